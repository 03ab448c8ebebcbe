"""The command ``storage``: the facade, for shells and pods.

Exit status: 0 done, 1 failed, 2 misused, 130 and 143 ended by an interrupt or a SIGTERM, 141
when the reader of standard output went away. Whatever fails says so in one line on stderr.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from storage.cli.arguments import MisuseError
from storage.cli.output import Output, ReaderGoneError
from storage.cli.parser import build_parser
from storage.errors import DestinationError, StorageError

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["main"]

_FAILED = 1
_MISUSED = 2
_INTERRUPTED = 128 + signal.SIGINT
_READER_GONE = 128 + signal.SIGPIPE
_TERMINATED = 128 + signal.SIGTERM


class _TerminatedError(BaseException):
    """SIGTERM: leave by the way of an exception, so that partial files are removed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; those of the process if ``None``.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    output = Output(as_json="--json" in arguments)
    try:
        args = build_parser().parse_args(arguments)
    except MisuseError as exc:
        output.error("InvalidInput", str(exc))
        return _MISUSED
    except SystemExit as exc:  # --help and --version
        return exc.code if isinstance(exc.code, int) else 0
    except ReaderGoneError:
        return _READER_GONE
    except DestinationError as exc:
        output.error(type(exc).__name__, str(exc))
        return _FAILED
    except KeyboardInterrupt:
        output.error("Interrupted", "interrupted")
        return _INTERRUPTED
    return _run(args, Output(as_json=args.json, quiet=args.quiet))


def _run(args: Namespace, output: Output) -> int:
    try:
        with _termination_raises(), output.one_line_warnings():
            from storage.cli.commands import run

            run(args, output)
    except ReaderGoneError:
        return _READER_GONE
    except KeyboardInterrupt:
        output.error("Interrupted", "interrupted")
        return _INTERRUPTED
    except _TerminatedError:
        output.error("Terminated", "terminated")
        return _TERMINATED
    except StorageError as exc:
        _show_traceback(args, output)
        output.error(type(exc).__name__, str(exc))
        return _FAILED
    except Exception as exc:  # noqa: BLE001 -- nobody is left to catch it
        _show_traceback(args, output)
        hint = "" if args.debug else " (--debug shows where)"
        output.error(type(exc).__name__, f"unexpected {type(exc).__name__}: {exc}{hint}")
        return _FAILED
    return 0


def _show_traceback(args: Namespace, output: Output) -> None:
    if args.debug:
        import traceback

        output.trace(traceback.format_exc())


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception meanwhile, where this thread may and nobody ignores it.

    In a container the command is often process 1, which the kernel does not end by SIGTERM
    unless there is a handler.
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
