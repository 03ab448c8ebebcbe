"""The conformance suite for stores that can only be read."""

from __future__ import annotations

from storage.testing.conformance import BackendConformance
from storage.testing.conformance_write import Conditions, Writing

__all__ = ["ReadingConformance"]

# Of the classes about writing.
_ABOUT_READING = (
    "test_missing_bucket_is_no_empty_bucket",
    "test_nothing_is_found_in_a_missing_bucket",
)
# Of the other classes.
_ABOUT_WRITING = (
    "test_odd_key_is_written",
    "test_odd_key_is_copied",
    "test_odd_key_is_deleted",
    "test_key_of_odd_segments_is_literal_or_refused",
    "test_delete_of_odd_segments_removes_no_other_object",
    "test_empty_key_is_refused",
    "test_key_with_a_nul_is_refused",
)


class ReadingConformance(BackendConformance):
    """All that is about reading.

    What is about writing would be left out one by one, each with a store made before.
    """

    locals().update(
        {
            name: None
            for name in (*dir(Conditions), *dir(Writing), *_ABOUT_WRITING)
            if name.startswith("test_") and name not in _ABOUT_READING
        }
    )
