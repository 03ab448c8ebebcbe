"""Every error that this library raises, drawn once.

::

    RuntimeError
    ├── StorageError                    anything that went wrong in a store or on the way
    │   ├── ModelMissingError           no such object or tree        (FileNotFoundError)
    │   │   └── BucketMissingError      not even the bucket
    │   ├── AuthenticationError         the store refused who we are  (PermissionError)
    │   ├── IntegrityError              the bytes are not the ones expected
    │   ├── SignatureError              a signature is missing or does not verify
    │   ├── OfflineError                a store would be needed, but may not be asked
    │   ├── ConfigurationError          a setting, config or environment variable is unusable
    │   ├── UnsupportedOperation        this store or driver cannot do that
    │   │   └── UnsupportedScheme       no backend for the URI's scheme
    │   ├── InvalidInput                an argument is unusable       (ValueError)
    │   ├── ObjectExistsError           there already, and not to be overwritten (FileExistsError)
    │   ├── DestinationError            the local path cannot be written         (OSError)
    │   │   └── InsufficientSpaceError  ... because the disk is full
    │   └── TransferError               retries are spent
    │       ├── TransientError          one attempt failed in a way worth repeating
    │       │   └── UnreachableError    ... because nobody answers at that address
    │       ├── ObjectChangedError      the object was replaced while it was read
    │       └── MirrorError             not all objects of a mirror are in place
    └── InferenceError                  for model servers: a prediction failed
    Exception
    └── ModelNotFound                   for model servers: no model of that name

A message says what was asked, what was expected, what was found and what to do. It is one
line and holds no secret and no query string; :func:`redact` and :func:`one_line` see to it.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Self
from urllib.parse import quote, unquote

__all__ = [
    "AuthenticationError",
    "BucketMissingError",
    "ConfigurationError",
    "DestinationError",
    "InferenceError",
    "InsufficientSpaceError",
    "IntegrityError",
    "InvalidInput",
    "MirrorError",
    "ModelMissingError",
    "ModelNotFound",
    "ObjectChangedError",
    "ObjectExistsError",
    "OfflineError",
    "SignatureError",
    "StorageError",
    "TransferError",
    "TransientError",
    "UnreachableError",
    "UnsupportedOperation",
    "UnsupportedScheme",
    "conceal",
    "conceal_causes",
    "few",
    "one_line",
    "redact",
]

_FEW = 3

# A URL anywhere in a text: user information before the host and everything from the first
# "?" on may be a credential (SAS tokens and presigned URLs keep theirs in the query).
# What an Azure URI has there is the name of a container.
_USERINFO = re.compile(
    r"://(?!(?:(?<=\babfs://)|(?<=\babfss://))[a-z0-9$-]+@[a-z0-9]+\.(?:z[0-9]+\.)?(?:dfs|blob)\.)"
    r"[^/?#\s@]*@"
)
_WORD = re.compile(r"[^\s\"<>]+")
_PIN = re.compile(r"\?(?:versionId|generation)=[A-Za-z0-9._-]+$")
# What a request's headers look like when an SDK prints them.
_HEADER = re.compile(
    r"(?i)\b(authorization|x-amz-security-token|cookie|proxy-authorization|x-ms-copy-source"
    r"|sharedaccesssignature|accountkey|sig)(\"?\s*[:=]\s*)(\"?)(?:(?:bearer|basic)\s+)?[^\s,;\"']+"
)


# Credentials that this process uses, in the order in which they were met, and how many of them
# are remembered: tokens come and go. Shorter ones may be words.
_met: dict[str, None] = {}
_meeting = threading.Lock()
# The same, the longest first: one may be a part of another.
_concealed: tuple[str, ...] = ()
_MOST_CONCEALED = 500
_SHORTEST_CONCEALED = 8


def conceal(*secrets: str) -> None:
    """Let :func:`redact` leave ``secrets`` out wherever they turn up, quoted or not.

    What a store, a proxy or an SDK says back of a credential has no form by which it could be
    told from any other text. Of what holds credentials (a SAS, a connection string, the key of
    a service account) they alone are concealed, too.
    """
    global _concealed
    forms = {
        form
        for secret in secrets
        for part in _credentials_in(secret)
        # Variables may hold bytes that are no text.
        for form in (part, quote(part, safe="", errors="surrogatepass"), unquote(part))
        if len(form) >= _SHORTEST_CONCEALED
    }
    with _meeting:
        for form in forms:
            _met.pop(form, None)
            _met[form] = None
        while len(_met) > _MOST_CONCEALED:
            del _met[next(iter(_met))]
        _concealed = tuple(sorted(_met, key=len, reverse=True))


def _after_fork() -> None:
    # Whoever held it is not in the child.
    global _meeting
    _meeting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _credentials_in(secret: str) -> Iterator[str]:
    yield secret
    yield from re.findall(r"(?i)\b(?:sig|accountkey|sharedaccesssignature)=([^;&\s]+)", secret)
    if "PRIVATE KEY" in secret:
        yield from re.findall(r"[A-Za-z0-9+/=]{40,}", secret.replace("\\n", "\n"))


def redact(text: str) -> str:
    """Return ``text`` with what may be a credential in it replaced by ``…``.

    User information and queries of URLs go, the values of headers and fields that carry
    credentials, and what :func:`conceal` was told. The pins ``?versionId=`` and
    ``?generation=`` stay: they identify an object.
    """
    for secret in _concealed:
        if secret in text:
            text = text.replace(secret, "…")
    text = _USERINFO.sub("://…@", text)
    text = _WORD.sub(_without_query, text)
    return _HEADER.sub(r"\1\2\3…", text)


class _RedactedError(Exception):
    """Stands for an exception of another library, in its words without the credentials."""


def conceal_causes(error: BaseException) -> None:
    """Let no cause of ``error`` tell a credential, for it is printed with its causes.

    Causes are exceptions of SDKs, which may hold requests and answers whole. One that tells
    nothing stays as it is; another one is replaced by its redacted text.
    """
    seen = set()
    left = [error]
    while left:
        found = left.pop()
        seen.add(id(found))
        for name in ("__cause__", "__context__"):
            below = getattr(found, name)
            if below is None or id(below) in seen:
                continue
            text = "\n".join(map(str, (below, below.args, vars(below))))
            if redact(text) != text:
                kind = type(below)
                stand_in = _RedactedError(
                    f"{kind.__module__}.{kind.__name__}: {redact(str(below))}"
                )
                stand_in.__cause__, stand_in.__context__ = below.__cause__, below.__context__
                suppressed = found.__suppress_context__
                for each in ("__cause__", "__context__"):
                    if getattr(found, each) is below:
                        setattr(found, each, stand_in.with_traceback(below.__traceback__))
                found.__suppress_context__ = suppressed
                below = stand_in
            left.append(below)


def _without_query(match: re.Match[str]) -> str:
    word = match.group(0)
    url = word.find("://")
    query = word.find("?", url)
    if url < 0 or query < 0 or (word.count("?") == 1 and _PIN.search(word, query)):
        return word
    return f"{word[:query]}?…"


def one_line(text: object, limit: int = 300) -> str:
    """Return ``text`` redacted, on one line, cut to ``limit`` characters."""
    line = " ".join(redact(str(text)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def few(items: Sequence[str]) -> str:
    """Return the first three of ``items``, and how many more there are."""
    shown = ", ".join(items[:_FEW])
    return shown if len(items) <= _FEW else f"{shown} and {len(items) - _FEW} more"


class StorageError(RuntimeError):
    """Base of everything that this library raises about a store or a transfer.

    It is a ``RuntimeError`` because that is what model servers catch around a download.
    """

    def __new__(cls, *_args: object, **_options: object) -> Self:
        """Make one without arguments, which ``__init__`` takes; for errors of the system, too."""
        # Whoever unpickles by ``cls.__new__(cls)``, as Dask's workers do, would find that of
        # RuntimeError first, which cannot make an OSError.
        return (OSError if issubclass(cls, OSError) else RuntimeError).__new__(cls)


class ModelMissingError(StorageError, FileNotFoundError):
    """Nothing is stored at ``path``: neither an object of that name nor anything below it."""

    def __init__(self, path: str, detail: str | None = None) -> None:
        """Keep the missing ``path`` (a URI or a local path) and an optional ``detail``."""
        # ``args`` are shown by repr() and by log handlers, so they hold no secret either.
        super().__init__(redact(path), detail)
        self.errno = errno.ENOENT
        self.path = redact(path)
        self.detail = detail

    def __str__(self) -> str:
        return self.detail or (
            f"no model at {self.path}: expected an object of that name or objects under "
            f"{self.path.rstrip('/')}/, found neither; check the spelling (`storage ls` lists)"
        )


class BucketMissingError(ModelMissingError):
    """The bucket, container or share that should hold ``path`` does not exist."""

    def __str__(self) -> str:
        return self.detail or (
            f"no bucket for {self.path}: the store says that the bucket or container does not "
            "exist; check its name, the region and the endpoint"
        )


class AuthenticationError(StorageError, PermissionError):
    """The store refused the credentials, or they do not permit the operation."""


class IntegrityError(StorageError):
    """Bytes arrived, but not the expected ones: wrong size or digest. Nothing is published."""


class SignatureError(StorageError):
    """A required signature is absent, or does not verify."""


class OfflineError(StorageError):
    """A store would have to be asked, but the call or the settings say offline."""


class ConfigurationError(StorageError):
    """A config, setting, environment variable or missing extra makes the store unusable."""


class UnsupportedOperation(StorageError):
    """The store, or the driver chosen for it, cannot do what was asked."""


class UnsupportedScheme(UnsupportedOperation):
    """No backend serves the URI's scheme."""


