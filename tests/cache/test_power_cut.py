"""Somebody pulls the plug: what was forced to disk is served, and nothing wrong ever is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import OfflineError
from storage.cache.verify import verify
from tests.cache.boots import count_hashes, reboot, run_in_boot
from tests.cache.conftest import MakeClient
from tests.cache.disk import DAMAGES
from tests.cache.support import Source, blob_files

FIRST = {"model.bin": b"weights" * 1000, "config/a.json": b"{}", "same.txt": b"same"}
SECOND = {"model.bin": b"WEIGHTS" * 1000, "config/b.json": b"{}", "same.txt": b"same"}

Journal = list[tuple[str, ...]]
"""``("sync", path)``, ``("rename", source, target)``, ``("mkdir", path)`` as they came."""


# -- the order of the calls ----------------------------------------------------------------


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    """What this process syncs, renames and makes."""
    events: Journal = []
    lock = threading.RLock()

    def note(name: str, kind: str) -> None:
        real: Callable[..., Any] = getattr(os, name)

        def call(*args: Any, **options: Any) -> None:
            paths = [
                os.readlink(f"/proc/self/fd/{arg}") if isinstance(arg, int) else os.fspath(arg)
                for arg in (args[:2] if kind == "rename" else args[:1])
            ]
            # As one step, or the note of one thread comes after what another one did later.
            with lock:
                real(*args, **options)
                events.append((kind, *paths))

        monkeypatch.setattr(os, name, call)

    for name, kind in (
        *(("fsync", "sync"), ("fdatasync", "sync"), ("mkdir", "mkdir")),
        *(("rename", "rename"), ("replace", "rename"), ("link", "rename")),
    ):
        note(name, kind)
    return events


def published(journal: Journal, root: Path, area: str) -> list[int]:
    """Return where in the journal something got its name in a folder of the cache."""
    place = f"{root}/{area}"
    return [
        number
        for number, event in enumerate(journal)
        if event[0] == "rename" and f"{event[2]}/".startswith(f"{place}/")
    ]


def assert_forced_in_order(journal: Journal, root: Path, blobs: int) -> None:
    """See that everything is on the disk before what leads to it, and the ref last of all."""

    def synced(path: str, after: int, before: int) -> bool:
        return ("sync", path) in journal[after:before]

    begin = min(published(journal, root, "VERSION") or [0])
    # Notes of downloads that began need not outlive a power cut.
    (ref,) = (
        number
        for number in published(journal, root, "refs")
        if journal[number][2].endswith(".json")
    )
    assert len(published(journal, root, "blobs")) == blobs
    (manifest,) = published(journal, root, "manifests")
    (snapshot,) = published(journal, root, "snapshots")
    for number in (*published(journal, root, "blobs"), manifest, snapshot, ref):
        _, source, target = journal[number]
        assert synced(source, begin, number), f"{target} has a name before its content"
        end = len(journal) if number == ref else ref
        assert synced(os.path.dirname(target), number, end), f"the name of {target}"
    assert max(published(journal, root, "blobs")) < manifest < snapshot < ref
    for number, event in enumerate(journal):
        if event[0] == "mkdir":
            area = os.path.relpath(event[1], root).split("/")[0]
            needed = area in (".", "..", "blobs", "manifests", "refs", "snapshots")
            if needed and f"{event[1]}/".startswith(f"{root.parent}/"):
                assert synced(os.path.dirname(event[1]), number, len(journal)), event
                # One of a download that began may be made earlier, and is not needed then.
                assert area == "refs" or synced(os.path.dirname(event[1]), number, ref), event


@pytest.mark.kinds("memory", "s3")
@pytest.mark.parametrize("how", ["call", "setting", "profile"])
def test_everything_is_on_the_disk_before_what_leads_to_it(
    make_client: MakeClient, source: Source, tmp_path: Path, journal: Journal, how: str
) -> None:
    uri = source.put_model(FIRST)
    root = tmp_path / "new" / "cache"
    ways: dict[str, dict[str, Any]] = {
        "call": {},
        "setting": {"durable": True},
        "profile": {"profile": "edge"},
    }
    client = make_client(cache_dir=root, **ways[how])
    journal.clear()
    options: dict[str, Any] = {"durable": True} if how == "call" else {}
    client.download(uri, config=source.config, **options)
    assert_forced_in_order(journal, root, len(FIRST))
    assert ("sync", f"{tmp_path}/new") in journal
    assert ("sync", f"{tmp_path}") in journal


@pytest.mark.kinds("memory")
def test_an_archive_is_on_the_disk_before_what_leads_to_it(
    make_client: MakeClient, served_archive: str, tmp_path: Path, journal: Journal
) -> None:
    root = tmp_path / "cache"
    client = make_client(cache_dir=root, durable=True)
    journal.clear()
    client.download(served_archive, unpack=True)
    assert_forced_in_order(journal, root, 2)
    ((_, source, _),) = (journal[number] for number in published(journal, root, "snapshots"))
    for inner in ("bin/run", "bin", "none"):
        assert ("sync", f"{source}/{inner}") in journal


@pytest.mark.kinds("web")
def test_the_system_sees_that_order_too(source: Source, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    uri = source.put_file("model.bin", FIRST["model.bin"])
    root = tmp_path / "cache"
    log = tmp_path / "log"
    calls = "fsync,fdatasync,rename,renameat,renameat2,link,linkat,mkdir,mkdirat"
    command = [sys.executable, "-m", "storage.cli", "download", "--quiet", uri]
    for durable in ("1", "0"):
        environ = {"STORAGE_CACHE_DIR": str(root / durable), "STORAGE_DURABLE": durable}
        done = subprocess.run(
            ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(log), *command],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if "ptrace" in done.stderr:
            pytest.skip("strace may not trace here")
        assert done.returncode == 0, done.stderr
        journal = list(_traced(log.read_text()))
        if durable == "1":
            assert_forced_in_order(journal, root / durable, 1)
        else:
            assert len(published(journal, root / durable, "blobs")) == 1
            assert syncs(journal, root / durable) == []


def _traced(text: str) -> Iterator[tuple[str, ...]]:
    for line in text.splitlines():
        match = re.fullmatch(r"(\d+ +)?(\w+)\((.*)\) += 0", line)
        if match is None:
            continue
        name, arguments = match[2], match[3]
        paths = re.findall(r'"([^"]*)"', arguments)
        if "sync" in name:
            yield "sync", arguments.partition("<")[2].rstrip(">")
        elif name.startswith("mkdir"):
            yield "mkdir", paths[0]
        else:
            yield "rename", paths[0], paths[1]


def syncs(journal: Journal, root: Path) -> list[str]:
    """Return what was synced, but for what tells that a folder is a cache: once in its life."""
    begin = [*published(journal, root, "VERSION"), -1][0]
    return [
        event[1]
        for number, event in enumerate(journal)
        if event[0] == "sync"
        and not (number == begin - 1 or event[1] in (str(root), *map(str, root.parents)))
    ]


@pytest.mark.kinds("memory", "s3")
def test_nothing_is_forced_to_the_disk_unasked(
    make_client: MakeClient,
    source: Source,
    cache: Path,
    served_archive: str,
    tmp_path: Path,
    journal: Journal,
) -> None:
    uri = source.put_model(FIRST)
    client = make_client()
    journal.clear()
    client.download(uri, config=source.config)
    assert len(published(journal, cache, "blobs")) == len(FIRST)
    assert syncs(journal, cache) == []
    journal.clear()
    source.put_model(SECOND)
    client.download(uri, config=source.config)
    client.download(uri, config=source.config)
    client.download(uri, config=source.config, offline=True)
    client.download(uri, tmp_path / "out", config=source.config)
    client.download(served_archive, unpack=True)
    assert len(published(journal, cache, "blobs")) == 3
    assert [event for event in journal if event[0] == "sync"] == []


@pytest.mark.kinds("memory")
def test_what_is_asked_for_once_more_and_durably_is_forced_then(
    make_client: MakeClient,
    source: Source,
    cache: Path,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = source.put_model(FIRST)
    make_client().download(uri)
    shared = blob_files(cache)
    # What is known to be there is not on the disk yet.
    source.put_file("model/more", b"more")
    journal.clear()
    source.forget()
    make_client().download(uri, durable=True)
    assert source.bodies == ["model/more"]
    ref = max(published(journal, cache, "refs"))
    assert {("sync", str(blob)) for blob in shared} <= set(journal[:ref])
    assert unsynced(cache, monkeypatch) == set()
    source.put_file("model/more", b"new")
    make_client().download(uri)
    assert unsynced(cache, monkeypatch) == {b"new"}
    make_client().download(uri, durable=True)
    assert unsynced(cache, monkeypatch) == set()


def unsynced(cache: Path, patch: pytest.MonkeyPatch) -> set[bytes]:
    """Return the contents of which another boot would not know that they are right."""
    from storage.cache.blobs import is_marked
    from storage.digest import Digest

    with patch.context() as boot:
        reboot(boot)
        return {
            path.read_bytes()
            for path in blob_files(cache)
            if not is_marked(path.stat(), Digest("blake3", path.name))
        }


# -- the next boot -------------------------------------------------------------------------


@pytest.mark.kinds("web", "s3")
def test_what_was_not_synced_is_hashed_once_after_another_boot(
    make_client: MakeClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"model.bin": b"weights", "b": b"2"} if "s3" in source.uri() else {"model.bin": b"1"}
    uri = source.put_model(files)
    path = make_client().download(uri, config=source.config)
    hashes = count_hashes(monkeypatch)
    for number in range(3):
        reboot(monkeypatch)
        client = make_client()
        assert client.download(uri, config=source.config, offline=True) == path
        assert client.download(uri, config=source.config) == path
        # From then on it is known to be on the disk.
        assert sorted(hashes.values()) == [1] * len(files), number


@pytest.mark.kinds("web", "s3")
def test_what_was_synced_is_not_hashed_after_another_boot(
    make_client: MakeClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = source.put_model({"model.bin": b"weights"})
    path = make_client(durable=True).download(uri, config=source.config)
    hashes = count_hashes(monkeypatch)
    reboot(monkeypatch)
    for offline in (True, False):
        assert make_client().download(uri, config=source.config, offline=offline) == path
    assert not hashes


@pytest.mark.kinds("web")
@pytest.mark.parametrize("durable", [False, True])
def test_a_new_process_after_another_boot_hashes_what_was_not_synced(
    make_client: MakeClient, source: Source, cache: Path, durable: bool
) -> None:
    uri = source.put_file("model.bin", FIRST["model.bin"])
    path = make_client(durable=durable).download(uri)
    program = (
        f"{run_in_boot('the next one')}"
        "real, hashed = blobs.hash_file, []\n"
        "blobs.hash_file = lambda file, *a: (hashed.append(1), real(file, *a))[1]\n"
        "import storage\n"
        f"print(storage.Storage.download({uri!r}, offline=True), len(hashed))\n"
    )
    for expected in (0 if durable else 1, 0):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "STORAGE_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.stdout, done.stderr) == (f"{path} {expected}\n", "")


@pytest.mark.kinds("web")
@pytest.mark.parametrize("name", DAMAGES)
def test_what_a_power_cut_left_of_a_blob_is_not_served(
    make_client: MakeClient,
    source: Source,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    uri = source.put_file("model.bin", FIRST["model.bin"])
    path = make_client().download(uri)
    (blob,) = blob_files(cache)
    times = blob.stat()
    blob.chmod(0o644)
    blob.write_bytes(DAMAGES[name](FIRST["model.bin"]))
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))
    # A mark, but one of the boot before.
    reboot(monkeypatch)
    client = make_client()
    for _ in range(2):
        with pytest.raises(OfflineError, match="damaged"):
            client.download(uri, offline=True)
    source.forget()
    assert client.download(uri) == path
    assert Path(path).read_bytes() == FIRST["model.bin"]
    assert source.bodies == ["model.bin"]
    assert verify(client.cache, full=True).problems == ()
