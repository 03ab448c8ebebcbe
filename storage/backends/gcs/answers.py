"""What Google Cloud Storage answers, in our words: objects, and errors of both its APIs."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from storage.backends.base import ObjectInfo, content_digests, md5_hint
from storage.backends.drivers.fsspec_errors import THROTTLED, Kind, classify, error, retry_after
from storage.backends.drivers.fsspec_parts import moment
from storage.digest import Digest, available
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
    UnsupportedOperation,
)

__all__ = [
    "PAGE",
    "checksums",
    "damage",
    "encoded",
    "from_answer",
    "from_code",
    "info_of_headers",
    "info_of_resource",
    "page_of",
    "removal",
    "rewrite",
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
    # Damaged on the way.
    "BadDigest": TransientError,
    "InvalidDigest": TransientError,
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
    405: UnsupportedOperation,
    407: AuthenticationError,
    408: TransientError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    429: TransientError,
    501: UnsupportedOperation,
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
_DAMAGED = re.compile(r"\bProvided (?:MD5|CRC32C)\b.*\bdoesn't match\b", re.IGNORECASE)
# Both as codes of the XML API and as reasons of the JSON API, which may say so with a 403.
_THROTTLING = ("SlowDown", "TooManyRequests", "rateLimitExceeded", "userRateLimitExceeded")


def said(where: str, body: bytes) -> dict[str, Any]:
    """Return the JSON object that a success of the JSON API consists of.

    Raises:
        TransientError: it is something else: a part of one, an error, or what a proxy answers
            in the store's name.
    """
    found = None
    with suppress(ValueError):
        found = json.loads(body)
    if not isinstance(found, dict) or "error" in found:
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
        if isinstance(problem, str):
            message = problem
        else:
            message = str(problem.get("message", ""))
            reasons = [str(one.get("reason")) for one in problem.get("errors") or ()]
            code = next((reason for reason in reasons if reason in _THROTTLING), "")
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
        missing: what a 404 means that does not say what is missing, and a 410 if that passes.
    """
    summary = f"{code or status}: {message}" if message else code or str(status)
    kind = _CODES.get(code)
    if kind is None and status == 404:
        kind = BucketMissingError if _NO_BUCKET.search(message) else missing
    if kind is None and status == 410 and missing is TransientError:
        # The session of an upload is over; of nothing else does the store say so.
        kind = missing
    if kind is None and status == 400 and _WITHOUT_PROJECT.search(message):
        kind = ConfigurationError
    throttled = status in THROTTLED or code in _THROTTLING
    if kind is None and (throttled or (status == 400 and _DAMAGED.search(message))):
        kind = TransientError
    if kind is None:
        kind = _STATUS.get(status, TransientError if status >= 500 else StorageError)
    if kind is ConfigurationError:
        return kind(
            f"{where}: the bucket's requests are paid by who asks; set requester_pays and "
            "project_id in the GCSConfig"
        )
    return error(kind, where, summary, retry_after(headers), throttled=throttled)


def info_of_resource(key: str, resource: Mapping[str, Any]) -> ObjectInfo:
    """Return what the JSON API says about an object.

    Its ``etag`` is left out: the XML API, by which objects are read, has another one for the
    same content, and the generation says as much.

    Raises:
        TransientError: it is no description of an object.
    """
    given = resource.get("metadata") or {}
    size = str(resource.get("size", ""))
    if not isinstance(given, dict) or not size.isdigit():
        raise TransientError(
            f"{key}: the store's description of it has no size; check the endpoint and the proxy"
        )
    metadata = {str(name).lower(): str(value) for name, value in given.items()}
    return ObjectInfo(
        key,
        int(size),
        version=_text(resource.get("generation")),
        modified=moment(resource.get("updated")),
        content_type=resource.get("contentType"),
        digests=(*content_digests(metadata), *checksums(resource)),
        metadata=metadata,
    )


PAGE = {
    "maxResults": "1000",
    "fields": "kind,nextPageToken,"
    "items(name,size,generation,updated,contentType,md5Hash,crc32c,metadata)",
}
"""What a listing by the JSON API asks for, beside the prefix and the page."""


