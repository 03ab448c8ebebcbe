"""What the tests of the cache share: sources that count, no network, bytes that went bad."""

from __future__ import annotations

import functools
import os
import re
import socket
import stat
import subprocess
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pytest

from storage.backends.base import ByteRange, ObjectInfo
from storage.backends.memory import MemoryBackend
from storage.digest import hash_file
from tests.facade.stores import HubStore, MemoryStore, S3Store, Store, tree_bytes
from tests.servers import CountingProxy, Hub, NginxHTTP, Recorded, S3Server
from tests.servers.nginx_http import put_file

__all__ = [
    "SOURCES",
    "HubSource",
    "MemorySource",
    "S3Source",
    "Source",
    "WebSource",
    "blob_files",
    "blocked_sockets",
    "flip_byte",
    "make_source",
    "no_network_process",
    "tree_bytes",
    "wrong_blobs",
]

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")

# -- sources -------------------------------------------------------------------------------


class Source(ABC):
    """A place for models that knows what was asked of it, by whichever process.

    Attributes:
        config: for ``config=``; ``None`` if the URI is enough.
        fields: the same as a dict that JSON can hold, for other processes.
    """

    config: Any = None
    fields: dict[str, Any]

    def __init__(self) -> None:
        self.fields = {}
        self._here: set[str] = set()
        # Of what was deleted, too: it may have been fetched.
        self._sizes: dict[str, int] = {}

    @abstractmethod
    def uri(self, path: str = "") -> str:
        """Return the URI of ``path``."""

    @abstractmethod
    def _put(self, files: Mapping[str, bytes]) -> None:
        """Store objects, each at once."""

    @abstractmethod
    def _delete(self, path: str) -> None:
        """Delete an object."""

    @abstractmethod
    def forget(self) -> None:
        """Begin to count anew."""

    @property
    @abstractmethod
    def requests(self) -> int:
        """How many requests came, of whatever kind."""

    @abstractmethod
    def _asked(self) -> list[tuple[str, str | None]]:
        """Return path and range of each request that fetched content, in their order."""

    def put_model(self, files: Mapping[str, bytes], name: str = "model") -> str:
        """Let ``name`` be exactly these ``files``, and return its URI."""
        wanted = {f"{name}/{path}": data for path, data in files.items()}
        self._store_all(wanted)
        for path in self._here - wanted.keys():
            if path.startswith(f"{name}/"):
                self.delete(path)
        return self.uri(name)

    def put_file(self, path: str, data: bytes) -> str:
        """Store one object, and return its URI."""
        self._store_all({path: data})
        return self.uri(path)

    def _store_all(self, files: Mapping[str, bytes]) -> None:
        self._put(files)
        self._here |= files.keys()
        self._sizes |= {path: len(data) for path, data in files.items()}

    def delete(self, path: str) -> None:
        """Delete one object."""
        self._delete(path)
        self._here.remove(path)

    @property
    def bodies(self) -> list[str]:
        """Paths of the requests that fetched content; a large object takes several."""
        return [path for path, _ in self._asked()]

    @property
    def fetched(self) -> dict[str, int]:
        """Bytes of content that were asked for, by path."""
        counted: Counter[str] = Counter()
        for path, span in self._asked():
            match = _RANGE.fullmatch(span or "")
            whole = self._sizes[path]
            counted[path] += int(match[2]) + 1 - int(match[1]) if match else whole
        return dict(counted)

    def sizes(self, name: str = "model") -> dict[str, int]:
        """Return what :attr:`fetched` is when all of ``name`` came once; empty files aside."""
        mine = [path for path in self._here if path == name or path.startswith(f"{name}/")]
        return {path: self._sizes[path] for path in mine if self._sizes[path]}


class _Stored(Source):
    """A source whose objects are in a store of the conformance tests."""

    _store: Store

    def uri(self, path: str = "") -> str:
        return self._store.uri(path)

    def _put(self, files: Mapping[str, bytes]) -> None:
        self._store.put_all(files)

    def _delete(self, path: str) -> None:
        self._store.delete_raw(path)


