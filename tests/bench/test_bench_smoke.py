"""``python -m tests.bench --quick`` from end to end, with whichever peers are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.again import REPEATS
from tests.bench.cases import CASES, Sizes
from tests.bench.contestants import OURS, PEERS, Toolbox

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_quick_run_measures_everybody_and_writes_the_page(tmp_path: Path) -> None:
    tools = Toolbox(
        *(os.environ.get(name) for name in ("KSERVE_PYTHON", "SCALEOUT_PYTHON", "ARKINDEX_PYTHON"))
    )
    peers = [peer.name for peer in PEERS if peer.missing(tools) is None]
    page, raw = tmp_path / "benchmarks.md", tmp_path / "raw.json"
    argv = [sys.executable, "-m", "tests.bench", "--quick", "--date", "2026-01-02"]
    argv += ["--out", os.fspath(page), "--json", os.fspath(raw), "--peers", *peers]
    finished = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
    assert finished.returncode == 0, finished.stderr

    measured = json.loads(raw.read_text())
    assert list(measured["cases"]) == list(CASES)
    for name, case in CASES.items():
        if name in ("again", "import"):
            continue
        runs = measured["cases"][name]["runs"]
        able = {one.name for one in OURS if case.action in one.actions}
        able |= {one.name for one in PEERS if one.name in peers and case.action in one.actions}
        assert set(runs) == able
        for who, times in runs.items():
            assert len(times) == 1, who
            assert times[0]["fault"] is None, who
            assert times[0]["seconds"] > 0, who
            assert times[0]["peak_memory"] > 0, who
    assert measured["cases"]["import"]["runs"]["storage"]
    sizes, again = Sizes.smoke(), measured["cases"]["again"]["runs"]
    invited = {one.name for one in OURS} | set(peers)
    assert set(again) == {way.name for way in REPEATS if way.contestant in invited}
    for way in REPEATS:
        times = again.get(way.name, [])
        assert len(times) in (0, sizes.repeat_rounds if way.cold else sizes.repeat_calls)
        for run in times:
            assert run["fault"] is None, way.name
            assert 0 < run["seconds"] < 60, way.name

    text = page.read_text()
    assert "quick run" in text
    assert "2026-01-02" in text
    assert "(benchmarks.svg)" in text
    assert os.fspath(tmp_path) not in text
    ElementTree.parse(tmp_path / "benchmarks.svg")
