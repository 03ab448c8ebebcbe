"""What Azure answers, and what its clients make of it, in our words."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from storage.backends.base import ByteRange, ObjectInfo, content_digests
from storage.backends.drivers import streams
from storage.backends.drivers.fsspec_errors import (
    THROTTLED,
    Kind,
    causes,
    classify,
    error,
    retry_after,
)
from storage.backends.drivers.obstore_errors import translated as obstore_translated
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
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

__all__ = [
    "by_obstore",
    "check_key",
    "classify_azure",
    "decoded_metadata",
    "described",
    "encoded_metadata",
    "extent",
    "from_code",
    "from_headers",
    "is_marker",
    "quoted",
    "translated",
]

_CODES: dict[str, Kind] = {
    "AccountBeingCreated": TransientError,
    "AccountIsDisabled": AuthenticationError,
    "AuthenticationFailed": AuthenticationError,
    "AuthorizationFailure": AuthenticationError,
    "AuthorizationPermissionMismatch": AuthenticationError,
    "AuthorizationProtocolMismatch": AuthenticationError,
    "AuthorizationResourceTypeMismatch": AuthenticationError,
    "AuthorizationServiceMismatch": AuthenticationError,
    "AuthorizationSourceIPMismatch": AuthenticationError,
    "BlobAlreadyExists": ObjectExistsError,
    "BlobArchived": StorageError,
    "BlobBeingRehydrated": StorageError,
    "BlobNotFound": ModelMissingError,
    "BlobOverwritten": ObjectChangedError,
    "CannotVerifyCopySource": AuthenticationError,
    "ConditionNotMet": ObjectChangedError,
    "ContainerBeingDeleted": TransientError,
    "ContainerDisabled": AuthenticationError,
    "ContainerNotFound": BucketMissingError,
    "CopyIdMismatch": TransientError,
    "IncorrectEndpoint": ConfigurationError,
    "InsufficientAccountPermissions": AuthenticationError,
    "InternalError": TransientError,
    "InvalidAuthenticationInfo": AuthenticationError,
    "InvalidBlobType": UnsupportedOperation,
    # Somebody committed other blocks of this blob meanwhile, and that dropped ours.
    "InvalidBlockList": TransientError,
    "InvalidRange": ObjectChangedError,
    "InvalidResourceName": InvalidInput,
    "InvalidUri": InvalidInput,
    "KeyBasedAuthenticationNotPermitted": AuthenticationError,
    "LeaseIdMissing": StorageError,
    "LeaseLost": StorageError,
    "Md5Mismatch": TransientError,
    "MetadataTooLarge": InvalidInput,
    "NoAuthenticationInformation": AuthenticationError,
    "NoPendingCopyOperation": TransientError,
    "OperationTimedOut": TransientError,
    "OutOfRangeInput": InvalidInput,
    "ParentNotFound": ModelMissingError,
    "PendingCopyOperation": TransientError,
    "PublicAccessNotPermitted": AuthenticationError,
    "RequestBodyTooLarge": UnsupportedOperation,
    "RequestUrlFailedToParse": InvalidInput,
    "ResourceNotFound": ModelMissingError,
    "ServerBusy": TransientError,
    "ShareBeingDeleted": TransientError,
    "ShareDisabled": AuthenticationError,
    "ShareNotFound": BucketMissingError,
    "SnapshotsPresent": StorageError,
    "SourceConditionNotMet": ObjectChangedError,
    "TargetConditionNotMet": ObjectChangedError,
    # Of a credential that may create and not replace; who did not ask to create only is told so.
    "UnauthorizedBlobOverwrite": ObjectExistsError,
    "UnsupportedHttpVerb": UnsupportedOperation,
}
_ADVICE = {
    "BlobArchived": "it is in the archive tier; rehydrate it first, then try again",
    "BlobBeingRehydrated": "it is on its way out of the archive tier; try again in some hours",
    "InvalidBlobOrBlock": "blocks that another tool left unfinished are in the way; upload it "
    "once in a single request, or wait a week until Azure drops them",
    "LeaseIdMissing": "somebody holds a lease on it; break the lease, or wait",
    "SnapshotsPresent": "it has snapshots; delete these first",
}
_STATUS: dict[int, Kind] = {
    400: StorageError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: ModelMissingError,
    405: UnsupportedOperation,
    408: TransientError,
    409: StorageError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    429: TransientError,
    501: UnsupportedOperation,
    507: InsufficientSpaceError,
}
_NAMES: dict[str, Kind] = {
    "azure.AzureSigningError": AuthenticationError,
    "azure.ClientAuthenticationError": AuthenticationError,
    "azure.DecodeError": TransientError,
    "azure.IncompleteReadError": TransientError,
    "azure.ServiceRequestTimeoutError": UnreachableError,
    "azure.ServiceResponseError": TransientError,
    "binascii.Error": AuthenticationError,
    # What the client makes of an answer that is not Azure's.
    "builtins.AttributeError": TransientError,
    "builtins.LookupError": TransientError,
    # URLs, keys and arguments that the client cannot make sense of.
    "builtins.TypeError": ConfigurationError,
    "builtins.ValueError": ConfigurationError,
}
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)")
# One of many that were to be deleted by one request.
_UNDELETED = re.compile(r'\bDeleteFailed \{[^}]*?\bcode: "(\d{3})",\s*reason: "([^"]*)"')
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_ALIASED = re.compile(r"\\|\.(?:/|$)")
_MARKERS = ("hdi_isfolder", "is_directory")


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn whatever azure-storage-blob or adlfs raises in the block into an error of ours."""
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:
        raise classify_azure(exc, where) from exc


