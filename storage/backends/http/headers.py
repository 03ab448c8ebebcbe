"""What the headers of an HTTP answer say: pure functions, no network."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import unquote

from storage.backends.base import content_digests, md5_hint
from storage.digest import Digest, available
from storage.errors import InvalidInput

__all__ = [
    "ContentRange",
    "Validators",
    "content_coding",
    "content_range",
    "digests",
    "disposition_name",
    "hint",
    "kept_coding",
    "last_part",
    "length",
    "metadata",
    "retry_after",
    "url_text",
    "validators",
]

Headers = Mapping[str, str]
"""Headers of an answer; looked up without regard to case."""

# RFC 9110 lets a time be a strong validator only if nothing can have changed within its second;
# a minute also covers the clocks of a cluster that are not quite the same.
_SETTLED = timedelta(seconds=60)
_NOT_IN_A_PATH = re.compile(r"[^A-Za-z0-9._~!$&'()*+,;=:@/%-]|%(?![0-9A-Fa-f]{2})")
_NOT_IN_A_QUERY = re.compile(r"[^A-Za-z0-9._~!$&'()*+,;=:@/?%-]|%(?![0-9A-Fa-f]{2})")
_USER_METADATA = re.compile(r"x-(?:amz|goog|ms)-meta-(.+)", re.IGNORECASE)
_DIGEST_FIELD = re.compile(r"\s*([A-Za-z0-9-]+)=(:?)([A-Za-z0-9+/=_-]+):?\s*")
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512", "sha": "sha1", "md5": "md5"}
_GZIP_NAMES = (".gz", ".gzip", ".svgz", ".taz", ".tgz")
_GZIP_TYPES = ("application/gzip", "application/x-gzip", "application/x-gunzip")
# Cheapest first among those that no attacker can forge.
_BEST_FIRST = ("blake3", "sha256", "sha512", "sha1", "md5", "crc64nvme", "crc32c")
_AMZ_CHECKSUMS = ("sha256", "sha1", "crc64nvme", "crc32c")


def url_text(text: str, *, query: bool = False) -> str:
    """Return a path (or a query) as it may be sent: what no URL may hold is percent-encoded.

    What is encoded already stays as it is; a ``%`` that begins no code becomes ``%25``.
    """
    return (_NOT_IN_A_QUERY if query else _NOT_IN_A_PATH).sub(
        lambda match: "".join(
            f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape")
        ),
        text,
    )


def last_part(path: str) -> str:
    """Return the file name in the path of a URL: decoded, and without any slash."""
    return re.split(r"[/\\]", unquote(path.rsplit("/", 1)[-1]))[-1]


class ContentRange(NamedTuple):
    """Which part of how many bytes."""

    start: int
    end: int
    """Offset after the last byte; equal to ``start`` in a refusal, which has no part."""
    total: int | None


def content_range(headers: Headers) -> ContentRange | None:
    """Return what ``Content-Range`` says, or ``None`` if it is absent or no range of bytes."""
    match = re.fullmatch(
        r"\s*bytes\s+(?:(\d+)-(\d+)|\*)/(?:(\d+)|\*)\s*",
        headers.get("Content-Range", ""),
        re.IGNORECASE,
    )
    if match is None:
        return None
    first, last, total = (None if group is None else int(group) for group in match.groups())
    if first is None or last is None:
        return ContentRange(0, 0, total)
    if last < first or (total is not None and last >= total):
        return None
    return ContentRange(first, last + 1, total)


def length(headers: Headers) -> int | None:
    """Return ``Content-Length``, or ``None`` if the body ends in another way."""
    text = headers.get("Content-Length", "").strip()
    if headers.get("Transfer-Encoding") or not re.fullmatch(r"[0-9]+", text):
        return None
    return int(text)


class Validators(NamedTuple):
    """What identifies the content of an answer."""

    etag: str | None
    modified: datetime | None
    version: str | None
    """The text of ``Last-Modified`` where that alone identifies the content."""


def validators(headers: Headers) -> Validators:
    """Return the validators of an answer."""
    etag = headers.get("ETag") or None
    if etag is not None and not re.fullmatch(r'(?:W/)?"[^"]*"', etag):
        # Servers that forget the quotes; nothing can be asked with it.
        etag = None
    text = headers.get("Last-Modified")
    modified = _date(text)
    version = None
    if modified is not None and (etag is None or etag.startswith("W/")):
        now = _date(headers.get("Date"))
        if now is not None and now - modified >= _SETTLED:
            version = text
    return Validators(etag, modified, version)


def _date(text: str | None) -> datetime | None:
    if not text:
        return None
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def retry_after(headers: Headers) -> float | None:
    """Return the seconds that ``Retry-After`` asks for, given as such or as a date."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    moment = _date(text)
    if moment is None:
        return None
    # By the server's clock, if it tells; ours may be wrong.
    now = _date(headers.get("Date")) or datetime.now(UTC)
    return max(0.0, (moment - now).total_seconds())


