"""How long what a container is in lives: as long as somebody needs it, and no longer."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from storage.container import ModelContainer, ModelContainerBuilder, NumpyHelper
from storage.errors import DestinationError, IntegrityError, InvalidInput, StorageError
from tests.container.conftest import WEIGHTS, content, same

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1
OpenFiles = Callable[[], set[str]]


def test_closing_lets_go_of_everything_once(file: Path, open_files: OpenFiles) -> None:
    before = open_files()
    container = ModelContainer.from_file(file)
    assert len(open_files() - before) == 1
    container.close()
    container.close()
    assert open_files() == before
    # What is in memory can still be asked for.
    assert container.metadata["tag"] == "v1"
    assert container.has_training_model
    assert "numpyhelper" in repr(container)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.get_training_model(),
        lambda c: c.get_training_model(mmap=True),
        lambda c: c.get_training_model_stream().__enter__(),
        lambda c: c.get_inference_model_stream().__enter__(),
        lambda c: c.get_file_stream(),
        lambda c: list(c.get_filechunk_stream()),
        lambda c: c.to_builder(),
        lambda c: c.checksum,
        lambda c: c.size,
        lambda c: c.save_to_file("/nowhere"),
        lambda c: c.verify_checksum("0" * 64),
    ],
)
def test_what_is_closed_cannot_be_read(use: Callable[[ModelContainer], Any], file: Path) -> None:
    with ModelContainer.from_file(file) as container:
        pass
    with pytest.raises(InvalidInput, match="closed; open it again"):
        use(container)


def test_what_is_forgotten_is_let_go_of(file: Path, data: bytes, open_files: OpenFiles) -> None:
    before = open_files()
    for make in (
        lambda: ModelContainer.from_file(file),
        lambda: ModelContainer.from_stream(io.BytesIO(data)),
        lambda: ModelContainer.from_training_model(WEIGHTS),
        lambda: ModelContainerBuilder.from_file(file),
        lambda: ModelContainerBuilder().set_inference_model_stream(io.BytesIO(data), "x"),
        lambda: ModelContainer.from_file(file).to_builder().set_metadata("k", 1).build(),
    ):
        made: Any = make()
        gone = weakref.ref(made)
        assert open_files() != before
        del made
        gc.collect()
        assert gone() is None
        assert open_files() == before


def test_failures_let_go_of_everything(
    file: Path, data: bytes, temporary: Path, open_files: OpenFiles
) -> None:
    class Failing(NumpyHelper):
        def __init__(self, streams: bool) -> None:
            super().__init__()
            self.streams = streams

        def save(self, params: Any, stream: BinaryIO) -> None:
            stream.write(bytes(3_000_000))
            raise RuntimeError("midway")

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1000:
                raise RuntimeError("midway")
            return super().read(800)

    cut = file.with_name("cut")
    cut.write_bytes(data[:-10])
    before = open_files()
    for fail in (
        lambda: ModelContainer.from_training_model(WEIGHTS, Failing(True)),
        lambda: ModelContainer.from_training_model(WEIGHTS, Failing(False)),
        lambda: ModelContainer.from_stream(Cut(data)),
        lambda: ModelContainerBuilder().set_inference_model_stream(Cut(data), "x"),
    ):
        with pytest.raises(RuntimeError, match="midway"):
            fail()
        gc.collect()
        assert open_files() == before
    with pytest.raises(InvalidInput):
        ModelContainer.from_file(cut)
    gc.collect()
    assert open_files() == before
    assert os.listdir(temporary) == []


def test_no_temporary_file_ever_has_a_name(
    file: Path, data: bytes, bare: bytes, temporary: Path
) -> None:
    seen = []

    class Looking(NumpyHelper):
        streams = False

        def save(self, params: Any, stream: BinaryIO) -> None:
            super().save(params, stream)
            seen.append(os.listdir(temporary))

    containers = [
        ModelContainer.from_training_model(WEIGHTS, Looking()),
        ModelContainer.from_stream(io.BytesIO(data)),
        ModelContainer.from_stream(io.BytesIO(bare)),
        ModelContainer.from_file(file).to_builder().set_metadata("k", 1).build(),
    ]
    assert seen == [[]]
    assert os.listdir(temporary) == []
    assert all(same(container.get_training_model()) for container in containers)


KILLED = """
import io, sys
from storage.container import ModelContainer, ModelContainerBuilder, NumpyHelper

