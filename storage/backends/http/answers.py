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
    kept_coding,
    last_part,
    metadata,
    validators,
)
from storage.errors import UnsupportedOperation

__all__ = ["coding_to_undo", "describe", "is_page", "page_instead_of_file"]

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
        None,
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
    kind = headers.get("Content-Type", "").split(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml")


def page_instead_of_file(key: str, headers: Mapping[str, str]) -> bool:
    """Tell whether a web page came where the key names another kind of file."""
    ending = re.search(r"\.[A-Za-z0-9_]{1,12}$", last_part(key))
    return is_page(headers) and ending is not None and ending[0].lower() not in _PAGE_NAMES
