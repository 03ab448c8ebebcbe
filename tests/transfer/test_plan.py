"""Plans: which objects, under which paths, in which parts."""

from __future__ import annotations

import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.backends.base import ByteRange, ObjectInfo, bytes_payload
from storage.errors import InvalidInput, ModelMissingError
from storage.transfer.engine import PART_GRANULE
from storage.transfer.plan import (
    Patterns,
    Plan,
    PlannedFile,
    even_part,
    local_paths,
    make_plan,
    resolve,
    split,
)
from storage.uri import Location
from tests.transfer.support import assert_clear, memory_bucket

ALL = Patterns()
MIB = 1024 * 1024


def at(key: str, version: str | None = None) -> Location:
    return Location("memory", "bucket", key, version)


# -- paths ---------------------------------------------------------------------------------


def test_usual_keys_are_their_own_paths() -> None:
    keys = ["a.bin", "sub/b.bin", "sub/deeper/é +%41#x[1]", ".hidden", "sub/.x", "..x", "a..b"]
    assert local_paths(keys, "memory://b/") == keys


def test_empty_and_dot_segments_vanish() -> None:
    assert local_paths(["a//b", "c/./d", "./e", "f/"], "memory://b/") == ["a/b", "c/d", "e", "f"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("", "absolute"),
        ("/etc/passwd", "absolute"),
        ("//x", "absolute"),
        ("..", r"'\.\.'"),
        ("../x", r"'\.\.'"),
        ("a/../b", r"'\.\.'"),
        ("a/..", r"'\.\.'"),
        ("a\0b", "NUL"),
        (".", "names no file"),
        ("./.", "names no file"),
        ("a/" + "x" * 256, "255 bytes"),
        ("é" * 128 + "/a", "255 bytes"),
    ],
)
def test_a_key_that_cannot_be_a_file_is_refused(key: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        local_paths(["fine", key], "memory://b/m")
    assert_clear(caught.value)
    assert "memory://b/m" in str(caught.value)


def test_a_name_of_255_bytes_is_fine() -> None:
    keys = ["a/" + "x" * 255, "é" * 127 + "x"]
    assert local_paths(keys, "memory://b/") == keys


@pytest.mark.parametrize(
    "keys",
    [("a/b", "a//b"), ("a/b", "a/./b"), ("./a", "a"), ("a", "a/"), ("a/b", "x", "a///b")],
)
def test_two_keys_of_one_path_are_refused_and_both_named(keys: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput) as caught:
        local_paths(keys, "memory://b/")
    assert_clear(caught.value)
    assert repr(keys[0]) in str(caught.value)
    assert repr(keys[-1]) in str(caught.value)


@pytest.mark.parametrize(
    "keys", [("a", "a/b"), ("a/b/c", "a/b"), ("x/y", "x//y/z"), ("a/b/c/d", "a")]
)
def test_a_key_that_is_a_file_and_a_folder_is_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="a file and a folder"):
        local_paths(keys, "memory://b/")


def test_names_that_only_share_a_beginning_do_not_collide() -> None:
    keys = ["a", "a.b", "ab/c", "a-b/c", "a b"]
    assert local_paths(keys, "memory://b/") == keys


@given(st.lists(st.text("ab./\0é", max_size=8), max_size=6))
def test_paths_are_safe_or_refused(keys: list[str]) -> None:
    try:
        paths = local_paths(keys, "memory://b/")
    except InvalidInput:
        return
    assert len(paths) == len(keys) == len(set(paths))
    for path in paths:
        assert os.path.normpath(path) == path
        assert not path.startswith(("/", "../"))
        assert path not in ("", ".", "..")
        assert not any(other.startswith(path + "/") for other in paths)


# -- parts ---------------------------------------------------------------------------------


@given(st.integers(0, 5000), st.integers(1, 700))
def test_parts_cover_every_byte_once_in_order(size: int, part_size: int) -> None:
    parts = split(size, part_size)
    assert [byte for part in parts for byte in range(part.start, part.end)] == list(range(size))
    assert all(len(part) == part_size for part in parts[:-1])
    assert all(0 < len(part) <= part_size for part in parts)


