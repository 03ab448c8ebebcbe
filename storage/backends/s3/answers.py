"""What S3 answers, and what botocore makes of it, in our words."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from storage.backends.base import ObjectInfo, content_digests, md5_hint
from storage.backends.drivers.fsspec_errors import (
    THROTTLED,
    Kind,
    causes,
    classify,
    error,
    retry_after,
)
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
    one_line,
)

__all__ = [
    "EXPIRED",
    "classify_s3",
    "code_of",
    "damaged",
    "described",
    "encrypted",
    "from_code",
    "kept_with",
    "stored_digests",
    "translated",
    "version_of",
]

EXPIRED = frozenset(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"))
"""Codes of answers to credentials that were good once."""

# Some come with status 400 or 500, or in the body of a success.
_THROTTLING = frozenset(
    (
        "RequestLimitExceeded",
        "ServiceUnavailable",
        "SlowDown",
        "SlowDownRead",
        "SlowDownWrite",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XMinioServerNotInitialized",
    )
)
# The cheapest one that is good enough first.
_CHECKSUMS = {
    "crc64nvme": "ChecksumCRC64NVME",
    "crc32c": "ChecksumCRC32C",
    "sha256": "ChecksumSHA256",
    "sha1": "ChecksumSHA1",
}

_CODES: dict[str, Kind] = {
    "AccessDenied": AuthenticationError,
    "AccountProblem": AuthenticationError,
    "AllAccessDisabled": AuthenticationError,
    "AuthorizationHeaderMalformed": ConfigurationError,
    "AuthorizationQueryParametersError": AuthenticationError,
    "BadDigest": TransientError,
    "BucketRegionError": ConfigurationError,
    "ConditionalRequestConflict": TransientError,
    "CredentialsNotSupported": AuthenticationError,
    "ExpiredToken": AuthenticationError,
    "ExpiredTokenException": AuthenticationError,
    "IllegalLocationConstraintException": ConfigurationError,
    "IncompleteBody": TransientError,
    "InsufficientStorage": InsufficientSpaceError,
    "InternalError": TransientError,
    "InvalidAccessKeyId": AuthenticationError,
    "InvalidBucketName": InvalidInput,
    "InvalidClientTokenId": AuthenticationError,
    "InvalidRange": ObjectChangedError,
    "InvalidSecurity": AuthenticationError,
    "InvalidToken": AuthenticationError,
    "KeyTooLongError": InvalidInput,
    "MethodNotAllowed": UnsupportedOperation,
    "MissingSecurityHeader": AuthenticationError,
    "NoSuchBucket": BucketMissingError,
    "NoSuchKey": ModelMissingError,
    "NoSuchUpload": TransientError,
    "NoSuchVersion": ModelMissingError,
    "NotImplemented": UnsupportedOperation,
    "NotSignedUp": AuthenticationError,
    "OperationAborted": TransientError,
    "PermanentRedirect": ConfigurationError,
    "PreconditionFailed": ObjectChangedError,
    "QuotaExceeded": InsufficientSpaceError,
    "RequestLimitExceeded": TransientError,
    "RequestTimeTooSkewed": AuthenticationError,
    "RequestTimeout": TransientError,
    "ServiceUnavailable": TransientError,
    "SignatureDoesNotMatch": AuthenticationError,
    "SlowDown": TransientError,
    "SlowDownRead": TransientError,
    "SlowDownWrite": TransientError,
    "TemporaryRedirect": ConfigurationError,
    "Throttling": TransientError,
    "ThrottlingException": TransientError,
    "TokenRefreshRequired": AuthenticationError,
    "TooManyRequests": TransientError,
    "UnauthorizedAccess": AuthenticationError,
    "XAmzContentSHA256Mismatch": TransientError,
    "XMinioServerNotInitialized": TransientError,
    "XMinioStorageFull": InsufficientSpaceError,
}
_STATUS: dict[int, Kind] = {
    301: ConfigurationError,
    307: ConfigurationError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: ModelMissingError,
    405: UnsupportedOperation,
    408: TransientError,
    409: TransientError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    425: TransientError,
    429: TransientError,
    501: UnsupportedOperation,
    507: InsufficientSpaceError,
}
_NAMES: dict[str, Kind] = {
    "botocore.ConfigNotFound": ConfigurationError,
    "botocore.ConfigParseError": ConfigurationError,
    "botocore.ConnectTimeoutError": UnreachableError,
    "botocore.CredentialRetrievalError": AuthenticationError,
    "botocore.EndpointConnectionError": UnreachableError,
    "botocore.HTTPClientError": TransientError,
    "botocore.IncompleteReadError": TransientError,
    "botocore.InvalidConfigError": ConfigurationError,
    "botocore.InvalidEndpointConfigurationError": ConfigurationError,
    "botocore.InvalidProxiesConfigError": ConfigurationError,
    "botocore.InvalidRegionError": ConfigurationError,
    "botocore.InvalidS3AddressingStyleError": ConfigurationError,
    "botocore.LoginError": AuthenticationError,
    "botocore.MetadataRetrievalError": AuthenticationError,
    "botocore.NoAuthTokenError": AuthenticationError,
    "botocore.NoCredentialsError": AuthenticationError,
    "botocore.NoRegionError": ConfigurationError,
    "botocore.ParamValidationError": InvalidInput,
    "botocore.PartialCredentialsError": AuthenticationError,
    "botocore.ProfileNotFound": ConfigurationError,
    "botocore.ProxyConnectionError": UnreachableError,
    "botocore.ResponseParserError": TransientError,
    "botocore.SSLError": ConfigurationError,
    "botocore.SSOError": AuthenticationError,
    "botocore.TokenRetrievalError": AuthenticationError,
    "botocore.UnknownCredentialError": ConfigurationError,
    "botocore.UnknownTokenProviderError": ConfigurationError,
    "botocore.UnsupportedS3ConfigurationError": ConfigurationError,
    # Endpoints and arguments of the client that botocore cannot make sense of.
    "builtins.TypeError": ConfigurationError,
    "builtins.ValueError": ConfigurationError,
}
# A request that may have been received is not one that reached nobody.
_BROKEN: dict[str, Kind] = {"botocore.EndpointConnectionError": TransientError}


# What belongs to an object beside its bytes and its user metadata.
_STANDARD = (
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "StorageClass",
)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn whatever s3fs or botocore raises in the block into an error of ours."""
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:
        raise classify_s3(exc, where) from exc


