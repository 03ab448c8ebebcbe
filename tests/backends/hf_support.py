"""What the tests of the Hub share: the way round its client, and what git cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from storage.backends.base import ByteRange, ObjectInfo, OpenOptions
from storage.backends.hf.backend import HubBackend, open_backend
from storage.config import HFConfig
from storage.uri import parse_uri
from tests.servers.hub import Hub, Repo
from tests.servers.hub.state import CommitError

OpenHub = Callable[..., HubBackend]
_GIT = "git keeps no file or folder named .git, and the Hub refuses it"
_FOLDERS = "git has no folders of their own, so there are no directory markers"

HUB_EXCEPTIONS: dict[str, str] = {
    **{
        f"{test}[hidden]": _GIT
        for test in (
            "test_odd_key_is_read",
            "test_odd_key_is_listed",
            "test_odd_prefix_is_literal",
            "test_odd_key_is_written",
            "test_odd_key_is_copied",
            "test_odd_key_is_deleted",
        )
    },
    "test_directory_marker_is_no_object": _FOLDERS,
    "test_directory_markers_are_not_listed": _FOLDERS,
    "test_key_may_be_the_beginning_of_another": "in git a name is a file or a folder, not both",
}
"""Conformance tests that no Hub can pass, and why."""


class HubRaw:
    """One repository, around HTTP."""

    def __init__(self, hub: Hub, repo: Repo) -> None:
        self._hub = hub
        self._repo = repo

    def put(self, key: str, data: bytes) -> None:
        try:
            self._hub.put(self._repo, {key: data})
        except CommitError as exc:
            raise OSError(f"the Hub refuses the key {key!r}: {exc}") from exc

    def get(self, key: str) -> bytes:
        return self._hub.get(self._repo, key)

    def keys(self) -> set[str]:
        return set(self._repo.head().files)

    def unfinished(self) -> list[str]:
        return self._hub.uploads.unfinished


@contextmanager
def hub_backends(hub: Hub) -> Iterator[OpenHub]:
    """Give a function that opens backends of ``hub``: a URI, and fields of the config."""
    opened: list[HubBackend] = []

    def make(uri: str = "hf://owner/m", **fields: str) -> HubBackend:
        chosen: dict[str, Any] = {"token": hub.writer.token, "endpoint": hub.url, **fields}
        config = HFConfig(**chosen)
        opened.append(open_backend(parse_uri(uri), config, OpenOptions()))
        return opened[-1]

    yield make
    for backend in opened:
        backend.close()
    assert not hub.leaks, "the content network was sent a token"
    assert not hub.failures


def read(
    backend: HubBackend,
    key: str,
    span: ByteRange | None = None,
    pin: ObjectInfo | None = None,
) -> bytes:
    """Return the bytes of a read."""
    with backend.read(key, span, pin) as body:
        return b"".join(bytes(piece) for piece in body)
