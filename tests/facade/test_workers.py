"""Worker processes of one model server start at once, and the model is fetched once for all."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage
from storage import StorageClient, tree_digest
from storage.config import reveal
from storage.digest import hash_file
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from tests.facade.stores import S3Store, Store, noted_bytes
from tests.servers.proxy import CountingProxy

WORKERS = 16
MIB = 1024 * 1024
# What requests may cost beside the bodies of the model: listings, and answers to HEAD.
BESIDE = 256 * 1024

# A worker as of a model server: it downloads, looks at all that it got, and tells what it saw.
# What is at the path at any time is whole: the first look may be at what another one put there.
WORKER = """
import json, os, sys
from storage import Storage, tree_digest
from storage.digest import hash_file
from storage.transfer.destination import NOT_OF_TREE

def digest_of(path):
    if os.path.isfile(path):
        return str(hash_file(path, ("sha256",))["sha256"])
    found = {}
    for root, folders, files in os.walk(path):
        # Where entries move one by one, who waits for a turn does so in there.
        folders[:] = [name for name in folders if not NOT_OF_TREE.fullmatch(name)]
        for name in files:
            file = os.path.join(root, name)
            found[os.path.relpath(file, path)] = hash_file(file, ("sha256",))["sha256"]
    return str(tree_digest(found, "sha256"))

def work(index, uri, dest, options, out):
    try:
        path = Storage.download(uri, dest, **options)
        result = {"path": path, "digest": digest_of(path)}
    except BaseException as exc:
        result = {"error": f"{type(exc).__name__}: {exc}"}
    with open(f"{out}/{index}.tmp", "w") as file:
        json.dump(result, file)
    os.rename(f"{out}/{index}.tmp", f"{out}/{index}.json")
"""

FORKED = (
    WORKER
    + """
import signal, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads
uri, dest, options, out, count, warm = json.loads(sys.argv[1])
if warm:
    # The parent's connections, threads and locks must not be the children's.
    Storage.download(warm)
read, write = os.pipe()
children = []
for index in range(count):
    child = os.fork()
    if child == 0:
        try:
            os.close(write)
            signal.alarm(240)
            os.read(read, 1)  # all at once: when the parent lets go of the other end
            work(index, uri, dest, options, out)
        finally:
            os._exit(0)
    children.append(child)
os.close(write)
for child in children:
    os.waitpid(child, 0)
"""
)

SPAWNED = (
    WORKER
    + """
import multiprocessing
def run(index, barrier, *arguments):
    barrier.wait(240)
    work(index, *arguments)

