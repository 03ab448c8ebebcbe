"""Hashing what arrives out of order, and deciding whether it is what it should be."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.backends.base import ByteRange, ObjectInfo
from storage.digest import Digest
from storage.errors import IntegrityError
from storage.transfer.plan import split
from storage.transfer.verify import OrderedHasher, algorithms_for, check_digests
from tests.transfer.support import KIB, MIB, assert_clear

WRONG = Digest("sha256", "0" * 64)
SHA = Digest("sha256", hashlib.sha256(b"data").hexdigest())
MD5 = Digest("md5", hashlib.md5(b"data", usedforsecurity=False).hexdigest())
FOUND = {"sha256": SHA, "md5": MD5}


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    found = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield found
    os.close(found)


def rewrite(descriptor: int, data: bytes) -> None:
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


# -- OrderedHasher -------------------------------------------------------------------------


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=200,
)
@given(data=st.data(), size=st.integers(1, 40 * KIB), part_size=st.integers(1, 9 * KIB))
def test_parts_in_any_order_give_the_hash_of_the_whole(
    descriptor: int, data: st.DataObject, size: int, part_size: int
) -> None:
    content = random.Random(size).randbytes(size)
    rewrite(descriptor, content)
    parts = split(size, max(part_size, size // 64 + 1))
    order = data.draw(st.permutations(range(len(parts))))
    hasher = OrderedHasher(descriptor, parts)
    hasher.start(("sha256", "blake3", "md5"))
    done = [hasher.part_done(index) for index in order]
    assert done == [False] * (len(parts) - 1) + [True]
    digests = hasher.digests()
    assert digests["sha256"].hex == hashlib.sha256(content).hexdigest()
    assert digests["blake3"].hex == blake3(content).hexdigest()
    assert digests["md5"].hex == hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_a_part_beyond_one_window_is_hashed_whole(descriptor: int) -> None:
    content = random.Random(1).randbytes(17 * MIB + 5)
    rewrite(descriptor, content)
    hasher = OrderedHasher(descriptor, [ByteRange(0, 3), ByteRange(3, len(content))])
    hasher.start(("blake3",))
    assert not hasher.part_done(1)
    assert hasher.part_done(0)
    assert hasher.digests()["blake3"].hex == blake3(content).hexdigest()


def test_bytes_of_a_part_count_as_they_are_when_its_turn_comes(descriptor: int) -> None:
    rewrite(descriptor, b"\0" * 30)
    hasher = OrderedHasher(descriptor, split(30, 10))
    hasher.start(("sha256",))
    for index in (2, 1, 0):
        os.pwrite(descriptor, bytes([65 + index]) * 10, index * 10)
        last = hasher.part_done(index)
    assert last
    expected = hashlib.sha256(b"A" * 10 + b"B" * 10 + b"C" * 10).hexdigest()
    assert hasher.digests()["sha256"].hex == expected


def test_without_algorithms_completion_is_still_told(descriptor: int) -> None:
    rewrite(descriptor, b"0123456789")
    hasher = OrderedHasher(descriptor, split(10, 4))
    hasher.start(())
    assert [hasher.part_done(index) for index in (1, 0, 2)] == [False, False, True]
    assert hasher.digests() == {}


def test_many_threads_give_one_hash_and_exactly_one_of_them_learns_it(descriptor: int) -> None:
    content = random.Random(2).randbytes(64 * KIB)
    rewrite(descriptor, content)
    expected = hashlib.sha256(content).hexdigest()
    before = sys.getswitchinterval()
    # Threads change places as often as they can: that is where the races are.
    sys.setswitchinterval(1e-6)
    try:
        for seed in range(150):
            order = list(range(64))
            random.Random(seed).shuffle(order)
            assert _race(descriptor, split(len(content), KIB), order, 8) == [expected]
    finally:
        sys.setswitchinterval(before)


def _race(descriptor: int, parts: list[ByteRange], order: list[int], count: int) -> list[str]:
    """Report the parts from many threads; return the digest that each one who learnt it saw."""
    hasher = OrderedHasher(descriptor, parts)
    hasher.start(("sha256",))
    gate = threading.Barrier(count)
    seen: list[str] = []

    def report(mine: list[int]) -> None:
        gate.wait()
        for index in mine:
            if hasher.part_done(index):
                seen.append(hasher.digests()["sha256"].hex)

    threads = [threading.Thread(target=report, args=(order[n::count],)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


@pytest.mark.parametrize("moment", ["while it is hashed", "after it was hashed"])
def test_a_last_part_that_another_thread_takes_is_told_once(descriptor: int, moment: str) -> None:
    """Between a thread's last look and its answer another one may take the last part."""
    rewrite(descriptor, b"0123456789")
    hasher = OrderedHasher(descriptor, split(10, 5))
    hasher.start(("sha256",))
    looked, go_on, answered = threading.Event(), threading.Event(), threading.Event()
    answers: list[tuple[str, bool]] = []
    take, hash_part = hasher._take, hasher._hash

    def slow_take() -> ByteRange | None:
        part = take()
        if part is None and threading.current_thread().name == "first":
            looked.set()
            assert go_on.wait(30)
        return part

    def slow_hash(part: ByteRange) -> None:
        if part.start == 5 and moment == "while it is hashed":
            go_on.set()
            assert answered.wait(30)
        hash_part(part)

    hasher._take, hasher._hash = slow_take, slow_hash  # type: ignore[method-assign]

    def first() -> None:
        answers.append(("first", hasher.part_done(0)))
        answered.set()

    thread = threading.Thread(target=first, name="first")
    thread.start()
    assert looked.wait(30)
    answers.append(("second", hasher.part_done(1)))
    go_on.set()
    thread.join()
    assert sorted(answers) == [("first", False), ("second", True)]
    assert hasher.digests()["sha256"].hex == hashlib.sha256(b"0123456789").hexdigest()


