"""What ``requests`` and urllib3 raise, in our words, for the stores that are asked by them."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from storage.backends.drivers.fsspec_errors import Kind, error
from storage.errors import (
    ConfigurationError,
    StorageError,
    TransientError,
    UnreachableError,
)

__all__ = ["translated"]

# The first one that fits an exception counts; by class name, for the classes are in modules
# that are not imported for their exceptions' sake.
_NAMES: tuple[tuple[str, Kind], ...] = (
    ("requests.ProxyError", UnreachableError),
    ("requests.ConnectTimeout", UnreachableError),
    ("requests.Timeout", TransientError),
    ("requests.ConnectionError", TransientError),
    ("requests.ChunkedEncodingError", TransientError),
    ("requests.ContentDecodingError", TransientError),
    ("requests.InvalidURL", ConfigurationError),
    ("requests.InvalidSchema", ConfigurationError),
    ("requests.MissingSchema", ConfigurationError),
    ("requests.InvalidHeader", ConfigurationError),
    ("requests.RequestException", StorageError),
    ("urllib3.HTTPError", TransientError),
    ("builtins.UnicodeError", ConfigurationError),
)
_STALLED = {"requests.ReadTimeout", "urllib3.ReadTimeoutError"}
_UNREACHABLE = {"urllib3.NewConnectionError", "urllib3.ConnectTimeoutError"}
_TLS_SETTINGS = re.compile(
    r"WRONG_VERSION_NUMBER|HTTP_REQUEST|UNKNOWN_PROTOCOL|RECORD_LAYER|NO_START_LINE|NO_CERTIFICATE"
    r"|PEM|BAD_BASE64"
)


@contextmanager
def translated(where: str, store: str, address: str) -> Iterator[None]:
    """Turn what ``requests`` and urllib3 raise in the block into an error of ours.

    Its cause is the system's own error, if there is one: those around it repeat the address,
    which may be signed, and hold the request with its token.

    Args:
        where: the URI that is read or written.
        store: what is asked, for messages.
        address: what a user gave that says where it is, for messages.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:
        reasons = list(_reasons(exc))
        found = _classify(exc, reasons, where, store, address)
        if found is None:
            raise
        try:
            raise found from next((one for one in reasons if _is_of_the_system(one)), None)
        finally:
            found.__context__ = None


def _is_of_the_system(exc: BaseException) -> bool:
    return isinstance(exc, OSError) and not _lineage(exc) & {
        "requests.RequestException",
        "urllib3.HTTPError",
    }


def _classify(
    exc: Exception, reasons: list[BaseException], where: str, store: str, address: str
) -> StorageError | None:
    lineage = _lineage(exc)
    if "requests.SSLError" in lineage or "urllib3.SSLError" in lineage:
        return _tls(exc, reasons, where, store, address)
    for name, kind in _NAMES:
        if name in lineage:
            if any(_UNREACHABLE & _lineage(reason) for reason in reasons):
                kind = UnreachableError
            stalled = bool(_STALLED & {each for reason in reasons for each in _lineage(reason)})
            return error(kind, where, _summary(exc, reasons), stalled=stalled)
    return None


def _tls(
    exc: Exception, reasons: list[BaseException], where: str, store: str, address: str
) -> StorageError:
    if any(
        isinstance(one, ssl.SSLCertVerificationError) or type(one).__name__ == "CertificateError"
        for one in reasons
    ):
        return ConfigurationError(
            f"{where}: the TLS certificate of {store} is not trusted; name its authority in "
            "ca_bundle, REQUESTS_CA_BUNDLE or SSL_CERT_FILE"
        )
    said = " ".join(str(one) for one in reasons if isinstance(one, ssl.SSLError))
    if _TLS_SETTINGS.search(said):
        return ConfigurationError(
            f"{where}: no TLS with {store}: it does not speak it at that port, or the file of "
            f"authorities holds none; check {address}, ca_bundle, REQUESTS_CA_BUNDLE and "
            "SSL_CERT_FILE"
        )
    return error(TransientError, where, _summary(exc, reasons))


def _lineage(exc: BaseException) -> set[str]:
    return {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(exc).__mro__}


def _reasons(exc: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what urllib3 and requests wrapped in it."""
    seen: list[BaseException] = [exc]
    for current in seen:
        yield current
        if len(seen) > 8:
            return
        inner: list[Any] = [getattr(current, "reason", None), current.__cause__, *current.args]
        seen += [each for each in inner if isinstance(each, BaseException) and each not in seen]


def _summary(exc: BaseException, reasons: list[BaseException]) -> str:
    # Not str(exc): it holds the path and the query, which may be signed.
    for reason in reversed(reasons):
        if isinstance(reason, OSError) and reason.strerror:
            return f"{type(exc).__name__}: {reason.strerror}"
    return type(exc).__name__
