"""The bytes of an object in a store: which requests reads of it become."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.backends.base import Body, ByteRange, ObjectInfo, bytes_payload
from storage.container.entries import open_entry, read_directory
from storage.container.remote import RemoteSource
from storage.errors import InvalidInput, ObjectChangedError
from storage.transfer.reader import ObjectReader
from tests.transfer.support import FAST, MIB, Wrapped, memory_bucket

BLOCK = 32 * 1024
DATA = random.Random(1).randbytes(MIB)


class Noting(Wrapped):
    """Notes the ranges that are read."""

    spans: list[ByteRange | None]

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        self.spans.append(span)
        return self.inner.read(key, span, pin)


@contextmanager
def remote(data: bytes) -> Iterator[tuple[RemoteSource, Noting]]:
    with memory_bucket({"k": data}) as memory:
        backend = Noting(memory)
        backend.spans = []
        yield RemoteSource(ObjectReader(backend, memory.stat("k"), FAST, "memory://b/k")), backend


def test_short_reads_near_one_another_are_one_request() -> None:
    with remote(DATA) as (source, backend):
        assert (source.size, source.name, source.fileno()) == (MIB, "memory://b/k", None)
        assert backend.spans == []
        assert source.read_at(MIB - 22, 22) == DATA[-22:]
        assert source.read_at(MIB - 42, 20) == DATA[-42:-22]
        assert source.read_at(MIB - BLOCK, BLOCK) == DATA[-BLOCK:]
        assert source.read_at(0, 30) == DATA[:30]
        assert source.read_at(30, 1000) == DATA[30:1030]
        with source.duplicate().stream(2000, 10) as stream:
            assert stream.read() == DATA[2000:2010]
        assert backend.spans == [ByteRange(MIB - BLOCK, MIB), ByteRange(0, BLOCK)]


def test_a_stream_is_one_request_for_its_bytes() -> None:
    with remote(DATA) as (source, backend):
        stream = source.stream(1000, 500_000)
        assert backend.spans == []
        source.close()
        with stream:
            assert stream.read() == DATA[1000:501_000]
        assert backend.spans == [ByteRange(1000, 501_000)]


def test_an_archive_is_read_by_its_end() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", b"first")
        archive.writestr("b", DATA)
        archive.writestr("c", DATA[:1000] * 500, zipfile.ZIP_DEFLATED)
    size = len(packed.getvalue())
    with remote(packed.getvalue()) as (source, backend):
        entries = read_directory(source)
        assert backend.spans == [ByteRange(size - BLOCK, size)]
        for name, content in (("b", DATA), ("c", DATA[:1000] * 500)):
            with open_entry(source, entries[name]) as stream:
                assert stream.read() == content
        lengths = [len(span) for span in backend.spans if span is not None]
        # Their headers are near the beginning and near the end.
        assert lengths == [BLOCK, BLOCK, MIB]


@settings(max_examples=100)
@given(
    size=st.integers(0, 5 * BLOCK),
    reads=st.lists(
        st.tuples(st.integers(0, 6 * BLOCK), st.integers(0, 3 * BLOCK), st.booleans()), max_size=12
    ),
)
def test_reads_give_the_bytes_wherever_they_are(
    size: int, reads: list[tuple[int, int, bool]]
) -> None:
    data = DATA[:size]
    with remote(data) as (source, backend):
        for offset, length, streamed in reads:
            if streamed:
                length = max(0, min(length, size - offset))
                with source.stream(offset, length) as stream:
                    assert stream.read() == data[offset : offset + length]
            else:
                assert source.read_at(offset, length) == data[offset : offset + length]
        assert all(span is not None and span.end <= size for span in backend.spans)
        assert len(backend.spans) <= len(reads)


def test_another_version_is_never_given() -> None:
    with remote(DATA) as (source, backend):
        known = source.read_at(0, 10)
        backend.write("k", bytes_payload(DATA[::-1]))
        assert source.read_at(0, 10) == known
        with pytest.raises(ObjectChangedError):
            source.read_at(500_000, 10)
        with source.stream(100, 200_000) as stream, pytest.raises(ObjectChangedError):
            stream.read()


def test_a_closed_source_reads_nothing() -> None:
    with remote(DATA) as (source, backend):
        source.read_at(0, 10)
        other = source.duplicate()
        source.close()
        source.close()
        for read in (lambda: source.read_at(0, 10), lambda: source.stream(0, MIB)):
            with pytest.raises(InvalidInput, match="closed"):
                read()
        assert other.read_at(0, 10) == DATA[:10]
        assert len(backend.spans) == 1


def test_a_forked_child_has_to_open_it_anew() -> None:
    with remote(DATA) as (source, _):
        pid = os.fork()
        if not pid:
            try:
                source.read_at(0, 10)
            except InvalidInput as exc:
                os._exit(0 if "fork" in str(exc) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert source.read_at(0, 10) == DATA[:10]
