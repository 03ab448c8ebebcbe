"""What a registry's answers mean: errors, challenges, the bytes of a body.

Source: OCI Distribution Specification 1.1, and Docker's token authentication.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from storage.backends.drivers.fsspec_errors import THROTTLED, error, kind_of_status, retry_after
from storage.backends.drivers.requests_errors import translated as translated_for
from storage.backends.drivers.web import cut
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ModelMissingError,
    StorageError,
    TransientError,
    one_line,
)

if TYPE_CHECKING:
    import requests

__all__ = ["body", "content_start", "error_of", "scheme_of", "translated"]

_BLOCK = 256 * 1024
_SMALL = 64 * 1024


def translated(where: str) -> AbstractContextManager[None]:
    """Turn what ``requests`` and urllib3 raise in the block into an error of ours."""
    return translated_for(where, "the registry", "the host and the port")


def scheme_of(challenge: str) -> str:
    """Return the scheme that a ``WWW-Authenticate`` asks for, in lower case; the best of several.

    A registry that takes tokens may take passwords as well, and says so in one header.
    """
    schemes = [
        found.lower() for found in re.findall(r"(?:^|,\s*)([A-Za-z]+)\s+[A-Za-z]+=", challenge)
    ]
    for wanted in ("bearer", "basic"):
        if wanted in schemes or challenge.strip().lower() == wanted:
            return wanted
    return schemes[0] if schemes else ""


def error_of(
    response: requests.Response, where: str, *, who: str, own: bool = True
) -> StorageError:
    """Return the error of ours for an error answer, and free its connection.

    Args:
        response: the answer.
        where: the URI that it is about.
        who: as whom it was asked, for the message.
        own: whether it is the registry's own, and not one of a store that it led to.
    """
    status = response.status_code
    code, said = _told(response) if own else ("", "")
    response.close()
    text = f"{status}: {said}" if said else str(status)
    if not own and status in (400, 401, 403, 404, 410):
        # A store behind the registry knows signed addresses only, and these expire.
        return TransientError(
            f"{where}: the store that the registry led to did not accept the address ({status}); "
            "a proxy or a firewall may stand in the way"
        )
    if status in (401, 403):
        return AuthenticationError(
            f"{where}: the registry refused access {who} ({text}); check the name, log in by "
            "`docker login` or give credentials by OCIConfig"
        )
    if status == 404 and code == "NAME_UNKNOWN":
        return BucketMissingError(
            where,
            f"{where}: the registry has no such repository, or does not show it {who}; check its "
            "name and the credentials",
        )
    if status in (404, 410):
        return ModelMissingError(
            where, f"{where}: the registry has no such tag, digest or layer ({text})"
        )
    kind = kind_of_status(status)
    wait = None
    if issubclass(kind, TransientError):
        wait = retry_after({"retry-after": response.headers.get("Retry-After")})
    return error(kind, where, text, wait, throttled=status in THROTTLED)


def _told(response: requests.Response) -> tuple[str, str]:
    """Return the code and the words of a registry's error."""
    try:
        data: Any = json.loads(response.raw.read(_SMALL))
        first: Mapping[str, Any] = data["errors"][0]
        return str(first.get("code") or ""), one_line(first.get("message") or "", 160)
    except Exception:  # noqa: BLE001 -- the status says enough
        return "", ""


def content_start(response: requests.Response, where: str) -> int:
    """Return the offset of the first byte of a body; 0 if the range was ignored.

    Raises:
        TransientError: the answer is to another question.
    """
    if response.status_code != 206:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None:
        raise TransientError(f"{where}: the registry gave a part and did not say which one")
    return int(found.group(1))


def body(response: requests.Response, skip: int, length: int, where: str) -> Iterator[bytes]:
    """Yield ``length`` bytes of a body, after ``skip`` others.

    Raises:
        TransientError: it ends too early.
    """
    with translated(where):
        yield from cut(response.raw.stream(_BLOCK, decode_content=False), skip, length, where)
