"""What the tests of ForML share: its release, its project, and looks at what it made."""

from __future__ import annotations

import json
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.facade.stores import Store, tree_bytes
from tests.peers.environments import Peer, Release

HERE = Path(__file__).parent
SIDE = HERE / "side.py"
INSIDE = HERE / "inside"
PROJECT = tomllib.loads((HERE.parents[2] / "pyproject.toml").read_text())["project"]

STORE_EXTRAS = ("azure", "gcs", "hf", "s3")
FORML = Release(
    "forml==0.93",
    besides=(
        *PROJECT["dependencies"],
        *dict.fromkeys(
            requirement
            for extra in STORE_EXTRAS
            for requirement in PROJECT["optional-dependencies"][extra]
        ),
        "distributed",  # ForML's runner that trains
        "legacy-cgi; python_version >= '3.13'",  # which ForML imports from Python
    ),
)
"""The newest, and the last one. It asks for no versions of what it needs."""

STORES = ("file", "pvc", "s3", "gs", "azure", "hub")
on_every_store = pytest.mark.parametrize("store", STORES, indirect=True)
on_two_stores = pytest.mark.parametrize("store", ["file", "s3"], indirect=True)
on_s3 = pytest.mark.parametrize("store", ["s3"], indirect=True)
on_file = pytest.mark.parametrize("store", ["file"], indirect=True)

NAME, VERSION = "demo-project", "1.2.0"
Start = Callable[..., Peer]


def toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text of a TOML file with these tables."""
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
        for name, fields in tables.items()
    )


def write_wheel(folder: Path) -> None:
    """Make the package that the project depends on, which ForML bundles with the project."""
    name = "formldemodependency"
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "OFFSET = 100\n")
        info = f"{name}-1.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def keys_of(store: Store, part: str) -> list[str]:
    """Return the keys of all objects that have ``part`` in theirs."""
    keys = store.keys()
    return [key for key in keys if part in key]


def make_package(forml: Peer, path: Path, version: str, text: str, name: str = NAME) -> Path:
    """Make a small package with ``text`` in it."""
    source = path.with_suffix(".source")
    (source / "demo").mkdir(parents=True)
    (source / "demo" / "__init__.py").write_text(f"# {text}\n")
    forml("create", source=source, target=path, version=version, name=name)
    return path


def content_of(package: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(package) as found:
        return {name: found.read(name) for name in found.namelist()}


def installed(mounted: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a package that was extracted, without what Python leaves there."""
    found: dict[str, bytes] = tree_bytes(Path(mounted["path"]))
    return {path: data for path, data in found.items() if "__pycache__" not in path}
