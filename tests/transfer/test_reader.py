"""An object as a file: the same answers as ``io.BytesIO``, whatever the store does on the way."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.backends.base import (
    Backend,
    Body,
    Buffer,
    ByteRange,
    Capabilities,
    ObjectInfo,
    bytes_payload,
)
from storage.errors import ObjectChangedError, TransferError, TransientError
from storage.transfer.reader import ObjectReader, open_reader
from tests.transfer.support import FAST, MIB, Wrapped, memory_bucket

WHERE = "memory://b/k"
# More attempts than there are failures: a stream without ranges begins at 0 every time.
PATIENT = replace(FAST, attempts=100)


class Flaky(Wrapped):
    """Cuts bodies into chunks of odd sizes, and fails before the n-th chunk of all."""

    def __init__(
        self, inner: Backend, chunk: int = 7, failing: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(inner)
        self.chunk = chunk
        self.failing = failing
        self.given = 0
        self.requests: list[ByteRange | None] = []
        self.closed = 0

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self.inner.read(key, span, pin)
        self.requests.append(span)
        return Body(body.info, self._chunks(body), self._count_close)

    def _count_close(self) -> None:
        self.closed += 1

    def _chunks(self, body: Body) -> Iterator[Buffer]:
        data = b"".join(bytes(chunk) for chunk in body)
        for start in range(0, len(data), self.chunk):
            self.given += 1
            if self.given in self.failing:
                raise TransientError(f"reset before chunk {self.given}")
            # A buffer is valid until the next one: reuse of it has to be noticed.
            scratch = bytearray(data[start : start + self.chunk])
            yield memoryview(scratch)
            scratch[:] = b"\xff" * len(scratch)


class Streaming(Flaky):
    """Cannot read ranges."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, ranged_read=False)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        assert span is None
        return super().read(key, None, pin)


MOVES = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 120)),
    st.tuples(st.just("readinto"), st.integers(0, 120)),
    st.tuples(st.just("set"), st.integers(0, 600)),
    st.tuples(st.just("cur"), st.integers(-300, 300)),
    st.tuples(st.just("end"), st.integers(-600, 50)),
)


@settings(max_examples=300)
@given(
    size=st.integers(0, 500),
    moves=st.lists(MOVES, max_size=20),
    chunk=st.integers(1, 200),
    failing=st.frozensets(st.integers(1, 60), max_size=20),
    ranged=st.booleans(),
    buffered=st.booleans(),
)
def test_reads_and_seeks_give_what_a_file_gives(
    size: int,
    moves: list[tuple[str, int]],
    chunk: int,
    failing: frozenset[int],
    ranged: bool,
    buffered: bool,
) -> None:
    data = random.Random(size).randbytes(size)
    with memory_bucket({"k": data}) as memory:
        backend = (Flaky if ranged else Streaming)(memory, chunk, failing)
        info = memory.stat("k")
        opened: io.RawIOBase | io.BufferedReader = (
            open_reader(backend, info, PATIENT, WHERE)
            if buffered
            else ObjectReader(backend, info, PATIENT, WHERE)
        )
        with opened as file:
            model = io.BytesIO(data)
            for kind, amount in moves:
                _compare(file, model, kind, amount)
        assert backend.closed == len(backend.requests)


@settings(max_examples=200)
@given(
    bounds=st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted),
    moves=st.lists(MOVES, max_size=20),
    failing=st.frozensets(st.integers(1, 60), max_size=20),
)
def test_a_part_is_a_file_of_its_own_and_asks_for_nothing_else(
    bounds: list[int], moves: list[tuple[str, int]], failing: frozenset[int]
) -> None:
    start, end = bounds
    data = random.Random(7).randbytes(300)
    with memory_bucket({"k": data}) as memory:
        backend = Flaky(memory, 9, failing)
        with ObjectReader(backend, memory.stat("k"), PATIENT, WHERE) as whole:
            assert whole.pins_ranges
            whole.seek(5)
            with whole.part(start, end) as part:
                model = io.BytesIO(data[start:end])
                for kind, amount in moves:
                    _compare(part, model, kind, amount)
            assert whole.tell() == 5
        assert all(span and start <= span.start < span.end == end for span in backend.requests)
        assert backend.closed == len(backend.requests)


