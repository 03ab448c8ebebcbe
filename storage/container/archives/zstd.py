"""Writing Zstandard (RFC 8878), by the package ``zstandard``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from storage.container.archives.lanes import usable_cores
from storage.unpacking.zstd import MAGIC, SKIPPABLE, zstandard

__all__ = ["Compressor", "Sink", "filling"]

_FILLING = 512 * 1024
_MAX_WORKERS = 8

_UNIT = 1024 * 1024
_SAMPLES = 4
_SAMPLE = 8 * 1024
_SAMPLE_LEVEL = 1
_WORTH = 0.9
# The most that a block may hold. A decoder remembers a window of it, which is not used.
_BLOCK = 128 * 1024
# Magic number, no flags, a window of 128 KiB.
_RAW_FRAME = MAGIC.to_bytes(4, "little") + bytes([0, 7 << 3])


class Sink(Protocol):
    """Where compressed bytes go."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Take all of ``data``, which does not change any more; return its length."""


class Compressor:
    """Compresses a stream of bytes, and stores what hardly shrinks by that.

    The stream is cut into units of 1 MiB, of which samples are compressed. Those that shrink by a
    tenth go together into frames with a checksum; the others, weights above all, as they are
    into frames of raw blocks. The result depends on the level and on the release of zstd, and
    neither on the number of threads nor on the pieces in which the data comes.
    """

    def __init__(self, sink: Sink, level: int, threads: int | None = None) -> None:
        """Prepare.

        Args:
            sink: gets what comes out, in small pieces.
            level: of compression; negative ones are faster.
            threads: how many compress; if not given, as many as this process has cores.
        """
        library = zstandard()
        # Never none: without a worker zstd cuts the data at other places.
        workers = min(threads or usable_cores(), _MAX_WORKERS)
        parameters = library.ZstdCompressionParameters.from_level(
            level, threads=max(1, workers), write_checksum=True
        )
        self._compressor = library.ZstdCompressor(compression_params=parameters)
        self._sampler = library.ZstdCompressor(level=_SAMPLE_LEVEL)
        self._sink = sink
        self._unit: list[memoryview] = []
        self._size = 0
        # The frame under way, if it is one of compressed blocks.
        self._frame: Any = None
        self._storing = self._begun = False

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Take the next bytes, which do not change any more."""
        for piece in pieces:
            view = memoryview(piece)
            while view:
                part = view[: _UNIT - self._size]
                self._unit.append(part)
                self._size += len(part)
                view = view[len(part) :]
                if self._size == _UNIT:
                    self._end_unit()

    def close(self) -> None:
        """End the last frame. A stream without bytes is a frame without bytes."""
        if self._size or not self._begun:
            self._end_unit()
        self._end_frame()

    def _end_unit(self) -> None:
        unit, self._unit, self._size = self._unit, [], 0
        store = not self._shrinks(unit)
        if store != self._storing or not self._begun:
            self._end_frame()
            self._storing = store
            if store:
                self._sink.write(_RAW_FRAME)
            else:
                self._frame = self._compressor.stream_writer(self._sink, closefd=False)
        self._begun = True
        if not store:
            for part in unit:
                self._frame.write(part)
            return
        for block in _cut(unit, _BLOCK):
            self._sink.write(_block_header(sum(map(len, block)), last=False))
            for part in block:
                self._sink.write(part)

    def _shrinks(self, unit: list[memoryview]) -> bool:
        starts = _cut(unit, _UNIT // _SAMPLES)
        samples = [b"".join(next(_cut(start, _SAMPLE))) for start in starts]
        before = sum(map(len, samples))
        after = sum(len(self._sampler.compress(sample)) for sample in samples)
        return before == 0 or after < before * _WORTH

    def _end_frame(self) -> None:
        if self._frame is not None:
            self._frame.close()
            self._frame = None
        elif self._storing:
            self._sink.write(_block_header(0, last=True))
        self._storing = False


def _cut(parts: list[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Yield what is in ``parts`` in groups of ``size`` bytes; the last one may be shorter."""
    group: list[memoryview] = []
    room = size
    for part in parts:
        while part:
            group.append(part[:room])
            part = part[room:]
            room -= len(group[-1])
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group


def _block_header(size: int, *, last: bool) -> bytes:
    return (size << 3 | last).to_bytes(3, "little")


def filling(size: int) -> Iterator[bytes]:
    """Yield frames that decoders pass over, in pieces, which make an archive longer.

    Args:
        size: bytes of all of them, at least; a few more come.
    """
    while size > 0:
        zeros = min(size, _FILLING)
        yield SKIPPABLE.to_bytes(4, "little") + zeros.to_bytes(4, "little") + bytes(zeros)
        size -= zeros
