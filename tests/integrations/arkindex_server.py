"""A small Arkindex: the operations on versions of models, with their state, over HTTP.

It serves the OpenAPI document that its clients ask for, takes their token, checks what was
uploaded before a version becomes available, and refuses a second version of the same content
in one of the forms that its releases know. Not a byte of an archive passes it.

Uploads in parts are as its developers laid them down, in the issues 1926 to 1930 of
https://gitlab.teklia.com/arkindex/backend.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

import requests
from botocore.exceptions import ClientError

from tests.integrations.arkindex_store import Store

TOKEN = "ark-token-0123456789"
MODEL = "0e5a3c52-6c1f-4b51-9a0f-3f6a0b1f6a11"
OTHER_MODEL = "5b8a1f8e-1d7f-4d0c-8a64-0f2b6c0f9d22"

_ATTRIBUTES = ("tag", "description", "configuration", "parent")
_VALIDATION = ("state", "size", "hash", "archive_hash")
_MODEL_PATH = "/api/v1/model/{id}/versions/"
_VERSION_PATH = "/api/v1/modelversion/{id}/"
_OPERATIONS = {
    ("POST", _MODEL_PATH): "CreateModelVersion",
    ("GET", _VERSION_PATH): "RetrieveModelVersion",
    ("PUT", _VERSION_PATH): "UpdateModelVersion",
    ("PATCH", _VERSION_PATH): "PartialUpdateModelVersion",
    ("DELETE", _VERSION_PATH): "DestroyModelVersion",
    ("POST", "/api/v1/multipart/"): "CreateMultipartUpload",
    ("POST", "/api/v1/multipart/part/"): "CreateMultipartUploadPart",
    ("POST", "/api/v1/multipart/complete/"): "CompleteMultipartUpload",
    ("DELETE", "/api/v1/multipart/abort/"): "AbortMultipartUpload",
}
_ARCHIVE = ("size", "archive_hash")


class Asked(NamedTuple):
    """One request that came, and how it was answered."""

    operation: str
    id: str
    body: Any
    status: int


class Refusal(Exception):
    """An answer of 400 or more."""

    def __init__(self, status: int, content: Any) -> None:
        """Keep what is answered."""
        super().__init__(status, content)
        self.status, self.content = status, content


class Refused(Exception):
    """What a client raises for an answer of 400 or more; those of the real ones are like it."""

    def __init__(self, status_code: int, content: Any) -> None:
        """Keep the answer."""
        super().__init__(status_code, content)
        self.status_code, self.content = status_code, content


class PlainClient:
    """A client that repeats nothing, as little as can be."""

    def __init__(self, arkindex: Arkindex) -> None:
        """Ask ``arkindex``."""
        self._arkindex = arkindex

    def request(self, operation: str, id: str = "", body: Any = None) -> Any:
        """Ask for an operation."""
        method, path = self._arkindex.address(operation)
        answer = requests.request(
            method,
            self._arkindex.url.rstrip("/") + path.replace("{id}", id),
            json=body,
            headers={"Authorization": f"Token {TOKEN}"},
            timeout=180,
        )
        content = answer.json() if answer.content else None
        if answer.status_code >= 400:
            raise Refused(answer.status_code, content)
        return content


@dataclass
class Arkindex:
    """The server; a context manager. Its attributes may be set while it runs."""

    sign: Callable[[str], str | None]
    """Gives a URL to put the object of a key to."""

    stored: Callable[[str], bytes | None]
    """Gives the bytes at a key."""

    conflict: str = "id"
    """The form of a conflict: ``id``, ``version`` (the existing one) or ``existing_id``."""

    faults: dict[str, list[int | str]] = field(default_factory=dict)
    """For the next requests of an operation: a status; ``reset``; ``lost`` (done, then reset)."""

    missing: set[str] = field(default_factory=set)
    """Operations that this release does not have."""

    parts: Store | None = None
    """Takes archives in parts; ``None``: this release does not."""

    wants_archive: bool = False
    """Whether a version is made only with the size and the hash of its archive."""

    asked: list[Asked] = field(default_factory=list)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    """The ids of all versions that ever were, in order."""

    lost: list[str] = field(default_factory=list)
    """The versions that were available and are removed."""

    def __enter__(self) -> Self:
        """Listen on a free port."""
        this = self

        class Handler(_Handler):
            @property
            def arkindex(self) -> Arkindex:
                return this

        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def operations(self) -> list[str]:
        """The names of the operations that were asked for, in order."""
        return [one.operation for one in self.asked]

    def bodies(self, operation: str) -> list[Any]:
        """Return what came with an operation."""
        return [one.body for one in self.asked if one.operation == operation]

    @staticmethod
    def address(operation: str) -> tuple[str, str]:
        """Return the method and the path of an operation."""
        return next(where for where, name in _OPERATIONS.items() if name == operation)

    def document(self) -> dict[str, Any]:
        """Return what clients learn the operations from."""
        paths: dict[str, Any] = {}
        for (method, path), name in _OPERATIONS.items():
            if name in self.missing or (self.parts is None and "Multipart" in name):
                continue
            id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
            about: dict[str, Any] = {
                "operationId": name,
                "parameters": [id] if "{id}" in path else [],
                "responses": {"200": {"description": "done"}},
            }
            if method in ("POST", "PUT", "PATCH") or "Multipart" in name:
                schema = {"type": "object", "additionalProperties": True}
                about["requestBody"] = {"content": {"application/json": {"schema": schema}}}
            paths.setdefault(path, {})[method.lower()] = about
        return {
            "openapi": "3.0.0",
            "info": {"title": "Arkindex", "version": "1"},
            "servers": [{"url": self.url}],
            "paths": paths,
        }

    def answer(self, operation: str, id: str, body: Any) -> tuple[int, Any, bool]:
        """Do what is asked for; return status, content, and whether the answer arrives."""
        with self._lock:
            planned = self.faults.get(operation)
            fault = planned.pop(0) if planned else None
            if fault == "reset":
                self.asked.append(Asked(operation, id, body, 0))
                return 0, None, False
            try:
                if isinstance(fault, int):
                    raise Refusal(fault, {"detail": "It was planned so."})
                status, content = getattr(self, f"_{operation}")(id, body)
            except Refusal as refusal:
                status, content = refusal.status, refusal.content
            self.asked.append(Asked(operation, id, body, status))
            return status, content, fault != "lost"

    def _CreateModelVersion(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        if id not in (MODEL, OTHER_MODEL):
            raise Refusal(404, {"detail": "Not found."})
        self._check(id, None, body, (*_ATTRIBUTES, *_ARCHIVE))
        if self.wants_archive and (lacking := [name for name in _ARCHIVE if name not in body]):
            raise Refusal(400, {name: ["This field is required."] for name in lacking})
        version = {
            "id": str(uuid.uuid4()),
            "model_id": id,
            "state": "created",
            **dict.fromkeys(("tag", "parent", "hash", "archive_hash", "size"), None),
            "description": "",
            "configuration": {},
            **body,
        }
        self.versions[version["id"]] = version
        self.made.append(version["id"])
        return 201, self._shown(version)

    def _RetrieveModelVersion(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        return 200, self._shown(self._found(id))

    def _UpdateModelVersion(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        version = self._found(id)
        self._check(version["model_id"], id, body, (*_ATTRIBUTES, *_ARCHIVE))
        version.update(body)
        return 200, self._shown(version)

    def _PartialUpdateModelVersion(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        version = self._found(id)
        self._check(version["model_id"], id, body, (*_ATTRIBUTES, *_VALIDATION))
        if body.get("state") == "available":
            self._check_archive(version, body)
        version.update(body)
        return 200, self._shown(version)

    def _DestroyModelVersion(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        if self._found(id)["state"] == "available":
            self.lost.append(id)
        del self.versions[self._found(id)["id"]]
        return 204, None

    # -- uploads in parts ----------------------------------------------------------------------

    def _CreateMultipartUpload(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        store = self._multipart(id, body, {"checksum_algorithm"})
        return 201, {"upload_id": store.begin(id)}

    def _CreateMultipartUploadPart(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        known = {"upload_id", "checksum_algorithm", "part_number", "checksum", "md5_hash"}
        store = self._multipart(id, body, known)
        number = body.get("part_number")
        if not isinstance(number, int) or not 1 <= number <= 10_000:
            raise Refusal(400, {"part_number": ["A number from 1 to 10000 is wanted."]})
        return 201, {
            "url": store.sign_part(id, body["upload_id"], number, body.get("md5_hash")),
        }

    def _CompleteMultipartUpload(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        store = self._multipart(id, body, {"upload_id", "checksum_algorithm", "parts"})
        parts = sorted(body["parts"], key=lambda part: part["part_number"])
        if len({part["part_number"] for part in parts}) != len(parts):
            raise Refusal(400, {"parts": ["A number is there twice."]})
        if len({part.get("md5_hash") is None for part in parts}) > 1:
            raise Refusal(400, {"parts": ["All have an MD5, or none has."]})
        try:
            store.complete(
                id,
                body["upload_id"],
                [{"PartNumber": part["part_number"], "ETag": part["etag"]} for part in parts],
            )
        except ClientError as exc:
            self.versions[id]["state"] = "error"
            raise Refusal(400, {"detail": exc.response["Error"]["Message"]}) from exc
        size = store.server.head_raw(store.bucket, store.key(id))["ContentLength"]
        if size != self.versions[id]["size"]:
            self.versions[id]["state"] = "error"
            raise Refusal(400, {"size": [f"It has {size} bytes."]})
        self.versions[id]["state"] = "available"
        return 201, {}

    def _AbortMultipartUpload(self, id: str, body: Any) -> tuple[int, Any]:  # noqa: N802
        try:
            self._multipart(id, body, {"upload_id"}).abort(id, body["upload_id"])
        except ClientError as exc:
            raise Refusal(404, {"detail": exc.response["Error"]["Message"]}) from exc
        return 204, None

    def _multipart(self, id: str, body: Any, known: set[str]) -> Store:
        """Return the store, if the body of a request is as it has to be."""
        if self.parts is None:
            raise Refusal(404, {"detail": "Not found."})
        if wrong := body.keys() - known - {"object_type", "object_id"}:
            raise Refusal(400, {name: ["Unknown field."] for name in wrong})
        if body.get("object_type") != "model_version":
            raise Refusal(400, {"object_type": ["This server has no other objects."]})
        if "upload_id" in known and not body.get("upload_id"):
            raise Refusal(400, {"upload_id": ["This field is required."]})
        if body.get("checksum_algorithm") or body.get("checksum"):
            raise Refusal(400, {"checksum_algorithm": ["This server knows none."]})
        self._found(id)
        return self.parts

    def _found(self, id: str) -> dict[str, Any]:
        if id not in self.versions:
            raise Refusal(404, {"detail": "Not found."})
        return self.versions[id]

    def _check(self, model: str, id: str | None, body: Any, known: tuple[str, ...]) -> None:
        wrong = {name: ["Unknown field."] for name in body if name not in known}
        parent = body.get("parent")
        if parent is not None and parent not in self.versions:
            wrong["parent"] = [f'Invalid pk "{parent}" - object does not exist.']
        if wrong:
            raise Refusal(400, wrong)
        others = [v for v in self.versions.values() if v["model_id"] == model and v["id"] != id]
        if body.get("tag") and any(other["tag"] == body["tag"] for other in others):
            text = "A version for this model with this tag already exists."
            raise Refusal(400, {"non_field_errors": [text]})

    def _check_archive(self, version: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        if version["state"] == "available":
            raise Refusal(400, {"state": ["This version is available already."]})
        data = self.stored(version["id"])
        if data is None:
            raise Refusal(400, {"state": ["The archive was not uploaded."]})
        if body["size"] != len(data):
            raise Refusal(400, {"size": [f"It has {len(data)} bytes."]})
        if body["archive_hash"] != hashlib.md5(data).hexdigest():
            raise Refusal(400, {"archive_hash": ["It is another one."]})
        for other in self.versions.values():
            same = (other["model_id"], other["hash"]) == (version["model_id"], body["hash"])
            if same and other["state"] == "available":
                raise self._conflict(other)

    def _conflict(self, other: Mapping[str, Any]) -> Refusal:
        if self.conflict == "id":
            return Refusal(409, {"id": [other["id"]]})
        if self.conflict == "version":
            return Refusal(409, self._shown(other))
        error = {"attr": ["hash"], "code": "conflict", "detail": "It exists already."}
        return Refusal(409, {"type": "client_error", "errors": [error], "existing_id": other["id"]})

    def _shown(self, version: Mapping[str, Any]) -> dict[str, Any]:
        created = version["state"] == "created"
        return {**version, "s3_put_url": self.sign(version["id"]) if created else None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def arkindex(self) -> Arkindex:
        raise NotImplementedError

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/v1/openapi/":
            self._send(200, self.arkindex.document())
            return
        match = re.fullmatch(r"(/api/v1/model(?:version)?)/([^/]+)/(versions/)?", path)
        template = path if match is None else f"{match[1]}/{{id}}/{match[3] or ''}"
        operation = _OPERATIONS.get((self.command, template))
        if operation is None or operation in self.arkindex.missing:
            self._send(404, {"detail": "Not found."})
            return
        if self.headers.get("Authorization") != f"Token {TOKEN}":
            self._send(403, {"detail": "Authentication credentials were not provided."})
            return
        body = json.loads(raw) if raw else None
        id = match[2] if match is not None else str((body or {}).get("object_id"))
        status, content, arrives = self.arkindex.answer(operation, id, body)
        if arrives:
            self._send(status, content)
            return
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: Any) -> None:
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass
