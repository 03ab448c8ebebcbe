"""What the tests of both Azure drivers share: the way round them, and what Azurite cannot do."""

from __future__ import annotations

from storage.backends.base import Backend, bytes_payload
from tests.servers.azurite import Azurite

_BACKSLASH = "Azure, and Azurite with it, turns backslashes into slashes; such keys are refused"
_DOTS = "Azure, unlike Azurite, drops dots at the end of each part of a key; such keys are refused"

AZURITE_EXCEPTIONS: dict[str, str] = {
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
        for case, reason in (
            ("backslash", _BACKSLASH),
            ("backslash-dots", _BACKSLASH),
            ("dots", _DOTS),
        )
        # A listing tells what Azurite has.
        if (test, case) != ("test_odd_key_is_listed", "dots")
    },
    **{
        f"{test}[{case}]": _DOTS
        for test in (
            "test_key_of_odd_segments_is_literal_or_refused",
            "test_key_of_odd_segments_is_not_another_object",
            "test_delete_of_odd_segments_removes_no_other_object",
        )
        for case in ("dot-segment", "dot-dot-segment", "dot-dot-first")
    },
    "test_keys_that_look_alike_are_two[trailing-dot]": _DOTS,
}
"""Conformance tests that fail whichever client asks, and why."""


class AzureRaw:
    """One container through ``http.client``.

    It does not tell of blocks that nobody committed: no client can make Azure drop those of a
    failed upload, which stay until the next write of the blob, or a week.
    """

    def __init__(self, server: Azurite, container: str) -> None:
        self._server = server
        self._container = container

    def put(self, key: str, data: bytes) -> None:
        self._server.put_raw(self._container, key, data)

    def get(self, key: str) -> bytes:
        return self._server.get_raw(self._container, key)

    def keys(self) -> set[str]:
        return set(self._server.keys_raw(self._container))


def read(backend: Backend, key: str) -> bytes:
    with backend.read(key) as body:
        return b"".join(bytes(piece) for piece in body)


def check_use(backend: Backend) -> None:
    """Write, find, read and delete."""
    backend.write("m/a", bytes_payload(b"12345"))
    assert [info.key for info in backend.list("m/")] == ["m/a"]
    assert read(backend, "m/a") == b"12345"
    backend.copy("m/a", "m/b")
    assert backend.stat("m/b").size == 5
    files, path = backend.filesystem()
    assert files.cat_file(f"{path}/m/a") == b"12345"
    backend.delete(["m/a", "m/b"])
    assert list(backend.list("m/")) == []
