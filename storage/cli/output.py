"""What the command writes: results on stdout, everything else on stderr.

Results are lines or, with ``--json``, one document. On stderr there is one line for an error;
while bytes move, bars on a terminal, and elsewhere one line now and then and one at the end.
Nothing of it holds a credential.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TextIO

from storage.errors import DestinationError, one_line, redact
from storage.files import translate_os_errors

if TYPE_CHECKING:
    import rich.progress

    from storage.transfer.progress import Progress

__all__ = [
    "Output",
    "ReaderGoneError",
    "Reporter",
    "amounts",
    "count",
    "human_size",
    "human_time",
    "iso_time",
    "new_file",
    "printable",
    "summary",
]

# A pod's log gets a line this often, in seconds, while bytes move.
_LINE_INTERVAL = 5.0
# Longer than the library's own limit, so that no advice at the end of a message is cut off.
_MESSAGE_LIMIT = 2000
_DOING = {
    "download": "downloading",
    "upload": "uploading",
    "copy": "copying",
    "mirror": "mirroring",
}
_DONE = {
    "download": "downloaded",
    "upload": "uploaded",
    "copy": "copied",
    "mirror": "mirrored",
}


class ReaderGoneError(Exception):
    """Whoever read standard output has enough."""


class Output:
    """How one run of the command speaks."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        """Choose the form.

        Args:
            as_json: results and errors are JSON, and nothing else is written.
            quiet: no progress, no summary, no warnings.
        """
        self.as_json = as_json
        self.quiet = quiet

    # -- stdout ------------------------------------------------------------------------------

    def result(self, document: object, lines: Iterable[str] = ()) -> None:
        """Write a result: ``document`` as JSON, or else ``lines``.

        Raises:
            ReaderGoneError: nobody reads.
            DestinationError: standard output cannot be written.
        """
        terminal = _is_terminal(sys.stdout)
        if self.as_json:
            indent = 2 if terminal else None
            text = json.dumps(document, indent=indent, default=_jsonable) + "\n"
        else:
            text = "".join(f"{printable(line) if terminal else line}\n" for line in lines)
        self.write(_encode(text))

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes to standard output; raises as :meth:`result` does."""
        if not data:
            return
        if sys.stdout is None:
            raise DestinationError("standard output is closed; redirect it to somewhere")
        try:
            _write_through(sys.stdout, data)
        except BrokenPipeError as exc:
            raise ReaderGoneError from exc
        except OSError as exc:
            raise DestinationError(
                f"standard output cannot be written: {exc.strerror}; what was written so far is "
                "incomplete"
            ) from exc

    # -- stderr ------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Write a line for a human, unless nobody wants one."""
        if not (self.quiet or self.as_json):
            _write_stderr(_safe_line(text))

    def note_summary(self, reporter: Reporter) -> None:
        """Write what a transfer that has ended did."""
        if reporter.last is not None and reporter.last.finished:
            self.note(summary(reporter.last))

    def error(self, kind: str, message: str) -> None:
        """Write the one line of an error; ``kind`` is its type."""
        self._complain("error", kind, message)

    def trace(self, text: str) -> None:
        """Write a traceback, without credentials."""
        _write_stderr(redact(text.rstrip("\n")))

    def _complain(self, level: str, kind: str, message: str) -> None:
        line = one_line(message, _MESSAGE_LIMIT) or kind
        if self.as_json:
            _write_stderr(json.dumps({level: {"type": kind, "message": line}}))
        else:
            _write_stderr(_safe_line(f"storage: {level}: {line}"))

    @contextlib.contextmanager
    def one_line_warnings(self) -> Iterator[None]:
        """Make each warning one line, and silence the logs of libraries."""
        import logging

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not self.quiet:
                self._complain("warning", category.__name__, str(message))

        # Without a handler, Python prints what libraries log, URLs with their queries included.
        handler = logging.NullHandler()
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show
                yield
        finally:
            root.removeHandler(handler)

    # -- progress ----------------------------------------------------------------------------

    def reporter(self) -> Reporter:
        """Return what shows the progress of one transfer."""
        if self.quiet or self.as_json:
            return Reporter()
        if _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
            return _Bars()
        return _Lines()


