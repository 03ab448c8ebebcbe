"""What must hold of ``write``, ``copy``, ``delete`` and ``sign``."""

from __future__ import annotations

import hashlib
import posixpath
import threading
import urllib.request
from collections.abc import Callable
from functools import partial

import pytest

from storage.backends.base import Backend, ObjectInfo, Payload, bytes_payload
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
)
from storage.testing.conformance_support import (
    MIB,
    Raw,
    Scenario,
    Source,
    content,
    fails,
    in_threads,
    needs,
    read_all,
    stored,
    unfinished,
)

__all__ = ["Conditions", "Writing"]

_SIZES = {"empty": 0, "one-byte": 1, "1MiB": MIB, "5MiB+1": 5 * MIB + 1}
_KNOWN = pytest.mark.parametrize("known", [True, False], ids=["known-size", "unknown-size"])


class Writing(Scenario):
    """Objects are written, copied and deleted through the backend, and looked at around it."""

    @needs("write")
    @_KNOWN
    @pytest.mark.parametrize("size", _SIZES.values(), ids=_SIZES)
    def test_write_stores_every_byte(
        self, backend: Backend, raw: Raw, size: int, known: bool
    ) -> None:
        source, counts = Source(content(size)), list[int]()
        payload = source.payload(size if known else None)
        info = backend.write("models/a.bin", payload, on_bytes=counts.append)
        assert (info.key, info.size) == ("models/a.bin", size)
        assert stored(raw, "models/a.bin") == content(size)
        assert sum(counts) == size
        assert all(stream.closed for stream in source.streams)

    @needs("write")
    @_KNOWN
    def test_large_payload_is_stored_in_parts(
        self, backend: Backend, raw: Raw, known: bool
    ) -> None:
        data = content(self.large)
        source, counts = Source(data), list[int]()
        payload = source.payload(len(data) if known else None)
        info = backend.write("a", payload, on_bytes=counts.append)
        assert info.size == len(data)
        assert raw.get("a") == data
        assert sum(counts) == len(data)
        assert all(stream.closed for stream in source.streams)
        assert not unfinished(raw)

    @needs("write")
    @_KNOWN
    def test_stream_of_short_reads_is_stored_whole(
        self, backend: Backend, raw: Raw, known: bool
    ) -> None:
        data = content(300_000)
        backend.write("a", Source(data, piece=1009).payload(len(data) if known else None))
        assert raw.get("a") == data

    @needs("write")
    def test_write_tells_what_is_now_there(self, backend: Backend) -> None:
        written = backend.write("m/a", bytes_payload(b"12345"))
        info = backend.stat("m/a")
        assert (written.key, written.size) == ("m/a", 5)
        assert written.etag in (None, info.etag)
        assert written.version in (None, info.version)

    @needs("write")
    @pytest.mark.parametrize("new", [b"", b"1", b"x" * 100], ids=["empty", "shorter", "longer"])
    def test_write_replaces_what_is_there(self, backend: Backend, raw: Raw, new: bytes) -> None:
        raw.put("a", b"12345")
        backend.write("a", bytes_payload(new))
        assert raw.get("a") == new
        assert backend.stat("a").size == len(new)

    @needs("write")
    def test_write_is_idempotent(self, backend: Backend, raw: Raw) -> None:
        for _ in range(3):
            backend.write("m/a", bytes_payload(b"12345"))
        assert raw.keys() == {"m/a"}
        assert raw.get("m/a") == b"12345"

    @needs("write")
    @_KNOWN
    @pytest.mark.parametrize("old", [b"old", None], ids=["over-old", "new"])
    @pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
    def test_source_that_breaks_midway_changes_nothing(
        self, backend: Backend, raw: Raw, large: bool, old: bytes | None, known: bool
    ) -> None:
        if old is not None:
            raw.put("m/a", old)
        size = self.large if large else 5000
        source = Source(content(size), fail_at=size * 3 // 5, piece=MIB if large else 1000)
        # Whatever the stream raised, or what the backend made of it.
        with pytest.raises(Exception):  # noqa: B017, PT011
            backend.write("m/a", source.payload(size if known else None))
        assert raw.keys() == (set() if old is None else {"m/a"})
        if old is not None:
            assert raw.get("m/a") == old
        assert not unfinished(raw)
        assert source.streams
        assert all(stream.closed for stream in source.streams)

    @needs("write")
    @pytest.mark.parametrize("off", [-1, 1, 4000, -4000])
    def test_payload_of_another_size_than_announced_changes_nothing(
        self, backend: Backend, raw: Raw, off: int
    ) -> None:
        raw.put("a", b"old")
        with fails(StorageError):
            backend.write("a", Source(content(5000)).payload(5000 + off))
        assert raw.keys() == {"a"}
        assert raw.get("a") == b"old"

    @needs("write", "metadata")
    def test_metadata_and_content_type_are_kept(self, backend: Backend) -> None:
        metadata = {"owner": "team a", "note": "x=1; y, z"}
        backend.write("a", bytes_payload(b"1"), metadata=metadata, content_type="text/x-model")
        info = backend.stat("a")
        assert metadata.items() <= info.metadata.items()
        assert info.content_type == "text/x-model"
        with backend.read("a") as body:
            assert metadata.items() <= body.info.metadata.items()

    @needs("write", "metadata")
    def test_metadata_of_a_large_object_is_kept(self, backend: Backend) -> None:
        payload = Source(content(self.large)).payload(None)
        backend.write("a", payload, metadata={"owner": "me"}, content_type="text/x-model")
        info = backend.stat("a")
        assert info.metadata["owner"] == "me"
        assert info.content_type == "text/x-model"

    @needs("write", "metadata")
    def test_names_of_metadata_come_back_in_lower_case(self, backend: Backend) -> None:
        backend.write("a", bytes_payload(b"1"), metadata={"Model-Owner": "Me"})
        assert backend.stat("a").metadata["model-owner"] == "Me"

    @needs("write", "metadata")
    def test_metadata_of_the_old_object_does_not_stay(self, backend: Backend) -> None:
        backend.write("a", bytes_payload(b"1"), metadata={"old": "1"})
        backend.write("a", bytes_payload(b"2"), metadata={"new": "1"})
        metadata = backend.stat("a").metadata
        assert "new" in metadata
        assert "old" not in metadata

    @needs("write", "metadata")
    @pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
    def test_digest_in_the_metadata_is_told(self, backend: Backend, algorithm: str) -> None:
        digest = Digest(algorithm, hashlib.sha256(b"any").hexdigest())
        backend.write("a", bytes_payload(b"12345"), metadata={algorithm: digest.hex})
        assert digest in backend.stat("a").digests

    @needs("write", "metadata")
    def test_metadata_that_only_looks_like_a_digest_is_no_digest(self, backend: Backend) -> None:
        backend.write("a", bytes_payload(b"12345"), metadata={"sha256": "see the model card"})
        info = backend.stat("a")
        assert info.metadata["sha256"] == "see the model card"
        # The store may know the real one by itself.
        real = Digest("sha256", hashlib.sha256(b"12345").hexdigest())
        assert {digest for digest in info.digests if digest.algorithm == "sha256"} <= {real}

    @needs("write")
    def test_reader_sees_old_or_new_while_a_writer_overwrites(self, backend: Backend) -> None:
        size, rounds = 2 * MIB, 6
        versions = [bytes([letter]) * size for letter in b"ab"]
        backend.write("a", bytes_payload(versions[0]))
        done = threading.Event()

        def overwrite() -> None:
            try:
                for number in range(rounds):
                    backend.write("a", bytes_payload(versions[(number + 1) % 2]))
            finally:
                done.set()

        writer = threading.Thread(target=overwrite)
        writer.start()
        try:
            while not done.is_set():
                try:
                    assert read_all(backend, "a") in versions
                except (ObjectChangedError, TransientError):
                    continue  # noticed, so nobody was misled
        finally:
            writer.join()
        assert read_all(backend, "a") == versions[rounds % 2]

    @needs("write")
    def test_writes_in_many_threads(self, backend: Backend, raw: Raw) -> None:
        data = {f"m/{number % 3}/{number}": content(300_000, number) for number in range(16)}
        work = [partial(backend.write, key, bytes_payload(data[key])) for key in data]
        infos = in_threads(work)
        assert [info.key for info in infos] == list(data)
        assert raw.keys() == set(data)
        for key, value in data.items():
            assert raw.get(key) == value

    @needs("write")
    def test_writes_of_one_key_in_many_threads_leave_one_of_them(
        self, backend: Backend, raw: Raw
    ) -> None:
        versions = [content(1_000_000, number) for number in range(8)]
        in_threads([partial(backend.write, "a", bytes_payload(data)) for data in versions])
        assert raw.keys() == {"a"}
        assert raw.get("a") in versions
        assert not unfinished(raw)

    @needs("copy")
    def test_copy_has_the_content_and_leaves_the_source(self, backend: Backend, raw: Raw) -> None:
        data = content(3 * MIB + 1)
        raw.put("m/a", data)
        backend.copy("m/a", "other/deep/b")
        assert raw.keys() == {"m/a", "other/deep/b"}
        assert raw.get("m/a") == raw.get("other/deep/b") == data

    @needs("copy")
    def test_copy_of_an_empty_object(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"")
        backend.copy("a", "b")
        assert stored(raw, "b") == b""

    @needs("copy")
    def test_copy_replaces_what_is_there(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"new")
        raw.put("b", b"old and longer")
        backend.copy("a", "b")
        assert raw.get("b") == b"new"

    @needs("copy")
    def test_copy_of_the_version_that_is_there(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        backend.copy("a", "b", version=backend.stat("a").version)
        assert raw.get("b") == b"1"

    @needs("copy", "write", "metadata")
    def test_copy_keeps_metadata_and_content_type(self, backend: Backend) -> None:
        metadata = {"owner": "me"}
        backend.write("a", bytes_payload(b"1"), metadata=metadata, content_type="text/x-model")
        backend.copy("a", "b")
        info = backend.stat("b")
        assert info.metadata["owner"] == "me"
        assert info.content_type == "text/x-model"

    @needs("copy")
    @pytest.mark.parametrize("source", ["none", "m", "m/none"])
    def test_copy_of_a_missing_object(self, backend: Backend, raw: Raw, source: str) -> None:
        raw.put("m/a", b"1")
        raw.put("b", b"old")
        with fails(ModelMissingError):
            backend.copy(source, "b")
        assert raw.keys() == {"m/a", "b"}
        assert raw.get("b") == b"old"

    @needs("delete")
    def test_delete_removes_the_object_and_no_neighbour(self, backend: Backend, raw: Raw) -> None:
        for key in ("m/a", "m/ab", "m/b", "m-2/a", "a"):
            raw.put(key, b"1")
        backend.delete(["m/a"])
        assert raw.keys() == {"m/ab", "m/b", "m-2/a", "a"}
        with fails(ModelMissingError):
            backend.stat("m/a")

    @needs("delete")
    def test_delete_of_a_prefix_removes_nothing(self, backend: Backend, raw: Raw) -> None:
        raw.put("models/iris/a", b"1")
        backend.delete(["models/iris", "models"])
        assert raw.keys() == {"models/iris/a"}

    @needs("delete")
    def test_delete_of_missing_keys_is_silent(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"1")
        raw.put("m/b", b"1")
        backend.delete(["none", "m/none", "m/a", "none/at/all"])
        backend.delete(["m/a"])
        backend.delete([])
        assert raw.keys() == {"m/b"}

    @needs("delete")
    def test_deleted_object_can_be_written_again(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"1")
        backend.delete(["m/a"])
        raw.put("m/a", b"2")
        assert read_all(backend, "m/a") == b"2"

    @needs("sign")
    def test_signed_url_gives_the_object(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a b+c", b"12345")
        url = backend.sign("m/a b+c", "GET", 600)
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.read() == b"12345"

    @needs("write")
    def test_filesystem_writes_the_same_bucket(self, backend: Backend, raw: Raw) -> None:
        files, root = backend.filesystem()
        files.pipe_file(posixpath.join(root, "m/a.bin"), b"12345")
        with files.open(posixpath.join(root, "m/b.bin"), "wb") as file:
            file.write(b"67")
            file.write(b"890")
        assert raw.keys() == {"m/a.bin", "m/b.bin"}
        assert (raw.get("m/a.bin"), raw.get("m/b.bin")) == (b"12345", b"67890")

    def test_close_leaves_the_objects(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        assert backend.stat("a").size == 1
        backend.close()
        assert raw.get("a") == b"1"


class Conditions(Scenario):
    """Writes that depend on what is there, and buckets that are not."""

    @needs("if_absent")
    @pytest.mark.parametrize("size", [0, 5, 6 * MIB], ids=["empty", "small", "6MiB"])
    def test_if_absent_creates(self, backend: Backend, raw: Raw, size: int) -> None:
        data = content(size)
        info = backend.write("m/a", bytes_payload(data), if_absent=True)
        assert (info.key, info.size) == ("m/a", size)
        assert stored(raw, "m/a") == data

    @needs("if_absent")
    @pytest.mark.parametrize("size", [5, 6 * MIB], ids=["small", "6MiB"])
    @pytest.mark.parametrize("old", [b"old", b""], ids=["over-old", "over-empty"])
    def test_if_absent_leaves_what_is_there(
        self, backend: Backend, raw: Raw, size: int, old: bytes
    ) -> None:
        raw.put("m/a", old)
        with fails(ObjectExistsError):
            backend.write("m/a", bytes_payload(content(size)), if_absent=True)
        assert raw.keys() == {"m/a"}
        assert raw.get("m/a") == old
        assert not unfinished(raw)

    @needs("if_absent", "delete")
    def test_if_absent_creates_what_was_deleted(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"old")
        backend.delete(["a"])
        backend.write("a", bytes_payload(b"new"), if_absent=True)
        assert raw.get("a") == b"new"

    @needs("if_absent")
    def test_of_many_creators_one_wins(self, backend: Backend, raw: Raw) -> None:
        def create(data: bytes) -> bytes | None:
            try:
                backend.write("a", bytes_payload(data), if_absent=True)
            except (ObjectExistsError, TransientError):
                return None
            return data

        claims = [f"writer {number}".encode() for number in range(4)]
        won = [data for data in in_threads([partial(create, data) for data in claims]) if data]
        assert len(won) == 1
        assert raw.get("a") == won[0]

    @needs("if_match")
    def test_if_match_replaces_the_version_that_is_there(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        first = backend.write("a", bytes_payload(b"2"), if_match=backend.stat("a"))
        # What a write returned is as good as what stat says.
        pin = first if first.pin is not None else backend.stat("a")
        backend.write("a", bytes_payload(b"3"), if_match=pin)
        assert raw.get("a") == b"3"

    @needs("if_match")
    @pytest.mark.parametrize("size", [5, 6 * MIB], ids=["small", "6MiB"])
    def test_if_match_leaves_another_version(self, backend: Backend, raw: Raw, size: int) -> None:
        raw.put("a", b"1")
        info = backend.stat("a")
        raw.put("a", b"2")
        with fails(ObjectChangedError):
            backend.write("a", bytes_payload(content(size)), if_match=info)
        assert raw.keys() == {"a"}
        assert raw.get("a") == b"2"
        assert not unfinished(raw)

    @needs("if_match", "delete")
    def test_if_match_does_not_bring_back_what_was_deleted(
        self, backend: Backend, raw: Raw
    ) -> None:
        raw.put("a", b"1")
        info = backend.stat("a")
        backend.delete(["a"])
        with fails(ObjectChangedError):
            backend.write("a", bytes_payload(b"2"), if_match=info)
        assert raw.keys() == set()

    @needs("if_match")
    def test_if_match_without_an_identity_is_refused(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        with fails(InvalidInput):
            backend.write("a", bytes_payload(b"2"), if_match=ObjectInfo("a", 1))
        assert raw.get("a") == b"1"

    @needs("if_match")
    def test_no_update_is_lost_among_many_writers(self, backend: Backend, raw: Raw) -> None:
        backend.write("a", bytes_payload(b"start"))

        def append(token: bytes) -> None:
            for _ in range(500):
                try:
                    info = backend.stat("a")
                    old = read_all(backend, "a", pin=info)
                    if token in old.split():  # a failure that was reported took effect
                        return
                    new = bytes_payload(old + b" " + token)
                    backend.write("a", new, if_match=info)
                except (ObjectChangedError, TransientError):
                    continue
                return
            raise AssertionError("500 attempts were not enough")

        tokens = [f"{thread}.{number}".encode() for thread in range(4) for number in range(3)]
        in_threads([partial(append, token) for token in tokens], 4)
        assert sorted(raw.get("a").split()) == sorted([b"start", *tokens])

    def test_missing_bucket_is_no_empty_bucket(
        self, missing_bucket_backend: Backend | None
    ) -> None:
        backend = _given(missing_bucket_backend)
        if backend.capabilities.list:
            with fails(BucketMissingError):
                list(backend.list())
            with fails(BucketMissingError):
                list(backend.list("models/"))

    @pytest.mark.parametrize("operation", ["stat", "read", "copy"])
    def test_nothing_is_found_in_a_missing_bucket(
        self, missing_bucket_backend: Backend | None, operation: str
    ) -> None:
        backend = _given(missing_bucket_backend)
        calls: dict[str, Callable[[], object]] = {
            "stat": lambda: backend.stat("a"),
            "read": lambda: read_all(backend, "a"),
            "copy": lambda: backend.copy("a", "b"),
        }
        if operation == "copy" and not backend.capabilities.copy:
            pytest.skip(f"{backend.name}: capabilities.copy is false")
        with fails(ModelMissingError):
            calls[operation]()

    @pytest.mark.parametrize("size", [5, 6 * MIB, None], ids=["small", "6MiB", "unknown-size"])
    def test_write_makes_no_bucket(
        self, missing_bucket_backend: Backend | None, size: int | None
    ) -> None:
        backend = _given(missing_bucket_backend)
        if not backend.capabilities.write:
            pytest.skip(f"{backend.name}: capabilities.write is false")
        payload: Payload = Source(content(size or 5)).payload(size)
        with fails(BucketMissingError):
            backend.write("a", payload)


def _given(backend: Backend | None) -> Backend:
    if backend is None:
        pytest.skip("there is no fixture missing_bucket_backend for this store")
    return backend
