"""What a model is, in one value; and what a list of files may not say."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.cache.layout import Layout
from storage.cache.manifests import Manifest, ManifestFile, Manifests
from storage.cache.records import DamagedRecordError, write_record
from storage.digest import MultiHasher, tree_digest
from tests.cache.conftest import MakeClient
from tests.servers import OddHTTP
from tests.servers.odd_http import StaticFile


def file(path: str, data: bytes = b"content", *others: str, executable: bool = False) -> Any:
    hasher = MultiHasher(("blake3", *others))
    hasher.update(data)
    found = hasher.digests()
    return ManifestFile(
        path, len(data), found["blake3"], tuple(found[name] for name in others), executable
    )


def tree(*files: ManifestFile, links: Any = (), folders: Any = ()) -> Manifest:
    return Manifest(True, files, tuple(links), tuple(folders))


RICH = tree(
    file("model.bin", b"weights", "sha256"),
    file("bin/run", b"#!/bin/sh", executable=True),
    file("naïve \udcff\n#.txt", b""),
    links=[("latest", "bin/run"), ("bin/up", "../model.bin"), ("here", ".")],
    folders=["empty", "deep/er"],
)


@pytest.fixture
def manifests(tmp_path: Path) -> Manifests:
    return Manifests(Layout(str(tmp_path / "cache")))


def path_of(manifests: Manifests, manifest_id: str) -> Path:
    return Path(manifests._layout.manifest(manifest_id))


# -- identity ------------------------------------------------------------------------------


def test_the_order_of_files_and_what_else_is_known_of_them_is_no_part_of_the_id() -> None:
    files = [file("a", b"1"), file("b", b"2", "sha256", "sha512"), file("c/d", b"3")]
    assert len({tree(*each).id for each in itertools.permutations(files)}) == 1
    assert tree(*files).id == tree(file("a", b"1"), file("b", b"2"), file("c/d", b"3")).id


def test_whatever_makes_another_tree_makes_another_id() -> None:
    other = file("model.bin", b"weightX")
    variants = [
        RICH,
        replace(RICH, is_tree=False),
        replace(RICH, files=RICH.files[1:]),
        replace(RICH, files=(other, *RICH.files[1:])),
        replace(RICH, files=(replace(RICH.files[0], path="model.bim"), *RICH.files[1:])),
        replace(RICH, files=(replace(RICH.files[0], executable=True), *RICH.files[1:])),
        replace(RICH, files=(replace(RICH.files[0], size=8), *RICH.files[1:])),
        replace(RICH, links=RICH.links[1:]),
        replace(RICH, links=(("latest", "bin/ruN"), *RICH.links[1:])),
        replace(RICH, folders=RICH.folders[1:]),
        replace(RICH, folders=()),
        # The same texts, put together in other ways.
        tree(file("a"), links=[("b", "c")]),
        tree(file("a"), folders=["b\0c"]),
        tree(file("a"), folders=["b", "c"]),
    ]
    assert len({each.id for each in variants}) == len(variants)


def test_a_manifest_is_read_as_it_was_written(manifests: Manifests) -> None:
    assert manifests.load(RICH.id) is None
    manifests.save(RICH)
    assert manifests.load(RICH.id) == RICH
    single = Manifest(False, (file("model.bin"),))
    manifests.save(single)
    assert manifests.load(single.id) == single
    assert set(manifests.ids()) == {RICH.id, single.id}


def test_the_digest_of_a_tree_is_known_where_those_of_all_files_are() -> None:
    files = (file("a", b"1", "sha256"), file("b", b"2"))
    manifest = tree(*files)
    expected = tree_digest({each.path: each.digest for each in files}, "blake3")
    assert manifest.digest("blake3") == expected
    assert manifest.digest("sha256") is None
    more = file("b", b"2", "sha256")
    manifest = manifest.with_digests({"b": {"sha256": more.others[0]}})
    assert manifest.digest("sha256") is not None
    assert (manifest.id, manifest.size) == (tree(*files).id, 2)
    assert Manifest(False, (more,)).digest("sha256") == more.others[0]


def test_what_was_known_of_the_files_is_not_forgotten(manifests: Manifests) -> None:
    manifests.save(tree(file("a", b"1", "sha256")))
    manifests.save(tree(file("a", b"1", "sha512")))
    plain = tree(file("a", b"1"))
    manifests.save(plain)
    found = manifests.load(plain.id)
    assert found is not None
    assert {each.algorithm for each in found.files[0].others} == {"sha256", "sha512"}


# -- what is not believed ------------------------------------------------------------------

BAD_PATHS = ["", ".", "..", "/etc/passwd", "../up", "a/../b", "a/./b", "a//b", "a/", "/", "a\0b"]


def refused(record: Any) -> None:
    with pytest.raises(DamagedRecordError):
        Manifest.from_record(json.loads(json.dumps(record)))


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_stays_where_it_belongs(path: str) -> None:
    # Each has the id that its content gives, so that nothing but the path can be wrong.
    refused(tree(file(path)).as_record())
    refused(tree(file("b"), links=[(path, "b")]).as_record())
    refused(tree(file("b"), folders=[path]).as_record())
    refused(Manifest(False, (file(path),)).as_record())


@pytest.mark.parametrize(
    "links",
    [
        {"link": "/etc/passwd"},
        {"link": ""},
        {"link": ".."},
        {"link": "../elsewhere"},
        {"link": "a/../../elsewhere"},
        {"deep/link": "../../elsewhere"},
        # Each of two is fine by itself, and by its letters the second one stays inside.
        {"a/b/up": "../..", "link": "a/b/up/.."},
        {"a/b/up": "../..", "c/link": "../a/b/up/../x"},
        {"dir": "a/b", "dir2": "dir/../..", "link": "dir2/.."},
        {"first": "second", "second": "/etc"},
        # Round and round.
        {"link": "link"},
        {"one": "two", "two": "one"},
        {"one": "one/one"},
    ],
    ids=str,
)
def test_a_link_that_leads_out_is_refused(links: dict[str, str]) -> None:
    refused(tree(file("a/b/file"), links=links.items()).as_record())


@pytest.mark.parametrize(
    "links",
    [
        {"link": "a/b/file"},
        {"link": "."},
        {"link": "nowhere"},
        {"a/b/link": "../../a/b/./file"},
        {"a/up": "..", "link": "a/up/a/up/a"},
        {"dir": "a/b", "link": "dir/../b/file"},
        {"one": "two", "two": "three", "three": "a/b/file"},
    ],
    ids=str,
)
def test_a_link_inside_of_the_tree_is_fine(links: dict[str, str]) -> None:
    manifest = tree(file("a/b/file"), links=links.items())
    assert Manifest.from_record(manifest.as_record()) == manifest


@pytest.mark.parametrize(
    "manifest",
    [
        tree(file("a"), file("a")),
        tree(file("a", b"1"), file("a", b"2")),
        tree(file("a"), file("a/b")),
        tree(file("a/b"), file("a/b/c/d")),
        tree(file("a"), links=[("a", "b")]),
        tree(file("a"), links=[("b", "a"), ("b", ".")]),
        tree(file("a/b"), links=[("a", ".")]),
        tree(file("a"), folders=["a"]),
        tree(file("a"), folders=["a/b"]),
        tree(file("x"), folders=["a", "a"]),
        # A folder that is not empty would be looked for in vain.
        tree(file("a/b"), folders=["a"]),
        tree(file("x"), folders=["a", "a/b"]),
        tree(file("x"), links=[("a", "x")], folders=["a"]),
        Manifest(False, ()),
        Manifest(False, (file("a"), file("b"))),
        Manifest(False, (file("a/b"),)),
        Manifest(False, (file("a"),), (("b", "a"),)),
        Manifest(False, (), (("b", "a"),)),
        Manifest(False, (file("a"),), (), ("b",)),
    ],
    ids=lambda manifest: str([*(each.path for each in manifest.files), *manifest.links]),
)
def test_two_things_at_one_place_are_refused(manifest: Manifest) -> None:
    refused(manifest.as_record())


def _set(*path: str | int, value: Any) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for step in path[:-1]:
            record = record[step]
        record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("format", value=2),
        _set("id", value="0" * 64),
        _set("tree", value=False),
        _set("files", value=None),
        _set("files", value={}),
        _set("files", value=["model.bin"]),
        _set("files", 0, value={}),
        _set("files", 0, "path", value=None),
        _set("files", 0, "path", value=["model.bin"]),
        _set("files", 0, "path", value="\ud800"),
        _set("files", 0, "size", value=6),
        _set("files", 0, "size", value="seven"),
        _set("files", 0, "size", value=None),
        _set("files", 0, "digest", value="blake3:00"),
        _set("files", 0, "digest", value="rot13:" + "0" * 64),
        _set("files", 0, "others", value=["sha256"]),
        _set("files", 0, "others", value=7),
        _set("files", 0, "executable", value=True),
        _set("links", value=[["one"]]),
        _set("links", value=[["one", "two", "three"]]),
        _set("folders", value=[None]),
        _set("folders", value=7),
        *(lambda record, name=name: record.pop(name) for name in RICH.as_record()),
        *(lambda record, name=name: record["files"][0].pop(name) for name in ("path", "others")),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(change: Callable[[Any], object]) -> None:
    record = json.loads(json.dumps(RICH.as_record()))
    assert Manifest.from_record(record) == RICH
    change(record)
    refused(record)


def test_a_manifest_under_the_name_of_another_is_refused(manifests: Manifests) -> None:
    other = tree(file("a"))
    write_record(manifests._layout, str(path_of(manifests, RICH.id)), other.as_record())
    with pytest.raises(DamagedRecordError, match="another manifest"):
        manifests.load(RICH.id)


def test_a_damaged_manifest_is_replaced(manifests: Manifests) -> None:
    manifests.save(RICH)
    path = path_of(manifests, RICH.id)
    path.write_bytes(path.read_bytes()[:-70])
    with pytest.raises(DamagedRecordError):
        manifests.load(RICH.id)
    assert list(manifests.ids()) == [RICH.id]
    manifests.save(RICH)
    assert manifests.load(RICH.id) == RICH


# -- use -----------------------------------------------------------------------------------


def test_use_is_noted_and_a_hit_seldom_writes(manifests: Manifests) -> None:
    assert manifests.last_use(RICH.id) == 0
    manifests.touch(RICH.id)
    manifests.save(RICH)
    path = path_of(manifests, RICH.id)
    recently = int(time.time()) - 10
    for note in (manifests.touch, lambda _: manifests.save(RICH)):
        os.utime(path, (recently, recently))
        note(RICH.id)
        assert manifests.last_use(RICH.id) == recently
        os.utime(path, (1, 1))
        note(RICH.id)
        assert manifests.last_use(RICH.id) >= recently


# -- archives ------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["folders", "links", "all"])
def test_what_an_archive_holds_can_be_read_again(
    make_client: MakeClient,
    odd_http: Callable[..., OddHTTP],
    tmp_path: Path,
    kinds: str,
) -> None:
    model = tmp_path / "model"
    (model / "bin" / "none").mkdir(parents=True)
    if kinds != "folders":
        (model / "up").symlink_to("bin/..")
        (model / "bin" / "back").symlink_to("../up/bin/none")
    if kinds == "all":
        (model / "bin" / "run").write_bytes(b"#!/bin/sh\n")
        (model / "bin" / "run").chmod(0o755)
        (model / "copy").write_bytes(b"#!/bin/sh\n")
        os.link(model / "copy", model / "again")
        (model / os.fsdecode(b"odd\xff\n")).write_bytes(b"")
    with tarfile.open(tmp_path / "model.tar", "w") as tar:
        tar.add(model, ".")
    server = odd_http(StaticFile((tmp_path / "model.tar").read_bytes()))
    client = make_client()
    path = client.download(f"{server.url}/model.tar", unpack=True)
    out = client.download(f"{server.url}/model.tar", tmp_path / "out", unpack=True, offline=True)
    for found in (Path(path), Path(out)):
        assert shape(found) == shape(model)
    # Nothing is made anew when it is asked for again.
    before = os.stat(path).st_ino
    assert client.download(f"{server.url}/model.tar", unpack=True, offline=True) == path
    assert os.stat(path).st_ino == before


def shape(folder: Path) -> dict[str, object]:
    """Return what links, folders and files are; a link to a blob is a file."""
    found: dict[str, object] = {}
    for each in folder.rglob("*"):
        name = str(each.relative_to(folder))
        if each.is_symlink() and "blobs/" not in os.readlink(each):
            found[name] = os.readlink(each)
        elif each.is_dir():
            found[name] = None
        else:
            found[name] = (each.read_bytes(), bool(each.stat().st_mode & 0o100))
    return found
