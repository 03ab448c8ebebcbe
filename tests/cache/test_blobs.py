"""Marks: which blobs are known to be right, which are in doubt, and what becomes of those."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from storage.cache.blobs import Blobs, State, is_marked, set_mark
from storage.cache.layout import Layout
from storage.digest import Digest, hash_file
from tests.cache.boots import count_hashes, reboot
from tests.cache.processes import as_nobody, open_folder
from tests.cache.support import flip_byte
from tests.servers import read_only_view

DATA = b"weights" * 1000
SIZE = len(DATA)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(str(tmp_path / "cache"))


@pytest.fixture
def blobs(layout: Layout) -> Blobs:
    return Blobs(layout)


def digest_of(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


BLOB = digest_of(DATA)


def add(blobs: Blobs, data: bytes = DATA, *, durable: bool = False) -> Path:
    """Add a blob; the folder of the cache need not be there."""
    root = Path(blobs._layout.root)
    root.mkdir(parents=True, exist_ok=True)
    new = root / "new"
    new.write_bytes(data)
    path = Path(blobs.add(str(new), digest_of(data), len(data), durable=durable))
    assert not new.exists()
    return path


def quarantined(layout: Layout) -> list[str]:
    return sorted(os.listdir(layout.quarantine)) if os.path.isdir(layout.quarantine) else []


# -- marks ---------------------------------------------------------------------------------


def test_what_was_added_is_clean_and_read_only(blobs: Blobs) -> None:
    assert blobs.look(BLOB, SIZE) is State.ABSENT
    assert blobs.settle(BLOB, SIZE) is State.ABSENT
    path = add(blobs)
    assert blobs.look(BLOB, SIZE) is State.CLEAN
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o222 == 0
    assert [(digest, found.st_size) for digest, found in blobs.all()] == [(BLOB, SIZE)]


def test_a_clean_blob_is_never_read(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add(blobs)
    hashes = count_hashes(monkeypatch)
    assert blobs.settle(BLOB, SIZE) is State.CLEAN
    assert not hashes
    os.utime(path)
    assert blobs.settle(BLOB, SIZE) is State.CLEAN
    assert hashes == {str(path): 1}


def test_a_mark_is_an_even_second_of_the_last_century(blobs: Blobs) -> None:
    # There are file systems that keep pairs of seconds, and ones that begin in 1980.
    for number in range(50):
        path = add(blobs, b"%d" % number, durable=number % 2 == 0)
        seconds, rest = divmod(path.stat().st_mtime_ns, 10**9)
        assert rest == 0
        assert seconds % 2 == 0
        assert 315_532_800 < seconds < 1_100_000_000


def test_what_the_file_system_adds_below_a_second_does_not_count(blobs: Blobs) -> None:
    path = add(blobs)
    time = path.stat().st_mtime_ns
    os.utime(path, ns=(time, time + 999_999_999))
    assert blobs.look(BLOB, SIZE) is State.CLEAN
    for off in (-1, 10**9):
        os.utime(path, ns=(time, time + off))
        assert blobs.look(BLOB, SIZE) is State.DOUBTFUL


@pytest.mark.parametrize("durable", [False, True])
def test_the_mark_of_another_content_is_none(blobs: Blobs, layout: Layout, durable: bool) -> None:
    other = bytes(reversed(DATA))
    left, right = add(blobs, durable=durable), add(blobs, other, durable=durable)
    left.rename(left.with_name("aside"))
    right.rename(left)
    left.with_name("aside").rename(right)
    for digest in (BLOB, digest_of(other)):
        assert blobs.look(digest, SIZE) is State.DOUBTFUL
        assert blobs.settle(digest, SIZE) is State.DAMAGED
    assert len(quarantined(layout)) == 2


def test_only_what_was_synced_is_trusted_after_another_boot(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = b"synced"
    add(blobs)
    add(blobs, other, durable=True)
    reboot(monkeypatch)
    assert blobs.look(digest_of(other), len(other)) is State.CLEAN
    assert blobs.look(BLOB, SIZE) is State.DOUBTFUL
    assert blobs.settle(BLOB, SIZE) is State.CLEAN
    # It was synced when it was hashed.
    reboot(monkeypatch)
    assert Blobs(blobs._layout).look(BLOB, SIZE) is State.CLEAN


def test_a_system_without_an_id_of_its_boot_syncs_everything(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    add(blobs, b"with an id")
    assert not synced
    reboot(monkeypatch, None)
    path = add(blobs)
    assert "new" in synced
    assert path.parent.name in synced
    assert blobs.look(BLOB, SIZE) is State.CLEAN
    # The mark of the boot with an id cannot be told to be of this one.
    assert blobs.look(digest_of(b"with an id"), 10) is State.DOUBTFUL
    reboot(monkeypatch)
    assert blobs.look(BLOB, SIZE) is State.CLEAN


def test_copies_of_a_cache_keep_their_marks_if_they_keep_their_times(
    blobs: Blobs, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(blobs)
    subprocess.run(["cp", "-r", layout.root, tmp_path / "plain"], check=True)
    subprocess.run(["cp", "-a", layout.root, tmp_path / "exact"], check=True)
    shutil.copytree(layout.root, tmp_path / "python")
    looks = {
        name: Blobs(Layout(str(tmp_path / name))).look(BLOB, SIZE)
        for name in ("plain", "exact", "python")
    }
    assert looks == {"plain": State.DOUBTFUL, "exact": State.CLEAN, "python": State.CLEAN}
    hashes = count_hashes(monkeypatch)
    copy = Blobs(Layout(str(tmp_path / "plain")))
    assert [copy.settle(BLOB, SIZE) for _ in range(2)] == [State.CLEAN] * 2
    assert sum(hashes.values()) == 1


# -- damage --------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, SIZE - 1)


def cut_with_times(path: Path) -> None:
    times = path.stat()
    cut(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def empty(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.chmod(0o644)
    with open(path, "ab") as file:
        file.write(b"more")


def zero(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(bytes(SIZE))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inner").write_bytes(b"x")


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    flip_byte(path)


DAMAGES = [
    *(flip_byte, cut, cut_with_times, empty, grow, zero),
    *(replace_by_folder, replace_by_link),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_damaged_goes_to_quarantine_and_is_replaced(
    blobs: Blobs, layout: Layout, damage: object
) -> None:
    path = add(blobs)
    damage(path)  # type: ignore[operator]
    assert blobs.look(BLOB, SIZE) in (State.DOUBTFUL, State.DAMAGED)
    # It stays damaged, so that what is said about it offline stays the same.
    for _ in range(2):
        assert blobs.settle(BLOB, SIZE) is State.DAMAGED
    if not path.is_dir():
        # What cannot even be opened is judged no further.
        assert not os.path.lexists(path)
        (name,) = quarantined(layout)
        assert BLOB.hex in name
    add(blobs)
    assert blobs.settle(BLOB, SIZE) is State.CLEAN
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("durable", [False, True])
def test_a_right_file_replaces_whatever_is_in_its_place(
    blobs: Blobs, damage: object, durable: bool
) -> None:
    path = add(blobs)
    damage(path)  # type: ignore[operator]
    add(blobs, durable=durable)
    assert blobs.look(BLOB, SIZE) is State.CLEAN
    assert path.read_bytes() == DATA
    assert not path.is_symlink()


def test_a_right_blob_stays_when_it_comes_again(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add(blobs).stat().st_ino
    assert add(blobs).stat().st_ino == first
    # Known to this boot only, and now to all of them.
    path = add(blobs, durable=True)
    reboot(monkeypatch)
    assert blobs.look(BLOB, SIZE) is State.CLEAN
    assert path.stat().st_ino == first


def test_verify_reads_what_has_its_mark(blobs: Blobs, layout: Layout) -> None:
    path = add(blobs)
    assert blobs.verify(BLOB, SIZE) == (State.CLEAN, None)
    flip_byte(path, keep_times=True)
    assert blobs.settle(BLOB, SIZE) is State.CLEAN
    state, moved = blobs.verify(BLOB, SIZE)
    assert state is State.DAMAGED
    assert moved is not None
    assert [os.path.basename(moved)] == quarantined(layout)
    assert blobs.verify(BLOB, SIZE) == (State.ABSENT, None)


def test_what_cannot_be_read_to_its_end_is_damaged(
    blobs: Blobs, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(blobs)
    os.utime(path)

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("storage.cache.blobs.hash_file", fail)
    assert blobs.settle(BLOB, SIZE) is State.DAMAGED
    assert not path.exists()
    assert len(quarantined(layout)) == 1


def test_what_cannot_be_opened_is_not_used_and_stays() -> None:
    with open_folder() as folder:
        blobs = Blobs(Layout(str(folder)))
        path = add(blobs)
        path.chmod(0)
        for each in (folder, *folder.rglob("*")):
            if each.is_dir():
                each.chmod(0o777)

        def look() -> bool:
            assert blobs.settle(BLOB, SIZE) is State.DAMAGED
            assert blobs.verify(BLOB, SIZE) == (State.DAMAGED, None)
            return True

        assert as_nobody(look)
        assert path.exists()
        path.chmod(0o444)
        assert as_nobody(lambda: blobs.settle(BLOB, SIZE) is State.CLEAN)


def test_a_right_blob_that_came_meanwhile_is_not_put_away(blobs: Blobs, layout: Layout) -> None:
    path = add(blobs)
    flip_byte(path)
    judged = path.stat()
    add(blobs)
    assert blobs.quarantine(BLOB, judged) is None
    assert blobs.look(BLOB, SIZE) is State.CLEAN
    assert quarantined(layout) == []


def test_strange_files_among_the_blobs_are_none(blobs: Blobs, layout: Layout) -> None:
    path = add(blobs)
    (path.parent / "README").write_text("mine")
    (Path(layout.blobs) / "README").write_text("mine")
    (Path(layout.blobs) / "sha256" / "README").write_text("mine")
    (Path(layout.blobs) / "rot13" / "ab").mkdir(parents=True)
    (Path(layout.blobs) / "rot13" / "ab" / "0").write_text("mine")
    assert [digest for digest, _ in blobs.all()] == [BLOB]


# -- where no mark can be set --------------------------------------------------------------


def test_a_read_only_cache_is_hashed_once_and_left_alone(
    blobs: Blobs, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add(blobs)
    os.utime(path)
    before = path.stat()
    with read_only_view(layout.root) as view:
        # Both one that is told and one that finds out.
        for told in (True, False):
            found = Blobs(Layout(str(view)), read_only=told)
            hashes = count_hashes(monkeypatch)
            assert [found.settle(BLOB, SIZE) for _ in range(3)] == [State.CLEAN] * 3
            assert sum(hashes.values()) == 1
            # What is changed after it was hashed is in doubt again.
            flip_byte(path)
            assert found.look(BLOB, SIZE) is State.DOUBTFUL
            assert found.settle(BLOB, SIZE) is State.DAMAGED
            flip_byte(path)
            assert found.settle(BLOB, SIZE) is State.CLEAN
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert quarantined(layout) == []


def test_lower_blobs_are_not_touched_even_where_they_could_be(blobs: Blobs, layout: Layout) -> None:
    path = add(blobs)
    os.utime(path)
    before = path.stat().st_mtime_ns
    lower = Blobs(layout, read_only=True)
    assert lower.settle(BLOB, SIZE) is State.CLEAN
    assert path.stat().st_mtime_ns == before
    flip_byte(path)
    assert lower.settle(BLOB, SIZE) is State.DAMAGED
    assert path.exists()
    assert lower.quarantine(BLOB) is None


def test_blobs_of_another_user_are_hashed_once_and_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_folder() as folder:
        blobs = Blobs(Layout(str(folder)))
        path = add(blobs)
        os.utime(path)

        def look() -> bool:
            hashes = count_hashes(monkeypatch)
            assert [blobs.settle(BLOB, SIZE) for _ in range(2)] == [State.CLEAN] * 2
            assert sum(hashes.values()) == 1
            assert not is_marked(path.stat(), BLOB)
            return True

        assert as_nobody(look)
        assert blobs.look(BLOB, SIZE) is State.DOUBTFUL


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o077, 0o400), (0o002, 0o444)])
def test_who_may_read_a_blob_is_as_the_umask_says(blobs: Blobs, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = add(blobs)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_mark_can_be_set_by_name_and_by_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert not is_marked(path.stat(), BLOB)
    with open(path, "rb") as file:
        set_mark(file.fileno(), BLOB, durable=True)
    assert is_marked(path.stat(), BLOB)
    os.utime(path)
    set_mark(str(path), BLOB, durable=False)
    assert is_marked(path.stat(), BLOB)
    assert hash_file(str(path), ("sha256",))["sha256"] == BLOB
