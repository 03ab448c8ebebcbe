"""HDFS as KServe means it: a path on the name node that a secret tells, not a host in the URI.

The secret is mounted as a folder, a file for each of its keys, or comes as ``STORAGE_CONFIG``. What
is named there becomes options of fsspec's ``webhdfs``. Keys and certificates that come as text are
kept in memory only.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.config.kserve import kserve_fields
from storage.errors import ConfigurationError, InvalidInput, conceal
from storage.integrations.kserve.authorities import memory_file

if TYPE_CHECKING:
    from storage.config.base import ConfigModel
    from storage.integrations.kserve.environment import Environment

__all__ = ["hdfs_source"]

_SECRET_FOLDER = "/var/secrets/kserve-hdfscreds"
_SCHEMES = ("hdfs", "webhdfs")
_FILES = ("KERBEROS_KEYTAB", "TLS_CA", "TLS_CERT", "TLS_KEY")
_TEXTS = (
    "HDFS_NAMENODE",
    "HDFS_ROOTPATH",
    "HEADERS",
    "KERBEROS_PRINCIPAL",
    "N_THREADS",
    "TLS_SKIP_VERIFY",
    "USER_PROXY",
)
_PORTS = {"http": 9870, "https": 9871}


def hdfs_source(
    uri: str, environment: Environment, held: ExitStack
) -> tuple[str, list[ConfigModel]] | None:
    """Return the URI of a source in HDFS and a config for each name node.

    It is ``None`` if the source is in another store.

    Args:
        uri: such as ``hdfs://user/me/model``, which is the path ``/user/me/model``.
        environment: of the call.
        held: closes what is in memory.

    Raises:
        ConfigurationError: there is no secret, or it holds what it may not.
        InvalidInput: there is no path.
    """
    scheme, separator, path = uri.partition("://")
    if not separator or scheme.lower() not in _SCHEMES:
        return None
    secret = _secret(environment, held)
    if not path.strip("/"):
        raise InvalidInput(f"{uri}: there is no path; expected hdfs://path/of/the/model")
    # Of a cluster that fails over there are several, and only one of them answers.
    nodes = [node for node in secret.get("HDFS_NAMENODE", "").split(";") if node.strip()]
    options = [_options(secret, node.strip()) for node in nodes or [""]]
    root = secret.get("HDFS_ROOTPATH", "").strip().rstrip("/")
    path = f"{root}/{path.lstrip('/')}" if root else f"/{path.lstrip('/')}"
    from storage.config import FsspecConfig

    host, port = options[0]["host"], options[0]["port"]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"webhdfs://{address}{path}", [FsspecConfig(each) for each in options]


def _options(secret: Mapping[str, str], text: str) -> dict[str, Any]:
    """Return the arguments of fsspec's ``WebHDFS`` for a name node.

    Args:
        secret: KServe's keys; of those that are files, the paths.
        text: URL of the name node's web service.

    Raises:
        ConfigurationError: a key holds what it may not.
    """
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in _PORTS:
        raise ConfigurationError(
            "the secret of HDFS: HDFS_NAMENODE is the URL of the name node's web service, such as "
            "https://namenode.example:9871, and it is something else"
        )
    options: dict[str, Any] = {
        "host": host,
        "port": port or _PORTS[parts.scheme],
        "use_https": parts.scheme == "https",
    }
    if user := secret.get("USER_PROXY", "").strip():
        options["proxy_to"] = user
    certificate = secret.get("TLS_CERT")
    if certificate:
        key = secret.get("TLS_KEY")
        options["session_cert"] = (certificate, key) if key else certificate
    if secret.get("TLS_SKIP_VERIFY", "").strip().lower() == "true":
        options["session_verify"] = False
    elif authority := secret.get("TLS_CA"):
        options["session_verify"] = authority
    if headers := _headers(secret.get("HEADERS", "")):
        options["headers"] = headers
    if principal := secret.get("KERBEROS_PRINCIPAL", "").strip():
        options["kerberos"] = True
        options["kerb_kwargs"] = {"principal": principal}
        if keytab := secret.get("KERBEROS_KEYTAB"):
            options["keytab"] = keytab
    return options


def _headers(text: str) -> dict[str, str]:
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigurationError(
            "the secret of HDFS: HEADERS is a JSON object of texts, and it is something else"
        )
    conceal(*found.values())
    return found


def _secret(environment: Environment, held: ExitStack) -> dict[str, str]:
    kind, fields = kserve_fields(environment.variables)
    if kind in _SCHEMES:
        return dict(_stored(fields, held))
    folder = environment.get("HDFS_SECRET_DIR") or _SECRET_FOLDER
    found = {}
    try:
        for name in (*_FILES, *_TEXTS):
            path = os.path.join(folder, name)
            if not os.path.exists(path):
                continue
            if name in _FILES:
                found[name] = path
                continue
            with open(path, encoding="utf-8") as file:
                found[name] = file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(
            f"the secret of HDFS in {folder} cannot be read: {type(exc).__name__}"
        ) from None
    if not found:
        raise ConfigurationError(
            f"there is no secret of HDFS: expected HDFS_NAMENODE and its kin as files in {folder}, "
            "or in STORAGE_CONFIG with the type hdfs"
        )
    return found


def _stored(fields: Mapping[str, Any], held: ExitStack) -> dict[str, str]:
    found = {}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ConfigurationError(f"STORAGE_CONFIG: {name} is a text for the type hdfs")
        if name in _TEXTS:
            found[name] = value
        elif name in _FILES:
            try:
                content = base64.b64decode(value)
            except (binascii.Error, ValueError):
                raise ConfigurationError(
                    f"STORAGE_CONFIG: {name} is the content of a file in base64, and it is no such"
                ) from None
            descriptor = memory_file(name.lower(), content)
            held.callback(os.close, descriptor)
            found[name] = f"/proc/self/fd/{descriptor}"
    return found
