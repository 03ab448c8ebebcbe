"""Which credentials are in use, so that no message, event or cause of an error tells them."""

from __future__ import annotations

import base64
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from storage.config import reveal
from storage.errors import conceal, redact
from storage.uri import Location

if TYPE_CHECKING:
    from logging import LogRecord

__all__ = ["conceal_credentials"]

# Those of the chains that the stores' own clients follow.
_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MODELSCOPE_API_TOKEN",
)
_PACKAGES = (
    *("adlfs", "aiobotocore", "aiohttp", "azure", "boto3", "botocore", "fsspec", "gcsfs"),
    *("google", "httpcore", "httpx", "huggingface_hub", "msal", "requests", "s3fs", "urllib3"),
)
_CHATTY = re.compile(rf"(?:{'|'.join(_PACKAGES)})(?:\.|$)")
_EXPECTED = (
    *(
        f"{package}.{module}"
        for package in ("aiobotocore", "botocore")
        for module in (
            *("auth", "awsrequest", "client", "credentials", "endpoint", "handlers", "hooks"),
            *("httpchecksum", "httpsession", "parsers", "regions", "response", "retries.standard"),
            *("retryhandler", "session", "signers", "tokens", "utils"),
        )
    ),
    "azure.core.pipeline.policies.http_logging_policy",
    "azure.identity._internal.decorators",
    "google.auth.transport.requests",
    "urllib3.connectionpool",
    "urllib3.util.retry",
    *("fsspec", "gcsfs", "gcsfs.credentials", "gcsfs.retry", "s3fs"),
)
_SENSITIVE = re.compile(r"(?i)pass|token|secret|key|sas|credential|auth")


def conceal_credentials(location: Location, config: Any) -> None:
    """Let errors and events leave out the credentials by which a store is reached.

    Args:
        location: what is asked for; a URL may hold some.
        config: how it is reached.
    """
    found = [os.environ[name] for name in _VARIABLES if os.environ.get(name)]
    if config is not None:
        for name, value in vars(config).items():
            secret = reveal(value)
            if isinstance(secret, str) and secret is not value:
                found += _texts(secret)
            elif isinstance(secret, Mapping):
                found += _sensitive(secret, everything=name == "headers")
        password = reveal(getattr(config, "password", None))
        if password:
            found.append(_basic(getattr(config, "username", None) or "", password))
    if location.url is not None:
        found += _texts(location.url)
    conceal(*found)
    _watch_loggers()


def _watch_loggers() -> None:
    """Let the loggers of SDKs leave credentials out; at DEBUG, some print whole requests."""
    logging = sys.modules.get("logging")
    if logging is None:
        return
    known = [name for name in list(logging.root.manager.loggerDict) if _CHATTY.match(name)]
    # Most are made when the SDK is imported, which is later, and these are the ones that matter.
    for name in {*known, *_EXPECTED}:
        logger = logging.getLogger(name)
        if _without_credentials not in logger.filters:
            logger.addFilter(_without_credentials)


def _without_credentials(record: LogRecord) -> bool:
    try:
        message = record.getMessage()
    except (TypeError, ValueError):
        return True  # logging itself reports it
    clean = redact(message)
    if clean != message:
        record.msg, record.args = clean, ()
    if record.exc_info:
        text = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        shown = f"{text}\n{record.exc_info[1]!r}"
        if redact(shown) != shown:
            record.exc_info, record.exc_text = None, redact(text)
    return True


def _texts(secret: str) -> Iterator[str]:
    """Yield a secret; of a URL what is secret in it."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", secret):
        yield secret
        return
    parts = urlsplit(secret)
    if parts.password:
        yield parts.password
        yield _basic(unquote(parts.username or ""), unquote(parts.password))
    for name, _, value in (one.partition("=") for one in parts.query.split("&")):
        # What names the file is no secret, and errors have to tell it.
        if name not in ("versionId", "generation") and unquote(value) not in unquote(parts.path):
            yield value


def _sensitive(table: Mapping[Any, Any], *, everything: bool = False) -> Iterator[str]:
    for name, value in table.items():
        text = reveal(value)
        if isinstance(text, Mapping):
            yield from _sensitive(text)
        elif isinstance(text, str) and (everything or _SENSITIVE.search(str(name))):
            yield text
            # "Bearer …", "session=…; path=/"
            yield from re.findall(r"[^\s;=]{16,}", text)


def _basic(username: str, password: str) -> str:
    text = f"{username}:{password}".encode(errors="surrogatepass")
    return base64.b64encode(text).decode("ascii")
