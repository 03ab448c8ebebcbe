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

from storage.errors import ConfigurationError, StorageError, one_line, redact

if TYPE_CHECKING:
    from storage.transfer.progress import Progress

__all__ = ["main"]

_NAME = "storage-initializer"
_USAGE = f"Usage: {_NAME} SRC DEST [SRC DEST ...]"
_FAILED = 1
# A pod's log gets a line this often, in seconds, while bytes move.
_INTERVAL = 5.0
_MESSAGE_LIMIT = 2000
# Seconds that a signal leaves to transfers to end by themselves; Kubernetes leaves 30.
_PATIENCE = 2.0
_MIB = 1024 * 1024


class _EndedError(BaseException):
    """A signal: leave by the way of an exception, so that partial files are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


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
        with _signals_raise(), _warnings_as_lines(), _room(arguments[1]):
            from storage.integrations.kserve.batch import bring_all

            _refuse_confidential()
            bring_all(arguments[::2], arguments[1::2], watch=_Watch)
    except _EndedError as exc:
        _say("terminated")
        return exc.status
    except StorageError as exc:
        _say(f"error: {exc}")
        return _FAILED
    except Exception as exc:  # noqa: BLE001 -- nobody is left to catch it
        _say(f"error: unexpected {type(exc).__name__}: {exc}")
        return _FAILED
    return 0


def _refuse_confidential() -> None:
    """Refuse to hand over files as they are that somebody expects to be decrypted."""
    if os.environ.get("CONFIDENTIAL_ENABLED", "").strip().lower() == "true":
        raise ConfigurationError(
            "CONFIDENTIAL_ENABLED asks for a model to be decrypted with an enclave's key, which "
            "this initializer cannot do; use KServe's image for it, or unset the variable"
        )


@contextlib.contextmanager
def _room(folder: str) -> Iterator[None]:
    """Let temporary files be in ``folder``, hidden, if there is no other place for them.

    Layers of images and packs of git need some; where the root file system is read-only there is
    the volume alone.
    """
    import tempfile

    with contextlib.ExitStack() as held:
        try:
            tempfile.gettempdir()
        except FileNotFoundError:
            from storage.integrations.kserve.placing import Place

            # What cannot be written is said by whoever needs it.
            with contextlib.suppress(StorageError):
                place = held.enter_context(Place(folder, f"temporary files {os.urandom(8).hex()}"))
                tempfile.tempdir = place.path("")
                held.callback(setattr, tempfile, "tempdir", None)
        yield


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
    # Nobody reads it any more, or it was closed: the status tells.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{_NAME}: {line}\n")
        sys.stderr.flush()


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


def _leave(status: int, ending: threading.Lock) -> None:
    """End now. What is in a staging folder goes; what is being published, the next run ends."""
    from storage.integrations.kserve.placing import abandon

    if not ending.acquire(blocking=False):
        return  # it ends by itself at this moment
    try:
        abandon()
        _say("terminated")
        os._exit(status)
    finally:
        ending.release()


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into an exception meanwhile, where nobody ignores them.

    The command is process 1 of its container, which the kernel does not end by SIGTERM unless
    there is a handler.
    """
    timers: list[threading.Timer] = []
    # Whoever takes it first ends the process, and says so.
    ending = threading.Lock()

    def stop(signum: int, frame: FrameType | None) -> None:
        error = _EndedError(signum)
        if not timers:
            # Threads end between two buffers, which takes long where nothing comes any more.
            timers.append(threading.Timer(_PATIENCE, _leave, (error.status, ending)))
            timers[0].daemon = True
            timers[0].start()
        raise error

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
            ending.acquire()
