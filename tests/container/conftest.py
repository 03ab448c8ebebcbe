"""What the tests of containers share: weights, a container of them, and what lies about."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage.container import ModelContainer

WEIGHTS = [
    np.random.default_rng(1).standard_normal((64, 64), dtype="f4"),
    np.arange(10, dtype="i8"),
    np.zeros((0, 3)),
]


def same(found: object, expected: list[np.ndarray] = WEIGHTS) -> bool:
    assert isinstance(found, list)
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def content(container: ModelContainer) -> bytes:
    with container.get_file_stream() as stream:
        return stream.read()


@pytest.fixture
def data() -> bytes:
    """A container, as bytes: weights, an inference model and a tag."""
    with (
        ModelContainer.from_training_model(WEIGHTS, metadata={"tag": "v1"}) as made,
        made.to_builder().set_inference_model(b"onnx" * 1000, "onnx").build() as container,
    ):
        return content(container)


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.zip"
    path.write_bytes(data)
    return path


@pytest.fixture
def bare() -> bytes:
    """An NPZ file, as models were before there were containers."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **{str(index): array for index, array in enumerate(WEIGHTS)})
    return stream.getvalue()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def open_files() -> Callable[[], set[str]]:
    """Tell which regular files this process has open, by descriptor and name."""
    # Earlier tests may have left some to the collector, which comes when it likes.
    gc.collect()

    def find() -> set[str]:
        found = set()
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                found.add(f"{descriptor} {os.readlink(f'/proc/self/fd/{descriptor}')}")
            except FileNotFoundError:
                continue
        return {each for each in found if "/" in each.split(" ", 1)[1] and "/proc" not in each}

    return find
