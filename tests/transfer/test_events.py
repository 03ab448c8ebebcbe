"""What a program can learn of its transfers by ``logging``, and that it hears nothing unasked."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.backends.base import (
    Backend,
    BatchItem,
    Body,
    ByteRange,
    ObjectInfo,
    bytes_payload,
)
from storage.backends.memory import MemoryBackend
from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import (
    IntegrityError,
    ModelMissingError,
    TransferError,
    TransientError,
    UnreachableError,
)
from storage.transfer import events
from storage.transfer.progress import Meter
from storage.transfer.sending import send_item
from tests.transfer.support import FAST, KIB, Wrapped, memory_bucket

ROOT = Path(events.__file__).parents[2]
DATA = os.urandom(300 * KIB)


class Breaking(Wrapped):
    """Breaks its first reads and writes; the body of a read comes in part before."""

    def __init__(self, inner: Backend, *errors: TransientError) -> None:
        super().__init__(inner)
        self.errors = list(errors)
        self._lock = threading.Lock()

    def _next(self) -> TransientError | None:
        with self._lock:
            return self.errors.pop(0) if self.errors else None

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        error = self._next()
        if error is not None:
            raise error
        body: Body = self.inner.read(key, span, pin)
        return body

    def write(self, *args: Any, **options: Any) -> ObjectInfo:
        error = self._next()
        if error is not None:
            raise error
        info: ObjectInfo = self.inner.write(*args, **options)
        return info


class Client(StorageClient):
    """Has the backend that it is given."""

    def __init__(self, found: Any, **limits: Any) -> None:
        limits = {"retry_wait": 0.001, "attempts": 3, "part_size": "64KiB", **limits}
        super().__init__(settings=load_settings(transfer=limits))
        self.found = found

    def backend(self, location: Any, config: Any = None) -> Any:
        return self.found if location.scheme == "memory" else super().backend(location, config)


@pytest.fixture
def bucket() -> Iterator[MemoryBackend]:
    with memory_bucket({"model/a": DATA, "model/b": b"", "one": DATA}) as backend:
        yield backend


class Keeping(logging.Handler):
    """Keeps every record."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    logger = logging.getLogger(events.LOGGER)
    handler = Keeping()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.records
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return our fields of a record, without their prefix."""
    return {
        name.removeprefix(events.PREFIX): value
        for name, value in vars(record).items()
        if name.startswith(events.PREFIX)
    }


def told(records: list[logging.LogRecord], event: str | None = None) -> list[dict[str, Any]]:
    found = [fields(record) for record in records if record.name == events.LOGGER]
    return [one for one in found if event in (None, one["event"])]


def names(records: list[logging.LogRecord]) -> list[str]:
    return [one["event"] for one in told(records)]


# -- transfers -----------------------------------------------------------------------------


def test_a_download_tells_its_beginning_and_its_end(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    Client(bucket).download("memory://b/model/", tmp_path / "m")
    begun, finished = told(records)
    assert begun["event"] == "transfer.begun"
    assert finished.pop("seconds") >= 0
    assert finished == {
        "event": "transfer.finished",
        "transfer": begun["transfer"],
        "operation": "download",
        "uri": "memory://b/model/",
        "objects": 2,
        "bytes": len(DATA),
        "bytes_present": 0,
        "retries": 0,
    }
    assert [record.levelno for record in records] == [logging.DEBUG, logging.INFO]
    assert "download of memory://b/model/ finished: 2 objects" in records[1].getMessage()


def test_what_is_cached_is_present_and_not_moved(
    bucket: MemoryBackend, records: list[logging.LogRecord]
) -> None:
    client = Client(bucket)
    client.download("memory://b/model/")
    client.download("memory://b/model/")
    first, second = told(records, "transfer.finished")
    assert (first["bytes"], first["bytes_present"]) == (len(DATA), 0)
    assert (second["bytes"], second["bytes_present"]) == (0, len(DATA))
    assert first["transfer"] != second["transfer"]


def test_uploads_copies_and_written_files_are_transfers(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    client = Client(bucket)
    client.upload(tmp_path / "x", "memory://b/x")
    client.copy_object("memory://b/x", str(tmp_path / "y"))
    client.copy_object("memory://b/x", "memory://b/z")
    with client.open("memory://b/file", "wb") as file:
        file.write(b"123")
    found = [
        (one["operation"], one["uri"], one["objects"], one["bytes"], one["bytes_present"])
        for one in told(records, "transfer.finished")
    ]
    assert found == [
        ("upload", "memory://b/x", 1, 5, 0),
        ("copy", "memory://b/x", 1, 5, 0),
        # What the store copies by itself does not move.
        ("copy", "memory://b/x", 1, 0, 5),
        ("upload", "memory://b/file", 1, 3, 0),
    ]


def test_a_failure_tells_its_type_and_its_message(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    with pytest.raises(ModelMissingError) as caught:
        Client(bucket).download("memory://b/nothing", tmp_path / "m")
    failed = told(records)[-1]
    assert failed["event"] == "transfer.failed"
    assert (failed["error"], failed["reason"]) == ("ModelMissingError", str(caught.value))
    # The caller gets the error: a warning would tell it twice.
    assert records[-1].levelno == logging.INFO


def test_wrong_bytes_have_an_event_of_their_own(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError):
        Client(bucket).download("memory://b/one", tmp_path / "m", digest="sha256:" + "0" * 64)
    assert names(records) == ["transfer.begun", "verification.failed", "transfer.failed"]
    assert "sha256:" + "0" * 64 in told(records, "verification.failed")[0]["reason"]


# -- tries ---------------------------------------------------------------------------------


def test_a_try_that_failed_is_told_with_the_wait_for_the_next(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    broken = Breaking(
        bucket,
        TransientError("reset by the test"),
        TransientError("slow down", retry_after=0.05),
    )
    Client(broken, connections=1).download("memory://b/one", tmp_path / "m")
    first, second = told(records, "attempt.failed")
    begun = told(records, "transfer.begun")[0]
    assert first["transfer"] == second["transfer"] == begun["transfer"]
    assert (first["operation"], first["uri"]) == ("download", "memory://b/one")
    assert (first["error"], first["reason"]) == ("TransientError", "reset by the test")
    assert first["attempt"] == 1
    assert 0.001 <= first["delay"] <= 0.002
    assert 0.05 <= second["delay"] <= 0.051
    assert 0 <= first["bytes"] <= len(DATA)
    finished = told(records, "transfer.finished")[0]
    assert (finished["retries"], finished["bytes"]) == (2, len(DATA))
    levels = {record.levelno for record in records if fields(record)["event"] == "attempt.failed"}
    assert levels == {logging.INFO}


def test_a_stall_is_told_as_one(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    broken = Breaking(bucket, TransientError("not a byte came for 30 s", stalled=True))
    Client(broken).download("memory://b/one", tmp_path / "m")
    assert [one["attempt"] for one in told(records, "attempt.stalled")] == [1]


@pytest.mark.parametrize("kind", [TransientError, UnreachableError])
def test_giving_up_tells_how_often_it_was_tried(
    bucket: MemoryBackend,
    records: list[logging.LogRecord],
    tmp_path: Path,
    kind: type[TransientError],
) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    broken = Breaking(bucket, *(kind(f"reset {number}") for number in range(9)))
    with pytest.raises(TransferError):
        Client(broken).upload(tmp_path / "x", "memory://b/folder/")
    assert names(records) == [
        "transfer.begun",
        "attempt.failed",
        "attempt.failed",
        "attempt.gave_up",
        "transfer.failed",
    ]
    gave_up = told(records, "attempt.gave_up")[0]
    assert (gave_up["attempt"], gave_up["limit"]) == (3, "attempts")
    assert (gave_up["error"], gave_up["reason"]) == (kind.__name__, "reset 2")
    # The object, not the folder that the call named.
    assert gave_up["uri"] == "memory://b/folder/x"


def test_giving_up_tells_what_forbade_another_try(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    broken = Breaking(bucket, TransientError("later", retry_after=3600.0))
    with pytest.raises(TransferError):
        Client(broken).download("memory://b/one", tmp_path / "m")
    assert "the store asks to wait 3600 s" in told(records, "attempt.gave_up")[0]["limit"]


def test_tries_outside_of_transfers_name_what_was_asked(
    bucket: MemoryBackend, records: list[logging.LogRecord]
) -> None:
    class Unlistable(Wrapped):
        failures = 1

        def list(self, prefix: str = "") -> Any:
            if self.failures:
                self.failures -= 1
                raise TransientError("503")
            return self.inner.list(prefix)

    Client(Unlistable(bucket)).list_objects("memory://b/model/")
    [only] = told(records)
    assert (only["event"], only["uri"]) == ("attempt.failed", "memory://b/model/")
    assert "transfer" not in only


def test_parallel_transfers_are_told_apart(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    uris = ["memory://b/one", "memory://b/model/"]
    broken = Breaking(bucket, *(TransientError("reset") for _ in range(2)))
    Client(broken).download_many(uris, [tmp_path / "1", tmp_path / "2"])
    by_transfer: dict[str, set[str]] = {}
    for one in told(records):
        by_transfer.setdefault(one["transfer"], set()).add(one["uri"])
    # A try is about one object, a transfer of a tree about all of them.
    roots = [min(found, key=len) for found in by_transfer.values()]
    assert sorted(roots) == sorted(uris)
    for root, found in zip(roots, by_transfer.values(), strict=True):
        assert all(uri.startswith(root) for uri in found)


def test_resumption_is_told(records: list[logging.LogRecord]) -> None:
    with events.transfer("download", "s3://b/model/"):
        events.resumed("s3://b/model/x?X-Amz-Signature=secret", 10, 30)
    resumed = told(records, "transfer.resumed")[0]
    assert resumed.pop("transfer")
    assert resumed == {
        "event": "transfer.resumed",
        "operation": "download",
        "uri": "s3://b/model/x?…",
        "bytes_present": 10,
        "bytes_total": 30,
    }


def test_every_field_is_one_that_json_can_hold(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    broken = Breaking(bucket, TransientError("a", stalled=True), TransientError("b"))
    Client(broken).download("memory://b/one", tmp_path / "m")
    with pytest.raises(ModelMissingError):
        Client(broken).download("memory://b/nothing", tmp_path / "n")
    assert json.loads(json.dumps(told(records))) == told(records)


def test_the_page_lists_every_event_and_every_field(
    bucket: MemoryBackend, records: list[logging.LogRecord], tmp_path: Path
) -> None:
    errors = [TransientError("a", stalled=True), TransientError("b")]
    Client(Breaking(bucket, *errors)).download("memory://b/one", tmp_path / "m")
    with pytest.raises(TransferError):
        Client(Breaking(bucket, *[TransientError("b")] * 99)).download(
            "memory://b/model/a", tmp_path / "n"
        )
    with pytest.raises(IntegrityError):
        Client(bucket).download("memory://b/one", tmp_path / "o", digest="0" * 64)
    events.resumed("s3://b/model/x", 10, 30)
    page = (ROOT / "docs" / "events.md").read_text()
    assert len(set(names(records))) == 8
    for one in told(records):
        assert f"`{one['event']}`" in page
        for name in one:
            assert f"`{events.PREFIX}{name}`" in page, name


# -- programs that do not ask --------------------------------------------------------------

RUN = """
import sys
from storage import StorageClient
from storage.backends.memory import MemoryBackend
from storage.backends.base import bytes_payload
from storage.errors import TransferError, TransientError
from storage.config import load_settings
class Broken(MemoryBackend):
    def read(self, *args, **options):
        raise TransientError("reset")
