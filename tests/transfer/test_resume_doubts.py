"""What was left is not trusted blindly, nor shared: a disk that lies, several at once."""

from __future__ import annotations

import fcntl
import hashlib
import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import Backend, Body, ObjectInfo, bytes_payload
from storage.client import StorageClient
from storage.config import load_settings
from storage.digest import Digest
from storage.errors import IntegrityError, TransferError
from storage.transfer import destination as destination_module
from storage.transfer.progress import Progress
from tests.transfer.faulty import Poor
from tests.transfer.resume_support import (
    BIG,
    FILES,
    PART,
    PIECE,
    SIZE,
    TREE,
    Download,
    Metered,
    staging_in,
)
from tests.transfer.support import Wrapped, everything_in, files_of, memory_bucket, options, put_all


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=load_settings()) as found:
        found._options = options(PART)
        yield found


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
                    # One more is there to take turns, for those who wait for longer.
                    contents = dest.parent.glob(".*.partial/content")
                    folders.append({path.parent.name for path in contents})
                    both.wait()
                return super().read(key, *args)

            waited = False

        folders: list[set[str]] = []
        backends = [Meeting(memory), Meeting(memory)]
        errors: list[BaseException] = []

        def work(backend: Backend) -> None:
            try:
                with StorageClient(settings=load_settings(cache_lock_timeout=0.1)) as other:
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
