"""A parcel that was cut, changed or made to do harm gives no model."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import ConfigurationError, IntegrityError
from storage.cache.cache import ModelCache
from storage.cache.manifests import Manifest
from storage.cache.parcel import import_
from storage.cache.verify import verify
from storage.digest import Digest, hash_file
from storage.errors import InsufficientSpaceError, StorageError, TransferError
from tests.cache.conftest import MakeClient
from tests.cache.parcels import (
    assert_refused,
    joined,
    known,
    members,
    memory,
    packed,
    take,
    with_json,
)
from tests.cache.support import Source, blob_files, tree_bytes


@memory
def test_a_parcel_that_was_cut_gives_nothing(parcel: bytes, far: ModelCache) -> None:
    step = max(1, len(parcel) // 40)
    for length in (0, 1, 511, 512, 1024, *range(2048, len(parcel) - 1024, step)):
        assert "ends too early" in assert_refused(far, parcel[:length])


@memory
def test_a_parcel_in_which_a_byte_changed_gives_nothing_wrong(
    parcel: bytes, far: ModelCache, make_client: MakeClient, models: dict[str, dict[str, bytes]]
) -> None:
    refused = 0
    for place in range(0, len(parcel) - 1024, max(1, len(parcel) // 150)):
        damaged = bytearray(parcel)
        damaged[place] ^= 1
        try:
            take(far, bytes(damaged))
        except StorageError:
            refused += 1
            assert known(far) == []
        else:
            # It is in the padding, or in who made it.
            client = make_client(cache_dir=far.upper.path)
            for uri, files in models.items():
                assert tree_bytes(client.download(uri, offline=True)) == files
            shutil.rmtree(far.upper.path)
            far._checked = False
        assert verify(far, full=True).problems == ()
    assert refused > 100


@memory
@pytest.mark.parametrize("order", ["swapped", "twice", "more", "less"])
def test_the_members_are_those_that_are_told_in_their_order(
    parcel: bytes, far: ModelCache, order: str
) -> None:
    *rest, last = members(parcel)
    found = {
        "swapped": [*rest[:-1], last, rest[-1]],
        "twice": [*rest, last, last],
        "more": [*rest, last, ("extra", b"x")],
        "less": rest,
    }[order]
    assert_refused(far, joined(found))


@memory
@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_a_member_is_a_file(parcel: bytes, far: ModelCache, kind: bytes) -> None:
    def edit(info: tarfile.TarInfo) -> None:
        if info.name.startswith("blobs/"):
            info.type, info.linkname = kind, "/etc/passwd"

    assert "is no file" in assert_refused(far, joined(members(parcel), edit))


@memory
def test_what_is_said_about_a_member_is_its_size_only(parcel: bytes, far: ModelCache) -> None:
    def name(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"path": "../../escaped"}

    def much(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"comment": "x" * 100_000}

    assert_refused(far, joined(members(parcel), name))
    assert_refused(far, joined(members(parcel), much))


@memory
def test_a_size_of_more_than_8_gib_is_understood(
    parcel: bytes, far: ModelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"size": str(info.size)}

    assert take(far, joined(members(parcel), edit)).blobs == 4


@memory
def test_no_bomb_goes_off(parcel: bytes, far: ModelCache) -> None:
    class Endless(io.RawIOBase):
        """A parcel that never ends."""

        def __init__(self, begin: bytes) -> None:
            self.begin = begin
            self.read_bytes = 0

        def read(self, size: int = -1, /) -> bytes:
            self.read_bytes += size
            assert self.read_bytes < 10 * len(parcel)
            data, self.begin = self.begin[:size], self.begin[size:]
            return data or bytes(size)

    huge = tarfile.TarInfo("parcel.json")
    huge.size = 2**40
    begins = [huge.tobuf(tarfile.PAX_FORMAT)]
    *rest, (name, _) = members(parcel)
    huge.name = name
    begins.append(joined(rest)[: sum(512 + -(-len(data) // 512) * 512 for _, data in rest)])
    begins[-1] += huge.tobuf(tarfile.PAX_FORMAT)
    for begin in begins:
        with pytest.raises(IntegrityError):
            import_(far, Endless(begin))
        assert known(far) == []


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for name in path[:-1]:
            record = record[name]
        record[path[-1]] = value

    return change


@memory
@pytest.mark.parametrize(
    "change",
    [
        _set("refs", 0, "source", "scheme", value="../../../../tmp/x"),
        _set("refs", 0, "source", "scheme", value="s3"),
        _set("refs", 0, "source", "uri", value="memory://a\nb"),
        _set("refs", 0, "source", "uri", value="https://u:p@host/x?secret"),
        _set("refs", 0, "source", "identity", value="../x"),
        _set("refs", 0, "source", "identity", value=7),
        _set("refs", 0, "source", "allow", value=[1]),
        _set("refs", 0, "manifest", value="../../x"),
        _set("refs", 0, "manifest", value=["x"]),
        _set("refs", 0, "validated_at", value="soon"),
        _set("refs", 0, "validated_at", value=float("nan")),
        _set("refs", 0, "source", "uri", value="memory://a/\ud800"),
        _set("refs", 0, "validated_at", value=10**400),
        _set("refs", 0, "fingerprint", value={}),
        _set("refs", 0, value=None),
        _set("refs", value={}),
        _set("refs", value=[]),
    ],
)
def test_refs_are_not_believed(
    parcel: bytes, far: ModelCache, change: Callable[[Any], None]
) -> None:
    assert_refused(far, with_json(parcel, "refs.json", change))


@memory
@pytest.mark.parametrize(
    "change",
    [
        _set("id", value="0" * 64),
        _set("format", value=2),
        _set("tree", value=False),
        _set("files", 0, "path", value="../x"),
        _set("files", 0, "size", value=-1),
        _set("files", 0, "size", value=1),
        _set("files", 0, "size", value=float("inf")),
        _set("files", 0, "path", value="a/" * 1_000_000 + "a"),
        _set("links", value=[["link", "a/" * 1_000_000 + "a"]]),
        _set("links", value=[["link", "a\0b"]]),
        _set("files", 0, "digest", value="sha256:" + "0" * 64),
        _set("files", 0, "others", value=["sha256:" + "0" * 64]),
        _set("files", 0, "others", value=["blake3:" + "0" * 64]),
        _set("files", value=None),
        _set("links", value=[["out", "../../x"]]),
    ],
)
def test_lists_of_files_are_not_believed(
    parcel: bytes, far: ModelCache, change: Callable[[Any], None]
) -> None:
    assert_refused(far, with_json(parcel, "manifests/", change))


def forged(data: bytes, change: Callable[[Manifest], Manifest]) -> bytes:
    """Return a parcel with another list of files, whose id and whose mentions fit."""
    found = members(data)
    index = next(i for i, (name, _) in enumerate(found) if name.startswith("manifests/"))
    before = Manifest.from_record(json.loads(found[index][1]))
    after = change(before)
    record = json.dumps(after.as_record())
    found[index] = (f"manifests/{after.id}.json", record.encode())
    found = [
        (
            name,
            content.replace(before.id.encode(), after.id.encode())
            if name == "refs.json"
            else content,
        )
        for name, content in found
    ]
    return with_json(joined(found), "refs.json", lambda _: None)


def _with_file(**changes: Any) -> Callable[[Manifest], Manifest]:
    def change(manifest: Manifest) -> Manifest:
        first, *rest = manifest.files
        return replace(manifest, files=(replace(first, **changes), *rest))

    return change


def _with_link(path: str, target: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, links=((path, target),))


@memory
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_file(path="../x"), "no path"),
        (_with_file(path="/x"), "no path"),
        (_with_file(path="a/" * 1_000_000 + "a"), "no path"),
        (_with_file(path="a\0b"), "no path"),
        (_with_file(size=-1), "cannot be"),
        (_with_file(size=10**9), "not as large"),
        (_with_file(digest=Digest("sha256", "0" * 64)), "cannot be"),
        (_with_file(digest=Digest("blake3", "0" * 64)), "was expected"),
        (_with_file(others=(Digest("sha256", "0" * 64),)), "expected to be sha256:0000"),
        (_with_file(others=(Digest("blake3", "0" * 64),)), "expected to be blake3:0000"),
        (lambda manifest: replace(manifest, files=manifest.files[:1] * 2), "twice"),
        (lambda manifest: replace(manifest, is_tree=False), "one file"),
        (_with_link("out", "../../x"), "leads out"),
        (_with_link("out", "/etc/passwd"), "leads out"),
        (_with_link("../out", "x"), "no path"),
        (_with_link("link", "a\0b"), "no target"),
        (_with_link("link", "a/" * 1_000_000), "no target"),
    ],
)
def test_a_list_of_files_that_was_made_to_do_harm_is_refused(
    parcel: bytes, far: ModelCache, change: Callable[[Manifest], Manifest], message: str
) -> None:
    assert re.search(message, assert_refused(far, forged(parcel, change)))


@memory
def test_a_forged_parcel_is_otherwise_a_parcel(parcel: bytes, far: ModelCache) -> None:
    assert take(far, forged(parcel, lambda manifest: manifest)).new == 4
    data = forged(parcel, _with_link("link", "config"))
    assert len(take(far, data).uris) == 2


@memory
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_set("format", value=2), ConfigurationError),
        (_set("algorithm", value="sha256"), ConfigurationError),
        (_set("blobs", value=3), IntegrityError),
        (_set("size", value=1), IntegrityError),
        (_set("manifests", value=1), IntegrityError),
        (_set("manifests", value=True), IntegrityError),
        (_set("records", value=2**40), IntegrityError),
        (_set("records", value=1), IntegrityError),
    ],
)
def test_the_header_has_to_fit(
    parcel: bytes, far: ModelCache, change: Callable[[Any], None], error: type[StorageError]
) -> None:
    assert_refused(far, with_json(parcel, "parcel.json", change), error)


@memory
@pytest.mark.parametrize("data", [b"", b"no parcel", b"PK\3\4" * 1000, bytes(4096)])
def test_what_is_no_parcel_is_refused(far: ModelCache, data: bytes) -> None:
    assert_refused(far, data)


def test_the_digest_of_an_archive_that_is_not_here_is_not_believed(
    make_client: MakeClient, served_archive: str, tmp_path: Path, far: ModelCache
) -> None:
    model = served_archive
    digest = hash_file(tmp_path / "model.tar", ("sha256",))["sha256"]
    here = make_client()
    here.download(model, unpack=True, digest=digest)
    here.download(model, unpack=True, digest=digest, offline=True)
    take(far, packed(here.cache))
    client = make_client(cache_dir=far.upper.path)
    with pytest.raises(IntegrityError, match="no sha256 digest"):
        client.download(model, unpack=True, digest=digest, offline=True)


@memory
def test_a_stream_that_fails_is_an_error_of_ours(parcel: bytes, far: ModelCache) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 4096:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(TransferError, match="cannot be read"):
        import_(far, Failing(parcel))
    assert known(far) == []


@memory
def test_a_full_disk_is_told_before_anything_is_written(
    make_client: MakeClient, source: Source, full_disk: Path
) -> None:
    make_client().download(source.put_model({"a": b"x" * 9_000_000}))
    data = packed(make_client().cache)
    far = make_client(cache_dir=full_disk / "cache").cache
    with pytest.raises(InsufficientSpaceError):
        take(far, data)
    assert known(far) == []
    assert blob_files(far.upper.path) == []
