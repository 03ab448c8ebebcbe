"""A checksum that a store keeps, and tells when asked, is held against what has arrived."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import Backend, Body, Capabilities, ObjectInfo
from storage.client import StorageClient
from storage.config import load_settings
from storage.digest import Digest, hash_file
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    StorageError,
    TransientError,
    UnreachableError,
)
from storage.transfer import verify
from storage.transfer.copy import Source, stream_copy
from storage.transfer.engine import Budget
from storage.transfer.progress import Meter
from tests.transfer.resume_support import BIG, FILES, PART, TREE, Download
from tests.transfer.support import FAST, Wrapped, everything_in, files_of, memory_bucket, options


class Keeping(Wrapped):
    """A store that tells digests only when it is asked for them."""

    def __init__(self, inner: Backend, digests: tuple[Digest, ...] | StorageError) -> None:
        super().__init__(inner)
        self._digests = digests
        self.asked: list[str] = []

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, checksums=True)

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return replace(self.inner.stat(key, version), hint=None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in self.inner.list(prefix):
            yield replace(info, hint=None)

    def read(self, key: str, *args: Any) -> Body:
        body = self.inner.read(key, *args)
        return Body(replace(body.info, hint=None), iter(body), body.close)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        self.asked.append(info.key)
        if isinstance(self._digests, StorageError):
            raise self._digests
        return self._digests


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=load_settings()) as found:
        found._options = options(PART)
        yield found


@pytest.mark.parametrize("key", ["m/sub/weights.bin", "m/one-part"])
@pytest.mark.parametrize("algorithm", ["sha256", "crc64nvme", "crc32c", "md5"])
def test_a_checksum_that_the_store_keeps_is_held_against_it(
    download: Download, dest: Path, tmp_path: Path, key: str, algorithm: str
) -> None:
    (tmp_path / "x").write_bytes(FILES[key])
    right = hash_file(tmp_path / "x", (algorithm,))[algorithm]
    wrong = Digest(algorithm, right.hex[:-1] + ("0" if right.hex[-1] != "0" else "1"))
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, (right,))
        download(backend, key, dest)
        assert backend.asked == [key]
        assert dest.read_bytes() == FILES[key]
        dest.unlink()
        with pytest.raises(IntegrityError, match=str(wrong)):
            download(Keeping(memory, (wrong,)), key, dest)
    assert everything_in(dest.parent) == []


def test_each_object_of_a_tree_is_asked_for_once(download: Download, dest: Path) -> None:
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, ())
        download(backend, "m", dest)
        assert sorted(backend.asked) == sorted(FILES)
        assert files_of(dest) == TREE


def test_who_tells_a_digest_is_not_asked_for_more(download: Download, dest: Path) -> None:
    class Telling(Keeping):
        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            found: ObjectInfo = self.inner.stat(key, version)
            return found

    with memory_bucket(FILES) as memory:
        backend = Telling(memory, ())
        download(backend, "m/sub/weights.bin", dest)
        assert backend.asked == []


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("not for you"),
        TransientError("503"),
        UnreachableError("gone"),
        StorageError("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_store_that_does_not_tell_is_believed_as_before(
    download: Download, dest: Path, error: StorageError
) -> None:
    with memory_bucket(FILES) as memory:
        download(Keeping(memory, error), "m", dest)
    assert files_of(dest) == TREE


def test_who_may_not_ask_asks_once(client: StorageClient, download: Download, dest: Path) -> None:
    client._options = options(PART, connections=1)
    client._budget = Budget(1)
    with memory_bucket(FILES) as memory:
        backend = Keeping(memory, AuthenticationError("not for you"))
        download(backend, "m", dest)
    assert len(backend.asked) == 1
    assert files_of(dest) == TREE


def test_an_algorithm_that_cannot_be_computed_here_is_passed_over(
    download: Download, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "available", lambda name: not name.startswith("crc"))
    monkeypatch.setattr(
        "storage.transfer.download.available", lambda name: not name.startswith("crc")
    )
    with memory_bucket(FILES) as memory:
        download(Keeping(memory, (Digest("crc64nvme", "0" * 16),)), "m/one-part", dest)
        assert dest.read_bytes() == FILES["m/one-part"]
        dest.unlink()  # or it would not be fetched again
        both = (Digest("crc64nvme", "0" * 16), Digest("md5", "0" * 32))
        with pytest.raises(IntegrityError, match="md5:0"):
            download(Keeping(memory, both), "m/one-part", dest)


def test_a_copy_is_held_against_the_checksum_too() -> None:
    right = Digest("sha256", hashlib.sha256(BIG).hexdigest())
    with memory_bucket(FILES) as memory, memory_bucket() as target:
        for digest in (right, Digest("sha256", "0" * 64)):
            backend = Keeping(memory, (digest,))
            info = backend.stat("m/sub/weights.bin")
            source = Source(backend, info, where="memory://m", retry=FAST)
            meter = Meter("copy", "memory://m", info.size, 1, None)
            with contextlib.ExitStack() as stack:
                if digest != right:
                    stack.enter_context(pytest.raises(IntegrityError, match="sha256:0"))
                stream_copy(source, target, f"m{digest.hex[0]}", options=options(), meter=meter)
            assert backend.asked == [info.key]
        (written,) = target.list()
        assert written.key == f"m{right.hex[0]}"
        # It is the digest that an upload would leave, or none at all.
        assert written.metadata == {}