def test_a_part_is_of_the_version_that_was_opened() -> None:
    with memory_bucket({"k": b"a" * 1000}) as memory:
        file = ObjectReader(memory, memory.stat("k"), FAST, WHERE)
        memory.write("k", bytes_payload(b"b" * 1000))
        with file, file.part(10, 20) as part, pytest.raises(ObjectChangedError):
            part.read(10)


def _compare(file: io.RawIOBase | io.BufferedReader, model: io.BytesIO, kind: str, n: int) -> None:
    if kind == "read":
        position = model.tell()
        expected = model.read(n)
        got = file.read(n) if isinstance(file, io.BufferedReader) or n < 0 else _read_n(file, n)
        assert got == expected
        assert file.tell() == model.tell() == position + len(expected)
    elif kind == "readinto":
        buffer = bytearray(n)
        position = model.tell()
        count = file.readinto(buffer)
        assert count is not None
        # A raw file may give less than asked, never nothing before the end.
        assert bytes(buffer[:count]) == model.getvalue()[position : position + count]
        assert count > 0 or n == 0 or position >= len(model.getvalue())
        model.seek(position + count)
        assert file.tell() == model.tell()
    else:
        whence = {"set": io.SEEK_SET, "cur": io.SEEK_CUR, "end": io.SEEK_END}[kind]
        base = {"set": 0, "cur": model.tell(), "end": len(model.getvalue())}[kind]
        if base + n < 0:
            with pytest.raises((ValueError, OSError)):
                file.seek(n, whence)
            return
        assert file.seek(n, whence) == model.seek(n, whence) == file.tell()


