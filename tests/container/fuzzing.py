"""What the fuzzer changes and how: small files of every format, and changes told by bytes.

The bytes come from Hypothesis: they say which file is taken and what is changed in it, so that
a failure is shrunk to few changes and can be repeated.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import zstandard

from storage.container import BinaryHelper, ModelContainerBuilder, NumpyHelper, SafetensorsHelper

__all__ = [
    "Program",
    "Seed",
    "Unseekable",
    "archive_seeds",
    "changed",
    "container_seeds",
    "content_seeds",
    "npz_seeds",
    "seeds_of",
    "summed",
    "tensor_seeds",
    "zipped",
]

WEIGHTS = [np.arange(12, dtype="<f4").reshape(3, 4), np.array(7, "i8"), np.zeros((0, 2), "<f2")]
METADATA = {"model_id": "m-1", "helper_type": "numpyhelper", "tag": "größe", "n": [1, 2.5, None]}


@dataclass(frozen=True)
class Field:
    """Where a number or a name is that a reader goes by."""

    offset: int
    width: int
    kind: str = "number"


@dataclass(frozen=True)
class Seed:
    """A good file, and what becomes of its bytes after they were changed."""

    name: str
    data: bytes
    finish: Callable[[bytes], bytes] = bytes
    """Wraps the changed bytes, or makes their checksums right, so that more is looked at."""

    fields: Sequence[Field] = field(default=())


class Program:
    """Takes decisions out of bytes; when there are none left, always the first."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    def below(self, count: int) -> int:
        """Return a number from 0 to ``count`` - 1."""
        width = 1 if count <= 0x100 else 2 if count <= 0x1_0000 else 3
        found = int.from_bytes(self.take(width), "big")
        return found % count if count else 0

    def take(self, count: int) -> bytes:
        self._at += count
        return self._raw[self._at - count : self._at].ljust(count, b"\0")

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.below(len(choices))]


# -- changes ---------------------------------------------------------------------------------

_HOSTILE = (
    b"../x",
    b"/x",
    b"d/../../x",
    b"l/x",
    b"",
    b".",
    b"metadata.json",
    b"training_model.bin",
    b"a\0b",
    b"\xff\xfe",
    b"C:\\x",
    b"x" * 300,
    b"d/" * 150,
)


def changed(seeds: Sequence[Seed], program: Program) -> bytes:
    """Return one of ``seeds`` with up to four changes; without any if ``program`` is of zeros."""
    seed = program.one_of(seeds)
    data = bytearray(seed.data)
    for _ in range(program.one_of((0, 1, 1, 2, 2, 3, 3, 4))):
        program.one_of(_CHANGES)(data, seed, seeds, program)
    return bytes(seed.finish(bytes(data)))


def _change_field(data: bytearray, seed: Seed, _: Sequence[Seed], program: Program) -> None:
    if not seed.fields:
        _change_bytes(data, seed, (), program)
        return
    one = program.one_of(seed.fields)
    old = bytes(data[one.offset : one.offset + one.width])
    if one.kind == "name":
        new = program.one_of(_HOSTILE)[: one.width]
        if seed.name.startswith("tar"):
            new = new.ljust(one.width, b"\0")
    elif one.kind == "kind":
        new = bytes([program.one_of(b"0123456LKxgSDVX7\0~")])
    else:
        octal = one.kind == "octal"
        value = _number(program, old, octal, len(data))
        new = _octal(value, one.width) if octal and program.below(4) else _plain(value, one)
    data[one.offset : one.offset + len(new)] = new


def _number(program: Program, old: bytes, octal: bool, size: int) -> int:
    text = old.rstrip(b"\0 ")
    digits = octal and text and not text.strip(b"01234567")
    now = int(text, 8) if digits else int.from_bytes(old, "little")
    return int(
        program.one_of(
            (
                0,
                1,
                -1,
                now + 1,
                now - 1,
                now * 2,
                size,
                1 << 31,
                (1 << 32) - 2,
                1 << 63,
                now ^ 1 << program.below(8 * len(old) or 1),
                program.below(1 << 16),
            )
        )
    )


def _plain(value: int, one: Field) -> bytes:
    order = "big" if one.kind == "octal" else "little"
    return (value & ((1 << 8 * one.width) - 1)).to_bytes(one.width, order)  # type: ignore[arg-type]


def _octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value & ((1 << 3 * (width - 1)) - 1))


def _flip(data: bytearray, _: Seed, __: Sequence[Seed], program: Program) -> None:
    if data:
        data[program.below(len(data))] ^= 1 << program.below(8)


def _change_bytes(data: bytearray, _: Seed, __: Sequence[Seed], program: Program) -> None:
    at = program.below(len(data) + 1)
    new = program.take(1 + program.below(4))
    data[at : at + len(new)] = new


