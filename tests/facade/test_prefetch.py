"""Prefetching: what a file names is in the cache afterwards, whatever becomes of the rest."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import storage.client.base
from storage import (
    ConfigurationError,
    HTTPConfig,
    IntegrityError,
    InvalidInput,
    LockFile,
    ModelMissingError,
    StorageClient,
    StorageError,
)
from storage.backends import open_backend
from storage.backends.base import Body, ByteRange, ObjectInfo
from storage.cache.blobs import set_mark
from storage.config import load_settings
from tests.facade.stores import MemoryStore, S3Store, Store, tree_bytes
from tests.servers import NginxHTTP, free_port
from tests.servers.nginx_http import put_file
from tests.transfer.support import Wrapped

TREE = {"a": b"1", "sub/b": b"22"}


@pytest.fixture
def memory() -> MemoryStore:
    store = MemoryStore()
    store.put_all({f"tree/{path}": data for path, data in TREE.items()})
    store.put_all({"one": b"one", "two": b"two"})
    return store


@pytest.fixture
def client() -> Iterator[StorageClient]:
    settings = load_settings(transfer={"attempts": 1, "connect_timeout": 5})
    with StorageClient(settings=settings) as found:
        yield found


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Write a list and return its path."""

    def make(text: str | bytes) -> Path:
        path = tmp_path / "models.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_everything_that_a_list_names_is_cached_in_its_order(
    client: StorageClient, memory: MemoryStore, write: Callable[[str], Path]
) -> None:
    file = write(
        f"# models of this node\n\n{memory.uri('tree')}\n"
        f"   \t\n  # indented\r\n{memory.uri('one')}#sha256={sha256(b'one')}\r\n"
        f"  {memory.uri('two')}  "
    )
    results = client.prefetch(file)
    assert [result.uri for result in results] == [
        memory.uri("tree"),
        memory.uri("one"),
        memory.uri("two"),
    ]
    assert [result.error for result in results] == [None] * 3
    paths = [result.path or "" for result in results]
    assert tree_bytes(paths[0]) == TREE
    assert [Path(path).read_bytes() for path in paths[1:]] == [b"one", b"two"]
    assert paths == [client.download(result.uri, offline=True) for result in results]
    assert client.prefetch(str(file)) == results


def test_a_failure_does_not_keep_others_from_coming(
    client: StorageClient, memory: MemoryStore, write: Callable[[str], Path]
) -> None:
    lines = [
        memory.uri("absent"),
        memory.uri("one"),
        f"{memory.uri('two')}#sha256={'0' * 64}",
        f"http://127.0.0.1:{free_port()}/x?sig=canary",
        memory.uri("tree"),
    ]
    for jobs in (1, 4):
        results = client.prefetch(write("\n".join(lines)), jobs=jobs)
        assert [result.path is None for result in results] == [True, False, True, True, False]
        errors = [result.error for result in results]
        assert isinstance(errors[0], ModelMissingError)
        assert isinstance(errors[2], IntegrityError)
        assert isinstance(errors[3], StorageError)
        assert errors[1] is errors[4] is None
        assert "canary" not in f"{results}"


def test_several_sources_of_a_line_are_of_one_model(
    client: StorageClient, memory: MemoryStore, write: Callable[[str], Path]
) -> None:
    absent, one = memory.uri("absent"), memory.uri("one")
    results = client.prefetch(write(f"{absent} {one}\n{absent}\t{absent}\n"))
    assert [result.uri for result in results] == [f"{absent} {one}", f"{absent} {absent}"]
    assert Path(results[0].path or "").read_bytes() == b"one"
    assert "none of the 2 sources" in str(results[1].error)


def test_a_lock_is_prefetched_exactly(
    client: StorageClient, memory: MemoryStore, write: Callable[[str], Path]
) -> None:
    lock = client.lock([memory.uri("tree"), memory.uri("one")], ignore_patterns="s*")
    memory.put_raw("one", b"changed")
    with StorageClient(settings=load_settings(cache_dir=os.environ["HOME"] + "/other")) as fresh:
        tree, one = fresh.prefetch(write(lock.dumps()))
        assert tree.error is None
        assert tree_bytes(tree.path or "") == {"a": b"1"}
        assert fresh.download_locked(lock, tree.uri, offline=True) == tree.path
    assert one.path is None
    assert isinstance(one.error, IntegrityError)
    assert one.uri == memory.uri("one")


