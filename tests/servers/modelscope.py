"""What ModelScope answers to its own client when that downloads a model, in this process.

There is no server of it to be had. The tests let the unmodified client download from this one,
so that it says nothing which that does not understand.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.servers.odd_http import OddHTTP, Reply, Request

TOKEN = "ms-t0ken-of-the-tests"
LARGE = 1024 * 1024
LISTED = 3000


class ModelScope:
    """Repositories by name and revision; the large files are on another origin (``localhost``).

    Attributes:
        models: files by ``owner/name`` and revision.
        private: names that want the token.
        leaks: requests to the other origin that brought the token along.
    """

    def __init__(self, server: OddHTTP) -> None:
        """Answer for ``server``."""
        self.server = server
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.leaks: list[str] = []
        self.served: dict[str, bytes] = {}
        server.handler = self.answer

    def answer(self, request: Request) -> Reply:
        """Answer one request."""
        parts = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        steps = parts.path.strip("/").split("/")
        if steps[0] == "large":
            return self._large(request, steps[1])
        if steps[:3] != ["api", "v1", "models"] or len(steps) < 5:
            return _failed(404, 10010205001, "no such address")
        name, action = "/".join(steps[3:5]), "/".join(steps[5:])
        allowed = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.models or (name in self.private and not allowed):
            return _failed(404, 10010205001, f"Repo {name} not exist")
        if action == "":
            return _data({"Name": name})
        files = self.models[name].get(query.get("Revision", "master"))
        if files is None:
            return _failed(404, 10010205002, "revision not exist")
        if action == "repo/files":
            return _listing(files, query)
        if action == "repo" and query.get("FilePath") in files:
            return self._file(request, query["FilePath"], files[query["FilePath"]])
        return _failed(404, 10010205003, "file not exist")

    def _file(self, request: Request, path: str, data: bytes) -> Reply:
        data = self.served.get(path, data)
        if len(data) < LARGE:
            return Reply(body=data)
        oid = hashlib.sha256(data).hexdigest()
        self.served[oid] = data
        port = urlsplit(self.server.url).port
        return Reply(302, headers={"Location": f"http://localhost:{port}/large/{oid}?sig=signed"})

    def _large(self, request: Request, oid: str) -> Reply:
        if request.headers.get("Authorization") or request.headers.get("Cookie"):
            self.leaks.append(request.target)
        data = self.served[oid]
        headers = {"X-Linked-ETag": f'"{oid}"'}
        if request.span is None:
            return Reply(body=data, headers=headers)
        first, last = request.span
        part = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        return Reply(206, part, headers)


def _listing(files: dict[str, bytes], query: dict[str, str]) -> Reply:
    root = query.get("Root", "").strip("/")
    below = {path: data for path, data in files.items() if not root or path.startswith(f"{root}/")}
    if root and not below:
        return _failed(404, 10010205004, "path not exist")
    folders = {path[:index] for path in below for index, char in enumerate(path) if char == "/"} - {
        root[:index] for index in range(len(root) + 1)
    }
    entries: list[dict[str, Any]] = [
        {"Path": path, "Name": path.rpartition("/")[2], "Type": "tree", "Size": 0, "Sha256": ""}
        for path in sorted(folders)
    ]
    entries += [
        {
            "Path": path,
            "Name": path.rpartition("/")[2],
            "Type": "blob",
            "Size": len(data),
            "Sha256": hashlib.sha256(data).hexdigest(),
            "IsLFS": len(data) >= LARGE,
        }
        for path, data in sorted(below.items())
    ]
    if query.get("Recursive") != "True":
        inner = f"{root}/" if root else ""
        entries = [entry for entry in entries if "/" not in entry["Path"].removeprefix(inner)]
    return _data({"Files": entries[:LISTED]})


def _data(data: Any) -> Reply:
    return _json(200, {"Code": 200, "Success": True, "Data": data, "Message": "success"})


def _failed(status: int, code: int, message: str) -> Reply:
    return _json(status, {"Code": code, "Success": False, "Data": None, "Message": message})


def _json(status: int, value: Any) -> Reply:
    body = json.dumps(value).encode()
    return Reply(status, body, {"Content-Type": "application/json; charset=utf-8"})