def kept_coding(headers: Headers, *names: str | None) -> bool:
    """Tell whether the body is to be stored as it comes, content coding included.

    It is where there is no coding, and where the file is a compressed one by its name or
    type: servers announce ``model.tar.gz`` as a tar file in the coding gzip. Any other coding
    belongs to the transport and has to be undone.
    """
    coding = content_coding(headers)
    if coding == "":
        return True
    if coding != "gzip":
        return False
    content_type = headers.get("Content-Type", "").split(";")[0].strip().lower()
    return content_type in _GZIP_TYPES or any(
        name.lower().endswith(_GZIP_NAMES) for name in names if name
    )


def content_coding(headers: Headers) -> str:
    """Return the content coding in lower case; empty if there is none."""
    codings = (one.strip().lower() for one in headers.get("Content-Encoding", "").split(","))
    text = ", ".join(one for one in codings if one not in ("", "identity"))
    return {"x-gzip": "gzip"}.get(text, text)


def metadata(headers: Headers) -> dict[str, str]:
    """Return the user metadata that an object store puts into its answers."""
    found = {}
    for name, value in headers.items():
        if match := _USER_METADATA.fullmatch(name):
            found[match[1].lower()] = value
    return found


def digests(headers: Headers, *, whole: bool) -> tuple[Digest, ...]:
    """Return the digests of the whole stored representation, best first.

    Args:
        headers: of the answer.
        whole: whether the answer's body (for HEAD: that of the same GET) is all of it; some
            headers are about the body and not about the object.
    """
    found: dict[str, Digest] = {}
    for algorithm, value in _claims(headers, whole):
        try:
            found.setdefault(algorithm, Digest(algorithm, value))
        except InvalidInput:
            continue
    for digest in content_digests(metadata(headers)):
        found.setdefault(digest.algorithm, digest)
    return tuple(found[name] for name in _BEST_FIRST if name in found and available(name))


def hint(headers: Headers) -> Digest | None:
    """Return the MD5 that the ETag most likely is, or ``None``.

    Only where an object store of S3's kind answered, and did not encrypt with a key that makes
    its ETag something else. Many other servers make ETags that look like an MD5 of the file and
    are one of its name, size or time.
    """
    if not any(name.lower().startswith("x-amz-") for name in headers):
        return None
    encryption = headers.get("x-amz-server-side-encryption", "")
    if encryption.startswith("aws:") or any(
        name.lower().startswith("x-amz-server-side-encryption-customer") for name in headers
    ):
        return None
    return md5_hint(headers.get("ETag"))


def _claims(headers: Headers, whole: bool) -> Iterator[tuple[str, str]]:
    fields = ["Repr-Digest", "Digest"]
    if whole:
        fields.append("Content-Digest")
    for field in fields:
        for part in headers.get(field, "").split(","):
            match = _DIGEST_FIELD.fullmatch(part)
            if match and match[1].lower() in _ALGORITHMS:
                yield _ALGORITHMS[match[1].lower()], _hex(match[3])
    for algorithm in ("sha256", "sha512", "sha1", "md5"):
        yield algorithm, headers.get(f"X-Checksum-{algorithm}", "").strip().lower()
    # The Hub's name for a large file is its SHA-256; a redirection to the file tells it.
    yield "sha256", headers.get("X-Linked-ETag", "").strip().strip('"')
    # Of a part that was uploaded on its own, S3 may tell that part's.
    if whole and headers.get("X-Amz-Checksum-Type", "").upper() != "COMPOSITE":
        for algorithm in _AMZ_CHECKSUMS:
            yield algorithm, _hex(headers.get(f"X-Amz-Checksum-{algorithm}", ""))
    yield "md5", _hex(headers.get("X-Ms-Blob-Content-MD5", ""))
    # Google's is of the stored bytes, which it may have decompressed for this answer.
    if headers.get("X-Goog-Stored-Content-Encoding", "identity") == "identity":
        for part in headers.get("X-Goog-Hash", "").split(","):
            name, _, value = part.strip().partition("=")
            if name in ("md5", "crc32c"):
                yield name, _hex(value)
    if whole:
        yield "md5", _hex(headers.get("Content-MD5", ""))


def _hex(text: str) -> str:
    try:
        return base64.b64decode(text.strip(), validate=True).hex()
    except (binascii.Error, ValueError):
        return ""


def disposition_name(headers: Headers) -> str | None:
    """Return the file name in ``Content-Disposition``: a bare name, or ``None``.

    ``filename*`` goes before ``filename``. Folders, drives and control characters in it are
    another machine's business and are cut off.
    """
    text = headers.get("Content-Disposition", "")
    name = None
    if match := re.search(
        r"filename\*\s*=\s*\"?(utf-8|iso-8859-1)'[^']*'([^;\"\s]+)", text, re.IGNORECASE
    ):
        with contextlib.suppress(UnicodeDecodeError):
            name = unquote(match[2], encoding=match[1], errors="strict")
    if name is None and (
        match := re.search(
            r"(?:^|[;\s])filename\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^;\s]+))", text, re.IGNORECASE
        )
    ):
        name = re.sub(r"\\(.)", r"\1", match[1]) if match[1] is not None else match[2]
        # Servers send UTF-8, which a header's text shows as Latin-1.
        with contextlib.suppress(UnicodeError):
            name = name.encode("latin-1").decode("utf-8")
    if name is None:
        return None
    name = re.split(r"[/\\:]", name)[-1].strip()
    if name in ("", ".", "..") or re.search(r"[\x00-\x1f\x7f]", name) or len(name.encode()) > 255:
        return None
    return name