def test_an_object_of_exactly_one_part_is_one_part() -> None:
    assert split(100, 100) == [ByteRange(0, 100)]
    assert split(101, 100) == [ByteRange(0, 100), ByteRange(100, 101)]
    assert split(0, 100) == []


@given(st.integers(1, 1 << 40), st.integers(1, 512), st.integers(1, 64))
def test_connections_get_even_parts(total: int, granules: int, connections: int) -> None:
    most = granules * PART_GRANULE
    part = even_part(total, most, connections)
    assert part % PART_GRANULE == 0
    assert min(most, 4 * MIB) <= part <= most
    if total > connections * part:
        # The last one may be short of a granule for each of the others.
        rounds = -(-total // (connections * part))
        assert rounds * connections * (part - PART_GRANULE) < total or part in (most, 4 * MIB)


@pytest.mark.parametrize(
    ("mib", "connections", "parts"),
    [(6, 16, 2), (64, 16, 16), (64, 4, 8), (130, 16, 32), (1024, 16, 32), (1100, 16, 48)],
)
def test_no_connection_is_left_alone_with_a_part(mib: int, connections: int, parts: int) -> None:
    size = mib * MIB
    assert len(split(size, even_part(size, 32 * MIB, connections))) == parts


# -- patterns ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "ignore", "wanted"),
    [
        (None, None, {"a.bin", "B.BIN", "sub/a.bin", "sub/deep/c.txt", "[1].txt"}),
        ("*.bin", None, {"a.bin", "sub/a.bin"}),
        (["*.bin", "*.txt"], "sub/*", {"a.bin", "[1].txt"}),
        ("sub/", None, {"sub/a.bin", "sub/deep/c.txt"}),
        (None, ["*.bin", "*.txt"], {"B.BIN"}),
        ("?.bin", None, {"a.bin"}),
        ("[[]1].txt", None, {"[1].txt"}),
        ([], None, set()),
        (("a.bin",), ("a.*",), set()),
    ],
)
def test_patterns_choose_by_the_whole_path(
    allow: str | list[str] | None, ignore: str | list[str] | None, wanted: set[str]
) -> None:
    paths = ["a.bin", "B.BIN", "sub/a.bin", "sub/deep/c.txt", "[1].txt"]
    patterns = Patterns(allow, ignore)
    assert {path for path in paths if patterns.wants(path)} == wanted


def test_patterns_know_whether_they_may_leave_something_out() -> None:
    assert not Patterns().active
    assert not Patterns(None, []).active
    assert Patterns([]).active
    assert Patterns(None, "*.txt").active


def test_a_generator_of_patterns_is_good_for_many_paths() -> None:
    patterns = Patterns(pattern for pattern in ("*.bin", "*.txt"))
    assert [patterns.wants(path) for path in ("a.bin", "b.txt", "c.bin")] == [True] * 3


@pytest.mark.parametrize("pattern", ["", 3, None])
def test_a_pattern_that_is_none_is_refused(pattern: object) -> None:
    with pytest.raises(InvalidInput, match="non-empty string"):
        Patterns(["*.bin", pattern])  # type: ignore[list-item]


# -- what is there -------------------------------------------------------------------------


def test_the_exact_key_is_an_object_even_if_keys_lie_below_it() -> None:
    with memory_bucket({"m": b"1", "m/a": b"2", "m-2/a": b"3"}) as backend:
        plan = make_plan(backend, at("m"), ALL)
        assert (plan.is_tree, [file.path for file in plan.files]) == (False, ["m"])
        plan = make_plan(backend, at("m/"), ALL)
        assert (plan.is_tree, [file.path for file in plan.files]) == (True, ["a"])


def test_a_tree_has_sorted_paths_relative_to_it_and_no_siblings() -> None:
    with memory_bucket({"m/b": b"1", "m/a/c": b"22", "m-2/a": b"3", "mx": b"4"}) as backend:
        plan = make_plan(backend, at("m"), ALL)
        assert plan.is_tree
        assert [file.path for file in plan.files] == ["a/c", "b"]
        assert [file.info.key for file in plan.files] == ["m/a/c", "m/b"]
        assert plan.size == 3


