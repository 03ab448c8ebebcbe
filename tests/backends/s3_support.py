"""What the tests of both S3 drivers share: the way round them, and what the servers cannot do."""

from __future__ import annotations

from collections.abc import Sequence

from storage.testing.conformance import Sometimes
from tests.servers.s3 import S3Server

_BACKSLASH = "SeaweedFS turns backslashes into slashes"
_DOTS = "SeaweedFS refuses keys with dot segments, those hidden by backslashes included"
_EMPTY = "SeaweedFS drops empty segments from keys"

# Whichever client asks.
SEAWEEDFS_EXCEPTIONS: dict[str, str] = {
    **{
        f"{test}[{case}]": reason
        for test in (
            "test_odd_key_is_read",
            "test_odd_key_is_listed",
            "test_odd_prefix_is_literal",
            "test_odd_key_is_written",
            "test_odd_key_is_copied",
            "test_odd_key_is_deleted",
        )
        for case, reason in (("backslash", _BACKSLASH), ("backslash-dots", _DOTS))
    },
    **{
        f"{test}[{case}]": reason
        for test in (
            "test_key_of_odd_segments_is_literal_or_refused",
            "test_key_of_odd_segments_is_not_another_object",
            "test_delete_of_odd_segments_removes_no_other_object",
        )
        for case, reason in (
            ("empty-segment", _EMPTY),
            ("dot-segment", _DOTS),
            ("dot-dot-segment", _DOTS),
            ("dot-dot-first", _DOTS),
        )
    },
    "test_key_of_odd_segments_is_literal_or_refused[leading-slash]": _EMPTY,
    "test_prefix_of_odd_segments_is_literal_or_refused": _EMPTY,
}
"""Conformance tests that SeaweedFS itself fails, and why."""
MOTO_EXCEPTIONS: dict[str, str] = {
    "test_writes_of_one_key_in_many_threads_leave_one_of_them": Sometimes(
        "moto's threads race: now and then it answers 500 when several requests write one key"
    ),
    **dict.fromkeys(
        ("test_of_many_creators_one_wins", "test_no_update_is_lost_among_many_writers"),
        Sometimes("moto looks first and writes then; its other threads may come in between"),
    ),
}
"""The same for moto."""


class S3Raw:
    """One bucket through boto3."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self._server = server
        self._bucket = bucket

    def put(self, key: str, data: bytes) -> None:
        from botocore.exceptions import ClientError

        try:
            self._server.put_raw(self._bucket, key, data)
        except ClientError as exc:
            raise OSError(f"the server refuses the key {key!r}: {exc}") from exc

    def get(self, key: str) -> bytes:
        return self._server.get_raw(self._bucket, key)

    def keys(self) -> set[str]:
        return set(self._server.keys_raw(self._bucket))

    def unfinished(self) -> Sequence[str]:
        return [key for key, _ in self._server.pending_uploads(self._bucket)]
