"""The command ``storage-initializer``, which KServe runs before a model server.

``storage-initializer SRC DEST [SRC DEST …]``. Exit status: 0 done; 1 a source cannot be had, which
one line on stderr says, or the arguments are no pairs, and stdout says how to use it; 130 and 143
ended by an interrupt or a SIGTERM, which leave nothing half.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from storage.errors import StorageError, one_line, redact

if TYPE_CHECKING:
    from storage.transfer.progress import Progress

__all__ = ["main"]

_NAME = "storage-initializer"
_USAGE = f"Usage: {_NAME} SRC DEST [SRC DEST ...]"
_FAILED = 1
_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# A pod's log gets a line this often, in seconds, while bytes move.
_INTERVAL = 5.0
_MESSAGE_LIMIT = 2000
_MIB = 1024 * 1024


class _TerminatedError(BaseException):
    """SIGTERM: leave by the way of an exception, so that partial files are removed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Bring each SRC to its DEST.

    Args:
        argv: arguments without the program's name; those of the process if ``None``.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or len(arguments) % 2:
        print(_USAGE)
        return _FAILED
    try:
        with _termination_raises(), _warnings_as_lines():
            from storage.integrations.kserve.batch import bring_all

            bring_all(arguments[::2], arguments[1::2], watch=_Watch)
    except KeyboardInterrupt:
        _say("interrupted")
        return _INTERRUPTED
    except _TerminatedError:
        _say("terminated")
        return _TERMINATED
    except StorageError as exc:
        _say(f"error: {exc}")
        return _FAILED
    except Exception as exc:  # noqa: BLE001 -- nobody is left to catch it
        _say(f"error: unexpected {type(exc).__name__}: {exc}")
        return _FAILED
    return 0


class _Watch:
    """Says now and then how far a source is, and at the end what it was."""

    def __init__(self, uri: str, folder: str | None) -> None:
        self._what = f"{redact(uri)} to {folder}"
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Take note of an event."""
        now = time.monotonic()
        if progress.finished:
            _say(
                f"{self._what}: {progress.objects_done} files, {_size(progress.bytes_done)} in "
                f"{progress.seconds:.1f} s"
            )
        elif now - self._said >= _INTERVAL:
            self._said = now
            total = "" if progress.bytes_total is None else f" of {_size(progress.bytes_total)}"
            _say(f"{self._what}: {_size(progress.bytes_done)}{total}")


def _size(count: int) -> str:
    return f"{count} bytes" if count < _MIB else f"{count / _MIB:.1f} MiB"


def _say(text: str) -> None:
    line = "".join(char if char.isprintable() else "?" for char in one_line(text, _MESSAGE_LIMIT))
    data = f"{_NAME}: {line}\n".encode("utf-8", "backslashreplace")
    # Nobody reads it any more, or it was closed: the status tells.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), data)


class _Lines(logging.Handler):
    """Warnings of this library as lines of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one."""
        _say(f"warning: {record.getMessage()}")


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    import warnings

    def show(
        message: Warning | str, category: type[Warning], *where: object, **more: object
    ) -> None:
        _say(f"warning: {message}")

    # Without a handler, Python prints what libraries log, URLs with their queries included.
    silent, lines = logging.NullHandler(), _Lines(logging.WARNING)
    root, ours = logging.getLogger(), logging.getLogger("storage")
    root.addHandler(silent)
    ours.addHandler(lines)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        root.removeHandler(silent)
        ours.removeHandler(lines)


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception meanwhile, where nobody ignores it.

    The command is process 1 of its container, which the kernel does not end by SIGTERM unless
    there is a handler.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TerminatedError

    usable = threading.current_thread() is threading.main_thread()
    if not usable or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