class Helper(NumpyHelper):
    def save(self, params, stream):
        stream.write(bytes(1 << 20))
        if sys.argv[1] == "saving":
            wait()
        stream.seek(0)
        stream.truncate()
        super().save(params, stream)

def wait():
    print("ready", flush=True)
    sys.stdin.read()

builder = ModelContainerBuilder.from_training_model([], Helper())
builder.set_inference_model_stream(io.BytesIO(bytes(1 << 20)), "x")
container = builder.build()
container.save_to_file(sys.argv[2])
changed = container.to_builder().set_metadata("k", 1).build()
wait()
"""


@pytest.mark.parametrize("moment", ["saving", "done"])
def test_a_process_that_is_killed_leaves_nothing(
    moment: str, tmp_path: Path, temporary: Path
) -> None:
    target = tmp_path / "models"
    target.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, moment, str(target / "model.zip")],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert os.listdir(temporary) == []
    assert os.listdir(target) == ([] if moment == "saving" else ["model.zip"])


def test_a_builder_and_its_container_live_apart(file: Path, data: bytes) -> None:
    container = ModelContainer.from_file(file)
    builder = container.to_builder()
    container.close()
    file.unlink()
    copied = builder.build()
    changed = builder.set_metadata("tag", "v2").build()
    builder.close()
    assert content(copied) == data
    copied.close()
    assert same(changed.get_training_model())
    assert changed.metadata["tag"] == "v2"


def test_a_stream_outlives_its_container(data: bytes) -> None:
    container = ModelContainer.from_stream(io.BytesIO(data))
    whole = container.get_file_stream()
    with container.get_training_model_stream() as stream:
        first = stream.read(10)
        container.close()
        # What is opened now gets the number that the closed file had.
        with open(os.devnull, "rb"):
            rest = stream.read()
    assert same(NumpyHelper().load(io.BytesIO(first + rest)))
    with whole:
        assert whole.read() == data


def test_a_file_that_is_moved_replaced_or_removed_is_still_the_same(
    file: Path, data: bytes
) -> None:
    with ModelContainer.from_file(file) as container:
        other = file.with_name("other")
        other.write_bytes(b"another one")
        os.replace(other, file)
        assert content(container) == data
        file.unlink()
        assert same(container.get_training_model())


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 100),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.write_bytes(path.read_bytes()[::-1]),
    ],
    ids=["cut", "longer", "overwritten"],
)
def test_a_file_that_is_written_to_is_noticed(change: Callable[[Path], object], file: Path) -> None:
    os.utime(file, (1, 1))
    with ModelContainer.from_file(file) as container:
        builder = container.to_builder().set_metadata("k", 1)
        change(file)
        for use in (
            container.get_training_model,
            container.get_file_stream,
            lambda: container.checksum,
            container.to_builder,
            lambda: container.save_to_file(file.with_name("copy")),
            builder.build,
        ):
            with pytest.raises(IntegrityError, match="written to"):
                use()
    assert not file.with_name("copy").exists()


def test_threads_read_entries_at_once(tmp_path: Path) -> None:
    arrays = [np.random.default_rng(each).random(200_000) for each in range(4)]
    inference = np.random.default_rng(9).bytes(3_000_000)
    path = tmp_path / "model.zip"
    ModelContainerBuilder.from_training_model(arrays).set_inference_model(
        inference, "x"
    ).build().save_to_file(path)
    start = threading.Barrier(8)

    def read(index: int) -> bool:
        start.wait(30)
        for _ in range(5 * SOAK):
            if index % 2:
                if not same(container.get_training_model(mmap=index == 3), arrays):
                    return False
            else:
                with container.get_inference_model_stream() as stream:
                    if stream.read() != inference:
                        return False
        return True

    with ModelContainer.from_file(path) as container, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_threads_read_while_the_container_is_saved_and_closed(tmp_path: Path) -> None:
    arrays = [np.random.default_rng(1).random(100_000)]
    container = ModelContainer.from_training_model(arrays)
    begun = threading.Barrier(5)

    def read(_: int) -> str:
        begun.wait(30)
        while True:
            try:
                if not same(container.get_training_model(), arrays):
                    return "wrong"
            except InvalidInput as exc:
                return str(exc)

    with ThreadPoolExecutor(4) as pool:
        found = pool.map(read, range(4))
        begun.wait(30)
        for index in range(20 * SOAK):
            container.save_to_file(tmp_path / f"{index % 2}.zip")
        container.close()
        # Nobody read anything wrong before it was closed.
        assert all("closed" in each for each in found)


def test_a_forked_child_goes_on_with_it(data: bytes) -> None:
    container = ModelContainer.from_stream(io.BytesIO(data))
    child = os.fork()
    if not child:
        status = 1
        try:
            assert same(container.get_training_model())
            container.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert content(container) == data


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_pickled_or_copied(way: Callable[[object], object], file: Path) -> None:
    with (
        ModelContainer.from_file(file) as container,
        pytest.raises(TypeError, match="save it to a file"),
    ):
        way(container)


# -- saving -------------------------------------------------------------------------------------


def test_saving_makes_a_file_as_any_other_and_reads_on_from_it(tmp_path: Path) -> None:
    path = tmp_path / "saved.zip"
    before = os.umask(0o027)
    try:
        container = ModelContainer.from_training_model(WEIGHTS)
        whole = content(container)
        container.save_to_file(path)
    finally:
        os.umask(before)
    assert path.read_bytes() == whole == content(container)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_nlink == 1
    assert os.listdir(tmp_path) == [path.name]
    with path.open("r+b") as file:
        file.write(b"written into")
    # The clock of a file system may not have gone on since the file was made.
    os.utime(path, (1, 1))
    with pytest.raises(IntegrityError, match="written to"):
        container.get_training_model()


def test_saving_twice_makes_two_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    container = ModelContainer.from_training_model(WEIGHTS)
    container.save_to_file(str(one))
    container.save_to_file(two)
    assert one.read_bytes() == two.read_bytes()
    assert not one.samefile(two)
    one.unlink()
    assert same(container.get_training_model())


def test_a_container_whose_file_was_removed_is_in_the_one_that_is_saved_next(
    file: Path, tmp_path: Path, open_files: OpenFiles
) -> None:
    made = ModelContainer.from_training_model(WEIGHTS)
    made.save_to_file(file.with_name("made"))
    file.with_name("made").unlink()
    with made, ModelContainer.from_file(file) as opened:
        file.unlink()
        for index, container in enumerate((made, opened)):
            container.save_to_file(tmp_path / f"saved {index}")
            assert same(container.get_training_model())
        # Nothing holds on to space that no name tells of.
        held = [int(name.split()[0]) for name in open_files() if str(tmp_path) in name]
        assert [os.fstat(descriptor).st_nlink for descriptor in held] == [1, 1]


def test_saving_to_the_file_it_is_in_leaves_it_alone(file: Path, data: bytes) -> None:
    before = file.stat()
    link = file.with_name("link")
    link.symlink_to(file.name)
    with ModelContainer.from_file(file) as container:
        container.save_to_file(file)
        container.save_to_file(os.path.relpath(file))
        container.save_to_file(link)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert link.is_symlink()
    assert file.read_bytes() == data


def test_saving_replaces_a_file_and_those_who_have_it_open_keep_it(file: Path, data: bytes) -> None:
    with ModelContainer.from_file(file) as old:
        new = old.to_builder().set_metadata("tag", "v2").build()
        new.save_to_file(file)
        assert content(old) == data
        assert old.metadata["tag"] == "v1"
        # It is another file now, so this is no file of its own any more.
        old.save_to_file(file)
    assert file.read_bytes() == data
    assert new.metadata["tag"] == "v2"
    assert same(new.get_training_model())


def test_what_cannot_be_saved_leaves_what_was_there(file: Path, data: bytes) -> None:
    container = ModelContainer.from_training_model(WEIGHTS)
    with pytest.raises(StorageError):
        container.save_to_file(file.parent)
    with pytest.raises(DestinationError):
        container.save_to_file(file.parent / "missing" / "model.zip")
    with pytest.raises(DestinationError):
        container.save_to_file(file / "model.zip")
    for name in ("a\0b", "\ud800"):
        with pytest.raises(InvalidInput, match="no path"):
            container.save_to_file(file.parent / name)
        with pytest.raises(InvalidInput, match="no path"):
            container.to_builder().set_metadata("k", 1).build(dir=name)
        assert ModelContainer.detect_format_file(name) == "legacy"
    with pytest.raises(DestinationError, match="missing cannot be written"):
        container.to_builder().set_metadata("k", 1).build(dir=file.parent / "missing")
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == data
    assert same(container.get_training_model())


FULL = """
import gc, io, os, subprocess, sys, tempfile
import numpy as np
from storage.container import FileChunk, ModelContainer, ModelContainerBuilder
from storage.errors import DestinationError, InsufficientSpaceError

