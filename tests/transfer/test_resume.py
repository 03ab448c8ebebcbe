"""A download that failed is gone on with by the next one, and no byte is paid for twice."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from storage import files
from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import (
    AuthenticationError,
    InsufficientSpaceError,
    IntegrityError,
    ObjectExistsError,
    StorageError,
    TransferError,
)
from storage.testing.faulty_backend import FaultyBackend
from storage.transfer import destination as destination_module
from storage.transfer import journal, progress
from storage.transfer.engine import Budget
from storage.transfer.progress import Progress
from tests.transfer.faulty import Poor
from tests.transfer.resume_support import (
    BIG,
    FILES,
    PART,
    PIECE,
    SIZE,
    STEP,
    TREE,
    Download,
    Metered,
    staging_in,
)
from tests.transfer.resume_support import some_bytes as _bytes
from tests.transfer.support import FAST, everything_in, files_of, memory_bucket, options, put_all

SOAK = bool(os.environ.get("STORAGE_SOAK"))


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=load_settings()) as found:
        found._options = options(PART)
        yield found


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


def test_a_download_goes_on_with_new_credentials(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        expired = AuthenticationError("the token has expired")
        broken = Metered(memory, 3 * PART, lambda: expired)
        with pytest.raises(AuthenticationError, match=r"expired; \d+ bytes of it are kept in"):
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
    monkeypatch.setattr("storage.client.placed.check_space", lambda _, size: needed.append(size))
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


@pytest.mark.parametrize("at", [PART, 5 * PART])
def test_a_child_that_ends_midway_takes_nothing_from_its_parent(
    client: StorageClient, download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(journal, "WORTH", 3 * PART)
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    client._budget = Budget(1)
    client._options = options(PART, connections=1)
    parent, children = os.getpid(), []

    def fork(event: Progress) -> None:
        if event.bytes_done >= at and not children:
            children.append(os.fork())
            if not children[0]:
                raise KeyboardInterrupt
            os.waitpid(children[0], 0)

    with memory_bucket(FILES) as memory:
        try:
            download(memory, "m/sub/weights.bin", dest, progress=fork)
        finally:
            if os.getpid() != parent:
                os._exit(0)
    assert children
    assert dest.read_bytes() == BIG
    assert everything_in(dest.parent) == ["model"]


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
