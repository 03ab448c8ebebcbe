"""What a failed request and an error answer mean, in our words."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator, Mapping

from storage.backends.http.headers import retry_after
from storage.errors import (
    AuthenticationError,
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

__all__ = ["failure", "is_signed", "refusal"]

_TRANSIENT = (408, 423, 425, 429)
_THROTTLED = (429, 503)
# By which object stores say more than "bad request".
_CODE = re.compile(r"<Code>([A-Za-z0-9]+)</Code>")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_DAMAGED = ("BadDigest", "InvalidDigest", "Md5Mismatch", "XAmzContentChecksumMismatch")
_MAX_TEXT = 4096
_MISMATCH = "CertificateError"
_SIGNED = re.compile(r"(?i)(?:^|&)(?:x-amz-signature|x-goog-signature|signature|sig|expires)=")


def refusal(
    status: int,
    headers: Mapping[str, str],
    where: str,
    *,
    method: str,
    query: str,
    elsewhere: str | None,
    text: str = "",
) -> StorageError:
    """Return what an answer that is no success means.

    Args:
        status: of the answer.
        headers: of the answer.
        where: the URL for messages.
        method: that was asked.
        query: of the URL; only looked at, never shown.
        elsewhere: the origin that answered, if a redirection led to another one, to which no
            credentials were sent.
        text: the answer's body, which may hold the code of an object store; never shown.
    """
    code = headers.get("x-ms-error-code", "")
    if status == 400 and (match := _CODE.search(text[:_MAX_TEXT])):
        code = match[1]
    if status in (401, 403, 407) or (status == 400 and code in _EXPIRED):
        return AuthenticationError(f"{where}: {_who(status, headers, query, elsewhere)}")
    if status in (404, 410):
        return ModelMissingError(where, f"{where}: the server knows no such file ({status})")
    if status == 412:
        return ObjectChangedError(f"{where} is no longer the version that was asked for")
    if status == 507:
        return InsufficientSpaceError(f"{where}: the server's disk is full (507)")
    if status in (405, 501):
        return UnsupportedOperation(f"{where}: the server does not do {method} there ({status})")
    if status == 411:
        return UnsupportedOperation(
            f"{where}: the server takes no body of unknown size (411); upload a file"
        )
    if status == 400 and code in _DAMAGED:
        return TransientError(f"{where}: the server got other bytes than were sent ({code})")
    if status in _TRANSIENT or status >= 500 or code == "RequestTimeout":
        return TransientError(
            f"{where}: the server answered {status}",
            retry_after(headers),
            throttled=status in _THROTTLED,
        )
    hint = ""
    if status == 409 and method == "PUT":
        hint = "; a folder may have to be made first, or one of that name is there"
    elif status == 413:
        hint = ": it takes no file of this size"
    elif status == 400 and is_signed(query):
        hint = "; the URL is a signed one, which may have expired"
    return StorageError(f"{where}: the server answered {method} by {status}{hint}")


def is_signed(query: str) -> bool:
    """Tell whether the query of a URL is a signature that permits what is asked."""
    return _SIGNED.search(query) is not None


def _who(status: int, headers: Mapping[str, str], query: str, elsewhere: str | None) -> str:
    if status == 407:
        return (
            "the proxy wants to know who asks (407); give user and password in the URL of "
            "HTTPConfig's proxy, or in HTTPS_PROXY"
        )
    if elsewhere is not None:
        return (
            f"access was refused ({status}) after a redirection to {elsewhere}, to which the "
            "credentials are not sent; give its URL if it is the one to trust"
        )
    if is_signed(query):
        return (
            f"access was refused ({status}); the URL is a signed one: it may have expired, or "
            "be for another method or other headers; ask for a new one"
        )
    scheme = headers.get("WWW-Authenticate", "").strip().split(" ")[0].rstrip(",")
    wanted = f", which asks for {scheme}" if re.fullmatch(r"[A-Za-z0-9-]{1,40}", scheme) else ""
    return (
        f"the server{wanted}{',' if wanted else ''} refused access ({status}); give token, or "
        "username and password, or headers, in an HTTPConfig"
    )


def failure(
    exc: BaseException, where: str, stall_timeout: float
) -> tuple[StorageError, BaseException | None]:
    """Return what it means that no answer, or not all of one, came.

    Returns:
        The error, and what to name as its cause: the innermost one, since those around it
        repeat the URL, query included.
    """
    chain = list(_causes(exc))
    names = {type(one).__name__ for one in chain}
    inner = next((one for one in reversed(chain) if isinstance(one, OSError)), None)
    if inner is not None and type(inner).__module__.startswith(("requests", "urllib3")):
        inner = None
    return _classify(chain, names, where, stall_timeout), inner


def _classify(
    chain: list[BaseException], names: set[str], where: str, stall_timeout: float
) -> StorageError:
    text = one_line(chain[-1], 160)
    for one in chain:
        # The first is how Python finds a certificate wrong, the second how urllib3 1 does.
        if isinstance(one, ssl.SSLCertVerificationError) or type(one).__name__ == _MISMATCH:
            why = one_line(getattr(one, "verify_message", one), 120)
            return ConfigurationError(
                f"{where}: the server's certificate is not trusted ({why}); name its authority "
                "in ca_bundle of HTTPConfig, or in SSL_CERT_FILE"
            )
    tunnel = re.search(r"Tunnel connection failed: (\d{3})", text)
    if tunnel is not None:
        status = int(tunnel[1])
        if status in (401, 403, 407):
            return AuthenticationError(
                f"{where}: the proxy refuses the way there ({status}); check the user and "
                "password in its URL, and whom it lets through"
            )
        return UnreachableError(f"{where}: the proxy cannot make the connection ({status})")
    for one in chain:
        if isinstance(one, ssl.SSLError):
            return _tls(one, where)
    if names & {"InvalidProxyURL", "ProxySchemeUnknown", "ProxySchemeUnsupported", "InvalidSchema"}:
        return ConfigurationError(
            f"{where}: the proxy cannot be used: its URL is malformed, or of a kind that needs "
            'more (SOCKS: pip install "requests[socks]")'
        )
    if "ProxyError" in names:
        return UnreachableError(f"{where}: the proxy does not answer ({text})")
    if "InvalidHeader" in names:
        return StorageError(f"{where}: a header of the request or of the answer is malformed")
    if names & {"InvalidURL", "LocationParseError", "LocationValueError", "UnicodeError"}:
        return InvalidInput(f"{where} is no URL that can be asked")
    if names & {"NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "gaierror"} or (
        any(isinstance(one, (ConnectionRefusedError, socket.gaierror)) for one in chain)
    ):
        return UnreachableError(
            f"{where}: nobody answers at that address ({text}); check the host, the network "
            "and the proxy"
        )
    if isinstance(chain[0], ValueError) and not isinstance(chain[0], OSError):
        # Its text may repeat a header, which may be a credential.
        return ConfigurationError(
            f"{where}: the request cannot be sent: a header, the user or the password, or the "
            "proxy's URL holds what HTTP does not allow, such as a line break"
        )
    if names & {"ReadTimeoutError", "ReadTimeout"} or isinstance(chain[-1], TimeoutError):
        return TransientError(f"{where}: not a byte came for {stall_timeout:g} s", stalled=True)
    return TransientError(f"{where}: the connection broke ({text})")


def _tls(exc: ssl.SSLError, where: str) -> StorageError:
    reason = exc.reason or ""
    text = one_line(reason or exc, 120)
    if re.search(r"WRONG_VERSION_NUMBER|HTTP_REQUEST|UNKNOWN_PROTOCOL|RECORD_LAYER", reason):
        return ConfigurationError(
            f"{where}: the server does not speak TLS at that port ({text}); is it http?"
        )
    if re.search(r"KEY_VALUES_MISMATCH|NO_START_LINE|NO_CERTIFICATE|PEM|BAD_BASE64", f"{exc}"):
        return ConfigurationError(
            f"{where}: ca_bundle, client_cert or client_key is not usable ({text})"
        )
    if "encrypted" in str(exc):
        return ConfigurationError(
            f"{where}: client_key is encrypted, and there is nobody to ask for its password"
        )
    if "ALERT" in reason:
        return AuthenticationError(
            f"{where}: the server broke off the TLS handshake ({text}); it may want a client "
            "certificate: give client_cert and client_key in an HTTPConfig"
        )
    return TransientError(f"{where}: the TLS connection broke ({text})")


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield ``exc`` and what it wraps, from the outside in."""
    seen: set[int] = set()
    following: BaseException | None = exc
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        wrapped = [
            getattr(following, "reason", None),
            getattr(following, "original_error", None),
            *reversed(following.args),
            following.__cause__,
            following.__context__,
        ]
        following = next((one for one in wrapped if isinstance(one, BaseException)), None)
