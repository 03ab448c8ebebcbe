"""The conformance suite itself: it notices what it is there to notice."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from storage.backends.base import (
    Backend,
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    Payload,
    bytes_payload,
)
from storage.backends.memory import MemoryBackend
from storage.digest import Digest
from storage.errors import ModelMissingError, StorageError, TransientError
from storage.testing.conformance import BackendConformance
from tests.backends.test_memory import MemoryRaw


class SiblingsToo(MemoryBackend):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        wanted = prefix.rstrip("/")
        return (info for info in super().list() if info.key.startswith(wanted))


class NoEmptyFiles(MemoryBackend):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix) if info.size)


class MarkersToo(MemoryBackend):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        objects = self._existing().objects
        return (entry.info for key, entry in objects.items() if key.startswith(prefix))


class OnePage(MemoryBackend):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(list(super().list(prefix))[:1000])


class EmptyIfMissing(MemoryBackend):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        try:
            yield from super().list(prefix)
        except ModelMissingError:
            return


class PrefixIsObject(MemoryBackend):
    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        if any(True for _ in super().list(key.rstrip("/") + "/")):
            return ObjectInfo(key, 0)
        return super().stat(key, version)


class ForeignError(MemoryBackend):
    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return self._existing().objects[key].info


class LongError(MemoryBackend):
    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        try:
            return super().stat(key, version)
        except ModelMissingError as exc:
            raise ModelMissingError(key, "not\nthere") from exc


class WrongDigest(MemoryBackend):
    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        return replace(super().stat(key, version), digests=(Digest("sha256", "0" * 64),))


class Unpinned(MemoryBackend):
    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        return super().read(key, span)


class LosesTheLast(MemoryBackend):
    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = super().read(key, span, pin)
        data = b"".join([bytes(piece) for piece in body])
        return Body(body.info, iter([data[:-1]]))


class OffByOne(MemoryBackend):
    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        size = self.stat(key).size or 0
        if span is not None and span.end < size:
            span = ByteRange(span.start, span.end + 1)
        return super().read(key, span, pin)


class EndsEarly(MemoryBackend):
    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = super().read(key, None, pin)
        data = b"".join([bytes(piece) for piece in body])
        return Body(body.info, iter([data[span.start : span.end] if span else data]))


class Writes(MemoryBackend):
    """Base of those that write wrongly; ``change`` is applied to the arguments."""

    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        return key, payload

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> ObjectInfo:
        options: dict[str, Any] = {
            "metadata": metadata,
            "content_type": content_type,
            "if_absent": if_absent,
            "if_match": if_match,
            "on_bytes": on_bytes,
        }
        key, payload = self.change(key, payload, options)
        return super().write(key, payload, **options)


class Partial(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        self._put(key, b"half", ObjectInfo(key, 4))
        return key, payload


class PartialUntilRead(Partial):
    """The half stays until a reader has met it; or all may be written before one looks."""

    def __init__(self, bucket: str) -> None:
        super().__init__(bucket)
        self.met = threading.Event()

    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        changed = super().change(key, payload, options)
        if threading.current_thread() is not threading.main_thread():
            self.met.wait(60)
        return changed

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        body = super().read(key, span, pin)
        if body.info.size == 4:
            self.met.set()
        return body


class Unconditional(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        options |= {"if_absent": False, "if_match": None}
        return key, payload


class Racing(Writes):
    """Asks first and writes then, and four do so at once."""

    together = threading.Barrier(4, timeout=60)

    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        with self._lock:
            self._check(key, options["if_absent"], options["if_match"])
        self.together.wait()
        options |= {"if_absent": False, "if_match": None}
        return key, payload


class Silent(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        options["on_bytes"] = None
        return key, payload


class AnySize(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        return key, Payload(payload.open, None)


class LeavesOpen(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        return key, bytes_payload(payload.open().read())


class NoMetadata(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        options["metadata"] = None
        return key, payload


class Decoding(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        return unquote(key), payload


class Normalising(Writes):
    def change(self, key: str, payload: Payload, options: dict[str, Any]) -> tuple[str, Payload]:
        return posixpath.normpath(key), payload


class CopiesNothing(MemoryBackend):
    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        if source in self._existing().objects:
            super().copy(source, key, version=version, bucket=bucket)


class DeletesTrees(MemoryBackend):
    def delete(self, keys: Sequence[str]) -> None:
        objects = self._existing().objects
        super().delete([found for found in objects if found.startswith(tuple(keys))])


class StrictDelete(MemoryBackend):
    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.stat(key)
        super().delete(keys)


class Modest(MemoryBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, copy=False)


DEFECTS: list[tuple[type[MemoryBackend], str, dict[str, Any]]] = [
    (SiblingsToo, "test_sibling_prefix_is_not_listed", {}),
    (SiblingsToo, "test_prefix_that_holds_nothing_lists_nothing", {"prefix": "models/iris/m/"}),
    (NoEmptyFiles, "test_zero_byte_objects_are_listed", {}),
    (MarkersToo, "test_directory_markers_are_not_listed", {}),
    (OnePage, "test_many_keys_under_one_prefix", {}),
    (PrefixIsObject, "test_stat_of_a_prefix_is_missing", {"key": "models/iris"}),
    (PrefixIsObject, "test_stat_of_a_prefix_is_missing", {"key": "models/iris/"}),
    (ForeignError, "test_stat_of_a_missing_key", {"key": "none"}),
    (LongError, "test_stat_of_a_missing_key", {"key": "none"}),
    (WrongDigest, "test_digests_are_those_of_the_content", {}),
    (Unpinned, "test_pinned_read_gives_no_other_version", {"span": None, "new": b"67890"}),
    (LosesTheLast, "test_read_yields_every_byte_in_order", {"size": 1000}),
    (OffByOne, "test_span_yields_exactly_its_bytes", {"span": (0, 1)}),
    (EndsEarly, "test_span_past_the_end_raises", {"span": (3, 6)}),
    (EndsEarly, "test_span_past_the_end_raises", {"span": (5, 6)}),
    (
        Partial,
        "test_source_that_breaks_midway_changes_nothing",
        {"large": False, "old": b"old", "known": True},
    ),
    (
        Partial,
        "test_source_that_breaks_midway_changes_nothing",
        {"large": False, "old": None, "known": True},
    ),
    (PartialUntilRead, "test_reader_sees_old_or_new_while_a_writer_overwrites", {}),
    (Unconditional, "test_if_absent_leaves_what_is_there", {"size": 5, "old": b"old"}),
    (Racing, "test_of_many_creators_one_wins", {}),
    (Unconditional, "test_if_match_leaves_another_version", {"size": 5}),
    (Unconditional, "test_if_match_does_not_bring_back_what_was_deleted", {}),
    (Silent, "test_write_stores_every_byte", {"size": 1, "known": True}),
    (AnySize, "test_payload_of_another_size_than_announced_changes_nothing", {"off": 1}),
    (LeavesOpen, "test_write_stores_every_byte", {"size": 1, "known": True}),
    (NoMetadata, "test_metadata_and_content_type_are_kept", {}),
    (NoMetadata, "test_digest_in_the_metadata_is_told", {"algorithm": "sha256"}),
    (Decoding, "test_odd_key_is_written", {"key": "a%41"}),
    (Normalising, "test_key_of_odd_segments_is_literal_or_refused", {"key": "a//b"}),
    (Normalising, "test_key_of_odd_segments_is_literal_or_refused", {"key": "a/../b"}),
    (CopiesNothing, "test_copy_of_a_missing_object", {"source": "none"}),
    (DeletesTrees, "test_delete_of_a_prefix_removes_nothing", {}),
    (DeletesTrees, "test_delete_removes_the_object_and_no_neighbour", {}),
    (StrictDelete, "test_delete_of_missing_keys_is_silent", {}),
    (Modest, "test_what_the_capabilities_deny_is_refused", {}),
]


def run(backend: Backend, test: str, arguments: Mapping[str, Any]) -> None:
    method = getattr(BackendConformance(), test)
    names = method.__code__.co_varnames[: method.__code__.co_argcount]
    given = {"backend": backend, "raw": MemoryRaw("bucket"), **arguments}
    method(**{name: given[name] for name in names if name != "self"})


@pytest.fixture
def bucket() -> Iterator[str]:
    backend = MemoryBackend("bucket")
    backend.write("first", bytes_payload(b""))
    backend.delete(["first"])
    yield "bucket"
    MemoryBackend.clear()


@pytest.mark.parametrize(
    ("broken", "test", "arguments"),
    DEFECTS,
    ids=[f"{broken.__name__}-{test}-{number}" for number, (broken, test, _) in enumerate(DEFECTS)],
)
def test_defect_is_found(
    bucket: str, broken: type[MemoryBackend], test: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises((AssertionError, KeyError, StorageError, pytest.fail.Exception)):
        run(broken(bucket), test, arguments)


@pytest.mark.parametrize(
    ("test", "arguments"),
    [(test, arguments) for broken, test, arguments in DEFECTS],
    ids=[f"{test}-{number}" for number, (_, test, _) in enumerate(DEFECTS)],
)
def test_what_is_right_passes(bucket: str, test: str, arguments: dict[str, Any]) -> None:
    run(MemoryBackend(bucket), test, arguments)


def test_failure_that_passes_is_no_lost_update(bucket: str) -> None:
    class Unsteady(MemoryBackend):
        asked = 0

        def stat(self, key: str, version: str | None = None) -> ObjectInfo:
            Unsteady.asked += 1
            if Unsteady.asked % 2:
                raise TransientError("busy")
            return super().stat(key, version)

    run(Unsteady(bucket), "test_no_update_is_lost_among_many_writers", {})


def test_empty_answer_for_a_missing_bucket_is_found() -> None:
    with pytest.raises(pytest.fail.Exception):
        BackendConformance().test_missing_bucket_is_no_empty_bucket(EmptyIfMissing("nowhere"))


MODULE = """
from dataclasses import replace