def test_what_is_prefetched_needs_no_check_after_a_power_cut(
    client: StorageClient, memory: MemoryStore, tmp_path: Path, write: Callable[[str], Path]
) -> None:
    def synced(found: StorageClient) -> list[bool]:
        marks = []
        for digest, blob in found.cache.upper.blobs.all():
            (tmp_path / "mark").touch()
            set_mark(str(tmp_path / "mark"), digest, durable=True)
            marks.append(blob.st_mtime_ns == (tmp_path / "mark").stat().st_mtime_ns)
        return marks

    lock = client.lock(memory.uri("tree"))
    assert synced(client) == [False, False]
    with StorageClient(settings=load_settings(cache_dir=tmp_path / "other")) as fresh:
        for text, count in ((lock.dumps(), 2), (f"{memory.uri('absent')} {memory.uri('one')}", 3)):
            assert [result.error for result in fresh.prefetch(write(text))] == [None]
            assert synced(fresh) == [True] * count


def test_what_is_prefetched_can_be_pinned(
    client: StorageClient, memory: MemoryStore, tmp_path: Path, write: Callable[[str], Path]
) -> None:
    local = put_file(tmp_path / "local", "m", b"local")
    absent, tree = memory.uri("absent"), memory.uri("tree")
    lines = [f"{absent} {memory.uri('one')}", tree, str(local), absent]
    results = client.prefetch(write("\n".join(lines)), pin=True)
    assert [result.path is None for result in results] == [False, False, False, True]
    pinned = [memory.uri("one"), tree]
    assert sorted(pin.uri for pin in client.cache.pins.all()) == sorted(pinned)
    client.prefetch(write(memory.uri("two")))
    lock = client.lock(memory.uri("two"))
    assert client.prefetch(write(lock.dumps()), pin=True)[0].error is None
    pinned.append(memory.uri("two"))
    assert sorted(pin.uri for pin in client.cache.pins.all()) == sorted(pinned)


def test_an_empty_list_is_nothing_to_do(
    client: StorageClient, write: Callable[[str], Path]
) -> None:
    assert client.prefetch(write("# nothing\n\n")) == []
    assert client.prefetch(write(""), config=HTTPConfig()) == []
    assert client.prefetch(write(LockFile(()).dumps())) == []


def test_a_config_goes_to_the_lines_of_its_type(
    client: StorageClient,
    memory: MemoryStore,
    make_store: Callable[[str], Store],
    nginx_http: NginxHTTP,
    prefix: str,
    write: Callable[[str], Path],
) -> None:
    s3 = make_store("seaweedfs-obstore")
    assert isinstance(s3, S3Store)
    s3.put_raw("model.bin", b"s3")
    put_file(nginx_http.data, f"{prefix}/m.bin", b"web")
    web = f"{nginx_http.endpoint}/{prefix}/m.bin"
    lines = [memory.uri("one"), s3.uri("model.bin"), f"{web} {s3.uri('model.bin')}"]
    results = client.prefetch(write("\n".join(lines)), config=s3.config)
    assert [Path(result.path or "").read_bytes() for result in results] == [b"one", b"s3", b"web"]
    with pytest.raises(ConfigurationError, match="none of the sources"):
        client.prefetch(write(memory.uri("one")), config=s3.config)


def test_no_more_models_than_asked_for_come_at_once(
    client: StorageClient, write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    store.put_all({str(number): b"%d" % number for number in range(9)})
    lock, together = threading.Lock(), threading.Barrier(3)
    now, most = 0, 0

    class Meets(Wrapped):
        """Answers three readers at a time, and notes how many there are."""

        def read(
            self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None
        ) -> Body:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            together.wait(60)
            body: Body = self.inner.read(key, span, pin)
            with lock:
                now -= 1
            return body

    make = open_backend
    monkeypatch.setattr(storage.client.base, "open_backend", lambda *args: Meets(make(*args)))
    text = "\n".join(store.uri(str(number)) for number in range(9))
    results = client.prefetch(write(text), jobs=3)
    assert [result.error for result in results] == [None] * 9
    assert most == 3
    with pytest.raises(InvalidInput, match="jobs is 0"):
        client.prefetch(write(text), jobs=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory://b/one\ns3://\n", "line 2: .*s3://"),
        ("# comment\n\nmemory://b/one memory://\n", "line 3: "),
        (b"memory://b/one\n\n\xff\n", "line 3: it is not UTF-8 text"),
        ("memory://b/o\0ne\n", "line 1: .*NUL"),
        (
            f"memory://b/1\nmemory://b/1#sha256={'1' * 64} memory://b/2#sha256={'2' * 64}",
            "line 2: .*keep one digest",
        ),
        ('{"version": 1}', "models is missing"),
        ('  \n{"version": 9, "models": []}', "expected version 1"),
    ],
)
def test_whatever_is_wrong_in_a_list_is_named_and_nothing_is_fetched(
    client: StorageClient, write: Callable[[str | bytes], Path], text: str | bytes, words: str
) -> None:
    file = write(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        client.prefetch(file)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value).splitlines()) == 1
    assert not os.path.exists(os.environ["STORAGE_CACHE_DIR"])


def test_a_list_that_cannot_be_read_is_named(client: StorageClient, tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read") as caught:
            client.prefetch(path)
        assert str(path) in str(caught.value)