def test_a_whole_bucket_is_a_tree() -> None:
    with memory_bucket({"a": b"1", "b/c": b""}) as backend:
        plan = make_plan(backend, at(""), ALL)
        assert plan.is_tree
        assert [file.path for file in plan.files] == ["a", "b/c"]


@pytest.mark.parametrize("key", ["nothing", "m/a/", "m/", "m/a/b", "M"])
def test_nothing_is_reported_as_missing(key: str) -> None:
    with memory_bucket({"m-2/a": b"", "m/a": b""} if key != "m/" else {"m-2/a": b""}) as backend:
        with pytest.raises(ModelMissingError) as caught:
            make_plan(backend, at(key), ALL)
        assert_clear(caught.value)
        assert key in str(caught.value)


def test_a_missing_version_is_not_looked_for_as_a_tree() -> None:
    with memory_bucket({"m/a": b""}) as backend, pytest.raises(ModelMissingError):
        resolve(backend, at("m", "7"))


def test_patterns_that_match_nothing_are_an_error_that_names_them() -> None:
    with memory_bucket({"m/a.bin": b"", "m/b.bin": b""}) as backend:
        with pytest.raises(ModelMissingError, match="none of its 2 objects") as caught:
            make_plan(backend, at("m"), Patterns("*.onnx", "*.md"))
        assert_clear(caught.value)
        assert "*.onnx" in str(caught.value)
        assert "*.md" in str(caught.value)


def test_keys_that_patterns_leave_out_may_be_anything() -> None:
    with memory_bucket({"m/../x": b"", "m/a": b"", "m//a": b""}) as backend:
        with pytest.raises(InvalidInput):
            make_plan(backend, at("m"), ALL)
        plan = make_plan(backend, at("m"), Patterns(None, ["../x", "/a"]))
        assert [file.path for file in plan.files] == ["a"]


def test_a_single_object_can_be_left_out_by_patterns() -> None:
    with memory_bucket({"m/a.bin": b""}) as backend:
        assert make_plan(backend, at("m/a.bin"), Patterns("*.bin")).files[0].path == "a.bin"
        with pytest.raises(ModelMissingError):
            make_plan(backend, at("m/a.bin"), Patterns("m/*"))


# -- the value -----------------------------------------------------------------------------


def test_the_fingerprint_follows_content_names_and_kind() -> None:
    with memory_bucket({"m/a": b"1", "m/b": b"2", "one": b"1"}) as backend:
        plan = make_plan(backend, at("m"), ALL)
        first = plan.fingerprint()
        assert first == make_plan(backend, at("m/"), ALL).fingerprint()
        assert first != make_plan(backend, at("m"), Patterns("a")).fingerprint()
        assert Plan("x", True, plan.files[:1]).fingerprint() != (
            Plan("x", False, plan.files[:1]).fingerprint()
        )
        backend.write("m/b", bytes_payload(b"3"))
        assert first != make_plan(backend, at("m"), ALL).fingerprint()


def test_what_cannot_be_pinned_has_no_fingerprint_and_what_has_no_size_no_sum() -> None:
    weak = PlannedFile("a", ObjectInfo("a", 1, etag='W/"x"'))
    unsized = PlannedFile("b", ObjectInfo("b", None, etag='"x"'))
    assert Plan("u", True, (weak,)).fingerprint() is None
    assert Plan("u", True, (weak, unsized)).size is None
    assert Plan("u", True, (unsized,)).fingerprint() is not None


def test_a_plan_survives_pickling() -> None:
    with memory_bucket({"m/a": b"1"}) as backend:
        plan = make_plan(backend, at("m"), ALL)
    again = pickle.loads(pickle.dumps(plan))
    assert (again.files[0].path, again.fingerprint()) == ("a", plan.fingerprint())


def test_only_a_named_version_is_pinned() -> None:
    with memory_bucket({"a": b"1"}) as backend:
        version = backend.stat("a").version
        assert not make_plan(backend, at("a"), ALL).pinned
        assert make_plan(backend, at("a", version), ALL).pinned
