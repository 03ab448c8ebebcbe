"""WebHDFS as its reference describes it, in this process: a name node, and a data node beside it.

There is no HDFS to be had. The name node is at 127.0.0.1, and leads to the data node at
``localhost`` for the bytes of a file, as a cluster does.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.servers.odd_http import OddHTTP, Reply, Request

USER, PASSWORD = "gateway-user", "s3cr3t-of-the-gateway"


class WebHDFS:
    """Files by absolute path.

    Attributes:
        files: content, number and time of modification (ms) by path.
        authorization: the header that the name node wants, if any.
        leaks: requests to the data node that brought a credential along.
        broken: whether the data node answers by errors.
    """

    def __init__(self, server: OddHTTP) -> None:
        """Answer for ``server``."""
        self.server = server
        self.files: dict[str, tuple[bytes, int, int]] = {}
        self.authorization: str | None = None
        self.leaks: list[str] = []
        self.broken = False
        self._number = 16_386
        server.handler = self.answer

    @property
    def uri(self) -> str:
        """URI of the root."""
        return f"webhdfs://{urlsplit(self.server.url).netloc}"

    def put(self, path: str, data: bytes) -> None:
        """Write a file, or another one in its place."""
        self._number += 1
        self.files[path] = (data, self._number, 1_770_000_000_000 + self._number)

    def opened(self) -> list[Request]:
        """Return the requests for bytes of files."""
        return [one for one in self.server.requests if "op=OPEN" in one.target]

    def answer(self, request: Request) -> Reply:
        """Answer one request."""
        parts = urlsplit(request.target)
        query = dict(parse_qsl(parts.query))
        path = unquote(parts.path).removeprefix("/webhdfs/v1").rstrip("/") or "/"
        if request.headers.get("Host", "").startswith("localhost"):
            return self._data_node(request, path, query)
        if self.authorization not in (None, request.headers.get("Authorization")):
            return _failed(401, "SecurityException", "Authentication required")
        inner = {one: facts for one, facts in self.files.items() if one.startswith(f"{path}/")}
        if path == "/":
            inner = dict(self.files)
        if path not in self.files and not inner:
            return _failed(404, "FileNotFoundException", f"File does not exist: {path}")
        if query["op"] == "GETFILESTATUS":
            return _json({"FileStatus": self._status(path, "")})
        if query["op"] == "LISTSTATUS":
            root = path.rstrip("/")
            names = sorted({one.removeprefix(f"{root}/").split("/")[0] for one in inner})
            found = [self._status(f"{root}/{name}", name) for name in names]
            if path in self.files:
                found = [self._status(path, "")]
            return _json({"FileStatuses": {"FileStatus": found}})
        assert query["op"] == "OPEN", query
        port = urlsplit(self.server.url).port
        place = f"http://localhost:{port}/webhdfs/v1{quote(path)}?{parts.query}"
        return Reply(307, headers={"Location": place})

    def _data_node(self, request: Request, path: str, query: dict[str, str]) -> Reply:
        if request.headers.get("Authorization") or request.headers.get("X-Ticket"):
            self.leaks.append(request.target)
        data = self.files[path][0]
        offset = int(query.get("offset", 0))
        part = data[offset : offset + int(query["length"])] if "length" in query else data[offset:]
        if self.broken:
            # As long as what was asked for, so that the length gives nothing away.
            return Reply(500, b"!" * len(part))
        return Reply(body=part)

    def _status(self, path: str, suffix: str) -> dict[str, Any]:
        if path not in self.files:
            return {"pathSuffix": suffix, "type": "DIRECTORY", "length": 0, "fileId": 1}
        data, number, moment = self.files[path]
        return {
            "pathSuffix": suffix,
            "type": "FILE",
            "length": len(data),
            "fileId": number,
            "modificationTime": moment,
        }


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _failed(status: int, exception: str, message: str) -> Reply:
    return _json({"RemoteException": {"exception": exception, "message": message}}, status)
