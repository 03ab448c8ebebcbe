"""What Google Cloud Storage answers, in our words: objects, and errors of both its APIs."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from storage.backends.base import ObjectInfo, content_digests, md5_hint
from storage.backends.drivers.fsspec_errors import Kind, classify, error, retry_after
from storage.backends.drivers.fsspec_parts import moment
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnreachableError,
)

__all__ = [
    "from_answer",
    "from_code",
    "info_of_headers",
    "info_of_resource",
    "said",
    "translated",
]

# Of the XML API; the JSON API says the same by its status.
_CODES: dict[str, Kind] = {
    "AccessDenied": AuthenticationError,
    "AccountProblem": AuthenticationError,
    "AuthenticationRequired": AuthenticationError,
    "ExpiredToken": AuthenticationError,
    "InvalidSecurity": AuthenticationError,
    "SignatureDoesNotMatch": AuthenticationError,
    "InvalidBucketName": InvalidInput,
    "KeyTooLong": InvalidInput,
    "InvalidRange": ObjectChangedError,
    "PreconditionFailed": ObjectChangedError,
    "NoSuchBucket": BucketMissingError,
    "NoSuchKey": ModelMissingError,
    "InternalError": TransientError,
    "RequestTimeout": TransientError,
    "ServiceUnavailable": TransientError,
    "SlowDown": TransientError,
    "TooManyRequests": TransientError,
    "UserProjectMissing": ConfigurationError,
}
_STATUS: dict[int, Kind] = {
    304: ObjectChangedError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: ModelMissingError,
    407: AuthenticationError,
    408: TransientError,
    410: TransientError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    429: TransientError,
    507: InsufficientSpaceError,
}
_NAMES: dict[str, Kind] = {
    "aiohttp.ConnectionTimeoutError": UnreachableError,
    "aiohttp.InvalidURL": ConfigurationError,
    "builtins.TypeError": ConfigurationError,
    "builtins.ValueError": ConfigurationError,
}
_XML = {name: re.compile(rf"<{name}>([^<]*)</{name}>") for name in ("Code", "Message", "Details")}
_LONGEST_PROBLEM = 64 * 1024
# What the JSON API says in words only.
_NO_BUCKET = re.compile(r"\bbucket does not exist\b", re.IGNORECASE)
_WITHOUT_PROJECT = re.compile(r"\brequester pays\b", re.IGNORECASE)


def said(where: str, body: bytes) -> dict[str, Any]:
    """Return the JSON object that a success of the JSON API consists of.

    Raises:
        TransientError: it is something else, as of a proxy that answers in the store's name.
    """
    found = None
    with suppress(ValueError):
        found = json.loads(body)
    if not isinstance(found, dict):
        raise TransientError(
            f"{where}: a JSON object was expected of the store, {len(body)} bytes of something "
            "else came; check the endpoint and the proxy"
        )
    return found


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn whatever gcsfs or aiohttp raises in the block into an error of ours."""
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:
        raise classify(exc, where, _NAMES) from exc


def from_answer(
    where: str, status: int, headers: Mapping[str, str], body: bytes, missing: Kind
) -> StorageError:
    """Return the error of ours for an error answer of either API.

    Args:
        where: the object's URI.
        status: of HTTP.
        headers: of the answer.
        body: of the answer.
        missing: what a 404 means that does not say what is missing.
    """
    known = {name.lower(): value for name, value in headers.items()}
    if known.get("content-encoding") == "gzip":
        # Reads ask for it, and a proxy may take them at their word.
        with suppress(zlib.error):
            body = zlib.decompressobj(31).decompress(body, _LONGEST_PROBLEM)
    text = body.decode(errors="replace")
    code = message = ""
    try:
        problem = json.loads(text)["error"]
        message = problem if isinstance(problem, str) else str(problem.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message, details = (
            match.group(1) if (match := pattern.search(text)) else "" for pattern in _XML.values()
        )
        message = f"{message} {details}".strip()
    return from_code(where, code, status, message, known, missing)


def from_code(
    where: str,
    code: str,
    status: int,
    message: str,
    headers: Mapping[str, Any] | None = None,
    missing: Kind = ModelMissingError,
) -> StorageError:
    """Return the error of ours for an error answer.

    Args:
        where: the object's URI.
        code: the XML API's error code, if there is one.
        status: of HTTP.
        message: what the store says in words.
        headers: of the answer, names in lower case.
        missing: what a 404 means that does not say what is missing.
    """
    summary = f"{code or status}: {message}" if message else code or str(status)
    kind = _CODES.get(code)
    if kind is None and status == 404:
        kind = BucketMissingError if _NO_BUCKET.search(message) else missing
    if kind is None and status == 400 and _WITHOUT_PROJECT.search(message):
        kind = ConfigurationError
    if kind is None:
        kind = _STATUS.get(status, TransientError if status >= 500 else StorageError)
    if kind is ConfigurationError:
        return kind(
            f"{where}: the bucket's requests are paid by who asks; set requester_pays and "
            "project_id in the GCSConfig"
        )
    return error(kind, where, summary, retry_after(headers))


def info_of_resource(key: str, resource: Mapping[str, Any]) -> ObjectInfo:
    """Return what the JSON API says about an object.

    Its ``etag`` is left out: the XML API, by which objects are read, has another one for the
    same content, and the generation says as much.
    """
    metadata = {name.lower(): value for name, value in (resource.get("metadata") or {}).items()}
    return ObjectInfo(
        key,
        int(resource.get("size", 0)),
        version=_text(resource.get("generation")),
        modified=moment(resource.get("updated")),
        content_type=resource.get("contentType"),
        digests=_digests(metadata, resource.get("md5Hash")),
        metadata=metadata,
    )


def info_of_headers(key: str, headers: Mapping[str, str], size: int | None) -> ObjectInfo:
    """Return what the XML API says about an object of ``size`` in whole, names in lower case."""
    metadata = {
        name.removeprefix("x-goog-meta-"): value
        for name, value in headers.items()
        if name.startswith("x-goog-meta-")
    }
    hashes = dict(
        part.strip().partition("=")[::2] for part in headers.get("x-goog-hash", "").split(",")
    )
    etag = headers.get("etag")
    return ObjectInfo(
        key,
        size,
        etag,
        _text(headers.get("x-goog-generation")),
        _date(headers.get("last-modified")),
        headers.get("content-type"),
        _digests(metadata, hashes.get("md5")),
        md5_hint(etag),
        metadata,
    )


def _digests(metadata: Mapping[str, str], md5: str | None) -> tuple[Digest, ...]:
    digests = content_digests(metadata)
    if not md5:
        # Objects composed of others have none.
        return digests
    try:
        return (*digests, Digest("md5", base64.b64decode(md5, validate=True).hex()))
    except (binascii.Error, InvalidInput):
        return digests


def _date(value: str | None) -> datetime | None:
    try:
        return moment(parsedate_to_datetime(value)) if value else None
    except ValueError:
        return None


def _text(value: Any) -> str | None:
    return str(value) if value else None