class MemorySource(_Stored):
    """A bucket in this process. It counts calls of the backend, and sees only this process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """Count from now on, until ``patch`` is undone."""
        super().__init__()
        self._store = MemoryStore()
        self._calls: list[tuple[str, str, str | None]] = []
        bucket = urlsplit(self._store.base).netloc
        real = MemoryBackend.read

        def read(
            backend: MemoryBackend,
            key: str,
            span: ByteRange | None = None,
            pin: ObjectInfo | None = None,
        ) -> Any:
            if backend._bucket == bucket:
                asked = None if span is None else f"bytes={span.start}-{span.end - 1}"
                self._calls.append(("read", key, asked))
            return real(backend, key, span, pin)

        def counted(name: str) -> Callable[..., Any]:
            function = getattr(MemoryBackend, name)

            def call(backend: MemoryBackend, key: str = "", *args: Any) -> Any:
                if backend._bucket == bucket:
                    self._calls.append((name, key, None))
                return function(backend, key, *args)

            return call

        patch.setattr(MemoryBackend, "read", read)
        for name in ("stat", "list"):
            patch.setattr(MemoryBackend, name, counted(name))

    def forget(self) -> None:
        self._calls.clear()

    @property
    def requests(self) -> int:
        return len(self._calls)

    def _asked(self) -> list[tuple[str, str | None]]:
        return [
            (key.removeprefix("place/"), span) for name, key, span in self._calls if name == "read"
        ]


class _Proxied(Source):
    """A server behind a proxy that counts."""

    def __init__(self, proxy: CountingProxy) -> None:
        super().__init__()
        self.proxy = proxy

    def forget(self) -> None:
        self.proxy.clear()

    @property
    def requests(self) -> int:
        return self.proxy.count()

    @abstractmethod
    def _path(self, request: Recorded) -> str | None:
        """Return the path of an object whose content was fetched."""

    def _asked(self) -> list[tuple[str, str | None]]:
        found = [
            (self._path(request), request.headers.get("range"))
            for request in self.proxy.requests
            if request.method == "GET" and request.status in (200, 206)
        ]
        return [(path, span) for path, span in found if path is not None]


class S3Source(_Stored, _Proxied):
    """A prefix of a bucket behind a proxy."""

    def __init__(self, server: S3Server, bucket: str, prefix: str, proxy: CountingProxy) -> None:
        """Keep models below ``prefix``, which is this source's alone."""
        super().__init__(proxy)
        self._store = S3Store("seaweedfs-obstore", server, "obstore", bucket, prefix, None)
        self.config = self._store.through(proxy.endpoint)
        self.fields = {
            "access_key_id": server.access_key,
            "secret_access_key": server.secret_key,
            "endpoint_url": proxy.endpoint,
        }
        self._place = f"/{bucket}/{prefix}/"

    def _path(self, request: Recorded) -> str | None:
        path, _, query = request.path.partition("?")
        if "list-type" in query or not unquote(path).startswith(self._place):
            return None
        return unquote(path)[len(self._place) :]