if __name__ == "__main__":
    uri, dest, options, out, count, _ = json.loads(sys.argv[1])
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    children = [
        context.Process(target=run, args=(index, barrier, uri, dest, options, out))
        for index in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
"""
)


class Server:
    """A model server of sixteen workers, as a program of its own."""

    def __init__(self, store: Store, config: Any, folder: Path) -> None:
        fields = {
            field: reveal(value)
            for field, value in config
            if field in config.model_fields_set and value is not None
        }
        kind = {"type": store.base.partition("://")[0]}
        self._environment = os.environ | {
            "PYTHONPATH": str(Path(storage.__file__).parents[1]),
            "STORAGE_CONFIG": json.dumps(kind | fields),
        }
        self._folder = folder

    def start(
        self,
        kind: str,
        uri: str,
        dest: Path | str | None = None,
        *,
        count: int = WORKERS,
        warm: str | None = None,
        cwd: Path | None = None,
        **options: Any,
    ) -> list[dict[str, str]]:
        """Start ``count`` workers at once, forked or spawned; return what each of them saw."""
        out = self._folder / f"told-{time.monotonic_ns()}"
        out.mkdir()
        program = out / "server.py"
        program.write_text(FORKED if kind == "fork" else SPAWNED)
        target = None if dest is None else str(dest)
        asked = json.dumps([uri, target, options, str(out), count, warm])
        done = subprocess.run(
            [sys.executable, str(program), asked],
            env=self._environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads((out / f"{index}.json").read_text()) for index in range(count)]

    def one(self, uri: str, dest: Path | None, out: Path) -> subprocess.Popen[bytes]:
        """Start one worker and do not wait for it; it tells in ``out``."""
        out.mkdir()
        call = f"{WORKER}\nwork(0, *json.loads(sys.argv[1]))"
        target = None if dest is None else str(dest)
        asked = json.dumps([uri, target, {}, str(out)])
        return subprocess.Popen([sys.executable, "-c", call, asked], env=self._environment)


@pytest.fixture
def s3(make_store: Callable[[str], Store]) -> S3Store:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    return store


@pytest.fixture
def proxy(s3: S3Store) -> Iterator[CountingProxy]:
    with CountingProxy(s3.server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def server(s3: S3Store, proxy: CountingProxy, tmp_path: Path) -> Server:
    return Server(s3, s3.through(proxy.endpoint), tmp_path)


def put_tree(store: Store) -> tuple[dict[str, bytes], str, int]:
    """Store a model of some files; return them, their digest and their size."""
    files = {f"tree/{index}/weights": os.urandom(700_000) for index in range(8)}
    files["tree/large"] = os.urandom(6 * MIB)
    files["tree/config.json"] = b"{}"
    store.put_all(files)
    return files, digest_of(files), sum(map(len, files.values()))


def digest_of(files: dict[str, bytes], prefix: str = "tree/") -> str:
    found = {
        name.removeprefix(prefix): hash_file(io.BytesIO(data), ("sha256",))["sha256"]
        for name, data in files.items()
    }
    return str(tree_digest(found, "sha256"))


def assert_all_saw(told: list[dict[str, str]], digest: str) -> set[str]:
    """Check that every worker saw the whole model; return the paths where they did."""
    assert [each.get("error") for each in told] == [None] * len(told)
    assert {each["digest"] for each in told} == {digest}
    return {each["path"] for each in told}


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_sixteen_workers_that_start_at_once_fetch_a_model_once_into_the_cache(
    server: Server, s3: S3Store, proxy: CountingProxy, kind: str
) -> None:
    _, digest, size = put_tree(s3)
    told = server.start(kind, s3.uri("tree/"))
    assert len(assert_all_saw(told, digest)) == 1
    assert size <= proxy.answered < size + BESIDE


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_sixteen_workers_that_start_at_once_fetch_a_model_once_to_one_destination(
    server: Server, s3: S3Store, proxy: CountingProxy, kind: str, out: Path
) -> None:
    _, digest, size = put_tree(s3)
    told = server.start(kind, s3.uri("tree/"), out / "model")
    assert assert_all_saw(told, digest) == {str(out / "model")}
    assert size <= proxy.answered < size + BESIDE
    assert os.listdir(out) == ["model"]


def test_a_folder_that_cannot_be_replaced_is_filled_once_by_sixteen_workers(
    server: Server, s3: S3Store, proxy: CountingProxy, out: Path
) -> None:
    """As KServe's /mnt/models is a mount point, so that its entries move one by one."""
    _, digest, size = put_tree(s3)
    models = out / "models"
    models.mkdir()
    (models / "lost+found").mkdir()
    inode = models.stat().st_ino
    told = server.start("fork", s3.uri("tree/"), f"{models}/", cwd=models)
    assert len(assert_all_saw(told, digest)) == 1
    assert proxy.answered < size + BESIDE
    assert models.stat().st_ino == inode
    assert leftovers(models) == leftovers(out) == []


@pytest.mark.parametrize("dest", [False, True], ids=["cache", "destination"])
def test_sixteen_workers_fetch_an_archive_once_and_all_see_all_of_what_was_in_it(
    server: Server, s3: S3Store, proxy: CountingProxy, out: Path, dest: bool
) -> None:
    files = {"a/weights": os.urandom(3 * MIB), "config.json": b"{}"}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    s3.put_raw("model.tar.gz", packed.getvalue())
    told = server.start(
        "fork", s3.uri("model.tar.gz"), out / "model" if dest else None, unpack=True
    )
    assert len(assert_all_saw(told, digest_of(files, ""))) == 1
    assert proxy.answered < len(packed.getvalue()) + BESIDE
    assert leftovers(out) == []


def test_sixteen_workers_fetch_one_file_once_and_all_hold_it_to_the_digest(
    server: Server, s3: S3Store, proxy: CountingProxy, out: Path
) -> None:
    data = os.urandom(3 * MIB)
    s3.put_raw("model.bin", data)
    digest = str(hash_file(io.BytesIO(data), ("sha256",))["sha256"])
    told = server.start("fork", s3.uri("model.bin"), out / "model.bin", digest=digest)
    assert assert_all_saw(told, digest) == {str(out / "model.bin")}
    assert proxy.answered < len(data) + BESIDE


@pytest.mark.parametrize("dest", [False, True], ids=["cache", "destination"])
def test_workers_that_are_forked_from_a_program_that_used_the_client_fetch_once(
    server: Server, s3: S3Store, proxy: CountingProxy, out: Path, dest: bool
) -> None:
    _, digest, size = put_tree(s3)
    s3.put_raw("warm", b"warm")
    told = server.start(
        "fork", s3.uri("tree/"), out / "model" if dest else None, warm=s3.uri("warm")
    )
    assert len(assert_all_saw(told, digest)) == 1
    assert proxy.answered < size + BESIDE


@pytest.mark.parametrize("dest", [False, True], ids=["cache", "destination"])
def test_a_worker_that_is_killed_midway_hangs_nobody_and_what_it_fetched_is_not_fetched_again(
    s3: S3Store, tmp_path: Path, out: Path, dest: bool
) -> None:
    data = os.urandom(40 * MIB)
    s3.put_raw("model/weights", data)
    digest = digest_of({"weights": data}, "")
    with FaultProxy(s3.server.endpoint, link=Link(shared_rate=16 * MIB), store="s3") as proxy:
        server = Server(s3, s3.through(proxy.endpoint), tmp_path)
        target = out / "model" if dest else None
        first = server.one(s3.uri("model/"), target, tmp_path / "first")
        deadline = time.monotonic() + 60
        places = [out, Path(os.environ["STORAGE_CACHE_DIR"])]
        while noted_bytes(*places) < 16 * MIB:
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.02)
        # It gets no further while the others start, however long that takes.
        first.send_signal(signal.SIGSTOP)
        kept = noted_bytes(*places)
        try:
            others = [
                server.one(s3.uri("model/"), target, tmp_path / f"other-{index}")
                for index in range(3)
            ]
        finally:
            first.kill()
        assert first.wait() == -signal.SIGKILL
        came = proxy.bytes_down
        for other in others:
            assert other.wait(200) == 0
        told = [
            json.loads((tmp_path / f"other-{index}" / "0.json").read_text()) for index in range(3)
        ]
        assert not (tmp_path / "first" / "0.json").exists()
        assert len(assert_all_saw(told, digest)) == 1
        # What was on its way, and not yet in the journal, comes again; the proxy may have counted
        # a block more of each connection since.
        assert proxy.bytes_down - came < len(data) - kept + 5 * MIB
    assert leftovers(out) == []


