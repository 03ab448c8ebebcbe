"""Resumable uploads to Google Cloud Storage: bounded, and cancelled when they fail."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from storage.backends.gcs.answers import said
from storage.errors import StorageError, TransientError, one_line

__all__ = ["Answer", "ResumableUpload", "chunk_size"]

_KIB = 1024
# All chunks but the last are a multiple of this; the store insists.
_STEP = 256 * _KIB
_CHUNK = 16 * _KIB * _KIB
# Seconds before each try of a chunk that the store does not take; then the upload has failed.
_PAUSES = (0.1, 0.5, 1.0, 2.0)
# Whoever asks for more than that gets the whole upload again, later.
_LONGEST_PAUSE = 30.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer of the store."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


def chunk_size(memory: int) -> int:
    """Return the size of an upload's chunks, of which two are held in ``memory`` bytes.

    A third of the memory is left for the copies on their way out.
    """
    return max(_STEP, min(_CHUNK, memory // 3) // _STEP * _STEP)


class ResumableUpload:
    """One object on its way up in chunks. Leaving the block by an exception cancels it."""

    def __init__(
        self,
        where: str,
        begin: Callable[[], str],
        put: Callable[[str, bytes, Mapping[str, str]], Answer],
        cancel: Callable[[str], int],
    ) -> None:
        """Describe the upload; entering the block begins it.

        Args:
            where: the object's URI, for messages.
            begin: returns the URL of a new session.
            put: sends bytes to that URL with some headers.
            cancel: ends the session; returns the status of the answer.
        """
        self._where = where
        self._begin = begin
        self._put = put
        self._cancel = cancel
        self._url = ""
        self._begun = 0
        self._sent = 0
        self.answer: dict[str, Any] = {}
        """What the store says of the object, after the last chunk."""

    def __enter__(self) -> Self:
        self._url = self._begin()
        if not self._url:
            raise StorageError(
                f"{self._where}: the store began an upload without saying where it goes on; it "
                "does not speak GCS's resumable uploads"
            )
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if exc is None:
            return
        problem: object
        try:
            problem = self._cancel(self._url)
        except Exception as failure:  # noqa: BLE001 -- the first failure is the one to report
            problem = failure
        # 499 is how the store says that the client cancelled it.
        if problem not in (200, 204, 404, 410, 499):
            _log.warning(
                "%s: a failed upload could not be cancelled and stays for a week: %s",
                self._where,
                one_line(problem),
            )

    def send(self, data: bytes, *, last: bool, checksum: str = "") -> None:
        """Send the next chunk; what the store did not keep of it is sent again.

        After a failure the store is asked how much it has, so that nothing else is paid twice.

        Args:
            data: the chunk.
            last: whether it is the last one.
            checksum: of the object, as ``x-goog-hash`` has it; with the last chunk.
        """
        self._begun = self._sent
        end = self._sent + len(data)
        total = str(end) if last else "*"
        failures, unsure = 0, False
        while True:
            try:
                answer = self._ask(total) if unsure else self._send(data, end, total, checksum)
            except TransientError as exc:
                failures += 1
                self._wait(failures, exc)
                unsure = True
                continue
            if answer.status != 308:
                if not last:
                    break
                self._sent = end
                self.answer = said(self._where, answer.body)
                return
            kept = _kept(answer)
            if kept == end and not last:
                self._sent = end
                return
            if not self._sent <= kept < end:
                break
            if kept > self._sent:
                failures = 0
            elif not unsure:
                failures += 1
                self._wait(failures, None)
            self._sent = kept
            unsure = False
        raise self._lost()

    def _send(self, data: bytes, end: int, total: str, checksum: str) -> Answer:
        skipped = self._sent - self._begun
        rest = bytes(memoryview(data)[skipped:]) if skipped else data
        headers = {"Content-Range": f"bytes {self._sent}-{end - 1}/{total}"}
        if checksum:
            headers["x-goog-hash"] = checksum
        return self._put(self._url, rest, headers)

    def _ask(self, total: str) -> Answer:
        return self._put(self._url, b"", {"Content-Range": f"bytes */{total}"})

    def _wait(self, failures: int, exc: TransientError | None) -> None:
        """Wait before the next try, or raise if there is to be none."""
        if failures > len(_PAUSES):
            raise exc or self._lost()
        pause = _PAUSES[failures - 1]
        if exc is not None:
            asked = exc.retry_after or (_PAUSES[-1] if exc.throttled else 0.0)
            if asked > _LONGEST_PAUSE:
                raise exc
            pause = max(pause, asked)
        time.sleep(pause)

    def _lost(self) -> TransientError:
        return TransientError(
            f"{self._where}: the store lost track of the upload at byte {self._sent}; nothing is "
            "stored"
        )


def _kept(answer: Answer) -> int:
    """Return how many bytes of the object the store has."""
    match = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("range", ""))
    return int(match.group(1)) + 1 if match else 0