def _delete(data: bytearray, _: Seed, __: Sequence[Seed], program: Program) -> None:
    at = program.below(len(data) + 1)
    del data[at : at + program.one_of((1, 2, 22, 46, 512, program.below(256)))]


def _cut(data: bytearray, _: Seed, __: Sequence[Seed], program: Program) -> None:
    del data[program.below(len(data) + 1) :]


def _splice(data: bytearray, _: Seed, seeds: Sequence[Seed], program: Program) -> None:
    """Put a piece of this or another file in, or in the place of something."""
    other = program.one_of(seeds).data if program.below(2) and seeds else bytes(data)
    begin = program.below(len(other) + 1)
    piece = other[begin : begin + program.one_of((1, 30, 46, 512, len(other)))]
    at = program.below(len(data) + 1)
    data[at : at + (len(piece) if program.below(2) else 0)] = piece


def _fill(data: bytearray, _: Seed, __: Sequence[Seed], program: Program) -> None:
    at = program.below(len(data) + 1)
    filler = program.one_of((b"\0", b"\xff", b"9", b"[", b'"', b"\x80"))
    data[at : at + program.below(64)] = filler * program.one_of((1, 8, 64, 3000))


_CHANGES = (
    _change_field,
    _change_field,
    _change_field,
    _flip,
    _change_bytes,
    _delete,
    _cut,
    _splice,
    _fill,
)


# -- files -----------------------------------------------------------------------------------

# Numbers of the records of ZIP, as places and widths behind the mark.
_RECORDS = {
    b"PK\3\4": ((4, 2), (6, 2), (8, 2), (10, 4), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\1\2": (
        *((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 4), (24, 4), (28, 2)),
        *((30, 2), (32, 2), (34, 2), (36, 2), (38, 4), (42, 4)),
    ),
    b"PK\5\6": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
    b"PK\6\6": ((4, 8), (12, 2), (14, 2), (16, 4), (20, 4), (24, 8), (32, 8), (40, 8), (48, 8)),
    b"PK\6\7": ((4, 4), (8, 8), (16, 4)),
    b"PK\7\x08": ((4, 4), (8, 4), (12, 4)),
}
_NAMES = {b"PK\3\4": (26, 30), b"PK\1\2": (28, 46)}


def _zip_seed(name: str, data: bytes) -> Seed:
    """Return a seed whose fields are those of all records, of archives inside it, too."""
    fields = []
    for mark, places in _RECORDS.items():
        at = data.find(mark)
        while at >= 0:
            fields += [Field(at + offset, width) for offset, width in places]
            if mark in _NAMES:
                length_at, name_at = _NAMES[mark]
                (length,) = struct.unpack_from("<H", data, at + length_at)
                fields.append(Field(at + name_at, length, "name"))
            at = data.find(mark, at + 4)
    return Seed(f"zip: {name}", data, fields=fields)


