"""Kinds of tree, and what two trees have to agree in."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

Tree = dict[str, tuple[str, ...]]


def _write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _folders_only(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "c").mkdir()


def _order(root: Path) -> None:
    # The order of paths by their parts is none of the orders of their texts.
    names = [
        "a/b",
        "a-b",
        "a.b",
        "a b",
        "A",
        "B/a",
        "a/a/a",
        "aa/a",
        "ä",
        "0",
        "a/é",
        "~",
        "\U0001f9ea",
    ]
    _write(root, {name: f"content of {name}".encode() for name in names})


def _long_names(root: Path) -> None:
    _write(root, {"/".join(["folder"] * 60) + "/deep": b"deep", "n" * 255: b"long"})
    _write(root, {f"{'d' * 99}/{'f' * 100}": b"100", f"{'ü' * 80}/{'ö' * 60}": b"unicode"})


def _odd_names(root: Path) -> None:
    names = ["with space", "[1]", "new\nline", "quote\"'", "back\\slash", "*?", "%20", "-rf", "#"]
    _write(root, {name: name.encode() for name in names})


def _links(root: Path) -> None:
    _write(root, {"weights/v1.bin": b"one", "weights/v2.bin": b"two", "readme": b"text"})
    (root / "current").symlink_to("weights/v2.bin")
    (root / "folder").symlink_to("weights")
    (root / "weights" / "up").symlink_to("../readme")
    (root / "again").symlink_to("current")


def _hard_links(root: Path) -> None:
    _write(root, {"first": b"the same" * 1000})
    os.link(root / "first", root / "second")
    (root / "sub").mkdir()
    os.link(root / "first", root / "sub" / "third")


def _modes(root: Path) -> None:
    _write(root, {"run": b"#!/bin/sh\n", "read only": b"x", "private": b"y", "plain": b"z"})
    for name, mode in {"run": 0o755, "read only": 0o444, "private": 0o600}.items():
        (root / name).chmod(mode)


def _weights_and_text(root: Path) -> None:
    _write(
        root,
        {
            "model.safetensors": random.Random(1).randbytes(8_000_000),
            "config.json": b'{"layers": 12}\n',
            "vocab.txt": "\n".join(f"token {n}" for n in range(100_000)).encode(),
        },
    )


def sparse(root: Path, size: int) -> None:
    """Make a file of zeros, with something at its end."""
    with (root / "weights.bin").open("wb") as file:
        file.truncate(size - 1)
        file.seek(size - 1)
        file.write(b"\x01")


TREES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda root: None,
    "folders only": _folders_only,
    "an empty file": lambda root: _write(root, {"empty": b""}),
    "1 byte": lambda root: _write(root, {"byte": b"\x00"}),
    "unicode names": lambda root: _write(
        root, {"модель/веса.bin": b"1", "模型": b"2", "e\u0301": b"3", "\u00e9": b"4"}
    ),
    "a name that is no unicode": lambda root: _write(root, {os.fsdecode(b"caf\xe9"): b"latin"}),
    "odd names": _odd_names,
    "long names": _long_names,
    "an order of its own": _order,
    "links": _links,
    "hard links": _hard_links,
    "modes": _modes,
    "500 small files": lambda root: _write(
        root, {f"{n % 7}/{n}": str(n).encode() * n for n in range(500)}
    ),
    "weights and text": _weights_and_text,
    "sparse, 64 MiB": lambda root: sparse(root, 64 * 1024**2),
    "sizes around a block": lambda root: _write(
        root, {str(n): b"x" * n for n in (511, 512, 513, 1023, 1024, 1025, 10_240, 1024**2 + 1)}
    ),
}


def make(name: str, parent: Path) -> Path:
    """Make a tree of a kind in a folder."""
    root = parent / "tree"
    root.mkdir()
    TREES[name](root)
    return root


def seen(root: Path) -> Tree:
    """Return all that matters of what is in a folder."""
    found: Tree = {}
    for path in root.rglob("*"):
        name = os.fspath(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder",)
        else:
            executable = "executable" if path.stat().st_mode & 0o100 else ""
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[name] = ("file", digest, executable)
    return found
