"""Where the files of a case are, and the servers that keep them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from tests.servers import Azurite, FakeGCS, ForwardProxy, Hub, Moto, SeaweedFS
from tests.servers.process import HOST
from tests.servers.tls import TlsFront

ACCOUNT_HOST = f"{Azurite.main.name}.blob.core.windows.net"
T = TypeVar("T")

Files = Mapping[str, "bytes | Page"]


@dataclass(frozen=True)
class Page:
    """What the HTTP server answers for a path.

    Attributes:
        body: of the answer.
        kind: its ``Content-Type``.
        headers: more of its headers.
        wanted: headers that a request must have; 401 without.
        status: of the answer.
        cut: bytes after which the connection is cut, each time.
    """

    body: bytes
    kind: str = "application/octet-stream"
    headers: Mapping[str, str] = field(default_factory=dict)
    wanted: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    cut: int | None = None


@dataclass
class Place:
    """Where a case's files are.

    Attributes:
        root: the URI of all of them.
        environment: leads a client to the store; a case adds to it.
        names: what the templates of a case may name.
    """

    root: str
    environment: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class Servers:
    """Servers that start when the first case needs them."""

    def __init__(self, scratch: Path, get: Callable[[str], object]) -> None:
        """Take the servers from pytest as they are needed, by ``get``."""
        self._scratch = scratch
        self._get = get
        self._stack = ExitStack()
        self._made: dict[str, object] = {}

    def close(self) -> None:
        """Stop what was started here."""
        self._stack.close()

    @property
    def seaweedfs(self) -> SeaweedFS:
        """The main S3 server."""
        server = self._get("seaweedfs")
        assert isinstance(server, SeaweedFS)
        return server

    @property
    def moto(self) -> Moto:
        """The S3 server that keeps keys literally."""
        server = self._get("moto")
        assert isinstance(server, Moto)
        return server

    @property
    def gcs(self) -> FakeGCS:
        """The GCS server."""
        server = self._get("gcs_server")
        assert isinstance(server, FakeGCS)
        return server

    @property
    def azurite(self) -> Azurite:
        """The Azure server."""
        server = self._get("azurite")
        assert isinstance(server, Azurite)
        return server

    @property
    def hub(self) -> Hub:
        """The Hub."""
        server = self._get("module_hub")
        assert isinstance(server, Hub)
        return server

    def _front(self, name: str, target: str, *more: str) -> TlsFront:
        hosts = (HOST, "localhost", f"*.{ACCOUNT_HOST.partition('.')[2]}", *more)
        start = TlsFront(target, hosts=hosts)
        return self._once(name, lambda: self._stack.enter_context(start))

    def _proxy(self, name: str, hosts: dict[str, tuple[str, int]]) -> ForwardProxy:
        return self._once(name, lambda: self._stack.enter_context(ForwardProxy(hosts=hosts)))

    def _bundle(self, name: str, certificate: Path) -> Path:
        """Return a folder like a mounted ConfigMap of authorities."""
        folder = self._scratch / name
        folder.mkdir(exist_ok=True)
        shutil.copy(certificate, folder / "cabundle.crt")
        return folder

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """Return what was made under a name; make it now if it was not."""
        if name not in self._made:
            self._made[name] = make()
        made: Any = self._made[name]
        return cast("T", made)


def write(folder: Path, files: Files) -> None:
    """Write files below a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        assert isinstance(content, bytes)
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