class Unseekable(io.RawIOBase):
    """Written by zipfile in one go: it puts the sizes behind the entries (data descriptors)."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__()
        self.data = bytearray(data)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.data += data
        return len(data)

    def readinto(self, buffer: Any, /) -> int:
        count = min(len(buffer), 100, len(self.data))
        buffer[:count] = self.data[:count]
        del self.data[:count]
        return count


def zipped(
    entries: dict[str, bytes],
    *,
    method: int = zipfile.ZIP_DEFLATED,
    file: Any = None,
    zip64: bool = False,
    comment: bytes = b"",
) -> bytes:
    """Make a ZIP archive as zipfile does, and so the libraries that use it."""
    target = io.BytesIO() if file is None else file
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.comment = comment
        for name, data in entries.items():
            with archive.open(name, "w", force_zip64=zip64) as entry:
                entry.write(data)
    return bytes(target.getvalue() if file is None else file.data)


def _with_end_of_zip64(data: bytes) -> bytes:
    end = len(data) - 22
    _, _, _, _, count, size, offset, _ = struct.unpack("<4s4H2LH", data[end:])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    place = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:end] + record + place + last


def _saved(helper: Any, params: Any) -> bytes:
    stream = io.BytesIO()
    helper.save(params, stream)
    return stream.getvalue()


def _numpy_s(save: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, **{str(index): array for index, array in enumerate(WEIGHTS)})
    return stream.getvalue()


TENSORS = {"a": WEIGHTS[0], "b": WEIGHTS[1], "größe": WEIGHTS[2]}
NPZ = _saved(NumpyHelper(), WEIGHTS)
SAFETENSORS = _saved(SafetensorsHelper(), TENSORS)


def _ours(helper: Any, params: Any) -> bytes:
    builder = (
        ModelContainerBuilder()
        .set_training_model(params, helper)
        .set_metadata_dict({key: METADATA[key] for key in ("tag", "n")})
        .set_model_id("m-1")
        .set_inference_model(b"onnx" * 2000, "onnx")
        .set_file("labels.txt", "größe".encode())
    )
    with builder, builder.build() as container, container.get_file_stream() as stream:
        return stream.read()


def container_entries(metadata: dict[str, Any] | None = None) -> dict[str, bytes]:
    """Return the entries of a container as scaleoututil writes them."""
    return {
        "metadata.json": json.dumps(
            {**(METADATA if metadata is None else metadata), "version": 2}
        ).encode(),
        "training_model.bin": _numpy_s(np.savez_compressed),
        "inference_model.bin": b"onnx" * 100,
    }


def container_seeds() -> list[Seed]:
    """Return whole containers, ours and as others write them, and bare models."""
    theirs = container_entries()
    deflated = zipped(theirs)
    return [
        _zip_seed("ours", _ours(NumpyHelper(), WEIGHTS)),
        _zip_seed("ours of safetensors", _ours(SafetensorsHelper(), TENSORS)),
        _zip_seed("ours of numbers", _ours(BinaryHelper(), WEIGHTS)),
        _zip_seed("deflated", deflated),
        _zip_seed("stored", zipped(theirs, method=zipfile.ZIP_STORED)),
        _zip_seed("data descriptors", zipped(theirs, file=Unseekable())),
        _zip_seed("ZIP64", _with_end_of_zip64(zipped(theirs, zip64=True))),
        _zip_seed("something in front", b"#!/bin/sh\n" * 9 + deflated),
        _zip_seed("a comment", zipped(theirs, comment=b"and so on")),
        _zip_seed("no entries", zipped({})),
        _zip_seed("only metadata", zipped({"metadata.json": b"{}"})),
        _zip_seed("bare NPZ", NPZ),
        _zip_seed("bare compressed NPZ", theirs["training_model.bin"]),
        Seed("bare pickle", b"\x80\x04\x95\x10\0\0\0\0\0\0\0]\x94(K\x01K\x02e."),
        Seed("nothing", b""),
    ]


def content_seeds() -> list[Seed]:
    """Return contents of entries; what is changed in them goes into a whole container."""

    def inside(name: str, **metadata: Any) -> Callable[[bytes], bytes]:
        entries = container_entries(metadata or None)
        return lambda data: zipped({**entries, name: data}, method=zipfile.ZIP_STORED)

    kind = "training_model_format"
    return [
        Seed("metadata", container_entries()["metadata.json"], inside("metadata.json")),
        Seed(
            "metadata of 1.1",
            json.dumps({"_version": 2, "version": "mine", "model_id": None}).encode(),
            inside("metadata.json"),
        ),
        Seed("safetensors", SAFETENSORS, inside("training_model.bin", **{kind: "safetensors"})),
        Seed("numbers", bytes(80), inside("training_model.bin", helper_type="binaryhelper")),
        Seed("unknown helper", bytes(80), inside("training_model.bin", helper_type="nobody's")),
        Seed("inference model", b"onnx" * 100, inside("inference_model.bin")),
        replace(_zip_seed("NPZ", NPZ), finish=inside("training_model.bin")),
    ]


def npz_seeds() -> list[Seed]:
    """Return NPZ files, and arrays in them whose checksum is right after a change."""
    member = zipfile.ZipFile(io.BytesIO(NPZ)).read("0.npy")
    fortran = io.BytesIO()
    np.save(fortran, np.asfortranarray(np.ones((2, 3), [("a", "<i4"), ("b", "S3")])))
    return [
        _zip_seed("ours", NPZ),
        _zip_seed("numpy's", _numpy_s(np.savez)),
        _zip_seed("numpy's, compressed", _numpy_s(np.savez_compressed)),
        Seed("array", member, lambda data: zipped({"0.npy": data}, method=zipfile.ZIP_STORED)),
        Seed("deflated array", member, lambda data: zipped({"0.npy": data})),
        Seed("array of records", fortran.getvalue(), lambda data: zipped({"0.npy": data})),
    ]


def tensor_seeds() -> list[Seed]:
    """Return safetensors files."""
    begin = 8 + int.from_bytes(SAFETENSORS[:8], "little")
    header, numbers = SAFETENSORS[8:begin], SAFETENSORS[begin:]
    return [
        Seed("safetensors", SAFETENSORS, fields=[Field(0, 8)]),
        # With a length that is right.
        Seed("header", header, lambda data: struct.pack("<Q", len(data)) + data + numbers),
    ]


# -- archives --------------------------------------------------------------------------------


def _tar(form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as made:
        for name, data in (("a", b"x" * 700), ("d" * 30 + "/" + "k" * 90, b"y"), ("é", b"")):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755 if data else 0o644
            made.addfile(member, io.BytesIO(data))
        for name, kind, target in (
            ("e", tarfile.DIRTYPE, ""),
            ("l", tarfile.SYMTYPE, "a"),
            ("h", tarfile.LNKTYPE, "a"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            made.addfile(member)
    # Without most of what fills the last record.
    return stream.getvalue().rstrip(b"\0") + bytes(1024 + 511)


def _whole_blocks(data: bytes) -> bytes:
    return data[: len(data) - len(data) % 512]


def _sparse(form: str) -> bytes:
    if form == "old":
        segments = b"%011o\0%011o\0%011o\0%011o\0" % (0, 3, 9, 3)
        return _header(b"s", 6, b"S", gnu=segments.ljust(97, b"\0") + b"%011o\0" % 20) + _padded(
            b"abcdef"
        )
    if form == "1.0":
        records = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "s",
            "GNU.sparse.realsize": "20",
        }
        content = b"2\n0\n3\n9\n3\n".ljust(512, b"\0") + b"abcdef"
    else:
        records = {"GNU.sparse.map": "0,3,9,3", "GNU.sparse.size": "20"}
        content = b"abcdef"
    body = b"".join(_record(key, value) for key, value in records.items())
    return (
        _header(b"x", len(body), b"x")
        + _padded(body)
        + _header(b"s", len(content))
        + _padded(content)
    )


def _record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 2
    return b"%d%s" % (length, rest)


def _header(name: bytes, size: int, kind: bytes = b"0", gnu: bytes = b"") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar  \0" if gnu else b"ustar\x0000"
    block[386 : 386 + len(gnu)] = gnu
    return summed(bytes(block))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def summed(data: bytes) -> bytes:
    """Make the checksums of headers right, as far as they stand where headers do."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def _tar_seed(name: str, data: bytes, finish: Callable[[bytes], bytes]) -> Seed:
    fields = []
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            fields += [
                Field(at, 100, "name"),
                Field(at + 100, 8, "octal"),
                Field(at + 124, 12, "octal"),
                Field(at + 156, 1, "kind"),
                Field(at + 157, 100, "name"),
                Field(at + 345, 131, "name"),
                Field(at + 386, 12, "octal"),
                Field(at + 398, 12, "octal"),
                Field(at + 482, 1),
                Field(at + 483, 12, "octal"),
            ]
    return Seed(f"tar: {name}", data, finish, fields)


