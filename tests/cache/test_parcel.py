"""Models in one file: they come out as they went in, or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import ConfigurationError, IntegrityError, ModelMissingError, OfflineError
from storage.cache import blobs as blobs_module
from storage.cache.blobs import State
from storage.cache.cache import ModelCache
from storage.cache.parcel import Imported, export, import_
from storage.cache.verify import verify
from storage.digest import Digest, hash_file
from storage.errors import InsufficientSpaceError, StorageError, TransferError
from tests.cache.conftest import MakeClient
from tests.cache.support import Source, blob_files, blocked_sockets, flip_byte, tree_bytes
from tests.cache.test_verify import archive
from tests.servers import OddHTTP
from tests.servers.odd_http import StaticFile

MODEL = {"model.bin": b"weights" * 100_000, "config/a.json": b"{}", "empty": b""}
OTHER = {"model.bin": MODEL["model.bin"], "more": b"x" * 513}

memory = pytest.mark.kinds("memory")
Member = tuple[str, bytes]


@pytest.fixture
def far(tmp_path: Path, make_client: MakeClient) -> ModelCache:
    """An empty cache of a machine without a network."""
    return make_client(cache_dir=tmp_path / "far").cache


@pytest.fixture
def models(make_client: MakeClient, source: Source) -> dict[str, dict[str, bytes]]:
    """Two cached models that share a file, by their URIs."""
    files = {source.put_model(MODEL): MODEL, source.put_model(OTHER, "other"): OTHER}
    client = make_client()
    for uri in files:
        client.download(uri, config=source.config)
    client.cache.close()  # else they are leased as long as this process lives
    return files


def packed(cache: ModelCache, **options: Any) -> bytes:
    stream = io.BytesIO()
    export(cache, stream, **options)
    return stream.getvalue()


def take(cache: ModelCache, data: bytes) -> Imported:
    return import_(cache, io.BytesIO(data))


def members(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def joined(
    found: list[Member], edit: Callable[[tarfile.TarInfo], object] = lambda _: None
) -> bytes:
    """Return a parcel with these members, each changed by ``edit``."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in found:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            edit(info)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def with_json(data: bytes, name: str, change: Callable[[Any], object]) -> bytes:
    """Return a parcel in which one record is changed, and its header fits."""
    found = members(data)
    for index, (member, content) in enumerate(found):
        if member.startswith(name):
            value = json.loads(content)
            change(value)
            found[index] = (member, json.dumps(value).encode())
            break
    if name != "parcel.json":
        header = json.loads(found[0][1])
        header["records"] = sum(
            len(content) for member, content in found[1:] if not member.startswith("blobs/")
        )
        found[0] = (found[0][0], json.dumps(header).encode())
    return joined(found)


def known(cache: ModelCache) -> list[str]:
    """Return all that the cache would tell of models."""
    layout = cache.upper.layout
    folders = (layout.refs, layout.manifests, layout.snapshots)
    return [str(path) for folder in folders for path in Path(folder).rglob("*") if path.is_file()]


def assert_refused(
    cache: ModelCache, data: bytes, error: type[StorageError] = IntegrityError
) -> str:
    with pytest.raises(error) as caught:
        take(cache, data)
    assert known(cache) == []
    assert os.listdir(cache.upper.layout.partial) == []
    assert verify(cache, full=True).problems == ()
    assert not cache.leases.held().manifests | cache.leases.held().blobs
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- there and back --------------------------------------------------------------------------