class Reporter:
    """Called with the progress of a transfer; a context manager around it. Shows nothing."""

    def __init__(self) -> None:
        """Begin before the first event."""
        self.last: Progress | None = None
        """The latest event; the final one once the transfer is done."""

    def __call__(self, progress: Progress) -> None:
        """Take note of an event."""
        self.last = progress
        self.show(progress)

    def show(self, progress: Progress) -> None:
        """Show an event."""

    def close(self) -> None:
        """Leave the screen as it is to stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Lines(Reporter):
    """A line now and then, for logs."""

    def __init__(self) -> None:
        super().__init__()
        self._shown_at = 0.0

    def show(self, progress: Progress) -> None:
        if progress.finished or progress.seconds - self._shown_at < _LINE_INTERVAL:
            return
        self._shown_at = progress.seconds
        total = "" if progress.bytes_total is None else f" of {human_size(progress.bytes_total)}"
        _write_stderr(
            _safe_line(
                f"{_DOING[progress.operation]} {progress.uri}: "
                f"{human_size(progress.bytes_done)}{total}, "
                f"{progress.objects_done} of {count(progress.objects_total, 'object')}, "
                f"{human_size(progress.rate)}/s"
            )
        )


class _Bars(Reporter):
    """A bar that follows the transfer and vanishes with it."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def show(self, progress: Progress) -> None:
        if progress.finished:
            return
        if self._bars is None:
            # What is here already is told faster than a bar is drawn.
            if progress.bytes_done == progress.bytes_present and progress.operation != "copy":
                return
            self._start(progress)
        assert self._bars is not None
        assert self._task is not None
        self._bars.update(
            self._task,
            completed=progress.bytes_done,
            objects=f"{progress.objects_done}/{progress.objects_total}",
        )

    def _start(self, progress: Progress) -> None:
        # Here, because most runs of the command draw nothing.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        name = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False, table_column=name),
            BarColumn(20),
            TextColumn("{task.fields[objects]}", markup=False),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._task = self._bars.add_task(
            printable(f"{_DOING[progress.operation]} {progress.uri}"),
            total=progress.bytes_total,
            objects="",
        )
        self._bars.start()

    def close(self) -> None:
        if self._bars is not None:
            with contextlib.suppress(OSError):
                self._bars.stop()
            self._bars = None


def amounts(reporter: Reporter, began: float) -> dict[str, Any]:
    """Return what moved; ``None`` where nothing had to, because it lies on this machine.

    Args:
        reporter: was told of the transfer.
        began: when it began, by ``time.perf_counter``.
    """
    last = reporter.last
    return {
        "size": None if last is None else last.bytes_done,
        "objects": None if last is None else last.objects_done,
        "moved": 0 if last is None else last.bytes_done - last.bytes_present,
        "seconds": round(time.perf_counter() - began, 3),
    }


def summary(progress: Progress) -> str:
    """Return in one line what a finished transfer did."""
    amount = f"{count(progress.objects_done, 'object')}, {human_size(progress.bytes_done)}"
    seconds = human_time(progress.seconds)
    moved = progress.bytes_done - progress.bytes_present
    verb = _DONE[progress.operation]
    if progress.bytes_present and not moved:
        if progress.operation == "copy":
            return f"{verb} {amount} inside the store in {seconds}"
        return f"found {amount} here already, in {seconds}"
    rate = f" ({human_size(progress.rate)}/s)" if moved else ""
    return f"{verb} {amount} in {seconds}{rate}"


def count(number: int, noun: str) -> str:
    """Return ``1 object``, ``2 objects``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def human_size(size: float) -> str:
    """Return bytes in decimal units, as networks and disks are sold: ``90.9 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_time(seconds: float) -> str:
    """Return a duration: ``34 ms``, ``1.2 s``, ``2 min 5 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.0095 else f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def iso_time(time: datetime | None) -> str | None:
    """Return a time in ISO 8601."""
    return None if time is None else time.isoformat()


def printable(text: str) -> str:
    """Return ``text`` without characters that steer a terminal; names may hold any."""
    return "".join(char if char.isprintable() else "?" for char in text)


@contextlib.contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """Open a file that gets its name when all of it is on the disk.

    Raises:
        DestinationError: it cannot be written; nothing is left.
    """
    with translate_os_errors(path):
        if os.path.exists(path) and not os.path.isfile(path):
            # A pipe or a device is written to, and stays what it is.
            with open(path, "wb") as file:
                yield file
            return
        folder, name = os.path.split(os.path.realpath(path))
        temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(4)}.part")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, os.path.join(folder, name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _jsonable(value: Any) -> Any:
    if isinstance(value, datetime):
        return iso_time(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _safe_line(text: str) -> str:
    line = " ".join(text.split("\n"))
    return printable(line) if _is_terminal(sys.stderr) else line


def _encode(text: str) -> bytes:
    try:
        # The bytes of a file's name are the ones that the file system knows.
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def _write_stderr(line: str) -> None:
    # Nobody can be told that telling failed.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = sys.stderr.encoding or "utf-8"
        _write_through(sys.stderr, f"{line}\n".encode(encoding, "backslashreplace"))


def _write_through(stream: TextIO, data: bytes | memoryview) -> None:
    """Write bytes past the buffers of a stream.

    What is left in them after a failure Python would write once more when it ends, and fail
    again, with an exit status of its own.
    """
    stream.flush()
    if not hasattr(stream, "buffer"):  # text alone, as in io.StringIO
        stream.write(os.fsdecode(bytes(data)))
        return
    raw = getattr(stream.buffer, "raw", stream.buffer)
    rest = memoryview(data)
    while rest:
        count = raw.write(rest)
        if count is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[count:]
