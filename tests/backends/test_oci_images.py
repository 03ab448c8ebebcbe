"""Images in an OCI registry: layers become the tree of the model."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import ByteRange
from storage.backends.oci import layers as layers_module
from storage.backends.oci.manifests import Manifest, parse_json
from storage.config import OCIConfig
from storage.digest import Digest
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    TransientError,
    UnsupportedOperation,
)
from storage.unpacking.extraction import ExtractionLimits
from tests.backends.oci_support import (
    INDEX,
    LAYER,
    Entry,
    Pusher,
    compressed,
    opened,
    sha256,
    tar_of,
    tree_of,
)
from tests.servers.registry import Gate, Registry, find_umoci

Layers = list[list[Entry | tuple[str, bytes]]]


@pytest.fixture
def push(oci_registry: Registry, prefix: str) -> Pusher:
    """A repository of its own."""
    return Pusher.of(oci_registry, prefix)


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Whatever happens, no layer stays behind."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert os.listdir(temporary) == []


def pulled(push: Pusher, layers: Layers, coding: str = "gzip", **config: Any) -> dict[str, bytes]:
    """Push an image and return what its tree is."""
    push.image("v1", layers, coding)
    with opened(push.uri(":v1"), OCIConfig(**config)) as backend:
        return tree_of(backend)


BASE: Layers = [
    [
        ("etc/passwd", b"root"),
        Entry("models", folder=True),
        ("models/config.json", b"{}"),
        ("models/weights/a.bin", b"a" * 70_000),
    ]
]


@pytest.mark.parametrize("coding", ["", "gzip", "zstd"])
def test_the_tree_is_what_lies_below_models(push: Pusher, coding: str) -> None:
    assert pulled(push, BASE, coding) == {"config.json": b"{}", "weights/a.bin": b"a" * 70_000}


def test_codings_may_be_mixed_and_media_types_may_be_dockers(push: Pusher) -> None:
    tars = [tar_of([(f"models/{name}", name.encode())]) for name in "abc"]
    docker = "application/vnd.docker.image.rootfs.diff.tar"
    kinds = (docker, f"{docker}.gzip", f"{LAYER}+zstd")
    pushed = [
        push.blob(compressed(tar, coding), kind)
        for tar, kind, coding in zip(tars, kinds, ("", "gzip", "zstd"), strict=True)
    ]
    push.image_of("v1", pushed, tars)
    with opened(push.uri(":v1")) as backend:
        assert tree_of(backend) == {"a": b"a", "b": b"b", "c": b"c"}


def test_names_may_begin_with_a_dot_or_a_slash(push: Pusher) -> None:
    layers: Layers = [[("./models/a", b"1"), ("/models/b", b"2")]]
    assert pulled(push, layers) == {"a": b"1", "b": b"2"}


def test_another_folder_may_hold_the_model(push: Pusher) -> None:
    layers: Layers = [[("models/a", b"1"), ("opt/model/b", b"2"), ("opt/modelx", b"3")]]
    assert pulled(push, layers, model_folder="/opt/model") == {"b": b"2"}
    # The version tells what else the content depends on.
    with (
        opened(push.uri(":v1")) as one,
        opened(push.uri(":v1"), OCIConfig(model_folder="/o")) as two,
    ):
        assert one.current_version() != two.current_version()


def test_an_image_without_models_says_so(push: Pusher) -> None:
    with pytest.raises(ModelMissingError, match="no files in /models"):
        pulled(push, [[("etc/passwd", b"root"), ("models.txt", b"1")]])


# -- layers over one another ---------------------------------------------------------------------


def test_a_file_of_an_upper_layer_wins(push: Pusher) -> None:
    assert pulled(push, [*BASE, [("models/config.json", b"new")]])["config.json"] == b"new"


def test_a_whiteout_hides_a_file_and_is_none_itself(push: Pusher) -> None:
    assert pulled(push, [*BASE, [("models/.wh.config.json", b"")]]) == {
        "weights/a.bin": b"a" * 70_000
    }


def test_a_whiteout_hides_a_folder(push: Pusher) -> None:
    assert pulled(push, [*BASE, [("models/.wh.weights", b"")]]) == {"config.json": b"{}"}


@pytest.mark.parametrize("first", [True, False], ids=["whiteout first", "whiteout last"])
def test_a_whiteout_hides_what_is_below_and_not_beside_it(push: Pusher, first: bool) -> None:
    whiteout, own = ("models/.wh.weights", b""), ("models/weights/b.bin", b"b")
    upper: list[Entry | tuple[str, bytes]] = [whiteout, own] if first else [own, whiteout]
    assert pulled(push, [*BASE, upper]) == {"config.json": b"{}", "weights/b.bin": b"b"}


@pytest.mark.parametrize("first", [True, False], ids=["opaque first", "opaque last"])
def test_an_opaque_folder_hides_all_that_was_in_it(push: Pusher, first: bool) -> None:
    opaque, own = ("models/.wh..wh..opq", b""), ("models/new/n", b"n")
    upper: list[Entry | tuple[str, bytes]] = [opaque, own] if first else [own, opaque]
    assert pulled(push, [*BASE, upper]) == {"new/n": b"n"}


@pytest.mark.parametrize("name", [".wh.models", ".wh..wh..opq"])
def test_the_whole_model_may_be_hidden_and_made_anew(push: Pusher, name: str) -> None:
    assert pulled(push, [*BASE, [(name, b""), ("models/c", b"c")]]) == {"c": b"c"}
    with pytest.raises(ModelMissingError):
        pulled(push, [*BASE, [(name, b"")]])


def test_whiteouts_elsewhere_do_not_matter(push: Pusher) -> None:
    upper: list[Entry | tuple[str, bytes]] = [("etc/.wh.passwd", b""), ("etc/.wh..wh..opq", b"")]
    assert set(pulled(push, [*BASE, upper])) == {"config.json", "weights/a.bin"}


def test_a_folder_takes_the_place_of_a_file_and_the_other_way_round(push: Pusher) -> None:
    upper: list[Entry | tuple[str, bytes]] = [
        Entry("models/config.json", folder=True),
        ("models/config.json/x", b"x"),
        ("models/weights", b"w"),
    ]
    assert pulled(push, [*BASE, upper]) == {"config.json/x": b"x", "weights": b"w"}


def test_hard_links_are_files_also_into_lower_layers(push: Pusher) -> None:
    layers: Layers = [
        [("models/a", b"a" * 1000), Entry("models/b", hard="models/a")],
        [Entry("models/sub/c", hard="models/a"), Entry("models/d", hard="/models/b")],
    ]
    assert pulled(push, layers) == dict.fromkeys(("a", "b", "d", "sub/c"), b"a" * 1000)


def test_a_hard_link_stays_what_it_was_when_its_other_name_is_replaced(push: Pusher) -> None:
    layers: Layers = [
        [("models/a", b"old"), Entry("models/b", hard="models/a")],
        [("models/a", b"new")],
    ]
    assert pulled(push, layers) == {"a": b"new", "b": b"old"}


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("models/link", "data/a"),
        ("models/link", "/models/data/a"),
        ("models/sub/link", "../data/a"),
        ("models/link", "../models/data/a"),
    ],
)
def test_links_within_the_model_are_followed(push: Pusher, place: str, target: str) -> None:
    found = pulled(push, [[("models/data/a", b"1"), Entry(place, link=target)]])
    assert found == {"data/a": b"1", place.removeprefix("models/"): b"1"}


def test_a_link_to_a_folder_is_that_folder(push: Pusher) -> None:
    found = pulled(push, [[("models/1/m", b"1"), Entry("models/latest", link="1")]])
    assert found == {"1/m": b"1", "latest/m": b"1"}


# -- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "link out": Entry("models/x", link="../../etc/passwd"),
    "absolute link out": Entry("models/x", link="/etc/passwd"),
    "link to a look-alike": Entry("models/x", link="/models-evil/a"),
    "link to nowhere": Entry("models/x", link="nothing"),
    "hard link out": Entry("models/x", hard="etc/passwd"),
    "hard link to nothing": Entry("models/x", hard="models/none"),
    "name out": Entry("models/../../x", b"1"),
    "name out elsewhere": Entry("../x", b"1"),
    "device": Entry("models/x", kind=tarfile.CHRTYPE),
    "pipe": Entry("models/x", kind=tarfile.FIFOTYPE),
    "whiteout of what is above": Entry("models/.wh...", b""),
    "the folder is a link": Entry("models", link="etc"),
    "the folder is a file": Entry("models", b"1"),
}


@pytest.mark.parametrize("entry", REFUSED.values(), ids=REFUSED)
def test_a_layer_that_leads_elsewhere_is_refused(push: Pusher, entry: Entry) -> None:
    with pytest.raises(InvalidInput, match="refused"):
        pulled(push, [[("etc/passwd", b"root"), entry]])


def test_writing_through_a_link_of_a_lower_layer_stays_inside(push: Pusher) -> None:
    layers: Layers = [
        [("models/data/a", b"1"), Entry("models/l", link="data")],
        [("models/l/b", b"2")],
    ]
    assert pulled(push, layers) == {"data/a": b"1", "data/b": b"2", "l/a": b"1", "l/b": b"2"}


def test_devices_elsewhere_are_passed_over(push: Pusher) -> None:
    layers: Layers = [[Entry("dev/null", kind=tarfile.CHRTYPE), ("models/a", b"1")]]
    assert pulled(push, layers) == {"a": b"1"}


def test_the_limits_hold_for_all_layers_together(
    push: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: Layers = [[(f"models/{part}{at}", b"x" * 600) for at in range(3)] for part in "ab"]
    push.image("v1", layers)
    for few, match in (
        (ExtractionLimits(entries=5), "more than 5 entries"),
        (ExtractionLimits(total_size=3000), "more than 3000 bytes"),
    ):
        monkeypatch.setattr("storage.backends.oci.content.ExtractionLimits", lambda few=few: few)
        with opened(push.uri(":v1")) as backend, pytest.raises(InvalidInput, match=match):
            tree_of(backend)


def test_what_lies_outside_of_the_model_counts_too(
    push: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "storage.backends.oci.content.ExtractionLimits", lambda: ExtractionLimits(total_size=5000)
    )
    with pytest.raises(InvalidInput, match="more than 5000 bytes"):
        pulled(push, [[("var/bomb", bytes(6000)), ("models/a", b"1")]])


# -- whether it is what was pushed ---------------------------------------------------------------


def test_a_layer_of_a_wrong_digest_is_refused(oci_registry: Registry, push: Pusher) -> None:
    push.image("v1", BASE, "")

    def alter(path: str, body: bytes) -> bytes:
        return body.replace(b"aaaa", b"aaab") if "/blobs/" in path else body

    with (
        Gate(oci_registry, alter=alter) as gate,
        opened(push.uri(":v1", gate.host)) as backend,
        pytest.raises(IntegrityError, match="nothing of it is used"),
    ):
        tree_of(backend)


def test_a_manifest_of_a_wrong_digest_is_refused(oci_registry: Registry, push: Pusher) -> None:
    pushed = push.image("v1", BASE)

    def alter(path: str, body: bytes) -> bytes:
        return body.replace(b'"size"', b' "size"') if "/manifests/" in path else body

    with Gate(oci_registry, alter=alter) as gate:
        for reference in (":v1", f"@{pushed['digest']}"):
            with (
                opened(push.uri(reference, gate.host)) as backend,
                pytest.raises(IntegrityError, match="the manifest should be"),
            ):
                list(backend.list())


def test_a_config_of_a_wrong_digest_is_refused(oci_registry: Registry, push: Pusher) -> None:
    push.image("v1", BASE)

    def alter(path: str, body: bytes) -> bytes:
        return body.replace(b'"linux"', b'"linuy"') if "/blobs/" in path else body

    with (
        Gate(oci_registry, alter=alter) as gate,
        opened(push.uri(":v1", gate.host)) as backend,
        pytest.raises(IntegrityError, match="config"),
    ):
        list(backend.list())


def test_the_content_of_a_layer_has_to_be_that_of_the_config(push: Pusher) -> None:
    tar = tar_of(BASE[0])
    layer = push.blob(gzip.compress(tar), f"{LAYER}+gzip")
    push.image_of("v1", [layer], [tar + bytes(512)])
    with opened(push.uri(":v1")) as backend, pytest.raises(IntegrityError, match="the content"):
        tree_of(backend)


def test_a_config_of_another_image_is_refused(push: Pusher) -> None:
    tar = tar_of(BASE[0])
    layer = push.blob(gzip.compress(tar), f"{LAYER}+gzip")
    push.image_of("v1", [layer], [tar, tar])
    with opened(push.uri(":v1")) as backend, pytest.raises(IntegrityError, match="digests of 2"):
        tree_of(backend)


@pytest.mark.parametrize("coding", ["", "gzip", "zstd"])
def test_a_layer_that_is_cut_is_damaged(push: Pusher, coding: str) -> None:
    tar = tar_of(BASE[0])
    whole = compressed(tar, coding)
    layer = push.blob(whole[: len(whole) // 2], f"{LAYER}+{coding}" if coding else LAYER)
    push.image_of("v1", [layer], [tar])
    with (
        opened(push.uri(":v1")) as backend,
        pytest.raises(InvalidInput, match="cannot be unpacked"),
    ):
        tree_of(backend)


def test_a_layer_that_cannot_be_read_is_told_before_anything_is_fetched(push: Pusher) -> None:
    tar = tar_of(BASE[0])
    push.image_of("v1", [push.blob(tar, f"{LAYER}+encrypted")], [tar])
    with opened(push.uri(":v1")) as backend, pytest.raises(UnsupportedOperation, match="encrypted"):
        list(backend.list())


# -- several images ------------------------------------------------------------------------------


def test_an_index_gives_the_image_of_the_platform(push: Pusher) -> None:
    entries = []
    for name in ("amd64", "arm64"):
        image = push.image(f"v1-{name}", [[("models/arch", name.encode())]])
        entries.append({**image, "platform": {"os": "linux", "architecture": name}})
    unknown = {"platform": {"os": "unknown", "architecture": "unknown"}}
    push.manifest({"manifests": [{**entries[0], **unknown}, *entries]}, "v1", INDEX)
    for name in ("amd64", "arm64"):
        with opened(push.uri(":v1"), OCIConfig(platform=f"linux/{name}")) as backend:
            assert tree_of(backend) == {"arch": name.encode()}
            (info,) = backend.list()
            assert info.version == backend.current_version()
    with (
        opened(push.uri(":v1"), OCIConfig(platform="linux/s390x")) as backend,
        pytest.raises(ModelMissingError, match="only for linux/amd64, linux/arm64"),
    ):
        list(backend.list())


# -- tags and digests ----------------------------------------------------------------------------


def test_a_digest_pins_what_a_tag_does_not(push: Pusher) -> None:
    first = push.image("v1", [[("models/a", b"1")]])
    with opened(push.uri(":v1")) as backend, opened(push.uri(f"@{first['digest']}")) as pinned:
        (old,) = backend.list()
        push.image("v1", [[("models/a", b"2")]])
        assert tree_of(backend) == {"a": b"2"}
        assert tree_of(pinned) == {"a": b"1"}
        # A read goes on with the version that was listed, by this backend or another one.
        for one in (backend, pinned):
            with one.read("a", None, old) as body:
                assert b"".join(map(bytes, body)) == b"1"
        assert backend.stat("a").version != old.version
        assert pinned.stat("a").version == old.version == pinned.current_version()


def test_without_a_tag_the_latest_is_meant(push: Pusher) -> None:
    push.image("latest", [[("models/a", b"1")]])
    with opened(push.uri()) as backend:
        assert tree_of(backend) == {"a": b"1"}


def test_an_image_is_fetched_once_for_many_questions(oci_registry: Registry, push: Pusher) -> None:
    push.image("v1", BASE)
    with Gate(oci_registry) as gate, opened(push.uri(":v1", gate.host)) as backend:
        assert len(list(backend.list())) == 2
        backend.stat("config.json")
        tree_of(backend)
        blobs = [asked.path for asked in gate.asked if "/blobs/" in asked.path]
        assert len(blobs) == len(set(blobs)) == 2  # config and layer
        gate.clear()
        backend.current_version()
        assert [asked.method for asked in gate.asked] == ["HEAD"]


def test_a_layer_that_broke_off_is_gone_on_with(
    oci_registry: Registry, push: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(600_000)
    push.image("v1", [[("models/a", data)]], "")
    failing = True

    class Breaking(layers_module._Blob):
        def fetch(self, fetch: Any) -> None:
            def cut(layer: Any, start: int) -> Any:
                first, chunks = fetch(layer, start)

                def some() -> Any:
                    yield next(iter(chunks))
                    if failing:
                        raise TransientError("cut")
                    yield from chunks

                return first, some()

            super().fetch(cut)

    monkeypatch.setattr(layers_module, "_Blob", Breaking)
    with Gate(oci_registry) as gate, opened(push.uri(":v1", gate.host)) as backend:
        with pytest.raises(TransientError):
            list(backend.list())
        failing = False
        assert tree_of(backend) == {"a": data}
        ranges = [asked.range for asked in gate.asked if asked.range]
        assert len(ranges) == 1
        assert int(ranges[0].removeprefix("bytes=").partition("-")[0]) > 0


def test_files_go_when_all_were_read_and_come_again_when_asked_for(
    oci_registry: Registry, push: Pusher
) -> None:
    push.image("v1", BASE)
    with Gate(oci_registry) as gate, opened(push.uri(":v1", gate.host)) as backend:
        infos = {info.key: info for info in backend.list()}
        assert len(os.listdir(tempfile.gettempdir())) == 1
        assert set(tree_of(backend)) == set(infos)
        assert os.listdir(tempfile.gettempdir()) == []
        gate.clear()
        assert {info.key: info for info in backend.list()} == infos
        assert gate.body_bytes == 0
        with backend.read("config.json", None, infos["config.json"]) as body:
            assert b"".join(map(bytes, body)) == b"{}"


def test_a_tag_that_moves_does_not_fill_the_disk(push: Pusher) -> None:
    with opened(push.uri(":v1")) as backend:
        for number in range(5):
            push.image("v1", [[("models/a", bytes([number])), ("models/b", b"unread")]])
            assert backend.stat("a").size == 1
            assert len(os.listdir(tempfile.gettempdir())) <= 2


def test_parts_of_files_in_layers_can_be_read(push: Pusher) -> None:
    push.image("v1", [[("models/a", bytes(range(256)) * 8000)]], "zstd")
    with opened(push.uri(":v1")) as backend:
        info = backend.stat("a")
        with backend.read("a", ByteRange(1_000_000, 1_500_000), info) as body:
            read = b"".join(bytes(chunk) for chunk in body)
        assert read == (bytes(range(256)) * 8000)[1_000_000:1_500_000]


def test_nothing_can_be_written(push: Pusher) -> None:
    push.image("v1", BASE)
    with opened(push.uri(":v1")) as backend:
        with pytest.raises(UnsupportedOperation, match="pushed by other programs"):
            backend.delete(["config.json"])
        with pytest.raises(UnsupportedOperation):
            backend.sign("config.json", "GET", 60)


def test_a_manifest_that_is_also_an_index_is_refused() -> None:
    with pytest.raises(StorageError, match="also an index"):
        parse_json(b'{"schemaVersion": 2, "manifests": [], "layers": []}', "oci://x/y")


@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"digest": "sha256:1", "size": 1},
        {"digest": f"md5:{'0' * 32}", "size": 1},
        {"digest": f"blake3:{'0' * 64}", "size": 1},
        {"digest": f"sha256:{'0' * 64}", "size": -1},
        {"digest": f"sha256:{'0' * 64}", "size": True},
        {"digest": f"sha256:{'0' * 64}", "size": 1, "annotations": ["x"]},
        "layer",
    ],
)
def test_a_damaged_descriptor_is_told(layer: Any) -> None:
    table = {"schemaVersion": 2, "layers": [layer]}
    with pytest.raises(StorageError, match="descriptor"):
        Manifest.parse(table, Digest("sha256", "0" * 64), "oci://x/y")


def test_a_manifest_of_an_older_kind_is_told() -> None:
    with pytest.raises(StorageError, match="none of an image or artifact"):
        Manifest.parse({"schemaVersion": 1}, Digest("sha256", "0" * 64), "oci://x/y")


def test_images_of_another_program_are_read(push: Pusher, tmp_path: Path) -> None:
    umoci, layout = find_umoci(), tmp_path / "layout"

    def run(*arguments: str) -> None:
        subprocess.run([umoci, *arguments], check=True, capture_output=True, timeout=60)

    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "model.bin").write_bytes(b"m" * 100_000)
    (source / "old.txt").write_bytes(b"old")
    (source / "sub" / "a").write_bytes(b"a")
    os.link(source / "model.bin", source / "same.bin")
    (source / "link").symlink_to("sub/a")
    run("init", "--layout", str(layout))
    image = f"{layout}:v1"
    run("new", "--image", image)
    rootless = ["--rootless"] if os.geteuid() else []
    run("insert", *rootless, "--image", image, str(source), "/models")
    run("insert", *rootless, "--image", image, "--whiteout", "/models/old.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / "b").write_bytes(b"b")
    run("insert", *rootless, "--image", image, "--opaque", str(other), "/models/sub2")
    _push_layout(push, layout, "v1")
    with opened(push.uri(":v1")) as backend:
        # Its layers end without the mark of the end.
        assert tree_of(backend) == {
            "model.bin": b"m" * 100_000,
            "same.bin": b"m" * 100_000,
            "sub/a": b"a",
            "link": b"a",
            "sub2/b": b"b",
        }


def _push_layout(push: Pusher, layout: Path, tag: str) -> None:
    index = json.loads((layout / "index.json").read_text())
    (entry,) = index["manifests"]

    def read(digest: str) -> bytes:
        data = (layout / "blobs" / "sha256" / digest.partition(":")[2]).read_bytes()
        assert sha256(data) == digest
        return data

    manifest = json.loads(read(entry["digest"]))
    for descriptor in (manifest["config"], *manifest["layers"]):
        push.blob(read(descriptor["digest"]), descriptor["mediaType"])
    push.manifest({key: manifest[key] for key in ("config", "layers")}, tag)