import pytest
from storage.backends.memory import MemoryBackend
from storage.errors import UnsupportedOperation
from storage.testing.conformance import BackendConformance, Sometimes
from tests.backends.test_memory import MemoryRaw, bucket


class Conformance(BackendConformance):
    made = MemoryBackend

    @pytest.fixture
    def backend(self, bucket):
        return self.made(bucket)

    @pytest.fixture
    def raw(self, bucket):
        return MemoryRaw(bucket)


class Refusing(MemoryBackend):
    def stat(self, key, version=None):
        raise UnsupportedOperation("no")


class Crashing(MemoryBackend):
    def stat(self, key, version=None):
        raise TypeError("no")


class Modest(MemoryBackend):
    @property
    def capabilities(self):
        return replace(super().capabilities, copy=False)

    def copy(self, source, key, *, version=None, bucket=None):
        raise UnsupportedOperation("no copy here")


class TestRefusing(Conformance):
    made = Refusing
    exceptions = {"test_stat_tells_key_and_size": "it cannot"}


class TestCrashing(Conformance):
    made = Crashing
    exceptions = {"test_stat_tells_key_and_size": "it cannot"}


class TestPassing(Conformance):
    exceptions = {
        "test_stat_tells_key_and_size": "it can, after all",
        "test_stat_of_a_missing_key[none]": "it can, after all",
    }


