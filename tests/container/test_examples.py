"""The examples of the page about containers run, in the order in which they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import storage
import storage.facade

_PAGE = Path(storage.__file__).parents[1] / "docs" / "containers.md"


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage.facade, "_client", None)
    blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("s3://models/", f"memory://{tmp_path.name}/"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"digits.zip", "digits-tested.zip"}
