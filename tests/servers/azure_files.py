"""The part of Azure Files' REST API that reads a share, in this process.

No emulator of it is to be had. Written after Microsoft's reference of the service (List
Directories and Files, Get File Properties, Get File); the unmodified SDK is its client. It checks
signatures by account key, service SAS and bearer tokens as the reference describes them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape, quoteattr

from tests.servers.odd_http import OddHTTP, Reply, Request

ACCOUNT = "filesaccount"
KEY = base64.b64encode(b"the key of an account in the tests").decode()
TOKEN = "a-bearer-token-of-the-tests"
_SIGNED = (
    *("content-encoding", "content-language", "content-length", "content-md5", "content-type"),
    *("date", "if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
)
_SAS = ("sp", "st", "se", "", "si", "sip", "spr", "sv", "rscc", "rscd", "rsce", "rscl", "rsct")
_MD5_LIMIT = 4 * 1024 * 1024


class AzureFiles:
    """Shares of one account.

    Attributes:
        shares: files by share and path; the folders are those that files are in.
        folders: more folders by share, without files.
        encodings: the stored ``Content-Encoding`` of files, by path.
        page: entries that one answer of a listing has at most.
        before: called with each request that is allowed; its answer goes before.
    """

    def __init__(self, server: OddHTTP) -> None:
        """Answer for ``server``."""
        self.server = server
        self.shares: dict[str, dict[str, bytes]] = {"models": {}}
        self.folders: dict[str, set[str]] = {}
        self.encodings: dict[str, str] = {}
        self.page = 5000
        self.before: Callable[[Request], Reply | None] = lambda request: None
        server.handler = self.answer

    @property
    def url(self) -> str:
        """URL of the file service, with the account in its path."""
        return f"{self.server.url}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        """As the portal shows it."""
        return f"AccountName={ACCOUNT};AccountKey={KEY};FileEndpoint={self.url};"

    def etag(self, share: str, path: str) -> str:
        """Return the entity tag of a file."""
        return f"0x8D{hashlib.sha1(self.shares[share][path]).hexdigest()[:12].upper()}"

    def answer(self, request: Request) -> Reply:
        """Answer one request."""
        parts = urlsplit(request.target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if not _allowed(request, parts.path, query):
            return _failed(403, "AuthenticationFailed", "the signature is not valid")
        if (reply := self.before(request)) is not None:
            return reply
        steps = [unquote(step) for step in parts.path.split("/")[1:]]
        if steps[0] != ACCOUNT or steps[1] not in self.shares:
            return _failed(404, "ShareNotFound", "the specified share does not exist")
        share, path = steps[1], "/".join(filter(None, steps[2:]))
        if query.get("restype") == "directory" and query.get("comp") == "list":
            return self._list(request, share, path, query)
        # The service does not tell upper and lower case apart.
        found = {name.lower(): name for name in self.shares[share]}.get(path.lower())
        if found is None:
            parent = path.rpartition("/")[0]
            code = "ResourceNotFound" if parent in self._folders(share) else "ParentNotFound"
            return _failed(404, code, "the specified resource does not exist")
        return self._file(request, share, found)

    def _folders(self, share: str) -> set[str]:
        paths = self.shares[share]
        inner = {path[:index] for path in paths for index, char in enumerate(path) if char == "/"}
        return {"", *inner, *self.folders.get(share, ())}

    def _list(self, request: Request, share: str, path: str, query: dict[str, str]) -> Reply:
        folders = self._folders(share)
        if path not in folders:
            return _failed(404, "ResourceNotFound", "the specified resource does not exist")
        prefix = f"{path}/" if path else ""
        names = sorted(
            {
                (one.removeprefix(prefix), kind)
                for kind, group in (("Directory", folders - {""}), ("File", self.shares[share]))
                for one in group
                if one.startswith(prefix) and "/" not in one.removeprefix(prefix)
            }
        )
        first = int(query.get("marker") or 0)
        entries = "".join(
            self._entry(share, prefix, *name) for name in names[first : first + self.page]
        )
        more = first + self.page if first + self.page < len(names) else ""
        body = (
            '<?xml version="1.0" encoding="utf-8"?>'
            f'<EnumerationResults ServiceEndpoint="{self.url}/" ShareName="{share}" '
            f"DirectoryPath={quoteattr(path)}><Entries>{entries}</Entries>"
            f"<NextMarker>{more}</NextMarker></EnumerationResults>"
        )
        return Reply(body=body.encode(), headers={"Content-Type": "application/xml"})

    def _entry(self, share: str, prefix: str, name: str, kind: str) -> str:
        facts = ""
        if kind == "File":
            path = prefix + name
            facts = (
                f"<Content-Length>{len(self.shares[share][path])}</Content-Length>"
                f"<Etag>{self.etag(share, path)}</Etag>"
                "<Last-Modified>Mon, 02 Feb 2026 10:00:00 GMT</Last-Modified>"
            )
        return f"<{kind}><Name>{escape(name)}</Name><Properties>{facts}</Properties></{kind}>"

    def _file(self, request: Request, share: str, path: str) -> Reply:
        data = self.shares[share][path]
        headers = {
            "ETag": f'"{self.etag(share, path)}"',
            "Last-Modified": format_datetime(datetime(2026, 2, 2, 10, tzinfo=UTC), usegmt=True),
            "Content-Type": "application/octet-stream",
            "x-ms-type": "File",
            "x-ms-version": request.headers.get("x-ms-version", ""),
            "Accept-Ranges": "bytes",
        }
        if path in self.encodings:
            headers["Content-Encoding"] = self.encodings[path]
        if request.method == "HEAD":
            return Reply(200, b"", headers, length=len(data))
        text = request.headers.get("x-ms-range") or request.headers.get("Range")
        if text is None:
            return Reply(200, data, headers)
        first, _, last = text.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        if not part:
            return _failed(416, "InvalidRange", "the range is not valid for this file")
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        if request.headers.get("x-ms-range-get-content-md5") == "true":
            if len(part) > _MD5_LIMIT:
                return _failed(400, "InvalidHeaderValue", "no MD5 of more than 4 MiB")
            headers["Content-MD5"] = base64.b64encode(hashlib.md5(part).digest()).decode()
        return Reply(206, part, headers)


def _allowed(request: Request, path: str, query: dict[str, str]) -> bool:
    given = request.headers.get("Authorization", "")
    if given == f"Bearer {TOKEN}":
        return request.headers.get("x-ms-file-request-intent") == "backup"
    if "sig" in query:
        share = path.split("/")[2]
        texts = [query.get(name, "") for name in _SAS]
        texts[3] = f"/file/{ACCOUNT}/{share}"
        return query["sig"] == _sign("\n".join(texts))
    return given == f"SharedKey {ACCOUNT}:{_sign(''.join(_to_sign(request, path, query)))}"


def _sign(text: str) -> str:
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    return base64.b64encode(digest).decode()


def _to_sign(request: Request, path: str, query: dict[str, str]) -> Iterator[str]:
    """Yield what a signature by key is of, as the reference of "Shared Key" has it."""
    yield f"{request.method}\n"
    for name in _SIGNED:
        value = request.headers.get(name, "")
        yield "\n" if name == "content-length" and value == "0" else f"{value}\n"
    fields = {name.lower(): value.strip() for name, value in request.headers.items()}
    for name in sorted(name for name in fields if name.startswith("x-ms-")):
        yield f"{name}:{fields[name]}\n"
    yield f"/{ACCOUNT}{path}"
    for name in sorted(query):
        yield f"\n{name.lower()}:{query[name]}"


def _failed(status: int, code: str, message: str) -> Reply:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    headers = {"x-ms-error-code": code, "Content-Type": "application/xml"}
    return Reply(status, body.encode(), headers)
