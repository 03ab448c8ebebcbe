"""The documents by which stores say that something is wrong, for answers made by the proxy.

Sources: "Error responses" of the Amazon S3 API reference; "Status and error codes" of the
Azure Storage REST reference; "HTTP status and error codes for JSON" of Cloud Storage; what
the Hugging Face Hub answers.
"""

from __future__ import annotations

import json
from typing import NamedTuple

__all__ = ["STORES", "Answer", "error_answer", "expired_answer"]

STORES = ("s3", "gcs", "azure", "hf", "http")
"""Whose manner an answer can have."""

_XML = "application/xml"
_JSON = "application/json"
_HTML = "text/html"

# Code by status: S3 and Azure name theirs, the others repeat the number.
_CODES = {
    "s3": {
        400: "ExpiredToken",
        401: "AccessDenied",
        403: "AccessDenied",
        404: "NoSuchKey",
        405: "MethodNotAllowed",
        408: "RequestTimeout",
        410: "Gone",
        429: "TooManyRequests",
        500: "InternalError",
        501: "NotImplemented",
        503: "SlowDown",
    },
    "azure": {
        400: "InvalidHeaderValue",
        401: "NoAuthenticationInformation",
        403: "AuthenticationFailed",
        404: "BlobNotFound",
        405: "UnsupportedHttpVerb",
        408: "OperationTimedOut",
        410: "Gone",
        429: "TooManyRequests",
        500: "InternalError",
        501: "NotImplemented",
        503: "ServerBusy",
    },
}


class Answer(NamedTuple):
    """An answer that did not come from the server."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def error_answer(
    store: str, status: int, *, sent_as: int | None = None, message: str = "fault injected"
) -> Answer:
    """Return the error ``status`` in the manner of ``store``.

    Args:
        store: one of ``STORES``.
        status: which error; decides the code in the document.
        sent_as: the status to send it with, if another one.
        message: the text for people.
    """
    headers: list[tuple[str, str]] = []
    if store == "s3":
        code = _CODES["s3"].get(status, "InternalError")
        kind, text = _XML, _xml(code, message, "<RequestId>FAULT</RequestId>")
    elif store == "azure":
        code = _CODES["azure"].get(status, "InternalError")
        kind, text = _XML, _xml(code, message, "")
        headers.append(("x-ms-error-code", code))
    elif store == "gcs":
        error = {"code": status, "message": message, "errors": [{"message": message}]}
        kind, text = _JSON, json.dumps({"error": error})
    elif store == "hf":
        kind, text = _JSON, json.dumps({"error": message})
        headers.append(("X-Error-Message", message))
    else:
        kind = _HTML
        text = f"<html><head><title>{status}</title></head><body>{message}</body></html>\n"
    headers.insert(0, ("Content-Type", kind))
    return Answer(sent_as or status, tuple(headers), text.encode())


def expired_answer(store: str) -> Answer:
    """Return what ``store`` answers to credentials that were good until a moment ago."""
    if store == "s3":
        return error_answer(store, 400, message="The provided token has expired.")
    if store == "azure":
        return error_answer(
            store,
            403,
            message="Server failed to authenticate the request. "
            "Signature not valid in the specified time frame",
        )
    answer = error_answer(store, 401, message="Invalid Credentials: the token has expired")
    challenge = ("WWW-Authenticate", 'Bearer error="invalid_token"')
    return answer._replace(headers=(*answer.headers, challenge))


def _xml(code: str, message: str, more: str) -> str:
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
    )
