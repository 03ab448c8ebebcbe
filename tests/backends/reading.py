"""The conformance suite for stores that can only be read."""

from __future__ import annotations

from storage.testing.conformance import BackendConformance
from storage.testing.conformance_write import Conditions, Writing

__all__ = ["ReadingConformance"]


class ReadingConformance(BackendConformance):
    """All that is about reading.

    What is about writing would be left out one by one, each with a store made before.
    """

    locals().update(
        {name: None for name in (*dir(Conditions), *dir(Writing)) if name.startswith("test_")}
    )
