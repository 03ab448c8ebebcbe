"""Mirrors to folders with symbolic links: no file is lost that is not the mirror's."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import InvalidInput, StorageOperations, UnsupportedOperation


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        place = folder / name.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return folder


def test_nothing_behind_a_link_is_deleted(tmp_path: Path) -> None:
    source = put(tmp_path / "source", v1__a="1")
    other = put(tmp_path / "other", precious="2")
    target = put(tmp_path / "target", old="3")
    (target / "link").symlink_to(other)
    with pytest.raises(InvalidInput, match="link is, by a symbolic link"):
        StorageOperations.mirror(source, target, delete=True)
    assert (other / "precious").read_text() == "2"
    assert (target / "old").read_text() == "3"
    assert not (target / "v1").exists()
    # Nothing is asked to go from there.
    result = StorageOperations.mirror(source, target, delete=True, ignore_patterns="link/*")
    assert (result.copied, result.deleted) == (1, 1)
    assert (other / "precious").read_text() == "2"


def test_a_second_name_of_a_folder_does_not_delete_what_the_first_one_holds(
    tmp_path: Path,
) -> None:
    source = put(tmp_path / "source", v1__a="1")
    target = put(tmp_path / "target", v1__a="1")
    (target / "current").symlink_to("v1")
    with pytest.raises(InvalidInput, match="delete=True would remove files there"):
        StorageOperations.mirror(source, target, delete=True)
    assert StorageOperations.mirror(source, target).skipped == 1
    assert (target / "v1" / "a").read_text() == "1"


def test_two_folders_that_are_one_at_the_destination_are_refused(tmp_path: Path) -> None:
    source = put(tmp_path / "source", one__a="1", two__a="2")
    target = put(tmp_path / "target", one__a="0")
    (target / "two").symlink_to("one")
    with pytest.raises(InvalidInput, match="holds other files of this mirror"):
        StorageOperations.mirror(source, target)
    apart = put(tmp_path / "apart", a="0")
    outside = put(tmp_path / "outside", keep="0")
    for name in ("one", "two"):
        (outside / name).symlink_to(apart)
    with pytest.raises(InvalidInput, match="holds other files of this mirror"):
        StorageOperations.mirror(source, outside)
    assert (target / "one" / "a").read_text() == (apart / "a").read_text() == "0"


def test_the_same_folder_by_another_name_overlaps(tmp_path: Path) -> None:
    source = put(tmp_path / "source", a="1")
    for one, two in ((source, f"local://{tmp_path}"), (f"local://{tmp_path}", source)):
        with pytest.raises(InvalidInput, match="overlap"):
            StorageOperations.mirror(one, two, delete=True)
    assert (source / "a").read_text() == "1"


def test_a_link_into_the_source_does_not_change_the_source(tmp_path: Path) -> None:
    source = put(tmp_path / "source", v1__a="1", v2__a="2")
    target = put(tmp_path / "target", keep="0")
    (target / "v1").symlink_to(source / "v2")
    with pytest.raises(InvalidInput, match="holds other files of this mirror"):
        StorageOperations.mirror(source, target)
    assert (source / "v2" / "a").read_text() == "2"


def test_a_folder_that_is_elsewhere_is_filled_there(tmp_path: Path) -> None:
    source = put(tmp_path / "source", big__a="1", z="2")
    disk = put(tmp_path / "disk", note="0")
    target = put(tmp_path / "target", a="0", old__b="0", z="0")
    (target / "big").symlink_to(disk)
    result = StorageOperations.mirror(source, target, delete=True, ignore_patterns="big/note")
    assert (result.copied, result.deleted) == (2, 2)
    assert (disk / "a").read_text() == "1"
    assert (target / "big").is_symlink()


def test_a_file_that_is_a_link_to_another_becomes_a_file(tmp_path: Path) -> None:
    """The other one is replaced or removed, and both would be what it is then."""
    source = put(tmp_path / "source", a="old", b="new")
    target = put(tmp_path / "target", b="old", c="new")
    (target / "a").symlink_to("b")
    planned = StorageOperations.mirror(source, target, delete=True, dry_run=True)
    result = StorageOperations.mirror(source, target, delete=True)
    assert (planned.copied, planned.deleted) == (result.copied, result.deleted) == (2, 1)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a": "old", "b": "new"}
    assert not (target / "a").is_symlink()


def test_deleting_where_nothing_can_be_listed_is_refused_before_a_byte_moves(
    tmp_path: Path,
) -> None:
    source = put(tmp_path / "source", a="1")
    with pytest.raises(UnsupportedOperation, match="without delete"):
        # Nobody listens there.
        StorageOperations.mirror(source, "http://127.0.0.1:9/models/", delete=True)
