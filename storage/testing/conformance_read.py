"""What must hold of ``stat``, ``list`` and ``read``."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from functools import partial

import pytest

from storage.backends.base import Backend, ByteRange, bytes_payload
from storage.digest import new_hasher
from storage.errors import (
    ModelMissingError,
    StorageError,
    TransferError,
    UnsupportedOperation,
)
from storage.testing.conformance_support import (
    MIB,
    Raw,
    Scenario,
    content,
    fails,
    in_threads,
    keys_of,
    needs,
    read_all,
)

__all__ = ["Reading"]

_SIZE = 3 * MIB + 7
_SPANS = {
    "first-byte": (0, 1),
    "last-byte": (_SIZE - 1, _SIZE),
    "one-byte-midway": (MIB + 5, MIB + 6),
    "middle": (1000, 2000),
    "across-buffers": (MIB - 1, 2 * MIB + 1),
    "all-but-the-first": (1, _SIZE),
    "all-but-the-last": (0, _SIZE - 1),
    "whole": (0, _SIZE),
}


class Reading(Scenario):
    """Objects are put there around the backend, and read through it."""

    def test_name_is_one_line_for_messages(self, backend: Backend) -> None:
        assert backend.name.strip()
        assert len(backend.name.splitlines()) == 1

    def test_stat_tells_key_and_size(self, backend: Backend, raw: Raw) -> None:
        raw.put("models/iris/model.bin", b"12345")
        info = backend.stat("models/iris/model.bin")
        assert (info.key, info.size) == ("models/iris/model.bin", 5)

    def test_time_of_modification_has_a_zone(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        modified = backend.stat("a").modified
        assert modified is None or modified.tzinfo is not None

    def test_names_of_metadata_are_in_lower_case(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        assert all(name == name.lower() for name in backend.stat("a").metadata)

    @pytest.mark.parametrize("key", ["none", "models/none", "models/iris/model.bin/none"])
    def test_stat_of_a_missing_key(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put("models/iris/model.bin", b"1")
        with fails(ModelMissingError):
            backend.stat(key)

    @pytest.mark.parametrize("key", ["models/iris", "models", "models/iris/", "models/ir", "model"])
    def test_stat_of_a_prefix_is_missing(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put("models/iris/model.bin", b"1")
        with fails(ModelMissingError):
            backend.stat(key)

    def test_stat_of_a_missing_version(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        with fails(ModelMissingError):
            backend.stat("a", "999999999999")

    def test_stat_of_the_version_that_is_there(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        info = backend.stat("a")
        assert info.version is None or backend.stat("a", info.version).size == 1

    def test_directory_marker_is_no_object(self, backend: Backend, raw: Raw) -> None:
        raw.put("models/", b"")
        with fails(ModelMissingError):
            backend.stat("models/")

    def test_zero_byte_object_is_an_object(self, backend: Backend, raw: Raw) -> None:
        raw.put("models/__init__.py", b"")
        assert backend.stat("models/__init__.py").size == 0
        assert read_all(backend, "models/__init__.py") == b""

    def test_digests_are_those_of_the_content(self, backend: Backend, raw: Raw) -> None:
        data = content(1000)
        raw.put("a", data)
        info = backend.stat("a")
        vouched = list(info.digests)
        if info.hint is not None and backend.is_digest(info):
            vouched.append(info.hint)
        for digest in vouched:
            hasher = new_hasher(digest.algorithm)
            hasher.update(data)
            assert digest.hex == hasher.hexdigest()

    @needs("list")
    def test_empty_prefix_lists_the_whole_bucket(self, backend: Backend, raw: Raw) -> None:
        keys = ["a", "b/c", "b/d/e", "b/d/f/g/h/i", "z"]
        for key in keys:
            raw.put(key, key.encode())
        assert keys_of(backend.list()) == keys
        assert keys_of(backend.list("")) == keys

    @needs("list")
    def test_list_tells_keys_and_sizes(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"1")
        raw.put("m/b/c", b"123")
        assert {info.key: info.size for info in backend.list("m/")} == {"m/a": 1, "m/b/c": 3}

    @needs("list")
    def test_empty_bucket_lists_nothing(self, backend: Backend) -> None:
        assert list(backend.list()) == []

    @needs("list")
    @pytest.mark.parametrize("prefix", ["none/", "models/none/", "models/iris/model.bin/"])
    def test_prefix_that_holds_nothing_lists_nothing(
        self, backend: Backend, raw: Raw, prefix: str
    ) -> None:
        raw.put("models/iris/model.bin", b"1")
        assert list(backend.list(prefix)) == []

    @needs("list")
    def test_sibling_prefix_is_not_listed(self, backend: Backend, raw: Raw) -> None:
        wanted = ["models/iris/a", "models/iris/b/c"]
        others = [
            "models/iris-v2/a",
            "models/iris.bak",
            "models/iris2",
            "models/iri/a",
            "iris/a",
            "x/models/iris/a",
            "Models/iris/a",
        ]
        for key in wanted + others:
            raw.put(key, b"1")
        assert keys_of(backend.list("models/iris/")) == wanted

    @needs("list")
    def test_directory_markers_are_not_listed(self, backend: Backend, raw: Raw) -> None:
        raw.put("models/", b"")
        raw.put("models/iris/", b"")
        raw.put("models/iris/model.bin", b"1")
        raw.put("models/empty/", b"")
        assert keys_of(backend.list()) == ["models/iris/model.bin"]
        assert keys_of(backend.list("models/iris/")) == ["models/iris/model.bin"]
        assert list(backend.list("models/empty/")) == []

    @needs("list")
    def test_zero_byte_objects_are_listed(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/__init__.py", b"")
        raw.put("m/model.bin", b"1")
        sizes = {info.key: info.size for info in backend.list("m/")}
        assert sizes == {"m/__init__.py": 0, "m/model.bin": 1}

    @needs("list")
    def test_list_can_be_given_up(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"1")
        raw.put("m/b", b"1")
        for _ in range(20):
            assert next(iter(backend.list("m/"))).key in ("m/a", "m/b")
        assert keys_of(backend.list("m/")) == ["m/a", "m/b"]

    @pytest.mark.parametrize("size", [1, 1000, MIB, _SIZE], ids=["1", "1000", "1MiB", "3MiB+7"])
    def test_read_yields_every_byte_in_order(self, backend: Backend, raw: Raw, size: int) -> None:
        data = content(size)
        raw.put("a", data)
        assert read_all(backend, "a") == data

    @needs("ranged_read")
    @pytest.mark.parametrize("span", _SPANS.values(), ids=_SPANS)
    def test_span_yields_exactly_its_bytes(
        self, backend: Backend, raw: Raw, span: tuple[int, int]
    ) -> None:
        data = content(_SIZE)
        raw.put("a", data)
        start, end = span
        assert read_all(backend, "a", ByteRange(start, end)) == data[start:end]

    @needs("ranged_read")
    @pytest.mark.parametrize("span", [(3, 6), (5, 6), (900, 901)], ids=["over", "at", "beyond"])
    def test_span_past_the_end_raises(
        self, backend: Backend, raw: Raw, span: tuple[int, int]
    ) -> None:
        raw.put("a", b"12345")
        with fails(StorageError):
            read_all(backend, "a", ByteRange(*span))

    @needs("ranged_read")
    def test_body_of_a_span_tells_about_the_whole_object(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"12345")
        with backend.read("m/a", ByteRange(1, 3)) as body:
            assert (body.info.key, body.info.size) == ("m/a", 5)

    def test_body_tells_about_the_object(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"12345")
        with backend.read("m/a") as body:
            assert body.info.key == "m/a"
            assert body.info.size in (5, None)
            assert body.info.pin == backend.stat("m/a").pin

    @pytest.mark.parametrize("key", ["none", "models/none", "models", "models/a/none"])
    def test_read_of_a_missing_key(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put("models/a", b"1")
        with fails(ModelMissingError):
            read_all(backend, key)

    def test_read_given_up_midway_frees_its_connection(self, backend: Backend, raw: Raw) -> None:
        data = content(2 * MIB)
        raw.put("a", data)
        # More often than any driver has connections.
        for _ in range(40):
            body = backend.read("a")
            assert len(next(iter(body))) > 0
            body.close()
            body.close()
        assert read_all(backend, "a") == data

    @needs("pinned_read")
    def test_read_pinned_to_what_is_there(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"12345")
        info = backend.stat("a")
        assert info.pin is not None
        assert read_all(backend, "a", pin=info) == b"12345"
        assert read_all(backend, "a", ByteRange(1, 3), info) == b"23"

    @needs("pinned_read", "list")
    def test_read_pinned_to_what_was_listed(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"12345")
        [info] = backend.list("m/")
        assert read_all(backend, "m/a", pin=info) == b"12345"

    @needs("pinned_read")
    @pytest.mark.parametrize("span", [None, ByteRange(1, 3)], ids=["whole", "span"])
    @pytest.mark.parametrize("new", [b"67890", b"6789"], ids=["same-size", "shorter"])
    def test_pinned_read_gives_no_other_version(
        self, backend: Backend, raw: Raw, span: ByteRange | None, new: bytes
    ) -> None:
        old = b"12345"
        raw.put("a", old)
        info = backend.stat("a")
        raw.put("a", new)
        assert backend.stat("a").pin != info.pin
        if _still_there(backend, "a", info.version):
            wanted = old if span is None else old[span.start : span.end]
            assert read_all(backend, "a", span, info) == wanted
        else:
            with fails(TransferError):
                read_all(backend, "a", span, info)

    @needs("pinned_read", "list")
    def test_read_pinned_to_what_was_listed_before_a_change(
        self, backend: Backend, raw: Raw
    ) -> None:
        raw.put("m/a", b"12345")
        [info] = backend.list("m/")
        raw.put("m/a", b"67890")
        if not _still_there(backend, "m/a", info.version):
            with fails(TransferError):
                read_all(backend, "m/a", pin=info)

    def test_read_under_way_gives_one_version_or_fails(self, backend: Backend, raw: Raw) -> None:
        size = 16 * MIB
        raw.put("a", b"a" * size)
        got = bytearray()
        with backend.read("a") as body:
            pieces = iter(body)
            got += next(pieces)
            raw.put("a", b"b" * size)
            try:
                for piece in pieces:
                    got += piece
            except TransferError:
                return
        assert got == b"a" * size

    def test_reads_in_many_threads(self, backend: Backend, raw: Raw) -> None:
        data = {f"m/{number}": content(200_000, number) for number in range(16)}
        for key, value in data.items():
            raw.put(key, value)
        found = in_threads([partial(read_all, backend, key) for key in data])
        assert found == list(data.values())

    @needs("ranged_read")
    def test_spans_of_one_object_in_many_threads(self, backend: Backend, raw: Raw) -> None:
        data = content(_SIZE)
        raw.put("a", data)
        info = backend.stat("a")
        spans = [
            ByteRange(start, min(start + 100_000, _SIZE)) for start in range(0, _SIZE, 100_000)
        ]
        found = in_threads([partial(read_all, backend, "a", span, info) for span in spans])
        assert b"".join(found) == data

    def test_local_path_leads_to_the_content(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a", b"12345")
        path = backend.local_path("m/a")
        if path is not None:
            with open(path, "rb") as file:
                assert file.read() == b"12345"

    def test_filesystem_reads_the_same_bucket(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/a.bin", b"12345")
        files, root = backend.filesystem()
        path = posixpath.join(root, "m/a.bin")
        assert files.cat_file(path) == b"12345"
        with files.open(path, "rb") as file:
            file.seek(2)
            assert file.read(2) == b"34"
        assert not files.exists(posixpath.join(root, "m/none"))

    def test_what_the_capabilities_deny_is_refused(self, backend: Backend, raw: Raw) -> None:
        raw.put("a", b"1")
        info = backend.stat("a")
        new = bytes_payload(b"2")
        calls: dict[str, Callable[[], object]] = {
            "list": lambda: list(backend.list()),
            "write": lambda: backend.write("a", new),
            "delete": lambda: backend.delete(["a"]),
            "copy": lambda: backend.copy("a", "b"),
            "if_absent": lambda: backend.write("b", new, if_absent=True),
            "if_match": lambda: backend.write("a", new, if_match=info),
            "sign": lambda: backend.sign("a", "GET", 60),
        }
        for capability, call in calls.items():
            if not getattr(backend.capabilities, capability):
                with fails(UnsupportedOperation):
                    call()
        assert raw.keys() == {"a"}
        assert raw.get("a") == b"1"


def _still_there(backend: Backend, key: str, version: str | None) -> bool:
    """Whether the store keeps old versions, and has this one."""
    if version is None:
        return False
    try:
        backend.stat(key, version)
    except ModelMissingError:
        return False
    return True