def test_forking_while_another_thread_downloads_harms_neither(
    s3: S3Store, tmp_path: Path, out: Path
) -> None:
    files, digest, _ = put_tree(s3)
    program = WORKER + FORK_WHILE_BUSY
    environment = Server(s3, s3.config, tmp_path)._environment
    asked = json.dumps([s3.uri("tree/"), str(out)])
    done = subprocess.run(
        [sys.executable, "-c", program, asked],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((out / f"{index}.json").read_text()) for index in range(6)]
    assert_all_saw(told, digest)
    assert files


FORK_WHILE_BUSY = """
import signal, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads
uri, out = json.loads(sys.argv[1])
over = threading.Event()
failures = []
def busy(index):
    count = 0
    while not over.is_set():
        try:
            Storage.download(uri, f"{out}/busy-{index}-{count}")
        except BaseException as exc:
            failures.append(exc)
            return
        count += 1
Storage.download(uri, f"{out}/first")  # all modules are there: Python itself is not safe before
threads = [threading.Thread(target=busy, args=(index,)) for index in range(2)]
for thread in threads:
    thread.start()
children = []
for index in range(6):
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(240)
            work(index, uri, f"{out}/child-{index % 2}", {}, out)
        finally:
            os._exit(0)
    children.append(child)
statuses = [os.waitpid(child, 0)[1] for child in children]
over.set()
for thread in threads:
    thread.join()
assert not failures, failures
assert statuses == [0] * 6, statuses
"""


def test_the_next_start_of_a_server_fetches_nothing(
    server: Server, s3: S3Store, proxy: CountingProxy, out: Path
) -> None:
    _, digest, size = put_tree(s3)
    server.start("fork", s3.uri("tree/"), out / "model", count=2)
    before = proxy.answered
    told = server.start("fork", s3.uri("tree/"), out / "model", count=4)
    assert_all_saw(told, digest)
    assert proxy.answered - before < BESIDE < size


def test_workers_get_the_new_version_when_there_is_one(
    server: Server, s3: S3Store, out: Path
) -> None:
    files, _, _ = put_tree(s3)
    server.start("fork", s3.uri("tree/"), out / "model", count=2)
    files["tree/config.json"] = b'{"version": 2}'
    s3.put_raw("tree/config.json", files["tree/config.json"])
    told = server.start("fork", s3.uri("tree/"), out / "model", count=4)
    assert_all_saw(told, digest_of(files))
    with StorageClient() as client:
        assert client.settings.cache_lock_timeout > 60
