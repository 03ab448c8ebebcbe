"""A model as a stream of FileChunk messages, on the wire as Protocol Buffers have it."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.container.filechunks import FileChunk, filechunk_data, to_filechunks
from storage.errors import InvalidInput


@pytest.mark.parametrize(
    ("data", "wire"),
    [
        (b"", b""),
        (b"a", b"\x0a\x01a"),
        (b"\0" * 127, b"\x0a\x7f" + b"\0" * 127),
        (b"\0" * 128, b"\x0a\x80\x01" + b"\0" * 128),
        (b"m" * 2**20, b"\x0a\x80\x80\x40" + b"m" * 2**20),
    ],
    ids=["nothing", "one byte", "127 bytes", "128 bytes", "1 MiB"],
)
def test_the_message_is_tag_length_and_data(data: bytes, wire: bytes) -> None:
    assert FileChunk(data=data).SerializeToString() == wire
    assert FileChunk.FromString(wire) == FileChunk(data)


@pytest.mark.parametrize(
    "wire",
    [
        b"\x10\x96\x01" + b"\x0a\x01a",
        b"\x0a\x01a" + b"\x12\x02hi",
        b"\x19" + b"8 bytes!" + b"\x0a\x01a" + b"\x1d" + b"four",
        b"\x23\x10\x01\x2b\x2c\x24" + b"\x0a\x01a",
        b"\x0a\x01b" + b"\x0a\x01a",
        b"\x8a\x80\x00\x81\x00a",
        b"\x08\x05" + b"\x0a\x01a",
    ],
    ids=[
        "a number before",
        "a text after",
        "fixed numbers",
        "nested groups",
        "twice, the last one counts",
        "numbers longer than they need be",
        "its own field as a number",
    ],
)
def test_unknown_fields_are_passed_over(wire: bytes) -> None:
    assert FileChunk.FromString(wire).data == b"a"


@pytest.mark.parametrize(
    "wire",
    [
        b"\x0a",
        b"\x0a\x05four",
        b"\x0a" + b"\xff" * 10,
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x02\x01a",
        b"\x0c",
        b"\x0f\x00",
        b"\x23" * 200,
        b"\x23\x2c",
        b"\x19four",
        b"PK\x03\x04 this is a container",
    ],
)
def test_what_is_no_message_is_refused(wire: bytes) -> None:
    with pytest.raises(InvalidInput, match="FileChunk"):
        FileChunk.FromString(wire)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(wire: bytes) -> None:
    try:
        chunk = FileChunk.FromString(wire)
    except InvalidInput:
        return
    assert FileChunk.FromString(chunk.SerializeToString()) == chunk


GENERATED = """
import sys
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

file = descriptor_pb2.FileDescriptorProto(name="chunk.proto", package="chunk", syntax="proto3")
field = file.message_type.add(name="FileChunk").field.add(name="data", number=1, label=1, type=12)
pool = descriptor_pool.DescriptorPool()
pool.Add(file)
message = message_factory.GetMessageClass(pool.FindMessageTypeByName("chunk.FileChunk"))
read = sys.stdin.buffer.read
while head := read(8):
    found = message.FromString(read(int.from_bytes(head, "little")))
    answer = message(data=found.data[::-1]).SerializeToString()
    sys.stdout.buffer.write(len(answer).to_bytes(8, "little") + answer)
"""


def test_the_class_that_protobuf_generates_reads_ours_and_is_read() -> None:
    pytest.importorskip("google.protobuf")
    contents = [b"", b"a", b"ab" * 63, b"ab" * 64, b"abc" * 2**19]
    sent = b"".join(
        len(wire).to_bytes(8, "little") + wire
        for wire in (FileChunk(content).SerializeToString() for content in contents)
    )
    done = subprocess.run(
        [sys.executable, "-c", GENERATED], input=sent, capture_output=True, timeout=60, check=True
    )
    answers = io.BytesIO(done.stdout)
    for content in contents:
        size = int.from_bytes(answers.read(8), "little")
        assert FileChunk.FromString(answers.read(size)).data == content[::-1]
    assert answers.read() == b""


class Dribble(io.RawIOBase):
    """Gives one byte at a time, as a raw stream may."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._content.read(1)
        buffer[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("source", [io.BytesIO, Dribble])
def test_a_stream_is_cut_into_chunks_of_one_size(source: Any) -> None:
    chunks = list(to_filechunks(source(b"abcdefgh"), 3))
    assert chunks == [FileChunk(b"abc"), FileChunk(b"def"), FileChunk(b"gh")]
    assert b"".join(filechunk_data(chunks)) == b"abcdefgh"


def test_a_chunk_has_a_mebibyte_if_not_told_otherwise() -> None:
    sizes = [len(chunk.data) for chunk in to_filechunks(io.BytesIO(bytes(2**21 + 1)))]
    assert sizes == [2**20, 2**20, 1]


def test_a_stream_without_bytes_has_no_chunks() -> None:
    assert list(to_filechunks(io.BytesIO())) == []


def test_a_caller_may_bring_the_class_of_the_messages() -> None:
    class Theirs:
        def __init__(self, *, data: bytes) -> None:
            self.data = data

    chunks = list(to_filechunks(io.BytesIO(b"abc"), 2, Theirs))
    assert [type(chunk) for chunk in chunks] == [Theirs, Theirs]
    assert list(filechunk_data(chunks)) == [b"ab", b"c"]


def test_empty_chunks_are_passed_over() -> None:
    chunks = [FileChunk(), FileChunk(b"a"), FileChunk(), FileChunk(b"b")]
    assert list(filechunk_data(chunks)) == [b"a", b"b"]


@pytest.mark.parametrize("chunk", [b"bytes", None, FileChunk(data=cast(bytes, "text"))])
def test_what_has_no_bytes_is_no_chunk(chunk: object) -> None:
    with pytest.raises(InvalidInput, match="FileChunk was expected"):
        list(filechunk_data([chunk]))


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_has_at_least_one_byte(size: int) -> None:
    stream: BinaryIO = io.BytesIO(b"abc")
    with pytest.raises(InvalidInput, match="chunk_size"):
        to_filechunks(stream, size)
