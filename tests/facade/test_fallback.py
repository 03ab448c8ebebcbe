"""Several sources of one model: the first that gives it, and a good account of all the others."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import storage.client.base
import storage.facade
from storage import (
    AuthenticationError,
    ConfigurationError,
    DestinationError,
    Digest,
    HTTPConfig,
    InsufficientSpaceError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    OfflineError,
    S3Config,
    Storage,
    StorageClient,
    StorageError,
    TransferError,
    UnreachableError,
    UnsupportedScheme,
    tree_digest,
)
from storage.backends import open_backend
from storage.backends.base import ObjectInfo
from storage.config import load_settings
from tests.facade.stores import MemoryStore, tree_bytes
from tests.servers import CountingProxy, Hub, NginxHTTP, OddHTTP, SeaweedFS, free_port
from tests.servers.nginx_http import put_file
from tests.servers.odd_http import Reply
from tests.transfer.support import Wrapped

TREE = {"config.json": b"{}", "sub/model.bin": b"weights" * 1000}
DATA = TREE["sub/model.bin"]


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


TREE_DIGEST = tree_digest({path: sha256(data) for path, data in TREE.items()})


class S3:
    """A place in a bucket, behind a proxy that counts; what is below ``weak`` has its own."""

    def __init__(self, server: SeaweedFS, bucket: str, prefix: str, stack: ExitStack) -> None:
        self._server, self.bucket, self._prefix = server, bucket, prefix
        self.proxy = stack.enter_context(CountingProxy(server.endpoint))
        self._weak = stack.enter_context(ExitStack())
        self.weak_endpoint = self._weak.enter_context(CountingProxy(server.endpoint)).endpoint

    def stop_weak(self, client: StorageClient) -> None:
        """Let nobody answer any more for what is below ``weak``."""
        self._weak.close()
        # A connection that is open would still be served.
        client.close()

    def put(self, path: str, data: bytes) -> None:
        self._server.put_raw(self.bucket, f"{self._prefix}/{path}", data)

    def put_tree(self, path: str = "model") -> str:
        for name, data in TREE.items():
            self.put(f"{path}/{name}", data)
        return self.uri(path)

    def delete(self, path: str) -> None:
        self._server.delete_raw(self.bucket, f"{self._prefix}/{path}")

    def uri(self, path: str = "model") -> str:
        return f"s3://{self.bucket}/{self._prefix}/{path}"


@pytest.fixture
def s3(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> Iterator[S3]:
    with ExitStack() as stack:
        yield S3(seaweedfs, shared_bucket, prefix, stack)


@pytest.fixture
def client(s3: S3, seaweedfs: SeaweedFS) -> Iterator[StorageClient]:
    """Reaches ``s3``; nobody is where it looks for the bucket ``dead``."""
    keys = {"access_key_id": seaweedfs.access_key, "secret_access_key": seaweedfs.secret_key}
    stores = {
        "alive": keys | {"prefix": f"s3://{s3.bucket}/", "endpoint_url": s3.proxy.endpoint},
        "weak": keys | {"prefix": s3.uri("weak"), "endpoint_url": s3.weak_endpoint},
        "dead": keys | {"prefix": "s3://dead/", "endpoint_url": f"http://127.0.0.1:{free_port()}"},
    }
    settings = load_settings(stores=stores, transfer={"attempts": 1, "connect_timeout": 5})
    with StorageClient(settings=settings) as found:
        yield found


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}"


# -- which source ----------------------------------------------------------------------------


def test_the_first_source_that_works_is_the_only_one_asked(
    client: StorageClient, s3: S3, memory: MemoryStore, out: Path
) -> None:
    memory.put_all({f"model/{path}": data for path, data in TREE.items()})
    mirror = s3.put_tree()
    s3.proxy.clear()
    for sources in ([memory.uri("model"), mirror], (memory.uri("model"), mirror)):
        path = client.download(sources, out / "model")
        assert path == str(out / "model")
        assert tree_bytes(path) == TREE
    assert s3.proxy.requests == []


def test_a_store_that_cannot_be_reached_leads_to_the_next(
    client: StorageClient, s3: S3, out: Path
) -> None:
    mirror = s3.put_tree()
    path = client.download(["s3://dead/model", f"{nobody()}/model", mirror], out / "model")
    assert tree_bytes(path) == TREE
    kept = client.download(["s3://dead/model", mirror])
    assert tree_bytes(kept) == TREE
    assert kept == client.download(mirror)


def test_every_failure_of_a_source_leads_to_the_next(
    client: StorageClient,
    s3: S3,
    seaweedfs: SeaweedFS,
    memory: MemoryStore,
    odd_http: Callable[..., OddHTTP],
    out: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory.put_raw("model.bin", DATA)
    memory.put_raw("damaged.bin", b"damaged")
    refusing = odd_http(lambda request: Reply(403))
    breaking = odd_http(lambda request: Reply(500))
    failing: dict[type[StorageError], str] = {
        ModelMissingError: s3.uri("absent"),
        AuthenticationError: f"{refusing.url}/model.bin",
        TransferError: f"{breaking.url}/model.bin",
        UnreachableError: "s3://dead/model.bin",
        IntegrityError: memory.uri("damaged.bin"),
        UnsupportedScheme: "nonsense://host/model.bin",
        ConfigurationError: "gs://bucket/model.bin",
    }
    sources = [*failing.values(), memory.uri("model.bin")]
    config = {"type": "gs", "service_account_key": "{", "nonsense": 1}
    path = client.download(sources, out / "a", digest=sha256(DATA), config=config)
    assert Path(path).read_bytes() == DATA
    logged = [record for record in caplog.records if record.name == "storage.client.sources"]
    assert [record.levelname for record in logged] == ["WARNING"] * len(failing)
    for (kind, uri), record in zip(failing.items(), logged, strict=True):
        assert f"{uri}: {kind.__name__}: " in record.getMessage()
    with pytest.raises(TransferError) as caught:
        client.download(sources[:-1], out / "b", digest=sha256(DATA), config=config)
    assert type(caught.value) is TransferError
    message = str(caught.value)
    assert f"none of the {len(failing)} sources" in message
    for kind, uri in failing.items():
        assert f"{uri}: {kind.__name__}: " in message
    assert len(message.splitlines()) == 1
    assert isinstance(caught.value.__cause__, ModelMissingError)
    assert os.listdir(out) == ["a"]


def test_a_folder_of_this_machine_is_a_source(
    client: StorageClient, tmp_path: Path, out: Path
) -> None:
    for name, data in TREE.items():
        put_file(tmp_path / "local", name, data)
    here = str(tmp_path / "local")
    assert client.download(["s3://dead/model", here]) == here
    assert client.download([tmp_path / "absent", tmp_path / "local"]) == here
    assert tree_bytes(client.download(["s3://dead/model", here], out / "model")) == TREE


def test_many_models_may_each_have_several_sources(
    client: StorageClient, s3: S3, memory: MemoryStore, out: Path
) -> None:
    memory.put_raw("one", b"1")
    s3.put("two", b"2")
    paths = client.download_many(
        [["s3://dead/one", memory.uri("one")], s3.uri("two"), ("s3://dead/x", s3.uri("two"))],
        [out / "a", out / "b", out / "c"],
    )
    assert [Path(path).read_bytes() for path in paths] == [b"1", b"2", b"2"]


def test_the_facade_takes_several_sources(memory: MemoryStore, out: Path) -> None:
    memory.put_raw("model.bin", DATA)
    path = Storage.download([memory.uri("absent"), memory.uri("model.bin")], out / "model.bin")
    assert Path(path).read_bytes() == DATA


def test_one_source_in_a_list_fails_as_it_does_alone(
    client: StorageClient, memory: MemoryStore, out: Path
) -> None:
    memory.put_raw("model.bin", DATA)
    with pytest.raises(ModelMissingError) as alone:
        client.download(memory.uri("absent"), out / "a")
    with pytest.raises(ModelMissingError) as listed:
        client.download([memory.uri("absent")], out / "a")
    assert str(listed.value) == str(alone.value)


@pytest.mark.parametrize("sources", [[], (), [""], ["s3://bucket/x", None], [["s3://b/x"]]])
def test_a_list_without_a_source_is_refused(client: StorageClient, sources: Any) -> None:
    with pytest.raises(InvalidInput):
        client.download(sources)


# -- the final error -------------------------------------------------------------------------


def test_failures_of_one_type_are_that_type(
    client: StorageClient, s3: S3, memory: MemoryStore, out: Path
) -> None:
    memory.put_raw("model.bin", b"damaged")
    s3.put("model.bin", b"damaged too")
    for kind, sources, options in (
        (UnreachableError, ["s3://dead/m", f"{nobody()}/m"], {}),
        (ModelMissingError, [memory.uri("absent"), s3.uri("absent")], {}),
        # A bucket that is missing is a model that is missing.
        (ModelMissingError, [memory.uri("absent"), "memory://nowhere/m"], {}),
        (IntegrityError, [memory.uri("model.bin"), s3.uri("model.bin")], {"digest": sha256(DATA)}),
        (OfflineError, ["s3://dead/m", memory.uri("absent")], {"offline": True}),
        (TransferError, ["s3://dead/m", memory.uri("absent")], {}),
    ):
        with pytest.raises(kind) as caught:
            client.download(sources, out / "model", **options)
        assert type(caught.value) is kind
        assert type(caught.value.__cause__) is not TransferError
        for uri in sources:
            assert f"{uri}: " in str(caught.value)
    assert os.listdir(out) == []


def test_an_error_of_another_package_is_told_by_a_type_of_ours(
    client: StorageClient, memory: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OddError(TransferError):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(f"{code}:\n{text}")

    class Odd(Wrapped):
        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            raise OddError(7, "https://host.example/x?sig=canary")

    memory.put_raw("m", b"1")
    monkeypatch.setattr(storage.client.base, "open_backend", lambda *args: Odd(open_backend(*args)))
    with pytest.raises(TransferError) as caught:
        client.download([memory.uri("m"), memory.uri("n")])
    assert type(caught.value) is TransferError
    assert f"{memory.uri('m')}: TransferError: 7: https://host.example/x?…" in str(caught.value)


def test_no_message_and_no_log_holds_a_query(
    client: StorageClient, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "canary-5bd1e9"
    sources = [
        f"{nobody()}/m?X-Amz-Signature={secret}",
        f"http://user:{secret}@127.0.0.1:{free_port()}/m",
    ]
    with pytest.raises(UnreachableError) as caught:
        client.download(sources, out / "model")
    assert secret not in f"{caught.value!s} {caught.value!r} {caplog.text}"
    assert "/m?…" in str(caught.value)


def test_nothing_is_printed_in_a_program_without_logging(memory: MemoryStore) -> None:
    code = (
        "import sys; from storage import Storage; from storage.backends.memory import *\n"
        "from storage.backends.base import bytes_payload\n"
        "MemoryBackend('b').write('m', bytes_payload(b'1'))\n"
        "print(Storage.download(['memory://b/absent', 'memory://b/m'], sys.argv[1]))"
    )
    target = os.path.join(os.environ["HOME"], "m")
    done = subprocess.run(
        [sys.executable, "-c", code, target], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr, done.returncode) == (f"{target}\n", "", 0)


# -- what no other source can mend -----------------------------------------------------------


def test_trouble_with_this_machine_ends_the_call_at_once(
    client: StorageClient, s3: S3, memory: MemoryStore, full_disk: Path, out: Path
) -> None:
    memory.put_raw("large", bytes(16 * 1024 * 1024))
    memory.put_raw("tree/a", b"1")
    mirror = s3.put_tree()
    put_file(out, "file", b"")
    put_file(out, "folder/of/others", b"")
    s3.proxy.clear()
    for kind, source, dest in (
        (InsufficientSpaceError, "large", full_disk / "large"),
        (DestinationError, "tree", out / "file" / "below"),
        (ObjectExistsError, "tree", out / "folder"),
    ):
        with pytest.raises(kind) as caught:
            client.download([memory.uri(source), mirror], dest)
        assert type(caught.value) is kind
    assert s3.proxy.requests == []


def test_a_wrong_call_ends_at_once(client: StorageClient, s3: S3, out: Path) -> None:
    mirror = s3.put_tree()
    s3.proxy.clear()
    wrong: tuple[dict[str, Any], ...] = (
        {"digest": "nonsense"},
        {"offline": "sometimes"},
        {"allow_patterns": [""]},
    )
    for options in wrong:
        with pytest.raises(InvalidInput):
            client.download([mirror, mirror], out / "model", **options)
    with pytest.raises(InvalidInput):
        client.download([mirror, "s3://"], out / "model")
    assert s3.proxy.requests == []


# -- digests ---------------------------------------------------------------------------------


def test_one_digest_holds_for_every_source(
    client: StorageClient, s3: S3, memory: MemoryStore, out: Path
) -> None:
    mirror = s3.put_tree()
    memory.put_all({f"model/{path}": data for path, data in TREE.items()})
    memory.put_raw("model/config.json", b"[]")
    wrong = memory.uri("model")
    for sources, digest in (
        ([wrong, mirror], str(TREE_DIGEST)),
        ([wrong, f"{mirror}#sha256={TREE_DIGEST.hex}"], None),
        ([f"{wrong}#sha256={TREE_DIGEST.hex}", mirror], None),
        ([f"{wrong}#sha256={TREE_DIGEST.hex}", f"{mirror}#sha256={TREE_DIGEST.hex}"], TREE_DIGEST),
    ):
        assert tree_bytes(client.download(sources, out / "model", digest=digest)) == TREE
        assert tree_bytes(client.download(sources, digest=digest)) == TREE


def test_digests_that_differ_are_refused_before_anyone_is_asked(
    client: StorageClient, s3: S3
) -> None:
    mirror = s3.put_tree()
    s3.proxy.clear()
    one, other = f"#sha256={'1' * 64}", f"#sha256={'2' * 64}"
    for sources, digest in (
        ([mirror + one, mirror + other], None),
        ([mirror, mirror + one], "sha256:" + "2" * 64),
        # Nobody could tell whether these two mean the same content.
        ([mirror + one, f"{mirror}#blake3={'1' * 64}"], None),
    ):
        with pytest.raises(InvalidInput, match="keep one digest"):
            client.download(sources, digest=digest)
    assert s3.proxy.requests == []


# -- the destination between tries -----------------------------------------------------------


def test_nothing_of_a_failed_source_is_in_the_destination(
    client: StorageClient, s3: S3, odd_http: Callable[..., OddHTTP], memory: MemoryStore, out: Path
) -> None:
    mirror = s3.put_tree()
    memory.put_all({"model/of-the-first-only": b"1", "model/sub/model.bin": b"2"})
    sources = [memory.uri("model"), mirror]
    assert tree_bytes(client.download(sources, out / "model", digest=TREE_DIGEST)) == TREE
    # What was there stays until a source gives all that is to replace it.
    with pytest.raises(StorageError):
        client.download([memory.uri("model"), "s3://dead/m"], out / "model", digest=TREE_DIGEST)
    assert tree_bytes(out / "model") == TREE
    assert os.listdir(out) == ["model"]
    cut = odd_http(lambda request: Reply(body=DATA, cut=100))
    path = client.download([f"{cut.url}/model.bin", f"{mirror}/sub/model.bin"], f"{out}/files/")
    assert Path(path).read_bytes() == DATA
    assert os.listdir(out / "files") == ["model.bin"]


# -- configs ---------------------------------------------------------------------------------


def test_a_config_goes_to_the_sources_of_its_type(
    client: StorageClient, s3: S3, seaweedfs: SeaweedFS, nginx_http: NginxHTTP, out: Path
) -> None:
    put_file(nginx_http.data, "fallback/model.bin", DATA)
    web = f"{nginx_http.endpoint}/fallback/model.bin"
    s3.put("model.bin", DATA)
    dead = S3Config("key", "secret", endpoint_url=nobody())
    alive = S3Config(seaweedfs.access_key, seaweedfs.secret_key, endpoint_url=seaweedfs.endpoint)
    mapping = {"access_key_id": "key", "secret_access_key": "secret", "endpoint_url": nobody()}
    for config in (dead, mapping | {"type": "s3"}):
        s3.proxy.clear()
        # The config goes before the settings, by which the bucket could be reached.
        with pytest.raises(StorageError):
            client.download(s3.uri("model.bin"), out / "a", config=config)
        path = client.download([s3.uri("model.bin"), web], out / "a", config=config)
        assert Path(path).read_bytes() == DATA
        assert s3.proxy.requests == []
    for typed in (alive, HTTPConfig()):
        path = client.download([f"{nobody()}/x", "/absent", s3.uri("model.bin")], config=typed)
        assert Path(path).read_bytes() == DATA
    local = put_file(out, "local", DATA)
    path = client.download(["s3://dead/model.bin", local], config=mapping)
    assert path == str(local)


def test_a_config_that_is_for_none_of_them_is_an_error(client: StorageClient, s3: S3) -> None:
    mirror = s3.put_tree()
    s3.proxy.clear()
    for sources, config, words in (
        ([mirror, mirror], HTTPConfig(), "HTTPConfig"),
        ([mirror, mirror], {"type": "gs"}, "none of the sources"),
        ([mirror, f"{nobody()}/m"], {"region": "eu-west-1"}, "add its type"),
        (["/absent", "memory://b/k"], {"region": "eu-west-1"}, "none of the sources"),
        ([mirror, mirror], {"type": "no type!"}, "type"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            client.download(sources, config=config)
    assert s3.proxy.requests == []


# -- offline ---------------------------------------------------------------------------------


def test_offline_the_cached_copies_are_looked_for_in_turn(
    client: StorageClient, s3: S3, out: Path
) -> None:
    mirror = s3.put_tree()
    kept = client.download(mirror)
    s3.proxy.clear()
    assert client.download(["s3://dead/model", mirror], offline=True) == kept
    assert tree_bytes(client.download(["s3://dead/model", mirror], out / "m", offline=True)) == TREE
    with pytest.raises(OfflineError) as caught:
        client.download(["s3://dead/model", s3.uri("other")], offline=True)
    assert s3.uri("other") in str(caught.value)
    assert s3.proxy.requests == []


def test_a_live_mirror_wins_over_an_old_copy(client: StorageClient, s3: S3) -> None:
    primary, mirror = s3.put_tree("weak/model"), s3.put_tree("mirror")
    old = client.download(primary)
    s3.put("mirror/config.json", b"new")
    s3.stop_weak(client)
    new = client.download([primary, "s3://dead/m", mirror], offline="auto")
    assert tree_bytes(new) == TREE | {"config.json": b"new"}
    assert tree_bytes(old) == TREE


def test_the_cache_comes_last_and_only_for_stores_that_cannot_be_reached(
    client: StorageClient, s3: S3
) -> None:
    primary, gone = s3.put_tree("weak/model"), s3.put_tree("gone")
    kept = client.download(primary)
    client.download(gone)
    for path in TREE:
        s3.delete(f"gone/{path}")
    s3.stop_weak(client)
    # The store says that it is gone: a copy of it is not what was asked for.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TransferError):
            client.download(["s3://dead/m", gone], offline="auto")
    with pytest.warns(RuntimeWarning, match="the cached copy is used") as caught:
        found = client.download([gone, "s3://dead/m", primary], offline="auto")
    assert found == kept
    assert primary in str(caught[0].message)
    with pytest.raises(UnreachableError) as failed:
        client.download(["s3://dead/m", s3.uri("weak/never")], offline="auto")
    assert s3.uri("weak/never") in str(failed.value)
    with pytest.raises(UnreachableError):
        client.download(["s3://dead/m", primary], offline=False)


def test_the_warning_points_at_the_caller(
    client: StorageClient, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = s3.put_tree("weak/model")
    client.download(primary)
    s3.stop_weak(client)
    monkeypatch.setattr(storage.facade, "_client", client)
    for download in (Storage.download, client.download):
        with pytest.warns(RuntimeWarning) as caught:
            download(["s3://dead/m", primary], offline="auto")
        assert caught[0].filename == __file__


def test_the_switch_of_the_hub_keeps_to_the_cache_for_the_hub_alone(
    client: StorageClient, s3: S3, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.repo("owner/model")
    hub.put(repo, TREE)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    mirror = s3.put_tree("mirror")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for offline in (None, "auto"):
        assert tree_bytes(client.download(["hf://owner/model", mirror], offline=offline)) == TREE
    with pytest.raises(TransferError) as caught:
        client.download(["hf://owner/model", "s3://dead/m"], offline="auto")
    assert "hf://owner/model: OfflineError" in str(caught.value)
    assert "s3://dead/m: UnreachableError" in str(caught.value)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    kept = client.download("hf://owner/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    s3.put("mirror/config.json", b"new")
    assert client.download(["hf://owner/model", mirror]) == kept
    new = client.download(["hf://owner/model", mirror], offline="auto")
    assert tree_bytes(new) == TREE | {"config.json": b"new"}


def test_log_records_are_those_of_the_library(
    client: StorageClient, memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    memory.put_raw("m", b"1")
    with caplog.at_level(logging.ERROR, "storage"):
        client.download([memory.uri("absent"), memory.uri("m")])
    assert caplog.records == []
