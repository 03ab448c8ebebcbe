"""Whatever the store does midway: the result is the source, or an error and nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import storage.client.base
from storage.backends.base import Backend, Body, Buffer, ByteRange, ObjectInfo
from storage.client import StorageClient
from storage.config import load_settings
from storage.digest import Digest, tree_digest
from storage.errors import (
    AuthenticationError,
    InsufficientSpaceError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransferError,
)
from storage.testing.faulty_backend import FaultyBackend
from storage.transfer.progress import Progress
from tests.transfer.faulty import (
    Poor,
    Replacing,
    Script,
    end_after,
    fine,
    one_more,
    reset_after,
)
from tests.transfer.support import (
    KIB,
    Wrapped,
    assert_clear,
    everything_in,
    files_of,
    memory_bucket,
    options,
)

_bytes = random.Random(11).randbytes
PART = 64 * KIB
FILES = {
    "m/config.json": _bytes(500),
    "m/empty": b"",
    "m/exactly-one-part": _bytes(PART),
    "m/one-byte-more": _bytes(PART + 1),
    "m/sub/weights.bin": _bytes(5 * PART - 7),
}
TREE = {key.removeprefix("m/"): data for key, data in FILES.items()}
BIG = FILES["m/sub/weights.bin"]

Download = Callable[..., str]


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> Iterator[Download]:
    """Call it with a backend, a key and a destination to download through a whole client."""
    with StorageClient(settings=load_settings()) as client:
        client._options = options(PART)

        def run(backend: Backend, key: str, dest: Path, **more: Any) -> str:
            monkeypatch.setattr(storage.client.base, "open_backend", lambda *_: backend)
            client.close()
            return client.download(f"memory://bucket/{key}", dest, **more)

        yield run


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    def opened() -> set[str]:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                found.add(os.readlink(f"/proc/self/fd/{name}"))
            except FileNotFoundError:
                continue
        return {path for path in found if ".partial" in path or "/place/" in path}

    before = set(threading.enumerate())
    yield
    assert opened() == set()
    assert set(threading.enumerate()) <= before


# -- any fault, any time -------------------------------------------------------------------


READ_FAULTS = ("truncate", "reset", "refuse", "flip", "extra", "replace", "resize", "vanish")


@pytest.mark.parametrize(
    "faults", [*((fault,) for fault in READ_FAULTS), READ_FAULTS], ids="-".join
)
def test_the_result_is_the_source_or_an_error_and_nothing(
    download: Download, dest: Path, faults: tuple[str, ...]
) -> None:
    succeeded, failed = 0, 0
    for seed in range(40):
        with memory_bucket(FILES) as memory:
            backend = FaultyBackend(memory, seed, faults, (0.1, 0.3, 0.8)[seed % 3])
            target = dest / f"t{seed}"
            dest.mkdir(exist_ok=True)
            error = None
            try:
                assert download(backend, "m", target) == str(target)
            except StorageError as exc:
                error = exc
            if error is not None:
                failed += 1
                assert_clear(error)
                assert type(error) is not StorageError, (seed, error)
                assert everything_in(dest) == [], (seed, error)
                assert backend.happened
                continue
            succeeded += 1
            for name, data in files_of(target).items():
                versions = [TREE[name], *backend.replaced.get(f"m/{name}", ())]
                assert data in versions, (seed, name, backend.happened)
            assert set(files_of(target)) == set(TREE), seed
            os.rename(target, dest.parent / f"done{seed}")
            assert everything_in(dest) == []
    # Neither outcome may be all that this ever sees.
    assert succeeded
    assert failed


# -- one fault at a time -------------------------------------------------------------------


@pytest.mark.parametrize("step", [reset_after(1000), end_after(1000)], ids=["reset", "truncated"])
def test_a_broken_range_goes_on_where_it_stopped(
    download: Download, dest: Path, step: Callable[[bytes], Iterator[Buffer]]
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/sub/weights.bin", step)
        download(backend, "m/sub/weights.bin", dest)
    assert dest.read_bytes() == BIG
    broken = backend.spans[0]
    assert broken is not None
    assert ByteRange(broken.start + 1000, broken.end) in backend.spans
    assert len(backend.spans) == 6


@pytest.mark.parametrize("step", [reset_after(100), end_after(100)], ids=["reset", "truncated"])
def test_a_broken_stream_goes_on_where_it_stopped(
    download: Download, dest: Path, step: Callable[[bytes], Iterator[Buffer]]
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/config.json", step)
        download(backend, "m/config.json", dest)
    assert dest.read_bytes() == FILES["m/config.json"]
    assert backend.spans == [None, ByteRange(100, 500)]


def test_a_link_that_breaks_again_and_again_but_moves_on_is_enough(
    download: Download, dest: Path
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/config.json", *[reset_after(10)] * 40)
        download(backend, "m/config.json", dest)
    assert dest.read_bytes() == FILES["m/config.json"]
    assert len(backend.spans) == 41


@pytest.mark.parametrize("key", ["m/config.json", "m/sub/weights.bin"])
@pytest.mark.parametrize(
    ("step", "says"),
    [(reset_after(0), "reset by the test"), (end_after(0), "ended")],
    ids=["reset", "empty"],
)
def test_a_link_that_stands_still_is_given_up(
    download: Download,
    dest: Path,
    key: str,
    step: Callable[[bytes], Iterator[Buffer]],
    says: str,
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, key, *[step] * 99)
        with pytest.raises(TransferError, match=rf"{says}.*\(tried 4 times\)") as caught:
            download(backend, key, dest)
    assert type(caught.value) is TransferError
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


@pytest.mark.parametrize("key", ["m/config.json", "m/empty"])
def test_a_stream_of_too_many_bytes_is_wrong(download: Download, dest: Path, key: str) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, key, one_more)
        with pytest.raises(IntegrityError, match="more arrived") as caught:
            download(backend, key, dest)
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


def test_a_range_of_too_many_bytes_never_reaches_its_neighbour(
    download: Download, dest: Path
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/sub/weights.bin", *[one_more] * 5)
        download(backend, "m/sub/weights.bin", dest)
    assert dest.read_bytes() == BIG


@pytest.mark.parametrize("part", range(5))
def test_a_flipped_bit_in_any_part_is_noticed(download: Download, dest: Path, part: int) -> None:
    def flip(data: bytes) -> Iterator[Buffer]:
        return iter([data[:7], bytes([data[7] ^ 64]), data[8:]])

    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/sub/weights.bin", *[fine] * part, flip)
        with pytest.raises(IntegrityError) as caught:
            download(backend, "m/sub/weights.bin", dest)
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


def test_one_bad_file_keeps_a_whole_tree_away(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/config.json", lambda data: iter([b"\0" * len(data)]))
        with pytest.raises(IntegrityError, match=r"m/config\.json"):
            download(backend, "m", dest)
    assert everything_in(dest.parent) == []


def test_a_permanent_failure_of_one_object_ends_all(download: Download, dest: Path) -> None:
    def denied(data: bytes) -> Iterator[Buffer]:
        raise AuthenticationError("the token has expired")

    with memory_bucket(FILES) as memory:
        backend = Script(memory, "m/one-byte-more", denied)
        with pytest.raises(AuthenticationError, match="expired"):
            download(backend, "m", dest)
    assert len(backend.spans) <= 2
    assert everything_in(dest.parent) == []


# -- replaced midway -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[len(BIG)], [100], [0], [9 * PART], [100, len(BIG), 0]],
    ids=["same-size", "small", "empty", "larger", "many"],
)
def test_an_object_replaced_between_its_parts_is_fetched_anew(
    download: Download, dest: Path, sizes: list[int]
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Replacing(memory, "m/sub/weights.bin", 1, iter(sizes))
        events: list[Progress] = []
        download(backend, "m/sub/weights.bin", dest, progress=events.append)
        assert dest.read_bytes() == backend.last
        assert (events[-1].bytes_done, events[-1].finished) == (len(backend.last), True)


def test_a_store_that_ignores_pins_is_caught_by_its_answers(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        backend = Replacing(Poor(memory), "m/sub/weights.bin", 1, iter([len(BIG)]))
        download(backend, "m/sub/weights.bin", dest)
        assert dest.read_bytes() == backend.last


def test_an_object_that_is_replaced_all_the_time_is_given_up(
    download: Download, dest: Path
) -> None:
    with memory_bucket(FILES) as memory:
        sizes = iter([len(BIG)] * 99)
        backend = Replacing(memory, "m/sub/weights.bin", 99, sizes)
        with pytest.raises(TransferError, match="replaced 4 times") as caught:
            download(backend, "m", dest)
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


def test_an_object_that_is_deleted_midway_is_missing(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:

        class Deleting(Script):
            def read(self, key: str, *args: Any) -> Body:
                body = super().read(key, *args)
                memory.delete([key])
                return body

        with pytest.raises(ModelMissingError):
            download(Deleting(memory, "m/sub/weights.bin"), "m/sub/weights.bin", dest)
    assert everything_in(dest.parent) == []


def test_a_named_version_is_never_followed_to_another_one(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No scheme that keeps versions is in memory, so the URI borrows one's form.
    with memory_bucket(FILES) as memory:
        version = memory.stat("m/sub/weights.bin").version
        uri = f"s3://bucket/m/sub/weights.bin?versionId={version}"
        backend = Replacing(memory, "m/sub/weights.bin", 1, iter([len(BIG)]))
        monkeypatch.setattr(storage.client.base, "open_backend", lambda *_: backend)
        with StorageClient(settings=load_settings()) as client:
            client._options = options(PART)
            with pytest.raises(ObjectChangedError, match="another version") as caught:
                client.download(uri, dest)
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


# -- stores that say little ----------------------------------------------------------------


@pytest.mark.parametrize(
    "poverty",
    [
        {"ranged": False},
        {"pinned": False},
        {"weak": True},
        {"sized": False},
        {"ranged": False, "pinned": False, "weak": True, "sized": False},
    ],
    ids=lambda poverty: "-".join(poverty),
)
def test_a_store_that_says_little_is_read_as_one_stream(
    download: Download, dest: Path, poverty: dict[str, bool]
) -> None:
    with memory_bucket(FILES) as memory:
        backend = Poor(memory, **poverty)
        download(backend, "m", dest)
        assert files_of(dest) == TREE
        assert set(backend.spans) == {None}


@pytest.mark.parametrize("poverty", [{"ranged": False}, {"pinned": False}, {"weak": True}])
def test_a_broken_stream_that_cannot_be_resumed_begins_again(
    download: Download, dest: Path, poverty: dict[str, bool]
) -> None:
    with memory_bucket(FILES) as memory:
        poor = Poor(memory, **poverty)
        backend = Script(poor, "m/sub/weights.bin", reset_after(1000), end_after(PART))
        events: list[Progress] = []
        download(backend, "m/sub/weights.bin", dest, progress=events.append)
        assert dest.read_bytes() == BIG
        assert backend.spans == [None] * 3
        assert events[-1].bytes_done == len(BIG)


def test_a_stream_that_cannot_be_resumed_is_not_tried_for_ever(
    download: Download, dest: Path
) -> None:
    with memory_bucket(FILES) as memory:
        poor = Poor(memory, ranged=False)
        backend = Script(
            poor, "m/sub/weights.bin", *[reset_after(1000 * number) for number in range(1, 99)]
        )
        with pytest.raises(TransferError, match="tried 4 times"):
            download(backend, "m/sub/weights.bin", dest)
    assert everything_in(dest.parent) == []


def test_an_etag_that_only_looks_like_a_digest_does_not_count(
    download: Download, dest: Path
) -> None:
    class Encrypted(Wrapped):
        asked = 0

        def is_digest(self, info: ObjectInfo) -> bool:
            self.asked += 1
            return False

    with memory_bucket(FILES) as memory:
        backend = Encrypted(Script(memory, "m/config.json", lambda data: iter([b"\0" * len(data)])))
        download(backend, "m/config.json", dest)
    assert dest.read_bytes() == b"\0" * 500
    assert backend.asked == 1


# -- what the caller expects ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["m/config.json", "m/sub/weights.bin", "m/empty"])
@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_the_expected_digest_decides(
    download: Download, dest: Path, key: str, algorithm: str
) -> None:
    from storage.digest import new_hasher

    hasher = new_hasher(algorithm)
    hasher.update(FILES[key])
    right = f"{algorithm}:{hasher.hexdigest()}"
    wrong = f"{algorithm}:{'0' * 64}"
    with memory_bucket(FILES) as memory:
        with pytest.raises(IntegrityError, match="the caller expects") as caught:
            download(memory, key, dest, digest=wrong)
        assert_clear(caught.value)
        assert everything_in(dest.parent) == []
        download(memory, key, dest, digest=right)
    assert dest.read_bytes() == FILES[key]


def test_the_expected_digest_of_a_tree_decides(download: Download, dest: Path) -> None:
    digests = {
        path: Digest("sha256", hashlib.sha256(data).hexdigest()) for path, data in TREE.items()
    }
    with memory_bucket(FILES) as memory:
        with pytest.raises(IntegrityError, match="the tree is expected to be") as caught:
            download(memory, "m", dest, digest="sha256:" + "0" * 64)
        assert_clear(caught.value)
        assert everything_in(dest.parent) == []
        download(memory, "m", dest, digest=tree_digest(digests))
    assert files_of(dest) == TREE


# -- the local end -------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "truncate", "pwrite"])
@pytest.mark.parametrize("key", ["m", "m/sub/weights.bin"])
def test_a_disk_that_fills_up_midway_is_told_and_left_clean(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch, call: str, key: str
) -> None:
    real = getattr(os, call)

    def full(target: Any, *args: Any, **kwargs: Any) -> Any:
        # Of the files that are fetched; locks are made elsewhere.
        if call != "open" or ("content" in str(target) and args[0] & os.O_CREAT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(target, *args, **kwargs)

    with memory_bucket(FILES) as memory, monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(InsufficientSpaceError) as caught:
            download(memory, key, dest)
        patch.undo()
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


@pytest.mark.parametrize("size", [10, 2 * PART])
def test_names_that_the_file_system_folds_are_refused(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """On a file system that knows no case, two keys may be one file."""
    real = os.open

    def folding(path: Any, *args: Any, **kwargs: Any) -> int:
        folder, name = os.path.split(path)
        return real(os.path.join(folder, name.lower()), *args, **kwargs)

    files = {"m/Model.bin": b"1" * size, "m/model.bin": b"2" * size}
    with memory_bucket(files) as memory, monkeypatch.context() as patch:
        patch.setattr(os, "open", folding)
        with pytest.raises(InvalidInput, match="folds names") as caught:
            download(memory, "m", dest)
        patch.undo()
    assert_clear(caught.value)
    assert everything_in(dest.parent) == []


def test_an_error_of_the_progress_callback_ends_the_download(
    download: Download, dest: Path
) -> None:
    def fail(_: Progress) -> None:
        raise ZeroDivisionError

    with memory_bucket(FILES) as memory, pytest.raises(ZeroDivisionError):
        download(memory, "m", dest, progress=fail)
    assert everything_in(dest.parent) == []


def test_progress_ends_with_everything_and_only_after_success(
    download: Download, dest: Path
) -> None:
    events: list[Progress] = []
    with memory_bucket(FILES) as memory:
        download(memory, "m", dest, progress=events.append)
        last = events.pop()
        total = sum(map(len, FILES.values()))
        assert (last.bytes_done, last.bytes_total) == (total, total)
        assert (last.objects_done, last.objects_total) == (5, 5)
        assert last.finished
        assert not any(event.finished for event in events)
        events.clear()
        with pytest.raises(IntegrityError):
            download(memory, "m", dest, progress=events.append, digest="sha256:" + "0" * 64)
        assert not any(event.finished for event in events)