_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0),
    "zstd": lambda data: zstandard.compress(data, 1),
    "zstd in frames": lambda data: b"".join(
        zstandard.compress(data[at : at + 1024], 1) for at in range(0, len(data), 1024)
    ),
}


def _behind(
    compress: Callable[[bytes], bytes], first: Callable[[bytes], bytes]
) -> Callable[[bytes], bytes]:
    return lambda data: compress(first(data))


def archive_seeds() -> dict[str, list[Seed]]:
    """Return archives by the kind of change: of a tar, inside a compressed one, and so on."""
    sparse = b"".join(map(_sparse, ("old", "0.1", "1.0"))) + bytes(1024)
    plain = {
        "PAX": _whole_blocks(_tar(tarfile.PAX_FORMAT)),
        "GNU": _whole_blocks(_tar(tarfile.GNU_FORMAT)),
        "ustar": _whole_blocks(_tar(tarfile.USTAR_FORMAT)),
        "sparse": sparse,
    }
    files = {"a": b"x" * 700, "d/k": b"y", "é": b"z", "l": b"d/k"}
    archives = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as made:
            for name, data in files.items():
                info = zipfile.ZipInfo(name)
                info.compress_type = method
                info.external_attr = (0o120777 if name == "l" else 0o100755) << 16
                made.writestr(info, data)
            made.mkdir("folder")
        archives.append(_zip_seed(f"method {method}", stream.getvalue()))
    archives.append(_zip_seed("data descriptors", zipped(files, file=Unseekable())))
    archives.append(_zip_seed("ZIP64", _with_end_of_zip64(zipped(files, zip64=True))))
    archives.append(_zip_seed("something in front", b"#!/bin/sh\n" * 9 + zipped(files)))
    pax = plain["PAX"]
    return {
        "tar": [_tar_seed(name, data, summed) for name, data in plain.items()],
        "tar as it is": [_tar_seed(name, data, bytes) for name, data in plain.items()],
        "tar inside": [
            _tar_seed(f"{name} of {form}", data, _behind(compress, summed))
            for name, compress in _COMPRESSIONS.items()
            for form, data in plain.items()
        ],
        "compressed": [Seed(name, compress(pax)) for name, compress in _COMPRESSIONS.items()],
        "zip": archives,
    }


def seeds_of(*groups: Sequence[Seed]) -> list[Seed]:
    """Return all seeds of some groups."""
    return [seed for group in groups for seed in group]
