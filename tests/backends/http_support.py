"""What the tests of HTTP share: ways round the backend, and what nginx cannot do."""

from __future__ import annotations

import base64
import hashlib
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from storage.backends.base import Backend, Body, ByteRange, ObjectInfo, Payload
from storage.client import StorageClient
from storage.config import load_settings
from storage.testing.fault_script import Fault
from tests.servers.nginx_http import put_file, unfinished_uploads

_EMPTY = "a URL may hold empty segments; nginx before a folder gives them no meaning"

NGINX_EXCEPTIONS: dict[str, str] = {
    "test_key_may_be_the_beginning_of_another": "a folder holds no file and folder of one name",
    **{
        f"{test}[{case}]": _EMPTY
        for test in (
            "test_key_of_odd_segments_is_literal_or_refused",
            "test_key_of_odd_segments_is_not_another_object",
            "test_delete_of_odd_segments_removes_no_other_object",
        )
        for case in ("empty-segment", "leading-slash")
    },
}
"""Conformance tests that nginx before a folder fails, and why."""


class FolderRaw:
    """The folder behind the server, through the file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, data: bytes) -> None:
        if key.endswith("/"):
            (self._folder / key).mkdir(parents=True, exist_ok=True)
        else:
            put_file(self._folder, key.lstrip("/"), data)

    def get(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def keys(self) -> set[str]:
        found = self._folder.rglob("*")
        return {str(path.relative_to(self._folder)) for path in found if path.is_file()}

    def unfinished(self) -> Sequence[str]:
        return unfinished_uploads(self._folder)


def empty(folder: Path) -> None:
    """Remove everything below ``folder``."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class LiteralKeys:
    """An HTTP backend that takes literal keys, and encodes them as ``Location.child`` does.

    Keys of the backend itself are what stands in URLs, where ``%41`` is the letter A; the
    conformance suite wants to see every key stored as it is.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name = backend.name
        self.capabilities = backend.capabilities

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return _literal(self._backend.stat(_encoded(key), version))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._backend.list(_encoded(prefix))

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self._backend.read(_encoded(key), span, pin)
        body.info = _literal(body.info)
        return body

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> ObjectInfo:
        info = self._backend.write(
            _encoded(key),
            payload,
            metadata=metadata,
            content_type=content_type,
            if_absent=if_absent,
            if_match=if_match,
            on_bytes=on_bytes,
        )
        return _literal(info)

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        self._backend.copy(_encoded(source), _encoded(key), version=version, bucket=bucket)

    def delete(self, keys: Sequence[str]) -> None:
        self._backend.delete([_encoded(key) for key in keys])

    def sign(self, key: str, method: str, expires: float) -> str:
        return self._backend.sign(_encoded(key), method, expires)

    def is_digest(self, info: ObjectInfo) -> bool:
        return self._backend.is_digest(info)

    def filesystem(self) -> tuple[Any, str]:
        return self._backend.filesystem()

    def local_path(self, key: str) -> str | None:
        return self._backend.local_path(_encoded(key))

    def close(self) -> None:
        self._backend.close()


def _encoded(key: str) -> str:
    return quote(key, safe="/~", errors="surrogateescape")


def _literal(info: ObjectInfo) -> ObjectInfo:
    return replace(info, key=unquote(info.key, errors="surrogateescape"))


CANARY = "CANARY5ecret"
"""Part of every secret in these tests; it must be in no message and no log."""


def fast_client(config: Any = None, **transfer: Any) -> StorageClient:
    """Return a client with small parts that does not wait long between attempts.

    It waits long for an answer. Who is to meet a silent server asks for haste; anybody else would
    take a machine that stands still for one, and repeat what a test counts.
    """
    options = {
        "part_size": 64 * 1024,
        "connections": 4,
        "attempts": 3,
        "stall_timeout": 60.0,
        "retry_wait": 0.01,
        "throttle_wait": 0.02,
    }
    return StorageClient(config, load_settings(transfer=options | transfer))


def quiet(error: BaseException) -> bool:
    """Tell whether neither an error nor what it shows of its causes holds the canary."""
    text = "".join(traceback.format_exception(error)) + repr(error) + str(error.args)
    return CANARY not in text


def b64(hasher: hashlib._Hash) -> str:
    """Return a digest as headers hold it."""
    return base64.b64encode(hasher.digest()).decode()


def named(fault: Fault) -> str:
    return f"{fault.kind}-{fault.status}" if fault.status else fault.kind
