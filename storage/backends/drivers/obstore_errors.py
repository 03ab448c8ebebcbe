"""What obstore raises, in our words.

obstore gives HTTP answers and broken connections as one exception with a long text, so the
text is read; but only its debug form, in which names and bodies are quoted and escaped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
    one_line,
)

__all__ = ["Classify", "check_headers", "fits_header", "translated"]

# Both are read from the debug form of an error, where names and bodies are quoted and escaped:
# a key cannot pretend to be a status.
_STATUS = re.compile(r"\bStatus \{\s*\n\s*status: (\d{3})")
_KIND = re.compile(r"\bHttpError \{\s*\n\s*kind: (\w+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
# Other requests are at the same key, and nobody has won yet; obstore takes any 409 for a loss.
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>|\"message\":\s*\"([^\"]*)\"")

Classify = Callable[[str, str, int, str], StorageError]
"""Says what an error answer means: (URI, error code or "", HTTP status, message) → error."""


def fits_header(name: str, value: str) -> bool:
    """Tell whether a header can hold this without a change."""
    plain = value == value.strip() and not re.search(r"[\x00-\x1f\x7f]", value)
    return plain and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) is not None


def check_headers(where: str, attributes: Mapping[str, str]) -> None:
    """Raise ``InvalidInput`` for what no header can hold.

    obstore would panic, and a panic goes past every handler of exceptions.
    """
    for name, value in attributes.items():
        if not fits_header(name, value):
            raise InvalidInput(
                f"{where}: {name!r} with the value {value!r} cannot be kept with it; a name is of "
                "letters, digits and -_., a value has no control characters and no spaces at "
                "its ends"
            )


@contextmanager
def translated(where: str, classify: Classify) -> Iterator[None]:
    """Turn what obstore raises in the block into an error of ours about ``where``."""
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:
        error = _error_for(exc, where, classify)
        if error is None:
            raise
        raise error from exc


def _error_for(exc: Exception, where: str, classify: Classify) -> StorageError | None:
    from obstore import exceptions

    text = str(exc)
    head, _, debug = text.partition("\n\nDebug source:")
    code = found.group(1) if (found := _CODE.search(head)) else ""
    if isinstance(exc, exceptions.AlreadyExistsError) and code not in _CONFLICTS:
        return ObjectExistsError(f"{where} exists already and is not to be overwritten")
    if isinstance(exc, exceptions.PreconditionError):
        return ObjectChangedError(f"{where} is no longer the version that was asked for")
    if isinstance(exc, exceptions.NotSupportedError):
        return UnsupportedOperation(f"{where}: the store cannot do that: {_last(head)}")
    if isinstance(exc, exceptions.InvalidPathError):
        return InvalidInput(f"{where}: a key cannot be expressed: {_last(head)}")
    if match := _STATUS.search(debug):
        message = found.group(1) or found.group(2) if (found := _MESSAGE.search(head)) else ""
        return classify(where, code, int(match.group(1)), message)
    if isinstance(exc, FileNotFoundError):
        return ModelMissingError(where)
    if isinstance(exc, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
        return AuthenticationError(f"{where}: access was refused: {_last(head)}")
    if isinstance(exc, exceptions.BaseError):
        return _unanswered(text, where, head)
    if isinstance(exc, (ConnectionError, TimeoutError)):
        return TransientError(f"{where}: {_last(head)}")
    if isinstance(exc, ValueError):
        return ConfigurationError(f"{where}: the store's settings are refused: {_last(head)}")
    return None


def _unanswered(text: str, where: str, head: str) -> StorageError:
    """Classify what went wrong below HTTP."""
    if "invalid peer certificate" in text or "InvalidCertificate(" in text:
        return ConfigurationError(
            f"{where}: the store's TLS certificate is not trusted; name its authority in "
            "ca_bundle, or SSL_CERT_FILE"
        )
    kind = match.group(1) if (match := _KIND.search(text)) else None
    if kind == "Connect":
        return UnreachableError(
            f"{where}: nobody answers at the store's address ({_last(head)}); check the "
            "endpoint, the network and the proxy"
        )
    if kind == "Timeout":
        return TransientError(f"{where}: nothing came for too long ({_last(head)})", stalled=True)
    return TransientError(f"{where}: {_last(head)}")


def _last(head: str) -> str:
    return one_line(head.rsplit(" - ", 1)[-1])