class Client(StorageClient):
    def backend(self, location, config=None):
        return Broken("b")
Broken("b").write("a", bytes_payload(b"12345"))
settings = load_settings(transfer={"retry_wait": 0.001, "attempts": 2})
try:
    Client(settings=settings).download("memory://b/a", sys.argv[1])
except TransferError:
    pass
else:
    raise SystemExit("it should have failed")
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_nothing_is_printed_unasked(tmp_path: Path) -> None:
    done = run(f"import logging\n{RUN}", str(tmp_path / "m"))
    assert (done.stdout, done.stderr) == ("", "")


def test_a_program_that_asks_reads_sentences(tmp_path: Path) -> None:
    asked = "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
    done = run(f"{asked}{RUN}", str(tmp_path / "m"))
    first, second, third = done.stderr.splitlines()
    assert first == "memory://b/a: try 1 failed (TransientError: reset); next in 0.0 s"
    assert second.startswith("memory://b/a: given up after try 2, limit: attempts")
    assert third.startswith("download of memory://b/a failed after ")


def test_telemetry_is_not_imported_for_a_program_that_does_without(tmp_path: Path) -> None:
    done = run(
        f"{RUN}\nprint([name for name in sys.modules if name.startswith('opentelemetry')])",
        str(tmp_path / "m"),
    )
    assert done.stdout == "[]\n"


def test_bytes_of_a_payload_are_counted_once(bucket: MemoryBackend) -> None:
    # Of what is written again only the last try counts.
    class Partial(Wrapped):
        tries = 0

        def write(self, *args: Any, on_bytes: Callable[[int], object], **options: Any) -> Any:
            self.tries += 1
            if self.tries == 1:
                on_bytes(3)
                raise TransientError("reset")
            return self.inner.write(*args, on_bytes=on_bytes, **options)

    with events.transfer("upload", "memory://b/x") as transfer:
        meter = Meter("upload", "memory://b/x", 5, 1, None)
        send_item(Partial(bucket), BatchItem("x", bytes_payload(b"12345")), FAST, meter)
    assert transfer.moved == 5
