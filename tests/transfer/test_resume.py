"""A download that failed is gone on with by the next one, and no byte is paid for twice."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import storage.client.base
from storage import files
from storage.backends.base import (
    Backend,
    Body,
    Buffer,
    ByteRange,
    Capabilities,
    ObjectInfo,
    bytes_payload,
)
from storage.client import StorageClient
from storage.config import load_settings
from storage.digest import Digest, hash_file
from storage.errors import (
    AuthenticationError,
    InsufficientSpaceError,
    IntegrityError,
    ObjectExistsError,
    StorageError,
    TransferError,
    TransientError,
    UnreachableError,
)
from storage.testing.faulty_backend import FaultyBackend
from storage.transfer import destination as destination_module
from storage.transfer import journal, verify
from storage.transfer.copy import Source, stream_copy
from storage.transfer.engine import Budget
from storage.transfer.progress import Meter, Progress
from tests.transfer.faulty import Poor
from tests.transfer.support import (
    FAST,
    KIB,
    Wrapped,
    everything_in,
    files_of,
    memory_bucket,
    options,
    put_all,
)

SOAK = bool(os.environ.get("STORAGE_SOAK"))

_bytes = random.Random(17).randbytes
PART = 64 * KIB
STEP = 8 * KIB
PIECE = 4 * KIB
BIG = _bytes(10 * PART - 7)
FILES = {
    "m/config.json": _bytes(500),
    "m/empty": b"",
    "m/one-part": _bytes(PART),
    "m/sub/weights.bin": BIG,
    "m/tokens.bin": _bytes(3 * STEP),
}
TREE = {key.removeprefix("m/"): data for key, data in FILES.items()}
SIZE = sum(map(len, FILES.values()))


class Metered(Wrapped):
    """Counts the bytes that are read, and fails when there were ``limit`` of them."""

    def __init__(
        self,
        inner: Backend,
        limit: int | None = None,
        error: Callable[[], BaseException] = lambda: TransientError("reset by the test"),
    ) -> None:
        super().__init__(inner)
        self.limit = limit
        self.error = error
        self.read_bytes = 0
        self.spans: list[tuple[str, ByteRange | None]] = []
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        self.asked.append(key)
        found: ObjectInfo = self.inner.stat(key, version)
        return found

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        with self._lock:
            self.spans.append((key, span))
        body = self.inner.read(key, span, pin)
        return Body(body.info, self._chunks(body), body.close)

    def _chunks(self, body: Body) -> Iterator[Buffer]:
        for chunk in body:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                with self._lock:
                    if self.limit is not None and self.read_bytes + len(piece) > self.limit:
                        raise self.error()
                    self.read_bytes += len(piece)
                yield piece


Download = Callable[..., str]


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=load_settings()) as found:
        found._options = options(PART)
        yield found


@pytest.fixture
def download(client: StorageClient, monkeypatch: pytest.MonkeyPatch) -> Download:
    """Call it with a backend, a key and a destination to download through a whole client."""
    monkeypatch.setattr(journal, "STEP", STEP)
    monkeypatch.setattr(journal, "WORTH", STEP)

    def run(backend: Backend, key: str, dest: Path | None, **more: Any) -> str:
        monkeypatch.setattr(storage.client.base, "open_backend", lambda *_: backend)
        client.close()
        return client.download(f"memory://bucket/{key}", dest, **more)

    return run


def staging_in(folder: Path) -> Path:
    (found,) = folder.glob(".*.partial")
    return found


# -- what has arrived is not fetched again -------------------------------------------------


@pytest.mark.parametrize("at", [STEP, PART, 3 * PART + 5, len(BIG) - 1])
def test_a_file_that_failed_midway_is_gone_on_with(download: Download, dest: Path, at: int) -> None:
    with memory_bucket(FILES) as memory:
        broken = Metered(memory, at)
        with pytest.raises(TransferError):
            download(broken, "m/sub/weights.bin", dest)
        assert not dest.exists()
        events: list[Progress] = []
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin", dest, progress=events.append)
        assert dest.read_bytes() == BIG
        assert everything_in(dest.parent) == ["model"]
        # What is not noted at a failure is what is not in a whole piece.
        assert whole.read_bytes + broken.read_bytes <= len(BIG) + 8 * PIECE
        last = events[-1]
        assert last.bytes_done == last.bytes_total == len(BIG)
        assert last.bytes_present == len(BIG) - whole.read_bytes


@pytest.mark.parametrize("at", [STEP, PART, SIZE // 2, SIZE - 1])
def test_a_tree_that_failed_midway_is_gone_on_with(download: Download, dest: Path, at: int) -> None:
    with memory_bucket(FILES) as memory:
        broken = Metered(memory, at)
        with pytest.raises(TransferError):
            download(broken, "m", dest)
        whole = Metered(memory)
        download(whole, "m", dest)
        assert files_of(dest) == TREE
        assert everything_in(dest.parent / "model") == sorted([*TREE, "sub"])
        assert whole.read_bytes + broken.read_bytes <= SIZE + 8 * PIECE


def test_it_fails_again_and_again_and_every_byte_comes_once(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        total = 0
        for _ in range(200):
            backend = Metered(memory, 3 * STEP)
            try:
                download(backend, "m", dest)
                break
            except TransferError:
                continue
            finally:
                total += backend.read_bytes
        assert files_of(dest) == TREE
        assert total <= SIZE + 200 * PIECE


def test_if_all_is_here_no_body_is_fetched(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_bucket(FILES) as memory:
        with monkeypatch.context() as patch:

            def fail(*_: object) -> str:
                raise TransferError("on the way")

            patch.setattr(destination_module.Destination, "publish", fail)
            with pytest.raises(TransferError, match="on the way"):
                download(Metered(memory), "m", dest)
        again = Metered(memory)
        download(again, "m", dest)
        # Nothing can be noted of a file without bytes.
        assert [key for key, _ in again.spans] == ["m/empty"]
        assert again.read_bytes == 0
        assert files_of(dest) == TREE


def test_the_error_says_what_is_kept_and_where(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory, pytest.raises(TransferError) as caught:
        download(Metered(memory, 3 * PART), "m/sub/weights.bin", dest)
    staging = staging_in(dest.parent)
    noted = sum(
        span["range"][1] - span["range"][0]
        for span in journal._records(str(staging / "journal"))
        if "range" in span
    )
    assert f"; {noted} bytes of it are kept in {staging}, and the next download" in str(
        caught.value
    )
    assert len(str(caught.value).splitlines()) == 1


def test_it_is_told_what_a_download_goes_on_with(
    download: Download, dest: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 3 * PART), "m/sub/weights.bin", dest)
        with caplog.at_level(logging.INFO, "storage.events"):
            whole = Metered(memory)
            download(whole, "m/sub/weights.bin", dest)
    (event,) = [each for each in caplog.records if "resumed" in each.getMessage()]
    assert f"{len(BIG) - whole.read_bytes} of {len(BIG)} bytes" in event.getMessage()


def test_an_interrupt_keeps_what_is_here(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        broken = Metered(memory, 3 * PART, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            download(broken, "m/sub/weights.bin", dest)
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin", dest)
        assert dest.read_bytes() == BIG
        assert whole.read_bytes + broken.read_bytes <= len(BIG) + 8 * PIECE


def test_an_archive_is_gone_on_with(download: Download, dest: Path, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(BIG)
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.add(tmp_path / "w.bin", "sub/w.bin")
    packed = (tmp_path / "m.tar").read_bytes()
    with memory_bucket({"m.tar": packed}) as memory:
        broken = Metered(memory, 5 * PART)
        with pytest.raises(TransferError):
            download(broken, "m.tar", dest, unpack=True)
        whole = Metered(memory)
        download(whole, "m.tar", dest, unpack=True)
        assert files_of(dest) == {"sub/w.bin": BIG}
        assert everything_in(dest.parent) == ["model", "model/sub", "model/sub/w.bin"]
        assert whole.read_bytes + broken.read_bytes <= len(packed) + 8 * PIECE


def test_what_is_here_needs_no_free_space(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(storage.client.download, "check_space", lambda _, size: needed.append(size))
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m/sub/weights.bin", dest)
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin", dest)
    assert needed == [len(BIG), whole.read_bytes]


@pytest.mark.parametrize("seed", range(400 if SOAK else 40))
def test_whatever_goes_wrong_in_however_many_downloads_the_last_one_is_right(
    client: StorageClient, download: Download, dest: Path, seed: int
) -> None:
    client._options = replace(options(PART), retry=replace(FAST, attempts=1))
    with memory_bucket(FILES) as memory:
        # Who has no way to tell that a byte was flipped is in another test.
        faults = ("refuse", "reset", "truncate", "extra", "flip", "replace", "resize", "stale")
        backend = FaultyBackend(memory, seed, faults, 0.2)
        for _ in range(200):
            try:
                download(backend, "m", dest)
                break
            except StorageError:
                assert not dest.exists()
        found = files_of(dest)
        assert found.keys() == TREE.keys()
        for name, data in found.items():
            assert data in [TREE[name], *backend.replaced.get(f"m/{name}", ())]
    assert list(dest.parent.iterdir()) == [dest]


# -- what leaves nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("the token has expired"),
        IntegrityError("wrong"),
        InsufficientSpaceError("full"),
        StorageError("odd"),
        ValueError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_another_try_does_not_help_leaves_nothing(
    download: Download, dest: Path, error: Exception
) -> None:
    def fail() -> BaseException:
        return error

    with memory_bucket(FILES) as memory, pytest.raises(type(error)):
        download(Metered(memory, 5 * PART, fail), "m", dest)
    assert everything_in(dest.parent) == []


def test_a_small_part_leaves_nothing(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory, pytest.raises(TransferError) as caught:
        download(Metered(memory, STEP - PIECE), "m", dest)
    assert everything_in(dest.parent) == []
    assert "kept" not in str(caught.value)


def test_a_small_model_has_no_journal(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "WORTH", SIZE + 1)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *args, **more: opened.append(path) or real(path, *args, **more)
    )
    with memory_bucket(FILES) as memory:
        download(memory, "m", dest)
    assert files_of(dest) == TREE
    assert not [path for path in opened if str(path).endswith("journal")]


@pytest.mark.parametrize(
    "poverty", [{"weak": True}, {"ranged": False}, {"pinned": False}, {"sized": False}], ids=str
)
def test_without_a_strong_validator_it_begins_again(
    download: Download, dest: Path, poverty: dict[str, bool]
) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError) as caught:
            download(Metered(Poor(memory, **poverty), 5 * PART), "m/sub/weights.bin", dest)
        assert "kept" not in str(caught.value)
        assert everything_in(dest.parent) == []
        whole = Metered(Poor(memory, **poverty))
        download(whole, "m/sub/weights.bin", dest)
        assert whole.read_bytes == len(BIG)
        assert dest.read_bytes() == BIG


def test_a_destination_that_may_not_be_replaced_is_as_it_was(
    download: Download, dest: Path
) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        dest.mkdir()
        (dest / "mine").write_bytes(b"x")
        with pytest.raises(ObjectExistsError):
            download(memory, "m", dest)
    assert files_of(dest.parent) == {"model/mine": b"x"}


# -- what has changed meanwhile ------------------------------------------------------------


@pytest.mark.parametrize("size", [len(BIG), len(BIG) - 1, 100, 0])
def test_an_object_that_was_replaced_begins_again(
    download: Download, dest: Path, size: int
) -> None:
    newer = _bytes(size)
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        put_all(memory, {"m/sub/weights.bin": newer})
        whole = Metered(memory)
        download(whole, "m", dest)
        assert files_of(dest) == TREE | {"sub/weights.bin": newer}


def test_what_is_not_in_the_source_any_more_is_not_in_the_result(
    download: Download, dest: Path
) -> None:
    with memory_bucket(FILES | {"m/gone/a": _bytes(9 * PART)}) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 12 * PART), "m", dest)
        memory.delete(["m/gone/a"])
        download(memory, "m", dest)
        assert files_of(dest) == TREE
        assert everything_in(dest) == sorted([*TREE, "sub"])


def test_another_source_does_not_go_on_with_it(download: Download, dest: Path) -> None:
    """Not even if name, size and version are the same."""
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m/sub/weights.bin", dest)
        put_all(memory, {"n/sub/weights.bin": BIG})
        whole = Metered(memory)
        download(whole, "n/sub/weights.bin", dest)
        assert whole.read_bytes == len(BIG)
        assert everything_in(dest.parent) == ["model"]


@pytest.mark.parametrize("more", [{"allow_patterns": "*.bin"}, {"ignore_patterns": "empty"}])
def test_another_choice_of_files_begins_anew(
    download: Download, dest: Path, more: dict[str, str]
) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        download(memory, "m", dest, **more)
        assert set(files_of(dest)) < set(TREE)
        assert list(dest.parent.iterdir()) == [dest]


def test_another_destination_does_not_go_on_with_it(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        whole = Metered(memory)
        download(whole, "m", dest.parent / "other")
        assert whole.read_bytes == SIZE
        assert staging_in(dest.parent)


def test_another_boot_begins_again(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        monkeypatch.setattr(files, "boot_id", lambda: "another")
        whole = Metered(memory)
        download(whole, "m", dest)
        assert whole.read_bytes == SIZE
        assert files_of(dest) == TREE
        assert list(dest.parent.iterdir()) == [dest]


def test_another_boot_goes_on_with_what_was_forced_to_disk(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_bucket(FILES) as memory:
        broken = Metered(memory, 5 * PART)
        with pytest.raises(TransferError):
            download(broken, "m", dest, durable=True)
        monkeypatch.setattr(files, "boot_id", lambda: "another")
        whole = Metered(memory)
        download(whole, "m", dest)
        assert whole.read_bytes + broken.read_bytes <= SIZE + 8 * PIECE
        assert files_of(dest) == TREE


# -- a disk that lies ----------------------------------------------------------------------


def spoil(dest: Path, name: str) -> None:
    """Let the disk have other bytes than those that were written."""
    with open(staging_in(dest.parent) / name, "r+b") as file:
        file.write(b"lies")


def test_what_was_here_and_is_wrong_is_fetched_again_once(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 8 * PART), "m/sub/weights.bin", dest)
        spoil(dest, "content")
        events: list[Progress] = []
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin", dest, progress=events.append)
        assert dest.read_bytes() == BIG
        assert whole.read_bytes >= len(BIG)
        assert (events[-1].bytes_done, events[-1].bytes_present) == (len(BIG), 0)


def test_a_store_that_is_wrong_all_the_time_is_asked_no_more_than_that(
    download: Download, dest: Path
) -> None:
    wrong = Digest("sha256", "0" * 64)
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 8 * PART), "m/sub/weights.bin", dest, digest=wrong)
        whole = Metered(memory)
        with pytest.raises(IntegrityError):
            download(whole, "m/sub/weights.bin", dest, digest=wrong)
        assert whole.read_bytes < 2 * len(BIG)
    assert everything_in(dest.parent) == []


def test_a_listing_that_tells_no_digest_is_asked_once_more(download: Download, dest: Path) -> None:
    """Else nobody would notice that a file that is all here is wrong."""
    sha256 = {"sha256": hashlib.sha256(BIG).hexdigest()}

    class Silent(Wrapped):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            for info in self.inner.list(prefix):
                yield replace(info, digests=(), hint=None, metadata={})

    with memory_bucket() as memory:
        memory.write("m/w.bin", bytes_payload(BIG), metadata=sha256)
        with pytest.raises(TransferError):
            download(Metered(Silent(memory), 9 * PART), "m/", dest)
        spoil(dest, "content/w.bin")
        whole = Metered(Silent(memory))
        download(whole, "m/", dest)
        assert files_of(dest) == {"w.bin": BIG}
        assert whole.asked == ["m/w.bin"]


def test_a_damaged_journal_never_gives_wrong_bytes(download: Download, dest: Path) -> None:
    rng = random.Random(5)
    with memory_bucket(FILES) as memory:
        for number in range(60):
            with pytest.raises(TransferError):
                download(Metered(memory, 6 * PART), "m", dest)
            path = staging_in(dest.parent) / "journal"
            data = bytearray(path.read_bytes())
            at = rng.randrange(len(data))
            if number % 2:
                del data[at:]
            else:
                data[at] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            # A store that tells nothing of its content: only the journal can be wrong.
            download(Poor(memory, hinted=False), "m", dest)
            assert files_of(dest) == TREE
            assert list(dest.parent.iterdir()) == [dest]
            shutil.rmtree(dest)


def test_the_old_tree_that_a_swap_leaves_behind_is_not_taken_for_the_new_one(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it were killed right after publishing; the files have the same names and sizes."""
    newer = {key: data[::-1] for key, data in FILES.items()}
    with memory_bucket(FILES) as memory:
        store = Poor(memory, hinted=False)
        download(store, "m", dest)
        put_all(memory, newer)
        with monkeypatch.context() as patch:
            patch.setattr(destination_module, "_drop", lambda *_: None)
            download(store, "m", dest)
        assert files_of(staging_in(dest.parent) / "content") == TREE
        shutil.rmtree(dest)
        whole = Metered(store)
        download(whole, "m", dest)
        assert files_of(dest) == {key.removeprefix("m/"): data for key, data in newer.items()}
        assert whole.read_bytes == SIZE
        assert list(dest.parent.iterdir()) == [dest]