def classify_s3(exc: BaseException, where: str) -> StorageError:
    """Return the error of ours that says what ``exc`` means, about the object ``where``."""
    for cause in causes(exc):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping) and "Error" in response:
            problem = response["Error"]
            if problem.get("ArgumentName") == "versionId":
                # What S3 says of a version that none of its own could be called.
                return ModelMissingError(where)
            meta = response.get("ResponseMetadata") or {}
            return from_code(
                where,
                str(problem.get("Code", "")),
                int(meta.get("HTTPStatusCode") or 0),
                str(problem.get("Message", "")),
                meta.get("HTTPHeaders"),
            )
    broken = any(_was_connected(cause) for cause in causes(exc))
    return classify(exc, where, _NAMES | _BROKEN if broken else _NAMES)


def _was_connected(exc: BaseException) -> bool:
    """Tell whether aiobotocore says "cannot connect" of a connection that broke later."""
    reason = (getattr(exc, "kwargs", None) or {}).get("error")
    if type(exc).__name__ != "EndpointConnectionError" or reason is None:
        return False
    lineage = {cls.__name__ for cls in type(reason).__mro__}
    return "ClientConnectionError" in lineage and "ClientConnectorError" not in lineage


def code_of(exc: BaseException) -> str:
    """Return the code of the error answer that botocore raised ``exc`` for, if it did."""
    for cause in causes(exc):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping) and "Error" in response:
            return str(response["Error"].get("Code", ""))
    return ""


def next_page(where: str, token: str | None, before: str | None) -> str:
    """Return the token of a listing's next page; ``before`` is the one that gave this page.

    Raises:
        StorageError: there is none, although the listing is cut.
    """
    if not token or token == before:
        raise StorageError(
            f"{where}: the listing is cut and the store does not say how to go on; it does not "
            "speak version 2 of S3's listing"
        )
    return token


