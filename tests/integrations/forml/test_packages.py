"""Packages of ForML: kept as they are, released once, installed whole."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import pytest

from tests.facade.stores import Store, tree_bytes
from tests.integrations.forml.support import (
    INSIDE,
    NAME,
    VERSION,
    content_of,
    installed,
    keys_of,
    make_package,
    on_file,
    on_two_stores,
)
from tests.peers.environments import Peer, PeerError


@on_two_stores
def test_a_package_is_stored_as_it_is_whether_file_or_folder(
    forml: Peer, store: Store, package: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(INSIDE / "project", folder)
    forml("describe", folder=folder, version="2")
    (folder / "demo" / "a file+ü.bin").write_bytes(bytes(range(256)))
    (folder / "demo" / "empty").touch()
    expected = tree_bytes(folder)
    for left in (folder / "__pycache__", folder / "demo" / "__pycache__"):
        left.mkdir()
        (left / "__4ml__.cpython-311.pyc").write_bytes(b"left out")
    for each in (package, folder):
        forml("push", uri=store.base, package=each)
    found = tmp_path / "found.4ml"
    assert forml("pull", uri=store.base, project=NAME, version=VERSION, target=found) == [
        NAME,
        VERSION,
        "demo",
    ]
    assert found.read_bytes() == package.read_bytes()
    found = tmp_path / "found"
    forml("pull", uri=store.base, project=NAME, version="2.0", target=found)
    shutil.rmtree(found / "__pycache__", ignore_errors=True)  # of its manifest, which was read
    assert tree_bytes(found) == expected
    assert not keys_of(store, "__pycache__")
    mounted = forml("mount", uri=store.base, project=NAME, version="2", staging=tmp_path / "staged")
    assert installed(mounted) == expected


@on_file
def test_a_release_never_changes(forml: Peer, pushed: Store, package: Path, tmp_path: Path) -> None:
    forml("push", uri=pushed.base, package=package)
    keys = keys_of(pushed, "")
    for version in (VERSION, "1.2"):
        other = make_package(forml, tmp_path / f"{version}.4ml", version, "other")
        with pytest.raises(
            PeerError, match=r"Level.Invalid.*released already, with another package"
        ):
            forml("push", uri=pushed.base, package=other)
    forml("pull", uri=pushed.base, project=NAME, version=VERSION, target=tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == package.read_bytes()
    assert keys_of(pushed, "releases/") == ["releases/demo-project/1.2.json"]
    assert set(keys) <= set(keys_of(pushed, ""))


@on_two_stores
def test_of_several_who_push_a_release_at_once_one_does(
    forml: Peer, store: Store, tmp_path: Path
) -> None:
    packages = [make_package(forml, tmp_path / f"{text}.4ml", "1", text) for text in "abc"]
    # One of them twice, which is no conflict.
    packages.append(packages[0])
    answers = forml("push_at_once", uri=store.base, packages=packages)
    found = tmp_path / "found"
    forml("pull", uri=store.base, project=NAME, version="1", target=found)
    for package, answer in zip(packages, answers, strict=True):
        if package.read_bytes() == found.read_bytes():
            assert answer["raised"] is None
        else:
            assert "another package" in answer["raised"]


@on_two_stores
def test_what_is_not_there_is_said_in_the_words_of_forml(forml: Peer, pushed: Store) -> None:
    where = {"uri": pushed.base, "project": NAME}
    sid = str(uuid.uuid4())
    missing = "has no release 3 of a project demo-project; its releases are 1.2"
    for task, arguments in (("pull", {"target": "/nowhere"}), ("mount", {})):
        with pytest.raises(PeerError, match=f"MissingError: .*{missing}"):
            forml(task, **where, version="3", **arguments)
    with pytest.raises(PeerError, match=r"Level.Listing.Empty: .*has no generation 1 of"):
        forml("open_", **where, version=VERSION, generation=1)
    with pytest.raises(PeerError, match=r"Level.Invalid: .*has no generation 1 of"):
        forml("read", **where, version=VERSION, generation=1, sid=sid)
    with pytest.raises(PeerError, match=r"Level.Invalid: .*has no release 3"):
        forml("write", **where, version="3", sid=sid, state="")
    with pytest.raises(PeerError, match=r"Level.Invalid: .*has no release 3"):
        forml("close", **where, version="3", generation=1)
    assert forml("listed", uri=pushed.base, project="other", version="1") == {
        "projects": [NAME],
        "releases": [],
        "generations": [],
    }


@on_two_stores
def test_a_package_that_changed_in_the_store_is_not_handed_over(
    forml: Peer, pushed: Store, tmp_path: Path
) -> None:
    (key,) = keys_of(pushed, "package.4ml")
    data = pushed.get_raw(key)
    pushed.put_raw(key, data[:-1] + bytes([data[-1] ^ 1]))
    staging = tmp_path / "staging"
    with pytest.raises(PeerError, match="IntegrityError"):
        forml("mount", uri=pushed.base, project=NAME, version=VERSION, staging=staging)
    assert not tree_bytes(staging)


@on_file
def test_packages_are_installed_once_and_never_mixed_up(
    forml: Peer, store: Store, tmp_path: Path
) -> None:
    staging = tmp_path / "staging"
    paths = []
    # Two registries have a release of the same name.
    for text in ("one", "two"):
        package = make_package(forml, tmp_path / f"{text}.4ml", "1", text)
        forml("push", uri=store.uri(text), package=package)
        where = {"uri": store.uri(text), "project": NAME, "version": "1", "staging": staging}
        answers = forml("mount_at_once", **where, processes=4)
        mounted = forml("mount", **where)
        assert {answer["value"]["path"] for answer in answers} == {mounted["path"]}
        assert mounted["imports"][0] == mounted["path"]
        assert content_of(Path(mounted["path"]))["demo/__init__.py"] == f"# {text}\n".encode()
        paths.append(mounted["path"])
    assert sorted(str(path) for path in staging.rglob("*") if path.is_file()) == sorted(paths)


@on_file
def test_threads_mount_at_once_what_they_ask_for(forml: Peer, store: Store, tmp_path: Path) -> None:
    rounds, names = 5, ["one", "two", "three", "four"]
    for name in names:
        source = tmp_path / name
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text(f"# {name}\n")
        path = tmp_path / f"{name}.4ml"
        forml("create", source=source, target=path, version="1", name=NAME, package=name)
        forml("push", uri=store.uri(name), package=path)
    uris = [store.uri(name) for name in names] * 2
    found = forml(
        "mount_in_threads", uris=uris, project=NAME, staging=tmp_path / "staging", rounds=rounds
    )
    mounted = set()
    for answers in found["read"]:
        for name, (path, package, pulled) in zip(names * 2, answers, strict=True):
            assert (package, pulled) == (name, name)
            assert content_of(Path(path))[f"{name}/__init__.py"] == f"# {name}\n".encode()
            mounted.add(path)
    assert len(mounted) == rounds * len(names)
    # Python finds all of them, and nothing that is gone.
    assert set(found["imports"]) == mounted


@on_file
def test_odd_names_are_kept(forml: Peer, store: Store, tmp_path: Path) -> None:
    names = ["..", "a/b", "ü %2F", "end."]
    for index, name in enumerate(names):
        package = make_package(forml, tmp_path / f"{index}.4ml", "1!2.0+local.1", "", name)
        forml("push", uri=store.base, package=package)
        forml("train", uri=store.base, project=name, version="1!2+local.1", states=[name])
        found = forml("states", uri=store.base, project=name, version="1!2+local.1", generation=1)
        assert found["states"] == [name]
    assert forml("levels", uri=store.base) == {name: {"1!2+local.1": [1]} for name in names}


@on_two_stores
def test_what_others_put_there_is_not_listed(forml: Peer, pushed: Store) -> None:
    expected = forml("levels", uri=pushed.base)
    for name in (
        f"releases/{NAME}/notes.json",
        f"releases/{NAME}/1.3/notes.json",
        # As this library would not spell it.
        f"releases/{NAME}/1.3.0.json",
        "releases/other/README.txt",
        "releases/notes.json",
        f"generations/{NAME}/1.2/notes.json",
        "applications/notes.txt",
        "applications/a b.py",
        "applications/.py",
    ):
        pushed.put_raw(name, b"{}")
    assert forml("levels", uri=pushed.base) == expected == {NAME: {"1.2": []}}
    assert forml("applications", uri=pushed.base) == []
