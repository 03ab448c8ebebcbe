"""The write side of the test Hub: large file storage, commits, repositories, references."""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.servers.hub.files import MismatchError
from tests.servers.hub.routes import Denied, identify
from tests.servers.hub.state import (
    LARGE,
    Change,
    Commit,
    CommitError,
    Entry,
    Repo,
    is_large,
    path_problem,
)
from tests.servers.hub.wire import Answer, Request, problem

if TYPE_CHECKING:
    from tests.servers.hub.server import Hub

__all__ = ["Uploads"]

_OID = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LFS_TYPE = "application/vnd.git-lfs+json"


@dataclass(slots=True)
class _Upload:
    """An object of large file storage on its way."""

    repo: Repo
    oid: str
    size: int
    part_size: int | None
    parts: dict[int, tuple[str, Path]] = field(default_factory=dict)

    def length(self, number: int) -> int:
        if self.part_size is None:
            return self.size
        return min(self.part_size, self.size - (number - 1) * self.part_size)


class Uploads:
    """Answers what writes."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._state = hub.state
        self._pending: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    @property
    def unfinished(self) -> list[str]:
        """Objects whose upload began and did not end."""
        with self._lock:
            return [upload.oid for upload in self._pending.values() if upload.parts]

    # -- large file storage ------------------------------------------------------------------

    def preupload(
        self, request: Request, kind: str, name: str, revision: str = "main", _: str = ""
    ) -> Answer:
        repo = self._hub.routes.repo(kind, name, request, write=True)
        commit = self._hub.routes.commit(repo, revision)
        files = []
        for asked in request.json()["files"]:
            path, size = asked["path"], asked["size"]
            sample = base64.b64decode(asked["sample"], validate=True)
            if len(sample) > 512 or len(sample) != min(size, len(sample)):
                return problem(400, "a sample is the first 512 bytes of a file")
            if trouble := path_problem(path):
                return problem(400, f"Invalid path {path!r}: {trouble}")
            large = is_large(path, size)
            entry = commit.files.get(path)
            files.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": entry.etag if entry is not None else None,
                }
            )
        return Answer.json({"files": files, "commitOid": commit.id})

    def lfs(self, request: Request, kind: str, name: str, parts: list[str]) -> Answer:
        repo = self._hub.routes.repo(kind, name, request, write=True)
        if request.method == "POST" and parts == ["objects", "batch"]:
            return self._batch(request, repo)
        if request.method == "POST" and parts == ["objects", "verify"]:
            return self._verify(request, repo)
        return problem(404, "Not found")

    def _batch(self, request: Request, repo: Repo) -> Answer:
        asked = request.json()
        if asked["operation"] != "upload" or asked.get("hash_algo", "sha256") != "sha256":
            return problem(422, "only uploads by sha256 are served")
        if _LFS_TYPE not in request.headers.get("accept", ""):
            return problem(406, f"expected Accept: {_LFS_TYPE}")
        transfers = asked.get("transfers") or ["basic"]
        objects = [self._one(repo, each, transfers) for each in asked["objects"]]
        multipart = any(
            "chunk_size" in each.get("actions", {}).get("upload", {}).get("header", {})
            for each in objects
        )
        transfer = "multipart" if multipart else "basic"
        answer = Answer.json({"transfer": transfer, "objects": objects})
        answer.headers["Content-Type"] = _LFS_TYPE
        return answer

    def _one(self, repo: Repo, asked: dict[str, Any], transfers: list[str]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if not _SHA256.fullmatch(oid) or not isinstance(size, int) or size <= 0:
            return answer | {"error": {"code": 422, "message": "an object has a sha256 and a size"}}
        if oid in repo.lfs:
            return answer
        blob = self._state.blobs.get(oid)
        if blob is not None and blob.size != size:
            return answer | {"error": {"code": 422, "message": "the size is another one"}}
        part_size = self._hub.part_size
        large = part_size is not None and size > part_size and "multipart" in transfers
        upload = _Upload(repo, oid, size, part_size if large else None)
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._pending[token] = upload
        base = f"{self._hub.cdn}/upload/{token}"
        signed = "?X-Amz-Signature=" + secrets.token_hex(8)
        action: dict[str, Any] = {"href": f"{base}/1{signed}", "expires_in": 3600}
        if upload.part_size is not None:
            count = -(-size // upload.part_size)
            header = {f"{number:05}": f"{base}/{number}{signed}" for number in range(1, count + 1)}
            action = {
                "href": f"{self._hub.url}/api/complete-multipart?upload={token}",
                "header": {"chunk_size": str(upload.part_size), **header},
            }
        prefix = "" if repo.type == "model" else f"{repo.type}s/"
        verify = f"{self._hub.url}/{prefix}{repo.id}.git/info/lfs/objects/verify"
        return answer | {"actions": {"upload": action, "verify": {"href": verify}}}

    def put(self, request: Request) -> Answer:
        """Take an object, or a part of one, at the storage's own origin."""
        _, token, number = request.parts
        with self._lock:
            upload = self._pending.get(token)
        if upload is None or "X-Amz-Signature" not in request.arguments:
            return Answer(403, body=b"<Error><Code>AccessDenied</Code></Error>")
        if "authorization" in request.headers:
            return Answer(400, body=b"<Error><Code>InvalidArgument</Code></Error>")
        if "content-length" not in request.headers:
            return Answer(411, body=b"<Error><Code>MissingContentLength</Code></Error>")
        part = int(number)
        path = self._state.blobs.receive(request.body())
        if path.stat().st_size != upload.length(part):
            path.unlink()
            return Answer(400, body=b"<Error><Code>EntityTooLarge</Code></Error>")
        if upload.part_size is not None:
            etag = f'"{secrets.token_hex(16)}"'
            with self._lock:
                upload.parts[part] = (etag, path)
            return Answer(200, {"ETag": etag})
        try:
            self._finish(token, upload, path)
        except MismatchError:
            # What S3 says of a signed checksum that does not fit.
            return Answer(400, body=b"<Error><Code>XAmzContentChecksumMismatch</Code></Error>")
        return Answer(200, {"ETag": f'"{upload.oid[:32]}"'})

    def complete(self, request: Request) -> Answer:
        """Join the parts of an object."""
        token = request.argument("upload") or ""
        with self._lock:
            upload = self._pending.get(token)
        if upload is None or upload.part_size is None:
            return problem(404, "no such upload")
        asked = request.json()
        count = -(-upload.size // upload.part_size)
        named = [(part["partNumber"], part["etag"]) for part in asked["parts"]]
        there = [(number, upload.parts.get(number, ("",))[0]) for number in range(1, count + 1)]
        if asked["oid"] != upload.oid or named != there:
            return problem(400, "the parts are not those that were uploaded")
        path = self._state.blobs.join(upload.parts[number][1] for number in range(1, count + 1))
        try:
            self._finish(token, upload, path)
        except MismatchError as exc:
            return problem(400, str(exc))
        return Answer.json({"success": True})

    def _finish(self, token: str, upload: _Upload, path: Path) -> None:
        # Whatever comes of it, nothing more can be added to it.
        with self._lock:
            self._pending.pop(token, None)
        self._state.blobs.adopt(path, upload.oid, upload.size)
        upload.repo.lfs.add(upload.oid)

    def _verify(self, request: Request, repo: Repo) -> Answer:
        asked = request.json()
        blob = self._state.blobs.get(asked["oid"])
        if blob is None or asked["oid"] not in repo.lfs or blob.size != asked["size"]:
            return problem(404, "the object is not there, or of another size")
        return Answer.json({"success": True})

    # -- commits -----------------------------------------------------------------------------

    def commit(
        self, request: Request, kind: str, name: str, revision: str = "main", _: str = ""
    ) -> Answer:
        repo = self._hub.routes.repo(kind, name, request, write=True)
        account = identify(self._state, request)
        assert account is not None
        if request.headers.get("content-type") != "application/x-ndjson":
            return problem(400, "a commit is sent as application/x-ndjson")
        lines = [json.loads(line) for line in request.data().splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            return problem(400, "a commit begins with a header that has a summary")
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and not _OID.fullmatch(parent):
            return problem(400, "parentCommit is not the id of a commit")
        try:
            with repo.lock:
                base = repo.find(revision)
                changes = [
                    self._change(repo, base, line["key"], line["value"]) for line in lines[1:]
                ]
                if not changes:
                    return problem(400, "a commit holds at least one operation")
                pull = request.argument("create_pr") == "1"
                commit = repo.commit(
                    changes,
                    header["summary"],
                    header.get("description", ""),
                    branch=revision,
                    parent=parent,
                    author=account.name,
                    pull=pull,
                )
        except CommitError as exc:
            return problem(exc.status, str(exc), exc.code)
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {
            "success": True,
            "commitOid": commit.id,
            "commitUrl": f"{self._hub.url}/{prefix}{repo.id}/commit/{commit.id}",
            "hookOutput": "",
        }
        if pull:
            number = len(repo.pulls)
            answer["pullRequestUrl"] = f"{self._hub.url}/{prefix}{repo.id}/discussions/{number}"
        return Answer.json(answer)

    def _change(self, repo: Repo, base: Commit | None, key: str, value: dict[str, Any]) -> Change:
        path = value["path"]
        if key == "file":
            return Change(path, self._regular(path, value))
        if key == "lfsFile":
            return Change(path, self._large(repo, path, value))
        if key == "deletedFile":
            return Change(path)
        if key == "deletedFolder":
            return Change(path, folder=True)
        if key == "copyFile":
            source = repo.find(value["srcRevision"]) if value.get("srcRevision") else base
            entry = source.files.get(value["srcPath"]) if source is not None else None
            if entry is None:
                raise CommitError(f"no file {value['srcPath']}", 404, "EntryNotFound")
            return Change(path, Entry(path, entry.sha256, entry.size, entry.git, entry.lfs))
        raise CommitError(f"unknown operation {key!r}")

    def _regular(self, path: str, value: dict[str, Any]) -> Entry:
        content = value["content"]
        if value.get("encoding") == "base64":
            try:
                data = base64.b64decode(content, validate=True)
            except binascii.Error as exc:
                raise CommitError(f"{path}: the content is not base64") from exc
        else:
            data = content.encode()
        if len(data) > LARGE:
            raise CommitError(f"{path} is larger than 10 MiB; use large file storage")
        if is_large(path, len(data)):
            raise CommitError(f"{path} belongs into large file storage by its name")
        return Entry.of(path, self._state.blobs.add(data), lfs=False)

    def _large(self, repo: Repo, path: str, value: dict[str, Any]) -> Entry:
        oid = value["oid"]
        blob = self._state.blobs.get(oid)
        if value.get("algo") != "sha256" or blob is None or oid not in repo.lfs:
            raise CommitError(f"{path}: LFS pointer pointed to a file that does not exist")
        if value.get("size", blob.size) != blob.size:
            raise CommitError(f"{path}: the object has {blob.size} bytes")
        return Entry.of(path, blob, lfs=True)

    # -- repositories and references ---------------------------------------------------------

    def create_repo(self, request: Request) -> Answer:
        account = identify(self._state, request)
        if account is None or not account.writes:
            raise Denied(problem(401, "Invalid username or password."))
        asked = request.json()
        owner = asked.get("organization") or account.name
        if owner not in (account.name, *account.orgs):
            return problem(403, f"You don't have the rights to create a repository under {owner}")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        kind = asked.get("type") or "model"
        name = f"{owner}/{asked['name']}"
        if (kind, name) in self._state.repos:
            return problem(409, f"You already created this {kind} repo")
        self._state.add_repo(Repo(kind, name, private))
        prefix = "" if kind == "model" else f"{kind}s/"
        return Answer.json({"url": f"{self._hub.url}/{prefix}{name}", "name": name, "id": name})

    def create_branch(
        self, request: Request, kind: str, name: str, branch: str, _: str = ""
    ) -> Answer:
        repo = self._hub.routes.repo(kind, name, request, write=True)
        start = (request.json() or {}).get("startingPoint") or "main"
        commit = self._hub.routes.commit(repo, start)
        if branch in repo.branches:
            return problem(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = commit.id
        return Answer.json({})

    def create_tag(
        self, request: Request, kind: str, name: str, revision: str = "main", _: str = ""
    ) -> Answer:
        repo = self._hub.routes.repo(kind, name, request, write=True)
        commit = self._hub.routes.commit(repo, revision)
        tag = request.json()["tag"]
        if tag in repo.tags:
            return problem(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = commit.id
        return Answer.json({})