@contextmanager
def by_obstore(where: str) -> Iterator[None]:
    """Turn what obstore raises in the block into an error of ours.

    obstore takes every 409 for "exists already" and every 412 for "changed". Azure says so by
    its error codes only.
    """
    with obstore_translated(where, from_code):
        try:
            yield
        except Exception as exc:
            head, _, debug = str(exc).partition("\n\nDebug source:")
            if match := _UNDELETED.search(debug):
                raise from_code(where, "", int(match.group(1)), match.group(2)) from exc
            code = match.group(1) if (match := _CODE.search(head)) else ""
            if type(exc).__name__ in ("AlreadyExistsError", "PreconditionError") and code:
                message = match.group(1) if (match := _MESSAGE.search(head)) else ""
                status = 409 if type(exc).__name__ == "AlreadyExistsError" else 412
                raise from_code(where, code, status, message) from exc
            raise


def classify_azure(exc: BaseException, where: str) -> StorageError:
    """Return the error of ours that says what ``exc`` means, about the object ``where``."""
    for cause in causes(exc):
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            headers = {
                str(k).lower(): v for k, v in (getattr(response, "headers", None) or {}).items()
            }
            text = str(getattr(cause, "message", None) or cause)
            code = headers.get("x-ms-error-code") or getattr(cause, "error_code", None) or ""
            code = str(getattr(code, "value", code))
            if match := _CODE.search(text):
                code = code or match.group(1)
            if match := _MESSAGE.search(text):
                text = match.group(1)
            return from_code(where, code, status, text, headers)
    return classify(exc, where, _NAMES)


def from_code(
    where: str,
    code: str,
    status: int,
    message: str,
    headers: Mapping[str, Any] | None = None,
) -> StorageError:
    """Return the error of ours for an error answer of Azure.

    Args:
        where: the object's URI.
        code: the answer's error code; empty where there was none.
        status: of HTTP.
        message: what the store says in words.
        headers: of the answer, names in lower case.
    """
    # The request's id and time follow in lines of their own.
    message = message.partition("\n")[0].strip()
    if code in _ADVICE:
        return StorageError(f"{where}: {one_line(message or code)}; {_ADVICE[code]}")
    if code in ("CannotVerifyCopySource", "CopySourceNotFound") and status == 404:
        return ModelMissingError(where)
    summary = f"{code or status}: {message}" if message else code or str(status)
    kind = _CODES.get(code)
    if kind is None:
        # A success of another kind than the request has: somebody else answered.
        passing = status >= 500 or 200 <= status < 300
        kind = _STATUS.get(status, TransientError if passing else StorageError)
    return error(
        kind,
        where,
        summary,
        retry_after(headers),
        throttled=status in THROTTLED or code == "ServerBusy",
    )


def check_key(where: str, key: str) -> None:
    """Refuse a key that Azure would store under another name.

    The service makes slashes of backslashes, resolves ``.`` and ``..`` however they are escaped,
    and drops the dots at the end of each segment, so a write would replace another blob.
    """
    if not key:
        raise ModelMissingError(where)
    if "\0" in key:
        raise InvalidInput(f"{where!r} holds a NUL character, which no store can")
    if _ALIASED.search(key):
        raise InvalidInput(
            f"{where}: Azure turns backslashes into slashes and drops the dots at the end of a "
            "part of a name, so this would be another blob; use a name without them"
        )


# --- what is said about a blob ---------------------------------------------------------------