class TestUnlucky(Conformance):
    made = Refusing
    exceptions = {"test_stat_tells_key_and_size": Sometimes("today")}


class TestLucky(Conformance):
    exceptions = {"test_stat_tells_key_and_size": Sometimes("not today")}


class TestSometimesCrashing(Conformance):
    made = Crashing
    exceptions = {"test_stat_tells_key_and_size": Sometimes("now and then")}


class TestModest(Conformance):
    made = Modest


class TestUnknownName(Conformance):
    exceptions = {"test_of_nothing": "there is no such test"}


class TestUnknownCase(Conformance):
    exceptions = {"test_stat_of_a_missing_key[nothing]": "there is no such case"}


class TestNoTest(Conformance):
    exceptions = {"backend": "that is a fixture"}
"""

SELECTED = (
    "stat_tells_key or stat_of_a_missing_key or declared_exceptions or copy_of_an_empty "
    "or capabilities_deny"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run of the module above says, by ``Class::test``."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-c", os.devnull, "-k", SELECTED, folder],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    found = re.findall(r"test_suite\.py::(\S+) ([A-Z]+)", done.stdout)
    assert found, done.stdout + done.stderr
    return dict(found)


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        ("TestRefusing::test_stat_tells_key_and_size", "XFAIL"),
        ("TestRefusing::test_declared_exceptions_name_tests", "PASSED"),
        # Only a failure that the suite looks for is excused.
        ("TestCrashing::test_stat_tells_key_and_size", "FAILED"),
        # What is declared and works is a failure, for one case as for all of them.
        ("TestPassing::test_stat_tells_key_and_size", "FAILED"),
        ("TestPassing::test_stat_of_a_missing_key[none]", "FAILED"),
        ("TestPassing::test_stat_of_a_missing_key[models/none]", "PASSED"),
        ("TestPassing::test_declared_exceptions_name_tests", "PASSED"),
        # What comes and goes may do either.
        ("TestUnlucky::test_stat_tells_key_and_size", "XFAIL"),
        ("TestLucky::test_stat_tells_key_and_size", "XPASS"),
        ("TestSometimesCrashing::test_stat_tells_key_and_size", "FAILED"),
        ("TestModest::test_copy_of_an_empty_object", "SKIPPED"),
        ("TestModest::test_what_the_capabilities_deny_is_refused", "PASSED"),
        ("TestUnknownName::test_declared_exceptions_name_tests", "FAILED"),
        ("TestUnknownCase::test_declared_exceptions_name_tests", "FAILED"),
        ("TestNoTest::test_declared_exceptions_name_tests", "FAILED"),
    ],
)
def test_outcome_of_a_declaration(outcomes: dict[str, str], test: str, outcome: str) -> None:
    assert outcomes[test] == outcome
