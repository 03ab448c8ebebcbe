"""The examples of the page about the registry run, in the order in which they are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import storage
import storage.facade

_PAGE = Path(storage.__file__).parents[1] / "docs" / "registry.md"


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