def page_of(
    where: str, page: Mapping[str, Any], token: str | None
) -> tuple[list[ObjectInfo], str | None]:
    """Return the objects of one page of a listing, and where the next page begins, if any does.

    Args:
        where: the URI of what is listed.
        page: what the store answered.
        token: where this page begins; ``None`` for the first one.

    Raises:
        TransientError: it is no page of a listing.
        StorageError: the listing does not get on.
    """
    items = page.get("items") or ()
    following = page.get("nextPageToken") or None
    # Nothing at all is what the store itself says of nothing.
    known = page.get("kind", "storage#objects") == "storage#objects"
    if not known or not all(isinstance(item, dict) and item.get("name") for item in items):
        raise TransientError(
            f"{where}: the store's answer is no page of a listing; check the endpoint and the proxy"
        )
    if following is not None and following == token:
        raise StorageError(f"{where}: the store gives the same page of its listing again")
    infos = [info_of_resource(item["name"], item) for item in items]
    return [info for info in infos if info.size or not info.key.endswith("/")], following


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
        (
            *content_digests(metadata),
            *checksums({"md5Hash": hashes.get("md5"), "crc32c": hashes.get("crc32c")}),
        ),
        md5_hint(etag),
        metadata,
    )


def checksums(resource: Mapping[str, Any]) -> tuple[Digest, ...]:
    """Return the digests that the store keeps of an object, those that can be computed here.

    Objects that were composed of others, or uploaded in parts by the XML API, have no MD5.
    """
    found = []
    for algorithm, name in (("md5", "md5Hash"), ("crc32c", "crc32c")):
        with suppress(KeyError, TypeError, ValueError):  # that of base64 and ours among them
            digest = Digest(algorithm, base64.b64decode(resource[name] or "", validate=True).hex())
            if available(algorithm):
                found.append(digest)
    return tuple(found)


def removal(generation: str) -> dict[str, str]:
    """Return the query of a deletion that concerns one generation and no other."""
    return {"generation": generation, "ifGenerationMatch": generation}


def rewrite(
    where: str,
    ask: Callable[[Mapping[str, str]], Mapping[str, Any]],
    query: Mapping[str, str],
) -> None:
    """Have an object copied, in as many steps as the store takes for it.

    Args:
        where: the URI of what is copied.
        ask: does a step; told the query, it returns the store's answer.
        query: of every step.
    """
    while (answer := ask(query)).get("done") is not True:
        if not answer.get("rewriteToken"):
            raise TransientError(f"{where}: the store does not tell how the copy goes on")
        query = {**query, "rewriteToken": answer["rewriteToken"]}


def encoded(digest: Digest) -> str:
    """Return a digest as the store writes it."""
    return base64.b64encode(bytes.fromhex(digest.hex)).decode()


def damage(
    answer: Mapping[str, Any],
    resource: Mapping[str, Any],
    info: ObjectInfo,
    size: int,
    digest: Digest,
) -> str | None:
    """Return what is wrong with an object that was just stored, if something is.

    Args:
        answer: what the store says of it.
        resource: what was to be kept with it.
        info: the same, as we understand it.
        size: of what was sent.
        digest: of what was sent.
    """
    kept = next((one for one in info.digests if one.algorithm == digest.algorithm), digest)
    if info.size != size or kept != digest:
        return (
            f"{size} bytes with the {digest} were sent, and the store has {info.size} bytes with "
            f"the {kept}: they were damaged on the way"
        )
    metadata = {str(name).lower(): value for name, value in resource["metadata"].items()}
    content_type = answer.get("contentType", resource["contentType"])
    if (
        answer.get("name", info.key) != info.key
        or content_type != resource["contentType"]
        or not metadata.items() <= info.metadata.items()
    ):
        return "the store keeps another description than was sent: it was damaged on the way"
    return None


def _date(value: str | None) -> datetime | None:
    try:
        return moment(parsedate_to_datetime(value)) if value else None
    except ValueError:
        return None


def _text(value: Any) -> str | None:
    return str(value) if value else None