# -- which digests, and what they decide ---------------------------------------------------


@pytest.mark.parametrize(
    ("digests", "hint", "wanted", "expected"),
    [
        ((), None, (), set()),
        ((), MD5, (), {"md5"}),
        ((SHA,), MD5, (), {"sha256"}),
        ((Digest("blake3", "0" * 64), SHA), None, (), {"blake3"}),
        ((SHA,), None, ("blake3",), {"blake3", "sha256"}),
        ((Digest("blake3", "0" * 64), SHA), None, ("sha256",), {"sha256"}),
        ((), None, ("sha256",), {"sha256"}),
        ((), MD5, ("sha256",), {"sha256", "md5"}),
    ],
)
def test_what_is_hashed_is_what_can_be_checked(
    digests: tuple[Digest, ...], hint: Digest | None, wanted: tuple[str, ...], expected: set[str]
) -> None:
    info = ObjectInfo("k", 4, digests=digests, hint=hint)
    assert algorithms_for(info, wanted) == expected


def test_digests_that_match_pass() -> None:
    info = ObjectInfo("k", 4, digests=(SHA,), hint=MD5)
    assert check_digests("s3://b/k", info, FOUND, SHA) is None


def test_a_digest_that_was_not_computed_decides_nothing() -> None:
    info = ObjectInfo("k", 4, digests=(Digest("blake3", "0" * 64),))
    assert check_digests("s3://b/k", info, FOUND, None) is None


def test_the_callers_digest_is_binding() -> None:
    with pytest.raises(IntegrityError, match="the caller expects") as caught:
        check_digests("s3://b/k", ObjectInfo("k", 4, digests=(SHA,)), FOUND, WRONG)
    assert_clear(caught.value)
    assert all(text in str(caught.value) for text in ("s3://b/k", str(WRONG), str(SHA)))


def test_the_stores_digest_is_binding() -> None:
    with pytest.raises(IntegrityError, match="the store says") as caught:
        check_digests("s3://b/k", ObjectInfo("k", 4, digests=(WRONG,)), FOUND, None)
    assert_clear(caught.value)


def test_a_hint_alone_raises_a_doubt_not_an_error() -> None:
    doubt = Digest("md5", "0" * 32)
    info = ObjectInfo("k", 4, hint=doubt)
    assert check_digests("s3://b/k", info, FOUND, SHA) == doubt
