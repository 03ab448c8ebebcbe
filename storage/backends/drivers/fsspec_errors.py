"""What an fsspec file system raises, in our words.

An exception is judged by its type, its status code, its ``errno`` and its reply code, never
by words in its message, and so are the exceptions that caused it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    InsufficientSpaceError,
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

__all__ = ["THROTTLED", "Kind", "causes", "classify", "error", "retry_after", "translated"]

Kind = type[StorageError]

THROTTLED = (429, 503)
"""Statuses by which a store says that it is asked too often."""

# By top-level package and class, so that no package is imported for its exceptions.
_NAMES: dict[str, Kind] = {
    "aiohttp.ClientConnectorCertificateError": ConfigurationError,
    "aiohttp.ClientConnectorError": UnreachableError,
    "aiohttp.ClientError": TransientError,
    "http.HTTPException": TransientError,
    "httpx.ConnectError": UnreachableError,
    "httpx.ConnectTimeout": UnreachableError,
    "httpx.InvalidURL": ConfigurationError,
    "httpx.TransportError": TransientError,
    "httpx.UnsupportedProtocol": ConfigurationError,
    "paramiko.AuthenticationException": AuthenticationError,
    "paramiko.BadHostKeyException": AuthenticationError,
    "paramiko.NoValidConnectionsError": UnreachableError,
    "paramiko.SSHException": TransientError,
    "requests.ConnectTimeout": UnreachableError,
    "requests.ConnectionError": TransientError,
    "requests.SSLError": ConfigurationError,
    "requests.Timeout": TransientError,
    "urllib3.HTTPError": TransientError,
    "webdav4.BadGatewayError": TransientError,
    "webdav4.ForbiddenOperation": AuthenticationError,
    "webdav4.InsufficientStorage": InsufficientSpaceError,
    "webdav4.ResourceAlreadyExists": ObjectExistsError,
    "webdav4.ResourceLocked": TransientError,
    "webdav4.ResourceNotFound": ModelMissingError,
    "xml.ParseError": TransientError,
}
_STATUS: dict[int, Kind] = {
    401: AuthenticationError,
    403: AuthenticationError,
    404: ModelMissingError,
    405: UnsupportedOperation,
    407: AuthenticationError,
    408: TransientError,
    410: ModelMissingError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    423: TransientError,
    425: TransientError,
    429: TransientError,
    501: UnsupportedOperation,
    507: InsufficientSpaceError,
}
_FTP_REPLY: dict[int, Kind] = {
    331: AuthenticationError,
    332: AuthenticationError,
    430: AuthenticationError,
    452: InsufficientSpaceError,
    502: UnsupportedOperation,
    504: UnsupportedOperation,
    530: AuthenticationError,
    532: AuthenticationError,
    550: ModelMissingError,
    552: InsufficientSpaceError,
    553: InvalidInput,
}
_ERRNO: dict[int, Kind] = {
    errno.ENOENT: ModelMissingError,
    errno.ENOTDIR: ModelMissingError,
    errno.EEXIST: ObjectExistsError,
    errno.EACCES: AuthenticationError,
    errno.EPERM: AuthenticationError,
    errno.EROFS: AuthenticationError,
    errno.ENOSPC: InsufficientSpaceError,
    errno.EDQUOT: InsufficientSpaceError,
    errno.ENAMETOOLONG: InvalidInput,
    errno.ENOSYS: UnsupportedOperation,
    errno.ENOTSUP: UnsupportedOperation,
    errno.EOPNOTSUPP: UnsupportedOperation,
    errno.ECONNREFUSED: UnreachableError,
    errno.EHOSTDOWN: UnreachableError,
    errno.EHOSTUNREACH: UnreachableError,
    errno.ENETDOWN: UnreachableError,
    errno.ENETUNREACH: UnreachableError,
    errno.EAGAIN: TransientError,
    errno.EBUSY: TransientError,
    errno.ECONNABORTED: TransientError,
    errno.ECONNRESET: TransientError,
    errno.EINTR: TransientError,
    errno.EIO: TransientError,
    errno.ENOTCONN: TransientError,
    errno.EPIPE: TransientError,
    errno.ESTALE: TransientError,
    errno.ETIMEDOUT: TransientError,
}
# The first one that fits counts.
_TYPES: tuple[tuple[type[BaseException], Kind], ...] = (
    (ssl.SSLCertVerificationError, ConfigurationError),
    (ssl.SSLError, TransientError),
    (socket.gaierror, UnreachableError),
    (ConnectionRefusedError, UnreachableError),
    (ConnectionError, TransientError),
    (TimeoutError, TransientError),
    (EOFError, TransientError),
    (FileNotFoundError, ModelMissingError),
    (NotADirectoryError, ModelMissingError),
    (FileExistsError, ObjectExistsError),
    (PermissionError, AuthenticationError),
    (NotImplementedError, UnsupportedOperation),
    (ImportError, ConfigurationError),
)
_SAYS: dict[Kind, str] = {
    AuthenticationError: "the store refused access ({}); check the credentials and that they "
    "permit this operation",
    ConfigurationError: "the store cannot be used with these settings ({}); check them",
    InsufficientSpaceError: "the store has no room ({}); free some space there",
    InvalidInput: "the store cannot hold this name ({}); use another one",
    ObjectChangedError: "no longer the version that was asked for ({})",
    ObjectExistsError: "exists already and is not to be overwritten ({})",
    TransientError: "the request failed ({})",
    UnreachableError: "nobody answers at the store's address ({}); check the address, the "
    "network and the proxy",
    UnsupportedOperation: "the store cannot do that ({})",
}
_DEPTH = 6


def classify(
    exc: BaseException, where: str, names: Mapping[str, Kind] | None = None
) -> StorageError:
    """Return the error of ours that says what ``exc`` means.

    Args:
        exc: what a file system raised.
        where: the object's URI, without anything secret.
        names: more kinds by ``package.Class``; they win over the ones known here.
    """
    for cause in causes(exc):
        if isinstance(cause, StorageError):
            return cause
        kind = _kind(cause, names or {})
        if kind is not None:
            return error(
                kind,
                where,
                _summary(cause),
                retry_after(_headers(cause)),
                throttled=_status(cause) in THROTTLED,
                stalled=kind is TransientError and "Timeout" in type(cause).__name__,
            )
    return error(StorageError, where, _summary(exc))


def error(
    kind: Kind,
    where: str,
    summary: str,
    wait: float | None = None,
    *,
    throttled: bool = False,
    stalled: bool = False,
) -> StorageError:
    """Return an error of ``kind`` about ``where``, in the words of that kind.

    Args:
        kind: its class.
        where: the object's URI.
        summary: what the store, or its client, said.
        wait: seconds that the store asked to wait.
        throttled: whether the store is asked too often; for what is worth repeating.
        stalled: whether nothing came for too long; for what is worth repeating.
    """
    if issubclass(kind, ModelMissingError):
        return kind(where)
    says = _SAYS.get(kind, "the store refused the request ({})").format(one_line(summary))
    if issubclass(kind, TransientError):
        return kind(f"{where}: {says}", wait, throttled=throttled, stalled=stalled)
    return kind(f"{where}: {says}")


@contextmanager
def translated(where: str, names: Mapping[str, Kind] | None = None) -> Iterator[None]:
    """Turn whatever a file system raises in the block into an error of ours."""
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:
        raise classify(exc, where, names) from exc


def retry_after(headers: Mapping[str, Any] | None) -> float | None:
    """Return the seconds that an answer's ``Retry-After`` asks to wait, if it does."""
    value = (headers or {}).get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(str(value))
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def kind_of_status(status: int) -> Kind:
    """Return the kind of error that the status of an HTTP answer is, from 400 on."""
    return _STATUS.get(status, TransientError if status >= 500 else StorageError)


def causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield an exception, what caused it, what caused that, and so on."""
    current: BaseException | None = exc
    for _ in range(_DEPTH):
        if current is None:
            return
        yield current
        if current.__cause__ is not None or current.__suppress_context__:
            current = current.__cause__
        else:
            current = current.__context__


def _kind(exc: BaseException, names: Mapping[str, Kind]) -> Kind | None:
    lineage = [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(exc).__mro__]
    for name in lineage:
        if name in names:
            return names[name]
    # An answer's status says more than the class that carries it.
    status = _status(exc)
    if status is not None and 400 <= status < 600:
        return kind_of_status(status)
    for name in lineage:
        if name in _NAMES:
            return _NAMES[name]
    if "ftplib.Error" in lineage:
        return _ftp_kind(exc)
    # Before errno: that of an SSLError is not the operating system's.
    for cls, kind in _TYPES:
        if isinstance(exc, cls):
            return kind
    return _ERRNO.get(exc.errno or 0) if isinstance(exc, OSError) else None


def _ftp_kind(exc: BaseException) -> Kind | None:
    # Every reply of the protocol starts with its code.
    code = str(exc)[:3]
    if not code.isdigit():
        return None
    other = TransientError if code.startswith("4") else StorageError
    return _FTP_REPLY.get(int(code), other)


def _status(exc: BaseException) -> int | None:
    for holder in (exc, getattr(exc, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _headers(exc: BaseException) -> Mapping[str, Any] | None:
    for holder in (exc, getattr(exc, "response", None)):
        headers = getattr(holder, "headers", None)
        if isinstance(headers, Mapping):
            return {str(name).lower(): value for name, value in headers.items()}
    return None


def _summary(exc: BaseException) -> str:
    name = type(exc).__name__
    text = str(exc)
    return f"{name}: {text}" if text else name
