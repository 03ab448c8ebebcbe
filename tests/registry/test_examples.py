"""The examples of the page about the registry and of the README run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import storage
import storage.facade

_ROOT = Path(storage.__file__).parents[1]
_PAGE = _ROOT / "docs" / "registry.md"


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage.facade, "_client", None)
    model = tmp_path / "out" / "model"
    model.mkdir(parents=True)
    (tmp_path / "report.html").write_text("good")
    blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, Any] = {"validate": lambda: True}
    for number, block in enumerate(blocks):
        # Somebody trains between them.
        (model / "weights.bin").write_bytes(bytes([number]) * 1000)
        exec(block.replace("s3://models/", f"memory://{tmp_path.name}/"), names)
    assert Path(names["path"], "weights.bin").read_bytes() == bytes(1000)
    registry = names["registry"]
    assert registry.numbers("iris") == [1, 2]
    assert registry.aliases("iris") == {"production": 2}


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.facade, "_client", None)
    blocks = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "ModelRegistry" in block)
    model = tmp_path / "iris"
    model.mkdir()
    (model / "weights.bin").write_bytes(bytes(1000))
    block = block.replace("s3://models/", f"memory://{tmp_path.name}/").replace(
        "/srv/iris", str(model)
    )
    names: dict[str, Any] = {}
    exec(block, names)
    assert Path(names["path"], "weights.bin").read_bytes() == bytes(1000)
    assert names["version"].attributes.metrics == {"accuracy": 0.97}
