"""A container of 4 GiB takes no more memory than a small one.

What streams is held to 160 MiB of peak resident memory (``VmHWM``). Where a file is mapped, its
pages count as resident as long as nobody needs the memory for something else; they are the page
cache's, so there it is the anonymous memory (``RssAnon``) that is held to the same bound.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 1024**2
BOUND = 160 * MIB
SIZE = 4096 * MIB
# The same array again and again: incompressible, and 16 MiB of memory.
ARRAYS = 256

PRELUDE = """
import contextlib, hashlib, json, sys
from storage.container import ModelContainer

path, other = sys.argv[1:]

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

def tell(**found):
    print(json.dumps({"peak": status("VmHWM"), "anonymous": status("RssAnon"), **found}))

def drain(stream):
    size = 0
    while block := stream.read(1 << 20):
        size += len(block)
    return size
"""
BUILD = """
import numpy
block = numpy.random.default_rng(1).standard_normal(4 << 20, dtype="f4")
with ModelContainer.from_training_model([block] * 256, metadata={"tag": "v1"}) as model:
    model.save_to_file(path)
    tell(size=model.size)
"""
RETAG = """
with ModelContainer.from_file(path) as model, model.to_builder().set_metadata("tag", "v2") \\
        .build() as tagged:
    tagged.save_to_file(other)
    tell(tag=tagged.metadata["tag"])
"""
OPEN = """
with ModelContainer.from_file(path) as model:
    tell(tag=model.metadata["tag"])
"""
MAP = """
with ModelContainer.from_file(path) as model:
    arrays = model.get_training_model(mmap=True)
sums = {float(array.sum(dtype="f8")) for array in arrays}
tell(count=len(arrays), bytes=sum(array.nbytes for array in arrays), sums=len(sums))
"""
STREAM = """
with ModelContainer.from_file(path) as model:
    with model.get_training_model_stream() as stream:
        size = drain(stream)
    with model.get_file_stream() as stream:
        whole = drain(stream)
    chunks = sum(len(chunk.data) for chunk in model.get_filechunk_stream())
    tell(size=size, whole=whole, chunks=chunks, expected=model.size)
"""
TAKE_IN = """
with open(path, "rb") as stream, ModelContainer.from_stream(stream) as model:
    tell(tag=model.metadata["tag"])
"""
CHECKSUM = """
with ModelContainer.from_file(path) as model:
    tell(checksum=model.checksum)
"""
SIGN = """
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
key = Ed25519PrivateKey.generate()
with ModelContainer.from_file(path) as model:
    signature = model.sign(key)
    tell(valid=model.verify_signature(key.public_key(), signature["signature"]))
"""


def step(code: str, *paths: Path) -> dict[str, Any]:
    """Do one step in a process of its own; return what it told."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Build a container of 4 GiB; return its path and what building it took."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 3 * SIZE:
        pytest.fail(f"{folder}: {3 * SIZE >> 30} GiB are needed")
    with pytest.MonkeyPatch.context() as patch:
        # Temporary files belong on the same disk; elsewhere they may be memory.
        patch.setenv("TMPDIR", str(folder))
        path = folder / "model.container"
        try:
            yield path, step(BUILD, path, path)
        finally:
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_building_and_saving_take_no_more_memory(container: tuple[Path, dict[str, Any]]) -> None:
    path, told = container
    assert told["size"] == path.stat().st_size > SIZE
    assert told["peak"] < BOUND


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tagging_takes_no_more_memory(container: tuple[Path, dict[str, Any]]) -> None:
    path, _ = container
    other = path.with_name("tagged.container")
    try:
        told = step(RETAG, path, other)
        assert told["tag"] == "v2"
        assert told["peak"] < BOUND
        assert step(OPEN, other, other)["tag"] == "v2"
    finally:
        other.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "code",
    [OPEN, STREAM, TAKE_IN, CHECKSUM, SIGN],
    ids=["open", "stream", "take-in", "checksum", "sign"],
)
def test_reading_takes_no_more_memory(code: str, container: tuple[Path, dict[str, Any]]) -> None:
    path, _ = container
    told = step(code, path, path)
    assert told["peak"] < BOUND
    if code is STREAM:
        assert told["size"] > SIZE
        assert told["whole"] == told["chunks"] == told["expected"] == path.stat().st_size
    if code is SIGN:
        assert told["valid"] is True


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mapping_takes_no_more_memory_than_the_page_cache_s(
    container: tuple[Path, dict[str, Any]],
) -> None:
    path, _ = container
    told = step(MAP, path, path)
    assert told["count"] == ARRAYS
    assert told["bytes"] == SIZE
    assert told["sums"] == 1
    assert told["anonymous"] < BOUND