small, home = sys.argv[1:]
weights = [np.random.default_rng(1).random(300_000)]
container = ModelContainer.from_training_model(weights)
with container.get_file_stream() as stream:
    data = stream.read()
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small]).returncode:
    sys.exit(77)
tempfile.tempdir = small

class Ours:
    name = "ours"
    def save(self, params, stream):
        stream.write(os.urandom(2 << 20))
    def load(self, stream):
        return None

for call in [
    lambda: ModelContainer.from_training_model(weights),
    lambda: ModelContainer.from_training_model([], Ours()),
    lambda: ModelContainer.from_stream(io.BytesIO(data)),
    lambda: ModelContainer.from_filechunk_stream(FileChunk(os.urandom(100_000)) for _ in range(20)),
    lambda: ModelContainerBuilder().set_inference_model(os.urandom(2 << 20), "x").build(),
    lambda: ModelContainerBuilder().set_file_stream("x", io.BytesIO(data)),
    lambda: container.to_builder().set_metadata("k", 1).build(),
    lambda: container.save_to_file(small + "/model.zip"),
]:
    try:
        call()
    except InsufficientSpaceError as exc:
        assert "full" in str(exc), exc
    else:
        sys.exit("there was room")
    gc.collect()
    room = os.statvfs(small)
    assert room.f_bfree == room.f_blocks and os.listdir(small) == [], "not all was given back"