def described(key: str, blob: Any) -> ObjectInfo:
    """Return what ``BlobProperties`` say about the blob ``key``."""
    metadata = decoded_metadata(blob.metadata or {})
    digests = content_digests(metadata)
    settings = blob.content_settings
    # Appending and writing pages leaves the MD5 of the time before.
    if settings.content_md5 is not None and _kind_of(blob) == "BlockBlob":
        with suppress(InvalidInput):
            digests = (*digests, Digest("md5", bytes(settings.content_md5).hex()))
    return ObjectInfo(
        key,
        blob.size,
        quoted(blob.etag),
        blob.version_id,
        blob.last_modified,
        settings.content_type,
        digests,
        None,
        metadata,
    )


def _kind_of(blob: Any) -> str:
    return str(getattr(blob.blob_type, "value", blob.blob_type))


def from_headers(key: str, headers: Mapping[str, str], size: int | None) -> ObjectInfo:
    """Return what the headers of a GET say about a blob of ``size`` in whole; names are lower."""
    from email.utils import parsedate_to_datetime

    prefix = "x-ms-meta-"
    metadata = decoded_metadata(
        {name[len(prefix) :]: value for name, value in headers.items() if name.startswith(prefix)}
    )
    digests = content_digests(metadata)
    # Of a part, Content-MD5 would be that part's.
    text = headers.get("x-ms-blob-content-md5")
    if text is None and "content-range" not in headers:
        text = headers.get("content-md5")
    if text and headers.get("x-ms-blob-type", "BlockBlob") == "BlockBlob":
        with suppress(binascii.Error, InvalidInput):
            digests = (*digests, Digest("md5", base64.b64decode(text, validate=True).hex()))
    modified = headers.get("last-modified")
    return ObjectInfo(
        key,
        size,
        quoted(headers.get("etag")),
        headers.get("x-ms-version-id"),
        parsedate_to_datetime(modified) if modified else None,
        headers.get("content-type"),
        digests,
        None,
        metadata,
    )


def is_marker(key: str, size: int | None, metadata: Mapping[str, str]) -> bool:
    """Tell whether a blob stands for a directory: ``a/``, or what Hadoop and adlfs leave."""
    return size == 0 and (
        key.endswith("/") or any(metadata.get(name, "").lower() == "true" for name in _MARKERS)
    )


def quoted(etag: str | None) -> str | None:
    """Return an entity tag with its quotes, which listings leave out."""
    return etag if etag is None or etag.endswith('"') else f'"{etag}"'


def extent(
    where: str, span: ByteRange | None, headers: Mapping[str, str]
) -> tuple[int | None, int | None]:
    """Return the blob's size and the length of the body, from the answer to a read.

    Raises:
        ObjectChangedError: the blob is too short for ``span``.
        TransientError: other bytes were sent than asked for.
    """
    length = int(headers.get("content-length", -1))
    found = headers.get("content-range", "")
    if span is not None and _RANGE.fullmatch(found) is None:
        # Azure always says what it sends; something on the way did not.
        raise TransientError(
            f"{where}: bytes {span.start}-{span.end - 1} were asked for and the store sent "
            f"{length} bytes from somewhere"
        )
    return streams.extent(where, span, length, found)


# --- metadata --------------------------------------------------------------------------------

# On Azure a name is a C# identifier and a value is printable ASCII. What other stores allow
# beyond that is written as .NET's XmlConvert writes names (model-owner: model_x002d_owner) and
# as RFC 2047 writes words, and read back the same way.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")
_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)")
_WORD = re.compile(r"=\?utf-8\?b\?([A-Za-z0-9+/=]*)\?=", re.IGNORECASE)


def encoded_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return user metadata as Azure can hold it, names in lower case."""
    return {
        _encoded_name(name.lower()): _encoded_value(value)
        for name, value in (metadata or {}).items()
        if name
    }


def _encoded_name(name: str) -> str:
    name = _ESCAPE.sub(lambda match: f"_x005f_{match.group(0)[1:]}", name)
    if _NAME.fullmatch(name):
        return name
    return "".join(
        char if _NAME.fullmatch(char if index == 0 else f"_{char}") else _escaped(char)
        for index, char in enumerate(name)
    )


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"_x{units[at : at + 2].hex()}_" for at in range(0, len(units), 2))


def _encoded_value(value: str) -> str:
    if _VALUE.fullmatch(value) and not _WORD.fullmatch(value):
        return value
    return f"=?UTF-8?B?{base64.b64encode(value.encode()).decode()}?="


def decoded_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return user metadata as it was before :func:`encoded_metadata`, names in lower case."""
    return {_decoded_name(name).lower(): _decoded_value(value) for name, value in metadata.items()}


def _decoded_name(name: str) -> str:
    units = _ESCAPE.sub(lambda match: chr(int(match.group(1), 16)), name)
    try:
        return units.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        return name


def _decoded_value(value: str) -> str:
    match = _WORD.fullmatch(value)
    if match is None:
        return value
    try:
        return base64.b64decode(match.group(1), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return value
