"""Kinds of model, and how each is built; the same steps for either program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Steps = list[list[Any]]

GIB = 1024**3
UNICODE = {
    "название": "модель",
    "名前": "モデル 🤖",
    "e\u0301": "\u00e9",
    "bidi": "\u202eabc",
    "nul": "a\0b",
    "surrogate pair": "\U0001f9ea",
}
NESTED = {
    "rounds": [{"loss": 0.25, "clients": ["a", "b", None]}, {"loss": 1e-300, "clients": []}],
    "flags": {"frozen": True, "shared": False, "parent": None},
    "huge": 2**80,
    "negative": -0.0,
    "empty": {"": {"": [[], {}]}},
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """A folder of arrays and files that models are made of."""

    folder: Path

    def arrays(self, name: str, *arrays: Any) -> list[str]:
        """Write arrays; return the paths."""
        paths = []
        for number, array in enumerate(arrays):
            path = self.folder / f"{name}-{number}.npy"
            if not path.exists():
                np.save(path, np.asarray(array, order="K"))
            paths.append(str(path))
        return paths

    def file(self, name: str, content: bytes) -> str:
        """Write a file; return its path."""
        path = self.folder / name
        if not path.exists():
            path.write_bytes(content)
        return str(path)

    def sparse(self, size: int) -> str:
        """Make a file of zeros that takes no space."""
        path = self.folder / f"sparse-{size}"
        with path.open("ab") as file:
            file.truncate(size)
        return str(path)

    def weights(self) -> list[str]:
        """Some ordinary weights."""
        random = np.random.default_rng(7)
        return self.arrays(
            "weights", random.random((64, 32), np.float32), random.random(32, np.float32)
        )

    def npz(self) -> str:
        """Write what scaleoututil's helper made before there were containers."""
        path = self.folder / "legacy.npz"
        if not path.exists():
            np.savez_compressed(path, **{"0": np.arange(12.0).reshape(3, 4), "1": np.ones(5)})
        return str(path)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of model."""

    steps: Callable[[Inputs], Steps]
    """What makes a builder of it."""

    helper: str | None = None
    """By which its weights are read, if it does not say so itself."""

    decode: bool = True
    """Whether its weights are arrays, and the peer can read them out of a container."""


def _metadata(content: dict[str, Any]) -> Callable[[Inputs], Steps]:
    return lambda of: [["from_training_model", of.weights()], ["set_metadata_dict", content]]


def _types(of: Inputs) -> Steps:
    codes = "?bBhHiIlLqQefdFD"
    random = np.random.default_rng(5)
    arrays = [(random.random((3, 2)) * 100).astype(code) for code in codes]
    arrays += [
        np.float32(2.5),
        np.zeros((0, 4), np.float32),
        np.asfortranarray(random.random((5, 7))),
        np.arange(6, dtype=">f4"),
        np.array(["a", "ü"]),
    ]
    return [["from_training_model", of.arrays("types", *arrays)]]


def _random(count: int) -> Any:
    return np.random.default_rng(3).random(count, np.float32)


KINDS: dict[str, Kind] = {
    "no weights": Kind(lambda of: [["set_metadata", "stage", "planned"]]),
    "no arrays": Kind(lambda of: [["from_training_model", []]]),
    "weights alone": Kind(lambda of: [["from_training_model", of.weights()]]),
    "raw, empty": Kind(lambda of: [["from_file", of.file("empty", b"")]], decode=False),
    "raw, 1 byte": Kind(lambda of: [["from_file", of.file("byte", b"\x80")]], decode=False),
    "raw, 3 MB": Kind(
        lambda of: [["from_stream", of.file("raw", np.random.default_rng(1).bytes(3_000_001))]],
        decode=False,
    ),
    "raw NPZ from a file": Kind(lambda of: [["from_file", of.npz()]], "numpyhelper"),
    "raw NPZ from a stream": Kind(lambda of: [["from_stream", of.npz()]], "numpyhelper"),
    "unicode metadata": Kind(_metadata(UNICODE)),
    "nested metadata": Kind(_metadata(NESTED)),
    "big metadata": Kind(_metadata({f"key {n}": "value " * 20 for n in range(10_000)})),
    "inference model alone": Kind(
        lambda of: [["set_inference_model", of.file("onnx", b"\x08\x07" * 5000), "onnx"]]
    ),
    "empty inference model": Kind(
        lambda of: [
            ["from_training_model", of.weights()],
            ["set_inference_model", of.file("empty", b""), "pt"],
        ]
    ),
    "weights and inference model": Kind(
        lambda of: [
            ["from_training_model", of.weights(), "numpyhelper"],
            ["set_inference_model_stream", of.file("onnx", b"\x08\x07" * 5000), "onnx ü"],
            ["set_metadata", "session_id", "s1"],
        ]
    ),
    "raw with inference model": Kind(
        lambda of: [
            ["from_file", of.npz()],
            ["set_inference_model", of.file("onnx", b"\x08\x07" * 5000), "onnx"],
            ["set_model_id", "given"],
            ["set_helper_type", "numpyhelper"],
        ]
    ),
    "1,000 arrays": Kind(
        lambda of: [["from_training_model", of.arrays("a", np.arange(9.0)) * 1000]]
    ),
    "all types of array": Kind(_types),
    # The peer's helper cannot read this from a container: it wants a file with a descriptor.
    "binary helper": Kind(
        lambda of: [
            ["from_training_model", of.arrays("flat", np.arange(5.0), np.ones(3)), "binaryhelper"]
        ],
        decode=False,
    ),
    "4 MB of noise": Kind(
        lambda of: [["from_training_model", of.arrays("noise", _random(1_000_000))]]
    ),
    "4 MB of zeros": Kind(
        lambda of: [["from_training_model", of.arrays("zeros", np.zeros(1_000_000, np.float32))]]
    ),
}
