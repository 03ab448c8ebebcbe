"""Spools, and stores that they are emptied into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.integrations.scaleout.spool import Spool
from tests.integrations.scaleout_reports.support import CLIENT, Gate, Nursery


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a spool is to be."""
    return tmp_path / "spool"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A directory that holds what was delivered."""
    return tmp_path / "store"


@pytest.fixture
def spool(folder: Path) -> Iterator[Spool]:
    """A fresh spool."""
    spool = Spool(folder, CLIENT)
    yield spool
    spool.close()


@pytest.fixture
def gate() -> Gate:
    """What a store does to writes."""
    return Gate()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Makes children that are killed."""
    with Nursery() as nursery:
        yield nursery