def _read_n(file: io.RawIOBase, count: int) -> bytes:
    pieces = []
    while count and (piece := file.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _fill(file: io.RawIOBase, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while count := file.readinto(view):
        view = view[count:]


def test_reading_from_end_to_end_is_one_request() -> None:
    with memory_bucket({"k": bytes(3 * MIB)}) as memory:
        backend = Flaky(memory, 64 * 1024)
        with open_reader(backend, memory.stat("k"), FAST, WHERE) as file:
            while file.read(100_000):
                pass
        assert backend.requests == [ByteRange(0, 3 * MIB)]


def test_opening_and_seeking_ask_nothing() -> None:
    with memory_bucket({"k": bytes(100)}) as memory:
        backend = Flaky(memory)
        with open_reader(backend, memory.stat("k"), FAST, WHERE) as file:
            assert file.seek(-10, io.SEEK_END) == 90
            assert file.seekable()
            assert file.readable()
            assert not file.writable()
        assert backend.requests == []


def test_the_end_of_a_large_object_costs_one_small_request() -> None:
    with memory_bucket({"k": bytes(3 * MIB)}) as memory:
        backend = Flaky(memory, 64 * 1024)
        with open_reader(backend, memory.stat("k"), FAST, WHERE) as file:
            file.seek(-10, io.SEEK_END)
            assert len(file.read()) == 10
        assert backend.requests == [ByteRange(3 * MIB - 10, 3 * MIB)]


def test_a_broken_body_goes_on_at_its_position() -> None:
    data = random.Random(3).randbytes(100)
    with memory_bucket({"k": data}) as memory:
        backend = Flaky(memory, 10, frozenset({4}))
        with ObjectReader(backend, memory.stat("k"), FAST, WHERE) as file:
            assert file.readall() == data
        assert backend.requests == [ByteRange(0, 100), ByteRange(30, 100)]


def test_failures_without_end_are_reported() -> None:
    with memory_bucket({"k": bytes(100)}) as memory:
        backend = Flaky(memory, 10, frozenset(range(3, 99)))
        with ObjectReader(backend, memory.stat("k"), FAST, WHERE) as file:
            assert len(_read_n(file, 20)) == 20
            with pytest.raises(TransferError, match="tried 4 times"):
                file.read(1)
        assert backend.closed == len(backend.requests)


@pytest.mark.parametrize("same_size", [True, False])
def test_an_object_replaced_between_two_requests_is_noticed(same_size: bool) -> None:
    with memory_bucket({"k": b"a" * 1000}) as memory:
        backend = Flaky(memory, 10)
        with ObjectReader(backend, memory.stat("k"), FAST, WHERE) as file:
            assert file.read(10) == b"a" * 10
            memory.write("k", bytes_payload(b"b" * (1000 if same_size else 999)))
            file.seek(0)
            with pytest.raises(ObjectChangedError):
                file.read(10)


class Deaf(Flaky):
    """Neither pins reads nor tells versions."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, pinned_read=False)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        assert pin is None
        return super().read(key, span, None)


def test_an_object_replaced_in_a_store_that_cannot_pin_is_noticed_by_its_answer() -> None:
    with memory_bucket({"k": b"a" * 1000}) as memory:
        backend = Deaf(memory, 10)
        with ObjectReader(backend, memory.stat("k"), FAST, WHERE) as file:
            assert not file.pins_ranges
            file.read(10)
            memory.write("k", bytes_payload(b"b" * 1000))
            file.seek(0)
            with pytest.raises(ObjectChangedError, match="replaced"):
                file.read(10)


class Wrong(Wrapped):
    """Gives bodies that are shorter or longer than what was asked for."""

    def __init__(self, inner: Backend, difference: int) -> None:
        super().__init__(inner)
        self.difference = difference

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = self.inner.read(key, span, pin)
        data = b"".join(bytes(chunk) for chunk in body)
        whole = data + b"!" * self.difference if self.difference > 0 else data[: self.difference]
        return Body(body.info, iter([whole]))


@pytest.mark.parametrize(("difference", "says"), [(-1, "ended at 99 of 100"), (1, "sent more")])
def test_a_body_of_another_length_is_an_error_not_other_bytes(difference: int, says: str) -> None:
    data = random.Random(4).randbytes(100)
    with memory_bucket({"k": data}) as memory:
        backend = Wrong(memory, difference)
        with ObjectReader(backend, memory.stat("k"), FAST, WHERE) as file:
            got = bytearray(100 + abs(difference))
            with pytest.raises(TransferError, match=says):
                _fill(file, got)
            assert not any(a != b for a, b in zip(data, got, strict=False) if b)


def test_an_empty_object_reads_as_empty_without_a_request() -> None:
    with memory_bucket({"k": b""}) as memory:
        backend = Flaky(memory)
        with open_reader(backend, memory.stat("k"), FAST, WHERE) as file:
            assert file.read() == b""
        assert backend.requests == []


def test_a_closed_file_cannot_be_read() -> None:
    with memory_bucket({"k": b"abc"}) as memory:
        file = open_reader(memory, memory.stat("k"), FAST, WHERE)
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read()


class Nameless(Flaky):
    """Tells of an object nothing but its size, and reads it from its beginning only."""

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        info = self.inner.stat(key, version)
        return replace(info, etag=None, version=None, hint=None, digests=(), ranged=False)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        assert span is None
        assert pin is None
        body = super().read(key)
        return Body(self.stat(key), iter(body), body.close)


def test_two_streams_of_what_has_no_name_are_never_put_together() -> None:
    with memory_bucket({"k": b"a" * 1000}) as memory:

        class Replaced(Nameless):
            def _chunks(self, body: Body) -> Iterator[Buffer]:
                try:
                    yield from super()._chunks(body)
                except TransientError:
                    memory.write("k", bytes_payload(b"b" * 1000))
                    raise

        backend = Replaced(memory, 10, frozenset({50}))
        with open_reader(backend, backend.stat("k"), FAST, WHERE) as file:
            assert file.read() == b"b" * 1000
        assert len(backend.requests) == 2


class Cutting(Nameless):
    """Ends the first body early, as if that were all."""

    def _chunks(self, body: Body) -> Iterator[Buffer]:
        chunks = list(map(bytes, super()._chunks(body)))
        yield from chunks[:-1] if len(self.requests) == 1 else chunks


def test_a_stream_that_is_cut_is_fetched_again() -> None:
    with memory_bucket({"k": b"a" * 1000}) as memory:
        backend = Cutting(memory)
        with open_reader(backend, backend.stat("k"), FAST, WHERE) as file:
            assert file.read() == b"a" * 1000
        assert len(backend.requests) == 2


def test_what_is_another_object_by_its_size_is_not_read() -> None:
    with memory_bucket({"k": b"a" * 1000}) as memory:
        backend = Nameless(memory)
        info = backend.stat("k")
        memory.write("k", bytes_payload(b"b" * 999))
        with pytest.raises(ObjectChangedError):
            open_reader(backend, info, FAST, WHERE)
        assert backend.closed == 1
