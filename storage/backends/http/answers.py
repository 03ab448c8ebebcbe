"""What an answer says about the file: its size, its identity, its coding."""

from __future__ import annotations

import re
from collections.abc import Mapping

from storage.backends.base import ObjectInfo
from storage.backends.http.body import CODINGS
from storage.backends.http.headers import (
    content_coding,
    digests,
    disposition_name,
    hint,
    kept_coding,
    last_part,
    metadata,
    validators,
)
from storage.errors import UnsupportedOperation, one_line

__all__ = [
    "coding_to_undo",
    "describe",
    "difference",
    "instead_of_file",
    "is_page",
    "page_instead_of_file",
]

# What servers, and what stands before them, say errors in.
_DOCUMENTS = ("text/html", "application/xhtml+xml", "application/xml", "text/xml", "text/plain")
_JSON = ("application/json", "application/problem+json")
_PAGE_NAMES = (".html", ".htm", ".xhtml", ".php", ".asp", ".aspx", ".jsp")


def coding_to_undo(key: str, headers: Mapping[str, str], where: str) -> str:
    """Return the content coding that has to be undone; empty if the bytes stay as they come.

    Raises:
        UnsupportedOperation: nobody here can undo it.
    """
    if kept_coding(headers, last_part(key), disposition_name(headers)):
        return ""
    coding = content_coding(headers)
    if coding not in CODINGS:
        raise UnsupportedOperation(
            f"{where}: the server sends it in the content coding {coding[:40]!r}, although none "
            f"was asked for; understood are {', '.join(CODINGS)}"
        )
    return coding


def describe(
    key: str,
    headers: Mapping[str, str],
    coding: str,
    size: int | None,
    *,
    ranged: bool,
    whole: bool,
) -> ObjectInfo:
    """Return what an answer says.

    Args:
        key: of the file.
        headers: of the answer.
        coding: the content coding that will be undone; sizes and digests are then about bytes
            that nobody gets to see.
        size: of the whole file as it is stored.
        ranged: whether the server serves ranges of it.
        whole: whether the answer's body is, or for HEAD would be, all of it.
    """
    etag, modified, version = validators(headers)
    return ObjectInfo(
        key,
        None if coding else size,
        etag,
        version,
        modified,
        headers.get("Content-Type"),
        () if coding else digests(headers, whole=whole),
        None if coding else hint(headers),
        metadata(headers),
        ranged and not coding and bool(size) and (version or _strong(etag)) is not None,
        # The name in the URL is known before anything is asked, and so it goes first; but
        # "download?id=3" says less than what the server calls the file.
        None if "." in last_part(key) else disposition_name(headers),
    )


def _strong(etag: str | None) -> str | None:
    return None if etag is None or etag.startswith("W/") else etag


def is_page(headers: Mapping[str, str]) -> bool:
    """Tell whether the body is a web page."""
    return _kind(headers.get("Content-Type")) in ("text/html", "application/xhtml+xml")


def _kind(content_type: str | None) -> str:
    return (content_type or "").split(";")[0].strip().lower()


def instead_of_file(info: ObjectInfo, pin: ObjectInfo) -> bool:
    """Tell whether an answer with status 200 is a document about an error, and not the file.

    It has nothing that identifies it, though the file has, and is of another size and type.
    """
    return (
        info.etag is None
        and info.modified is None
        and info.size != pin.size
        and _kind(info.content_type) != _kind(pin.content_type)
        and _kind(info.content_type) in (*_DOCUMENTS, *_JSON)
    )


def difference(pin: ObjectInfo, info: ObjectInfo) -> str:
    """Return in which way an answer is not about the file that ``pin`` describes."""
    for name, mine, theirs in (
        ("size", pin.size, info.size),
        ("ETag", pin.etag, info.etag),
        ("Last-Modified", pin.version, info.version),
        ("Last-Modified", pin.modified, info.modified),
    ):
        if None not in (mine, theirs) and mine != theirs:
            return one_line(f"its {name} was {mine} and is {theirs} now", 160)
    return "it says something else of itself"


def page_instead_of_file(key: str, headers: Mapping[str, str]) -> bool:
    """Tell whether a web page came where the key names another kind of file."""
    ending = re.search(r"\.[A-Za-z0-9_]{1,12}$", last_part(key))
    return is_page(headers) and ending is not None and ending[0].lower() not in _PAGE_NAMES