class InvalidInput(StorageError, ValueError):
    """An argument cannot be used; ``reason`` says which and why."""

    def __init__(self, reason: str) -> None:
        """Keep the ``reason``."""
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class ObjectExistsError(StorageError, FileExistsError):
    """Something is stored there already and the call may not overwrite it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class DestinationError(StorageError, OSError):
    """The local destination cannot be created or written."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InsufficientSpaceError(DestinationError):
    """The destination's file system has no room for the model; ``errno`` is ``ENOSPC``."""

    def __init__(self, message: str) -> None:
        """Keep the ``message``."""
        super().__init__(message)
        self.errno = errno.ENOSPC


class TransferError(StorageError):
    """The transfer failed, and repeating it did not help (or could not have)."""


class TransientError(TransferError):
    """One attempt failed in a way that is worth repeating.

    Backends raise it; the transfer layer repeats the attempt and turns the last one into a
    plain :class:`TransferError`.
    """

    def __init__(
        self,
        message: str,
        retry_after: float | None = None,
        *,
        throttled: bool = False,
        stalled: bool = False,
    ) -> None:
        """Keep what is known of the failure.

        Args:
            message: what happened.
            retry_after: seconds that the store asked to wait (``Retry-After``), if it did.
            throttled: whether the store says that it is asked too often (429, ``SlowDown``,
                ``ServerBusy``): then nobody comes back at once, whatever was not said.
            stalled: whether the connection was there and nothing came over it for too long.
        """
        super().__init__(message)
        self.retry_after = retry_after
        self.throttled = throttled
        self.stalled = stalled
        self.spent = False
        """Whether it was repeated already, as often as the policy allows."""


class UnreachableError(TransientError):
    """Nobody answers at the store's address: no route, no name, connection refused."""


class ObjectChangedError(TransferError):
    """The object is no longer the one that the read was pinned to."""


class MirrorError(TransferError):
    """Not all objects of a mirror are in place; ``result`` says which failed, and why."""

    def __init__(self, message: str, result: object = None) -> None:
        """Keep the ``message`` and the ``result``, a :class:`storage.MirrorResult`."""
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        return str(self.args[0])


class ModelNotFound(Exception):
    """A model server was asked for a model that it does not have."""

    def __init__(self, model_name: str | None = None) -> None:
        """Keep the ``model_name``."""
        super().__init__(model_name)
        self.model_name = model_name
        self.reason = f"Model with name {model_name} does not exist."

    def __str__(self) -> str:
        return self.reason


class InferenceError(RuntimeError):
    """A model failed to predict."""

    def __init__(
        self, reason: str, status: str | None = None, debug_details: str | None = None
    ) -> None:
        """Keep the ``reason``, a ``status`` code and ``debug_details``."""
        super().__init__(reason, status, debug_details)
        self.reason = reason
        self.status = status
        self.debug_details = debug_details

    def __str__(self) -> str:
        return self.reason
