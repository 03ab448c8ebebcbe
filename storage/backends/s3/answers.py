"""What S3 answers, and what botocore makes of it, in our words."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from storage.backends.base import ObjectInfo, content_digests, md5_hint
from storage.backends.drivers.fsspec_errors import Kind, causes, classify, error, retry_after
from storage.digest import Digest
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

__all__ = ["classify_s3", "described", "from_code", "translated", "version_of"]

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
    "TemporaryRedirect": ConfigurationError,
    "Throttling": TransientError,
    "ThrottlingException": TransientError,
    "TokenRefreshRequired": AuthenticationError,
    "TooManyRequests": TransientError,
    "UnauthorizedAccess": AuthenticationError,
    "XAmzContentSHA256Mismatch": TransientError,
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
    return classify(exc, where, _NAMES)


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
    return error(kind, where, summary, retry_after(headers))


def described(key: str, answer: Mapping[str, Any], size: int | None) -> ObjectInfo:
    """Return what an answer about an object says, of ``size`` in whole."""
    metadata = {name.lower(): value for name, value in (answer.get("Metadata") or {}).items()}
    digests = content_digests(metadata)
    stored = _stored_sha256(answer)
    if stored is not None and stored not in digests:
        digests = (*digests, stored)
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


def version_of(answer: Mapping[str, Any]) -> str | None:
    """Return the version that an answer names, if the bucket keeps versions."""
    # "null" is what is there without a version, and no name of any content.
    found: str | None = answer.get("VersionId")
    return found if found != "null" else None


def _stored_sha256(answer: Mapping[str, Any]) -> Digest | None:
    """Return the SHA-256 that the store itself keeps, if it is of the whole object."""
    value = answer.get("ChecksumSHA256")
    if not value or answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    try:
        return Digest("sha256", base64.b64decode(value, validate=True).hex())
    except (binascii.Error, InvalidInput):
        # That of parts ends in their number.
        return None
