"""The stores of the cases: what is put where, and which variables lead a client there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from tests.servers import (
    Azurite,
    FakeGCS,
    ForwardProxy,
    Hub,
    Moto,
    NginxHTTP,
    OddHTTP,
    Reply,
    Request,
    S3Server,
    SeaweedFS,
    free_port,
)
from tests.servers.process import HOST
from tests.servers.seaweedfs import PUBLIC_BUCKET, READABLE_BUCKET
from tests.servers.tls import TlsFront

BUCKET = "kserve"
ACCOUNT_HOST = f"{Azurite.main.name}.blob.core.windows.net"
S3_HOST = "s3.models.example"

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


class Pages:
    """A handler of ``OddHTTP``: pages by their targets."""

    def __init__(self) -> None:
        """Begin with none."""
        self.pages: dict[str, Page] = {}

    def __call__(self, request: Request) -> Reply:
        """Answer a request."""
        page = self.pages.get(request.target)
        if page is None:
            return Reply(404)
        if any(request.headers.get(name) != value for name, value in page.wanted.items()):
            return Reply(401)
        headers = {"Content-Type": page.kind, **page.headers}
        return Reply(page.status, page.body, headers, cut=page.cut)


class Stores:
    """All servers that the cases need, and how to fill them."""

    def __init__(self, scratch: Path, get: Callable[[str], object]) -> None:
        """Take the servers from pytest as they are needed, by ``get``."""
        self._scratch = scratch
        self._get = get
        self._stack = ExitStack()
        self._made: dict[str, object] = {}

    def close(self) -> None:
        """Stop what was started here."""
        self._stack.close()

    def place(self, store: str, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Put a case's files into a store.

        Args:
            store: which one, by the name of a method here.
            name: a word that only this case has.
            files: path to content, below the place.
            claims: the volumes that the programs see as ``/mnt/pvc``.
        """
        # On the stores where the old program mixes siblings up, a folder keeps the cases apart.
        put: Callable[..., Place] = getattr(self, f"_{store}")
        return put(name, files, claims)

    def common(self) -> dict[str, str]:
        """Return the names that the templates of every case may hold."""
        shared = self._scratch / "shared"
        _write(shared, {"shared.bin": b"shared"})
        return {"closed": str(free_port()), "shared": str(shared)}

    # --- S3 -------------------------------------------------------------------------------------

    def _s3(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._once(BUCKET, lambda: self._stack.enter_context(self.seaweedfs.bucket(BUCKET)))
        return self._objects(self.seaweedfs, BUCKET, f"{name}/m", files)

    def _bucket(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.seaweedfs.bucket(name))
        return self._objects(self.seaweedfs, name, "", files)

    def _literal(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use an S3 server that keeps every key as it is, and looks at no signature."""
        self._once("moto", lambda: self._stack.enter_context(self.moto.bucket(BUCKET)))
        return self._objects(self.moto, BUCKET, f"{name}/m", files)

    def _public(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._get("public_bucket")
        place = self._objects(self.seaweedfs, PUBLIC_BUCKET, f"{name}/m", files)
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del place.environment[variable]
        return place

    def _readable(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use keys that may read objects, and neither list nor ask for the bucket."""
        self._get("readable_bucket")
        place = self._objects(self.seaweedfs, READABLE_BUCKET, f"{name}/m", files)
        reader = self.seaweedfs.reader
        place.environment["AWS_ACCESS_KEY_ID"] = reader.access_key
        place.environment["AWS_SECRET_ACCESS_KEY"] = reader.secret_key
        return place

    def _secure(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use S3 over TLS, signed by an authority that nobody knows yet."""
        place = self._s3(name, files, claims)
        front = self._front("s3-tls", self.seaweedfs.endpoint)
        folder = self._bundle("s3-authority", front.ca_file)
        place.environment["AWS_ENDPOINT_URL"] = front.endpoint
        place.names |= {
            "ca": str(front.ca_file),
            "bundles": str(folder),
            "host": f"{HOST}:{front.port}",
        }
        return place

    def _virtual(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use S3 where the bucket is a part of the host's name; a proxy alone knows the hosts."""
        place = self._literal(name, files, claims)
        hosts = {f"{BUCKET}.{S3_HOST}": (HOST, self.moto.port)}
        proxy = self._proxy("s3-proxy", hosts)
        place.environment |= {"AWS_ENDPOINT_URL": f"http://{S3_HOST}", "HTTP_PROXY": proxy.url}
        return place

    def _objects(self, server: S3Server, bucket: str, prefix: str, files: Files) -> Place:
        for path, content in files.items():
            assert isinstance(content, bytes)
            server.put_raw(bucket, f"{prefix}/{path}".lstrip("/"), content)
        environment = {
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_DEFAULT_REGION": server.region,
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
        }
        config = {
            "type": "s3",
            "access_key_id": server.access_key,
            "endpoint_url": server.endpoint,
            "region": server.region,
            "secret_access_key": server.secret_key,
        }
        keys = f"aws_access_key_id={server.access_key}\naws_secret_access_key={server.secret_key}"
        (self._scratch / "credentials").write_text(f"[models]\n{keys}\n")
        names = {
            "bucket": bucket,
            "config": json.dumps(config),
            "credentials": str(self._scratch / "credentials"),
            "endpoint": server.endpoint,
            "host": f"{HOST}:{server.port}",
        }
        return Place(f"s3://{bucket}/{prefix}".rstrip("/"), environment, names)

    # --- the others -----------------------------------------------------------------------------

    def _gcs(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._once("gcs", lambda: self._stack.enter_context(self.gcs.bucket(BUCKET)))
        return self._gcs_objects(BUCKET, name, files)

    def _gcs_bucket(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.gcs.bucket(name))
        return self._gcs_objects(name, "", files)

    def _gcs_objects(self, bucket: str, prefix: str, files: Files) -> Place:
        for path, content in files.items():
            assert isinstance(content, bytes)
            self.gcs.put_raw(bucket, f"{prefix}/{path}".lstrip("/"), content)
        environment = {"STORAGE_EMULATOR_HOST": self.gcs.endpoint}
        return Place(f"gs://{bucket}/{prefix}".rstrip("/"), environment, {"bucket": bucket})

    def _azure(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._once("azure", lambda: self._stack.enter_context(self.azurite.container(BUCKET)))
        return self._blobs(BUCKET, f"{name}/m", files)

    def _azure_container(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.azurite.container(name))
        return self._blobs(name, "", files)

    def _azure_public(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.azurite.container(name, public=True))
        place = self._blobs(name, "m", files)
        del place.environment["AZURE_STORAGE_ACCESS_KEY"]
        return place

    def _azure_token(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use an account that takes tokens of Entra, as Azurite does over TLS alone."""
        server = self._get("azurite_tls")
        assert isinstance(server, Azurite)
        self._stack.enter_context(server.container(name))
        place = self._blobs(name, "m", files, server)
        del place.environment["AZURE_STORAGE_ACCESS_KEY"]
        place.names["token"] = server.bearer()
        return place

    def _blobs(
        self, container: str, prefix: str, files: Files, server: Azurite | None = None
    ) -> Place:
        server = server or self.azurite
        for path, content in files.items():
            assert isinstance(content, bytes)
            server.put_raw(container, f"{prefix}/{path}".lstrip("/"), content)
        front = self._front(f"{server.port}-tls", server.endpoint)
        proxy = self._proxy(f"{server.port}-proxy", {ACCOUNT_HOST: (HOST, front.port)})
        environment = {
            "AZURE_STORAGE_ACCESS_KEY": server.main.key,
            "HTTPS_PROXY": proxy.url,
            "SSL_CERT_FILE": str(front.ca_file),
        }
        names = {
            "bundles": str(self._bundle(f"{server.port}-authority", front.ca_file)),
            "ca": str(front.ca_file),
            "container": f"https://{ACCOUNT_HOST}/{container}",
            "sas": server.sas("rl"),
            "other_key": server.other.key,
        }
        root = f"https://{ACCOUNT_HOST}/{container}/{prefix}".rstrip("/")
        return Place(root, environment, names)

    def _http(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        pages = self._once("pages", Pages)
        server = self._once("http", lambda: self._stack.enter_context(OddHTTP(pages)))
        for path, content in files.items():
            page = content if isinstance(content, Page) else Page(content)
            pages.pages[f"/{name}/{path}"] = page
        return Place(f"{server.url}/{name}", {}, {"origin": server.url})

    def _proxied(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use the same server by a host that a proxy alone knows."""
        place = self._http(name, files, claims)
        port = int(place.names["origin"].rpartition(":")[2])
        proxy = self._proxy("http-proxy", {"models.example": (HOST, port)})
        return Place(f"http://models.example/{name}", {"HTTP_PROXY": proxy.url})

    def _nginx(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use a real web server, over HTTP and TLS."""
        server = self._get("nginx_http")
        assert isinstance(server, NginxHTTP)
        _write(server.data / name, files)
        names = {
            "bundles": str(self._bundle("nginx-authority", Path(server.ca_file))),
            "ca": server.ca_file,
            "tls": f"{server.tls}/{name}",
            "odd": server.odd,
            "name": name,
        }
        return Place(f"{server.endpoint}/{name}", {}, names)

    def _hf(self, name: str, files: Files, claims: Sequence[Path], private: bool = False) -> Place:
        """Use a Hub; files below ``v1:`` are those of the branch, the tag and a pull request."""
        repo = self.hub.repo(f"owner/{name}", private=private)
        first, last = _of_revisions(files)
        commit = self.hub.put(repo, first or last)
        repo.branches["v1"] = repo.tags["1.0"] = repo.pulls["refs/pr/1"] = commit.id
        if first:
            self.hub.put(repo, last)
        names = {"commit": commit.id, "token": self.hub.writer.token}
        return Place(f"hf://owner/{name}", {"HF_ENDPOINT": self.hub.url}, names)

    def _hf_private(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        return self._hf(name, files, claims, private=True)

    def _hf_short(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use a model without an owner, as the oldest ones are."""
        repo = self.hub.repo(name)
        self.hub.put(repo, _of_revisions(files)[1])
        return Place(f"hf://{name}", {"HF_ENDPOINT": self.hub.url})

    def _local(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        folder = self._scratch / "local" / name
        _write(folder, files)
        return Place(str(folder))

    def _claim(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        for claim in claims:
            _write(claim / name, files)
        return Place(f"/mnt/pvc/{name}", {}, {"name": name})

    # --- servers --------------------------------------------------------------------------------

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

    def _front(self, name: str, target: str) -> TlsFront:
        start = TlsFront(target, hosts=(HOST, "localhost", f"*.{ACCOUNT_HOST.partition('.')[2]}"))
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


def _of_revisions(files: Files) -> tuple[dict[str, bytes], dict[str, bytes]]:
    first: dict[str, bytes] = {}
    last: dict[str, bytes] = {}
    for path, content in files.items():
        assert isinstance(content, bytes)
        of, name = (first, path[3:]) if path.startswith("v1:") else (last, path)
        of[name] = content
    return first, last


def _write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        assert isinstance(content, bytes)
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@contextmanager
def stores(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Stores]:
    """Offer the stores; their servers start when the first case needs them."""
    found = Stores(scratch, request.getfixturevalue)
    try:
        yield found
    finally:
        found.close()
