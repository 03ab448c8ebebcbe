"""What the tests of both GCS drivers share: the way round them, and what the servers cannot do."""

from __future__ import annotations

from tests.servers.gcs import FakeGCS

FAKE_GCS_EXCEPTIONS: dict[str, str] = {}
"""Conformance tests that fake-gcs-server itself fails, whichever client asks, and why."""

_NO_XML_WRITES = (
    "fake-gcs-server refuses objects sent by the XML API (400, invalid uploadType), "
    "which is how obstore writes; the same test passes behind the shim"
)
FAKE_GCS_OBSTORE_EXCEPTIONS: dict[str, str] = {
    **FAKE_GCS_EXCEPTIONS,
    **dict.fromkeys(
        (
            "test_copy_keeps_metadata_and_content_type",
            "test_digest_in_the_metadata_is_told",
            "test_if_absent_creates",
            "test_if_absent_creates_what_was_deleted",
            "test_if_absent_leaves_what_is_there",
            "test_if_match_does_not_bring_back_what_was_deleted",
            "test_if_match_leaves_another_version",
            "test_if_match_replaces_the_version_that_is_there",
            "test_large_payload_is_stored_in_parts",
            "test_many_keys_under_one_prefix",
            "test_metadata_and_content_type_are_kept",
            "test_metadata_of_a_large_object_is_kept",
            "test_metadata_of_the_old_object_does_not_stay",
            "test_metadata_that_only_looks_like_a_digest_is_no_digest",
            "test_names_of_metadata_come_back_in_lower_case",
            "test_no_update_is_lost_among_many_writers",
            "test_odd_key_is_written",
            "test_of_many_creators_one_wins",
            "test_reader_sees_old_or_new_while_a_writer_overwrites",
            "test_stream_of_short_reads_is_stored_whole",
            "test_write_is_idempotent",
            "test_write_replaces_what_is_there",
            "test_write_stores_every_byte",
            "test_write_tells_what_is_now_there",
            "test_writes_in_many_threads",
            "test_writes_of_one_key_in_many_threads_leave_one_of_them",
        ),
        _NO_XML_WRITES,
    ),
    "test_write_makes_no_bucket": (
        "fake-gcs-server answers an upload by the XML API to no bucket by a plain 404 or 400"
    ),
}
"""The same for what obstore sends it."""

_BACKSLASH = "SeaweedFS turns backslashes into slashes"
_DOTS = "SeaweedFS refuses keys with dot segments, those hidden by backslashes included"
_NO_JSON = "the shim has the XML API only, and this goes by the JSON API, through gcsfs"
SHIM_EXCEPTIONS: dict[str, str] = {
    **{
        f"{test}[{case}]": reason
        for test in (
            "test_odd_key_is_read",
            "test_odd_key_is_listed",
            "test_odd_prefix_is_literal",
            "test_odd_key_is_written",
            "test_odd_key_is_copied",
        )
        for case, reason in (("backslash", _BACKSLASH), ("backslash-dots", _DOTS))
    },
    "test_odd_key_is_deleted[backslash-dots]": _DOTS,
    **{
        f"{test}[{case}]": _NO_JSON
        for test in (
            "test_key_of_odd_segments_is_literal_or_refused",
            "test_key_of_odd_segments_is_not_another_object",
        )
        for case in (
            "empty-segment",
            "leading-slash",
            "dot-segment",
            "dot-dot-segment",
            "dot-dot-first",
        )
        if (test, case) != ("test_key_of_odd_segments_is_not_another_object", "leading-slash")
    },
    "test_prefix_of_odd_segments_is_literal_or_refused": _NO_JSON,
    "test_copy_of_the_version_that_is_there": _NO_JSON,
    "test_digests_are_those_of_the_content": _NO_JSON,
    "test_filesystem_reads_the_same_bucket": _NO_JSON,
    "test_filesystem_writes_the_same_bucket": _NO_JSON,
}
"""The same for obstore's requests to a SeaweedFS behind the shim."""


class GCSRaw:
    """One bucket through the JSON API."""

    def __init__(self, server: FakeGCS, bucket: str) -> None:
        self._server = server
        self._bucket = bucket

    def put(self, key: str, data: bytes) -> None:
        self._server.put_raw(self._bucket, key, data)

    def get(self, key: str) -> bytes:
        return self._server.get_raw(self._bucket, key)

    def keys(self) -> set[str]:
        return set(self._server.keys_raw(self._bucket))