def from_code(
    where: str,
    code: str,
    status: int,
    message: str,
    headers: Mapping[str, Any] | None = None,
) -> StorageError:
    """Return the error of ours for an error answer of S3.

    Args:
        where: the object's URI.
        code: the answer's error code, or the status again where there was no body.
        status: of HTTP.
        message: what the store says in words.
        headers: of the answer, names in lower case.
    """
    headers = headers or {}
    summary = f"{code or status}: {message}" if message else code or str(status)
    if status in (404, 405) and headers.get("x-amz-delete-marker") == "true":
        return ModelMissingError(where)
    if code == "InvalidObjectState":
        return StorageError(
            f"{where}: the object is archived ({one_line(message)}); restore it first, then try "
            "again"
        )
    kind = _CODES.get(code)
    if kind is None:
        kind = _STATUS.get(status, TransientError if status >= 500 else StorageError)
    throttled = status in THROTTLED or code in _THROTTLING
    return error(kind, where, summary, retry_after(headers), throttled=throttled)


def damaged(where: str, sent: str, stored: str) -> TransientError:
    """Return the error for a store that got other bytes than it was sent.

    Args:
        where: the object's URI.
        sent: the ETag of what was sent.
        stored: that of what the store has.
    """
    return TransientError(
        f"{where}: what was sent has the ETag {sent}, what the store got {stored}: it was damaged "
        "on the way and has to be sent again"
    )


def encrypted(answer: Mapping[str, Any]) -> bool:
    """Tell whether an object's ETag is no MD5 because it is encrypted by a key of the user's.

    Args:
        answer: headers, names in lower case, or what botocore makes of them.
    """
    encryption = (
        answer.get("x-amz-server-side-encryption") or answer.get("ServerSideEncryption") or ""
    )
    return (
        str(encryption).startswith("aws:kms")
        or "x-amz-server-side-encryption-customer-algorithm" in answer
        or "SSECustomerAlgorithm" in answer
    )


def described(key: str, answer: Mapping[str, Any], size: int | None) -> ObjectInfo:
    """Return what an answer about an object says, of ``size`` in whole."""
    metadata = {name.lower(): value for name, value in (answer.get("Metadata") or {}).items()}
    digests = content_digests(metadata)
    digests += tuple(one for one in stored_digests(answer) if one not in digests)
    etag = answer.get("ETag")
    return ObjectInfo(
        key,
        size,
        etag,
        version_of(answer),
        answer.get("LastModified"),
        answer.get("ContentType"),
        digests,
        md5_hint(etag),
        metadata,
    )


def kept_with(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an answer says is kept with an object, as arguments that keep it with another."""
    found = {name: answer[name] for name in _STANDARD if answer.get(name)}
    return {**found, "Metadata": answer.get("Metadata", {})}


def version_of(answer: Mapping[str, Any]) -> str | None:
    """Return the version that an answer names, if the bucket keeps versions."""
    # "null" is what is there without a version, and no name of any content.
    found: str | None = answer.get("VersionId")
    return found if found != "null" else None


def stored_digests(answer: Mapping[str, Any]) -> tuple[Digest, ...]:
    """Return the checksums of a whole object that the store keeps, those that can be computed here.

    That of an upload in parts may be one of the parts' checksums instead, in which case the
    store says so by its type or a number at its end. One that says neither is not trusted.

    Args:
        answer: headers, names in lower case, or what botocore makes of them.
    """
    etag = str(answer.get("ETag") or answer.get("etag") or "").strip('"')
    kind = answer.get("ChecksumType") or answer.get("x-amz-checksum-type")
    if (kind or ("COMPOSITE" if "-" in etag else "FULL_OBJECT")) != "FULL_OBJECT":
        return ()
    found = []
    for algorithm, name in _CHECKSUMS.items():
        value = answer.get(name) or answer.get(f"x-amz-checksum-{algorithm}")
        if value and available(algorithm):
            with suppress(binascii.Error, InvalidInput):
                found.append(Digest(algorithm, base64.b64decode(value, validate=True).hex()))
    return tuple(found)