subprocess.run(["mount", "-o", "remount,ro", small], check=True)
try:
    container.save_to_file(small + "/model.zip")
except DestinationError as exc:
    assert "ead-only" in str(exc), exc
else:
    sys.exit("saved")
container.save_to_file(home + "/model.zip")
"""


def test_a_full_or_read_only_file_system_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    """Real ones, in a name space of their own."""
    (tmp_path / "small").mkdir()
    command = ["unshare", "-rm", sys.executable, "-c", FULL, tmp_path / "small", tmp_path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 0, done.stderr


LARGE = """
import io, sys
from storage.container import ModelContainer, ModelContainerBuilder

class Zeros(io.RawIOBase):
    left = 5 << 30
    def readable(self): return True
    def readinto(self, view):
        count = min(len(view), self.left)
        view[:count] = bytes(count)
        self.left -= count
        return count

builder = ModelContainerBuilder().set_inference_model_stream(io.BufferedReader(Zeros()), "zeros")
with builder.build() as container:
    container.save_to_file(sys.argv[1])
    entry = container.entries["inference_model.bin"]
builder.close()
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(entry.size, peak)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_inference_model_of_5_gib_streams(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(tmp_path / "large.zip")],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, peak = map(int, done.stdout.split())
    assert size == 5 << 30
    assert peak < 160 * 1024
    assert os.listdir(tmp_path) == ["large.zip"]