# -- several at once -----------------------------------------------------------------------


def test_two_downloads_at_once_never_share_what_was_left(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        left = staging_in(dest.parent)
        both = threading.Barrier(2, timeout=20)

        class Meeting(Metered):
            met = threading.local()

            def read(self, key: str, *args: Any) -> Body:
                if "weights" in key and not self.waited:
                    self.waited = True
                    both.wait()
                    folders.append({path.name for path in dest.parent.glob(".*.partial")})
                    both.wait()
                return super().read(key, *args)

            waited = False

        folders: list[set[str]] = []
        backends = [Meeting(memory), Meeting(memory)]
        errors: list[BaseException] = []

        def work(backend: Backend) -> None:
            try:
                with StorageClient(settings=load_settings()) as other:
                    other._options = options(PART, connections=1)
                    other._backends = Always(backend)
                    other.download("memory://bucket/m", dest)
            except BaseException as exc:  # noqa: BLE001 -- looked at below
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(backend,)) for backend in backends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert errors == []
        assert all(len(found) == 2 and left.name in found for found in folders)
        assert files_of(dest) == TREE
        assert list(dest.parent.iterdir()) == [dest]
        # One of them went on, the other one did it all.
        amounts = sorted(backend.read_bytes for backend in backends)
        assert amounts[0] < SIZE
        assert amounts[1] == SIZE