class WebSource(_Proxied):
    """A folder of nginx behind a proxy. Each file is a model of its own; there are no trees."""

    def __init__(self, server: NginxHTTP, proxy: CountingProxy) -> None:
        """Keep files in a folder of this source's own."""
        super().__init__(proxy)
        self._folder = f"m{uuid4().hex}"
        self._data = server.data

    def uri(self, path: str = "") -> str:
        return f"{self.proxy.endpoint}/{self._folder}/{path}"

    def put_model(self, files: Mapping[str, bytes], name: str = "model") -> str:
        """Store one file, and return its URI."""
        ((path, data),) = files.items()
        return self.put_file(f"{name}/{path}", data)

    def _put(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            put_file(self._data, f"{self._folder}/{path}", data)

    def _delete(self, path: str) -> None:
        (self._data / self._folder / path).unlink()

    def _path(self, request: Recorded) -> str | None:
        return unquote(request.path.partition("?")[0]).removeprefix(f"/{self._folder}/")


class HubSource(_Stored):
    """A repository of the test Hub."""

    def __init__(self, hub: Hub) -> None:
        """Keep models in a repository of this source's own."""
        super().__init__()
        self._hub = hub
        self._store = HubStore(hub, "")
        self.config = self._store.config
        self.fields = {"token": hub.writer.token, "endpoint": hub.url}
        self._repo = self._store._repo

    def forget(self) -> None:
        self._hub.forget()

    @property
    def requests(self) -> int:
        return len(self._hub.requests)

    def _asked(self) -> list[tuple[str, str | None]]:
        # Large files come from the content network, where they are named by their content.
        paths = {
            entry.sha256: path
            for commit in self._repo.commits.values()
            for path, entry in commit.files.items()
        }
        found = []
        for request in self._hub.requests:
            if request.method != "GET" or request.status not in (200, 206):
                continue
            if request.origin == "cdn":
                found.append((paths[request.parts[1]], request.headers.get("range")))
            elif re.search(r"/resolve(-cache)?/", request.path):
                asked = unquote(request.path)
                path = next(path for path in paths.values() if asked.endswith(f"/{path}"))
                found.append((path, request.headers.get("range")))
        return found


SOURCES = ("memory", "s3", "web", "hub")


def make_source(request: pytest.FixtureRequest, kind: str) -> Source:
    """Return a new, empty source of a ``kind`` out of :data:`SOURCES`."""
    value = request.getfixturevalue
    if kind == "memory":
        return MemorySource(value("monkeypatch"))
    if kind == "s3":
        server = value("seaweedfs")
        bucket = value("shared_bucket")
        return S3Source(server, bucket, f"m{uuid4().hex}", value("counting_proxy")(server.endpoint))
    if kind == "web":
        nginx = value("nginx_http")
        return WebSource(nginx, value("counting_proxy")(nginx.endpoint))
    assert kind == "hub"
    return HubSource(value("hub"))


# -- no network ----------------------------------------------------------------------------


@contextmanager
def blocked_sockets() -> Iterator[None]:
    """Let every use of the network by this process's Python code raise ``AssertionError``.

    What swallows it is found out at the end. Code that is not Python's (obstore's) goes its own
    way to the system; for that see :func:`no_network_process`.
    """
    attempts: list[str] = []

    def refuse(what: str) -> Any:
        attempts.append(what)
        raise AssertionError(f"the network was used: {what}")

    real = socket.socket

    class Refused(real):  # type: ignore[misc, valid-type]
        """A socket that is made of nothing but an open descriptor."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            descriptor = kwargs.get("fileno", args[3] if len(args) > 3 else None)
            if descriptor is None:
                refuse(f"socket{args}")
            super().__init__(*args, **kwargs)

    def guarded(name: str) -> Callable[..., Any]:
        function = getattr(real, name)

        def call(self: socket.socket, *args: Any) -> Any:
            # Pairs of sockets wake the event loops of this process, and go nowhere.
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(name)
            return function(self, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "send", "sendall", "sendto", "sendmsg"):
            patch.setattr(real, name, guarded(name), raising=False)
        for name in ("create_connection", "getaddrinfo", "gethostbyname"):
            patch.setattr(socket, name, lambda *args, _name=name, **_: refuse(f"{_name}{args}"))
        patch.setattr(socket, "socket", Refused)
        yield
    assert not attempts, attempts


def no_network_process(argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command where no network is, not even a loopback; skip where that is forbidden.

    Args:
        argv: program and arguments.
        options: of ``subprocess.run``.
    """
    command = [*_without_network(), *argv]
    options = {"capture_output": True, "text": True, "timeout": 60, "check": False} | options
    return subprocess.run(command, **options)


@functools.cache
def _without_network() -> tuple[str, ...]:
    for prefix in (("unshare", "--net"), ("unshare", "--map-root-user", "--net")):
        try:
            done = subprocess.run(
                [*prefix, "true"], capture_output=True, text=True, timeout=30, check=False
            )
        except FileNotFoundError:
            pytest.skip("unshare (util-linux) is not installed")
        if done.returncode == 0:
            return prefix
    pytest.skip(f"no network namespace can be made here: {done.stderr.strip()}")


# -- files ---------------------------------------------------------------------------------


def flip_byte(path: str | os.PathLike[str], offset: int = 0, *, keep_times: bool = False) -> None:
    """Change one byte of a file in place, read-only or not; from its end if negative.

    Args:
        path: the file, which keeps its mode.
        offset: of the byte.
        keep_times: let the file's times be as before.
    """
    before = os.stat(path)
    os.chmod(path, stat.S_IMODE(before.st_mode) | stat.S_IWUSR)
    with open(path, "r+b") as file:
        at = file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.chmod(path, stat.S_IMODE(before.st_mode))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def blob_files(root: str | os.PathLike[str]) -> list[Path]:
    """Return the blobs of the cache at ``root``, sorted."""
    return sorted(path for path in Path(root, "blobs").rglob("*") if path.is_file())


def wrong_blobs(root: str | os.PathLike[str]) -> list[Path]:
    """Return the blobs whose content is not what their names say."""
    wrong = []
    for path in blob_files(root):
        algorithm = path.parts[-3]
        if hash_file(str(path), (algorithm,))[algorithm].hex != path.name:
            wrong.append(path)
    return wrong
