"""What the Hub answers and what ``requests`` raises, in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from storage.backends.drivers.fsspec_errors import THROTTLED, error, kind_of_status, retry_after
from storage.backends.drivers.requests_errors import translated as translated_for
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ModelMissingError,
    StorageError,
    TransientError,
    one_line,
)

__all__ = ["from_answer", "from_storage", "translated", "understood"]

_NAMELESS = "Invalid username or password"
# Codes of S3.
_DAMAGED = re.compile(r"<Code>(?:BadDigest|XAmzContentChecksumMismatch|XAmzContentSHA256Mismatch)<")
_RESET = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")


def from_answer(
    where: str,
    status: int,
    headers: Mapping[str, str],
    message: str = "",
    *,
    anonymous: bool = False,
    reading: bool = True,
) -> StorageError:
    """Return the error of ours for an error answer of the Hub or its content network.

    Args:
        where: the object's URI.
        status: of HTTP.
        headers: of the answer; names in any case, if the mapping does not care.
        message: what the Hub says in words.
        anonymous: whether the request brought no token.
        reading: whether it only asked for something.
    """
    code = headers.get("X-Error-Code", "")
    message = headers.get("X-Error-Message") or message
    # So the public Hub answers those who give no name, whatever it is that is not there.
    nameless = status == 401 and anonymous and reading and message.startswith(_NAMELESS)
    if code == "RepoNotFound" or (nameless and not code):
        who = "no token was sent" if anonymous else "the token's account may not see it"
        return BucketMissingError(
            where,
            f"{where}: the Hub shows no such repository; its name or type (datasets/, spaces/) "
            f"is wrong, or it is private and {who}; repositories are not made by an upload",
        )
    if code == "RevisionNotFound":
        return ModelMissingError(
            where, f"{where}: the repository has no branch, tag or commit of that name"
        )
    if code == "EntryNotFound":
        return ModelMissingError(where)
    if code == "GatedRepo":
        how = "send the token of an account that did" if anonymous else "or use another account"
        return AuthenticationError(
            f"{where}: the repository is gated; accept its terms on its page of the Hub, {how}"
        )
    if status in (401, 403):
        return _refused(where, status, message, anonymous)
    kind = kind_of_status(status)
    wait = _wait(headers) if issubclass(kind, TransientError) else None
    text = f"{status}: {message}" if message else str(status)
    return error(kind, where, text, wait, throttled=status in THROTTLED)


def from_storage(
    where: str,
    host: str,
    status: int,
    headers: Mapping[str, str],
    text: str = "",
    *,
    fresh: bool = False,
) -> StorageError:
    """Return the error of ours for an error answer of the storage that the Hub leads to.

    It knows nobody's account, only signed addresses, and these expire: where it refuses one,
    another attempt gets another one.

    Args:
        where: the object's URI.
        host: of the storage.
        status: of HTTP.
        headers: of the answer.
        text: its body; only looked at.
        fresh: whether the address cannot have expired, so that another one would be no better.
    """
    if status in (400, 401, 403, 404, 410):
        said = f"{where}: {one_line(host)} did not accept "
        if _DAMAGED.search(text):
            return TransientError(f"{said}the bytes ({status}): they were damaged on the way")
        said += (
            f"the address that the Hub gave ({status}); a proxy or a firewall may stand in the way"
        )
        if not fresh or "expired" in text.lower():
            return TransientError(said)
        return AuthenticationError(said) if status in (401, 403) else StorageError(said)
    # Its words are not the Hub's, and may repeat the address with its signature.
    kept = {"Retry-After": headers["Retry-After"]} if "Retry-After" in headers else {}
    return from_answer(where, status, kept)


@contextmanager
def understood(where: str) -> Iterator[None]:
    """Turn what happens when an answer is not made as the Hub makes it into an error of ours."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as exc:
        if isinstance(exc, StorageError):
            raise
        # What began as the Hub's answers do is one that was cut or damaged on the way.
        if str(getattr(exc, "doc", ""))[:1] in ("{", "["):
            raise TransientError(f"{where}: the Hub's answer is cut or damaged") from exc
        raise StorageError(
            f"{where}: the answer is not one of a Hub ({type(exc).__name__}); check the endpoint "
            "and the proxy"
        ) from exc


def _refused(where: str, status: int, message: str, anonymous: bool) -> AuthenticationError:
    said = f"{status}: {one_line(message)}" if message else str(status)
    if anonymous:
        return AuthenticationError(
            f"{where}: the Hub refused a request without a token ({said}); give one by "
            "HFConfig(token=…), HF_TOKEN or `hf auth login`"
        )
    return AuthenticationError(
        f"{where}: the Hub refused the token ({said}); check that it is valid and permits this "
        "operation"
    )


def _wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait."""
    found = retry_after({"retry-after": headers.get("Retry-After")})
    if found is None and (match := _RESET.search(headers.get("RateLimit", ""))):
        # '"api";r=0;t=55': nothing left of this allowance for 55 seconds.
        found = float(match.group(1))
    return found


def translated(where: str) -> AbstractContextManager[None]:
    """Turn what ``requests`` and urllib3 raise in the block into an error of ours."""
    return translated_for(where, "the Hub", "the endpoint")