class Always(dict[Any, Any]):
    """Backends of a client that has but one."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend

    def get(self, *_: object) -> Any:
        return self._backend

    def values(self) -> Any:
        return ()


def test_the_one_that_got_furthest_is_taken(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_bucket(FILES) as memory:
        for limit in (3 * PART, 8 * PART, 2 * PART):
            with monkeypatch.context() as patch:
                # As if they had been under way at the same time.
                patch.setattr(destination_module.Destination, "_remove_leftovers", lambda _: None)
                with pytest.raises(TransferError):
                    download(Metered(memory, limit), "m/sub/weights.bin", dest)
        assert len(list(dest.parent.glob(".*.partial"))) == 3
        whole = Metered(memory)
        download(whole, "m/sub/weights.bin", dest)
        assert whole.read_bytes <= len(BIG) - 8 * PART + 8 * PIECE
        assert everything_in(dest.parent) == ["model"]


def test_where_every_lock_can_be_had_nothing_is_taken_over(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_bucket(FILES) as memory:
        with pytest.raises(TransferError):
            download(Metered(memory, 5 * PART), "m", dest)
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
        whole = Metered(memory)
        download(whole, "m", dest)
        assert whole.read_bytes == SIZE
        assert files_of(dest) == TREE


# -- the store's own checksums -------------------------------------------------------------


class Keeping(Wrapped):
    """A store that tells digests only when it is asked for them."""

    def __init__(self, inner: Backend, digests: tuple[Digest, ...] | StorageError) -> None:
        super().__init__(inner)
        self._digests = digests
        self.asked: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, checksums=True)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return replace(self.inner.stat(key, version), hint=None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in self.inner.list(prefix):
            yield replace(info, hint=None)

    def read(self, key: str, *args: Any) -> Body:
        body = self.inner.read(key, *args)
        return Body(replace(body.info, hint=None), iter(body), body.close)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        self.asked.append(info.key)
        if isinstance(self._digests, StorageError):
            raise self._digests
        return self._digests


@pytest.mark.parametrize("key", ["m/sub/weights.bin", "m/one-part"])
@pytest.mark.parametrize("algorithm", ["sha256", "crc64nvme", "crc32c", "md5"])
def test_a_checksum_that_the_store_keeps_is_held_against_it(
    download: Download, dest: Path, tmp_path: Path, key: str, algorithm: str
) -> None:
    (tmp_path / "x").write_bytes(FILES[key])
    right = hash_file(tmp_path / "x", (algorithm,))[algorithm]
    wrong = Digest(algorithm, right.hex[:-1] + ("0" if right.hex[-1] != "0" else "1"))
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, (right,))
        download(backend, key, dest)
        assert backend.asked == [key]
        assert dest.read_bytes() == FILES[key]
        dest.unlink()
        with pytest.raises(IntegrityError, match=str(wrong)):
            download(Keeping(memory, (wrong,)), key, dest)
    assert everything_in(dest.parent) == []


def test_each_object_of_a_tree_is_asked_for_once(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, ())
        download(backend, "m", dest)
        assert sorted(backend.asked) == sorted(FILES)
        assert files_of(dest) == TREE


def test_who_tells_a_digest_is_not_asked_for_more(download: Download, dest: Path) -> None:
    class Telling(Keeping):
        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            found: ObjectInfo = self.inner.stat(key, version)
            return found

    with memory_bucket(FILES) as memory:
        backend = Telling(memory, ())
        download(backend, "m/sub/weights.bin", dest)
        assert backend.asked == []


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("not for you"),
        TransientError("503"),
        UnreachableError("gone"),
        StorageError("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_store_that_does_not_tell_is_believed_as_before(
    download: Download, dest: Path, error: StorageError
) -> None:
    with memory_bucket(FILES) as memory:
        download(Keeping(memory, error), "m", dest)
    assert files_of(dest) == TREE


def test_who_may_not_ask_asks_once(client: StorageClient, download: Download, dest: Path) -> None:
    client._options = options(PART, connections=1)
    client._budget = Budget(1)
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, AuthenticationError("not for you"))
        download(backend, "m", dest)
    assert len(backend.asked) == 1
    assert files_of(dest) == TREE


def test_an_algorithm_that_cannot_be_computed_here_is_passed_over(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "available", lambda name: not name.startswith("crc"))
    monkeypatch.setattr(
        "storage.transfer.download.available", lambda name: not name.startswith("crc")
    )
    with memory_bucket(FILES) as memory:
        download(Keeping(memory, (Digest("crc64nvme", "0" * 16),)), "m/one-part", dest)
        assert dest.read_bytes() == FILES["m/one-part"]
        both = (Digest("crc64nvme", "0" * 16), Digest("md5", "0" * 32))
        with pytest.raises(IntegrityError, match="md5:0"):
            download(Keeping(memory, both), "m/one-part", dest)


def test_a_copy_is_held_against_the_checksum_too() -> None:
    right = Digest("sha256", hashlib.sha256(BIG).hexdigest())
    with memory_bucket(FILES) as memory, memory_bucket() as target:
        for digest in (right, Digest("sha256", "0" * 64)):
            backend = Keeping(memory, (digest,))
            info = backend.stat("m/sub/weights.bin")
            source = Source(backend, info, where="memory://m", retry=FAST)
            meter = Meter("copy", "memory://m", info.size, 1, None)
            with contextlib.ExitStack() as stack:
                if digest != right:
                    stack.enter_context(pytest.raises(IntegrityError, match="sha256:0"))
                stream_copy(source, target, f"m{digest.hex[0]}", options=options(), meter=meter)
            assert backend.asked == [info.key]
        (written,) = target.list()
        assert written.key == f"m{right.hex[0]}"
        # It is the digest that an upload would leave, or none at all.
        assert written.metadata == {}