@pytest.mark.kinds("memory", "s3", "hub")
def test_models_come_out_as_they_went_in(
    make_client: MakeClient, source: Source, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    here = make_client().cache
    stream = io.BytesIO()
    exported = export(here, stream, creator="me 1")
    size = sum(map(len, MODEL.values())) + 513
    assert (set(exported.uris), exported.blobs, exported.size) == (set(models), 4, size)
    imported = take(far, stream.getvalue())
    assert imported == Imported(exported.uris, 4, size, 4)
    with blocked_sockets():
        # Of whatever endpoint: this machine knows none.
        client = make_client(cache_dir=far.upper.path, offline=True)
        for uri, files in models.items():
            assert tree_bytes(client.download(uri)) == files
    assert verify(far, full=True).problems == ()
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        names = tar.getnames()
    assert [name.partition("/")[0] for name in names] == [
        *("parcel.json", "manifests", "manifests", "refs.json"),
        *["blobs"] * 4,
    ]


@memory
def test_the_same_models_give_the_same_bytes(
    make_client: MakeClient, source: Source, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    data = packed(make_client().cache)
    assert data == packed(make_client().cache)
    take(far, data)
    assert packed(far) == data


@memory
def test_only_the_chosen_models_are_exported(
    make_client: MakeClient, source: Source, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    here = make_client().cache
    chosen = next(iter(models))
    refs = [ref for ref in here.upper.refs.all() if ref.source.uri == chosen]
    assert take(far, packed(here, refs=refs)).uris == (chosen,)
    other = next(uri for uri in models if uri != chosen)
    with pytest.raises(OfflineError):
        make_client(cache_dir=far.upper.path).download(other, offline=True)


@memory
def test_an_import_may_be_repeated(
    make_client: MakeClient, models: dict[str, dict[str, bytes]], far: ModelCache
) -> None:
    data = packed(make_client().cache)
    first = take(far, data)
    before = {path: path.stat().st_ino for path in blob_files(far.upper.path)}
    again = take(far, data)
    assert (first.new, again.new) == (4, 0)
    assert {path: path.stat().st_ino for path in blob_files(far.upper.path)} == before
    # What is damaged here is not taken for what is there already.
    flip_byte(next(iter(before)))
    assert take(far, data).new == 1
    assert verify(far, full=True).problems == ()


@pytest.fixture
def served_archive(odd_http: Callable[..., OddHTTP], tmp_path: Path) -> str:
    """The URL of an archive with a program, a link and an empty folder in it."""
    return f"{odd_http(StaticFile(archive(tmp_path).read_bytes())).url}/model.tar"


def test_programs_links_and_empty_folders_survive(
    make_client: MakeClient, served_archive: str, far: ModelCache
) -> None:
    model = served_archive
    make_client().download(model, unpack=True)
    take(far, packed(make_client().cache))
    client = make_client(cache_dir=far.upper.path)
    path = Path(client.download(model, unpack=True, offline=True))
    assert os.access(path / "bin" / "run", os.X_OK)
    assert os.readlink(path / "link") == "bin/run"
    assert (path / "none").is_dir()


@memory
def test_what_comes_in_is_on_the_disk(
    make_client: MakeClient,
    models: dict[str, dict[str, bytes]],
    far: ModelCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = packed(make_client().cache)
    # One of them is here already, and not synced.
    content = MODEL["config/a.json"]
    place = Path(far.upper.path, "file")
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    digest = hash_file(place, ("blake3",))["blake3"]
    far.upper.blobs.add(str(place), digest, len(content), durable=False)
    take(far, data)
    monkeypatch.setattr(blobs_module, "boot_id", lambda: "another boot")
    for blob in blob_files(far.upper.path):
        size = blob.stat().st_size
        assert far.upper.blobs.look(Digest("blake3", blob.name), size) is State.CLEAN


@memory
def test_the_newer_of_two_states_stays(
    make_client: MakeClient, source: Source, tmp_path: Path, far: ModelCache
) -> None:
    parcels = []
    for number in range(2):
        uri = source.put_model({"a": b"%d" % number})
        make_client().download(uri)
        parcels.append(packed(make_client().cache))
    client = make_client(cache_dir=far.upper.path)
    for order, expected in (((0, 1), b"1"), ((1, 0), b"1")):
        shutil.rmtree(far.upper.path, ignore_errors=True)
        for number in order:
            take(make_client(cache_dir=far.upper.path).cache, parcels[number])
        assert tree_bytes(client.download(uri, offline=True)) == {"a": expected}


@pytest.mark.kinds("s3")
def test_a_machine_that_knows_the_endpoint_gets_the_newer_state_too(
    make_client: MakeClient, source: Source, far: ModelCache
) -> None:
    uri = source.put_model({"a": b"old"})
    client = make_client(cache_dir=far.upper.path)
    client.download(uri, config=source.config)
    source.put_model({"a": b"new"})
    make_client().download(uri, config=source.config)
    take(far, packed(make_client().cache))
    found = client.download(uri, config=source.config, offline=True)
    assert tree_bytes(found) == {"a": b"new"}
    # What the parcel says of the state of the source is true: nothing is fetched again.
    source.forget()
    client.download(uri, config=source.config)
    assert source.bodies == []


@memory
def test_what_is_exported_is_leased_meanwhile(
    make_client: MakeClient, models: dict[str, dict[str, bytes]]
) -> None:
    here = make_client().cache
    seen = []

    class Stream(io.BytesIO):
        def write(self, data: Any, /) -> int:
            seen.append(here.leases.held().manifests)
            return super().write(data)

    export(here, Stream())
    assert set(seen) == {frozenset(here.upper.manifests.ids())}
    assert here.leases.held().manifests == frozenset()


# -- what is not whole does not go out -------------------------------------------------------


@memory
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_damaged_model_is_not_exported(
    make_client: MakeClient, models: dict[str, dict[str, bytes]], cache: Path, keep_times: bool
) -> None:
    flip_byte(max(blob_files(cache), key=lambda path: path.stat().st_size), keep_times=keep_times)
    here = make_client().cache
    with pytest.raises(IntegrityError, match="damaged"):
        packed(here)
    assert here.leases.held().manifests == frozenset()


@memory
def test_a_model_with_a_missing_file_is_not_exported(
    make_client: MakeClient, models: dict[str, dict[str, bytes]], cache: Path
) -> None:
    blob_files(cache)[0].unlink()
    with pytest.raises(IntegrityError, match="only in part"):
        packed(make_client().cache)


def test_an_empty_cache_gives_no_parcel(make_client: MakeClient) -> None:
    with pytest.raises(ModelMissingError):
        packed(make_client().cache)


# -- what is not whole does not come in ------------------------------------------------------


@pytest.fixture
def parcel(make_client: MakeClient, models: dict[str, dict[str, bytes]]) -> bytes:
    return packed(make_client().cache)


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


@pytest.fixture
def slowly(parcel: bytes) -> io.RawIOBase:
    class Slow(io.RawIOBase):
        def __init__(self) -> None:
            self._stream = io.BytesIO(parcel)

        def read(self, size: int = -1, /) -> bytes:
            return self._stream.read(min(size, 777))

    return Slow()


@memory
def test_a_stream_may_give_less_than_is_asked_for(slowly: io.RawIOBase, far: ModelCache) -> None:
    assert import_(far, slowly).new == 4
    assert verify(far, full=True).problems == ()
