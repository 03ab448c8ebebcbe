"""Layers over one another, against a model of what they should become."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from storage.backends.oci.overlay import Overlay
from storage.unpacking.extraction import ExtractionLimits
from tests.backends.oci_support import Entry, tar_of
from tests.cli.conftest import read_tree

NAMES = ("a", "b", "c")


def _some_path(rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.choice(NAMES) for _ in range(rng.randint(1, 3)))


class Model:
    """What a tree is after some layers: paths and contents."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, ...], bytes] = {}

    def hide(self, path: tuple[str, ...], *, itself: bool) -> None:
        """Remove what is at a path and below it."""
        for one in list(self.files):
            if one[: len(path)] == path and (itself or len(one) > len(path)):
                del self.files[one]

    def put(self, path: tuple[str, ...], data: bytes) -> None:
        """Put a file in place of whatever is there."""
        self.hide(path, itself=True)
        for length in range(1, len(path)):
            self.files.pop(path[:length], None)
        self.files[path] = data


def _layer(rng: random.Random, model: Model) -> list[Entry]:
    """Return the members of a random layer, and apply it to the model."""
    own: dict[tuple[str, ...], bytes] = {}
    for _ in range(rng.randint(0, 5)):
        path = _some_path(rng)
        clash = any(path[: len(one)] == one or one[: len(path)] == path for one in own)
        if not clash:
            own[path] = rng.randbytes(5)
    hidden = [_some_path(rng) for _ in range(rng.randint(0, 2))]
    # A folder of a layer itself that hides all that was in it.
    opaque = [path[:-1] for path in own if rng.random() < 0.2]
    for path in hidden:
        model.hide(path, itself=True)
    for path in opaque:
        model.hide(path, itself=False)
    for path, data in own.items():
        model.put(path, data)
    made = sorted({path[:length] for path in own for length in range(1, len(path))})
    members = [Entry("/".join(("models", *path)), folder=True) for path in made]
    members += [Entry("/".join(("models", *path)), data) for path, data in own.items()]
    for path in hidden:
        name = "/".join(("models", *path[:-1], f".wh.{path[-1]}"))
        members.insert(rng.randint(0, len(members)), Entry(name))
    for path in opaque:
        name = "/".join(("models", *path, ".wh..wh..opq"))
        members.insert(rng.randint(0, len(members)), Entry(name))
    return members


@pytest.mark.parametrize("seed", range(60))
def test_random_layers_become_what_the_model_says(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    overlay = Overlay("layers", str(tmp_path), 10_000, ExtractionLimits())
    model = Model()
    for _ in range(rng.randint(2, 5)):
        tar = tar_of(_layer(rng, model))
        overlay.apply(io.BytesIO(tar), ("models",))
        assert read_tree(tmp_path) == {"/".join(path): data for path, data in model.files.items()}
    overlay.finish()
