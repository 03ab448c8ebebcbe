from __future__ import annotations

import logging
import os
import re
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from storage.cli.output import Output, human_size, human_time, summary
from storage.transfer.progress import Progress
from tests.cli.conftest import FILES, Command, write_tree

_ESCAPE = "\x1b["


def _event(
    seconds: float,
    done: int,
    *,
    operation: str = "download",
    present: int = 0,
    finished: bool = False,
) -> Progress:
    return Progress(
        operation, "s3://models/iris", done, 90_900_000, 3, 14, present, seconds, finished
    )


def _lines_since(began: float) -> str:
    """Return a pattern of what there may be before a summary: nothing, unless it took long."""
    return r"(?:\w+ing .*\n)*" if time.monotonic() - began > 5 else ""


def _on_terminal(
    command: Command, stream: str, *args: str | Path, term: str = "xterm"
) -> tuple[int, str, bytes]:
    """Run a command with one stream on a terminal; return its status, that, and the other."""
    ours, theirs = os.openpty()
    try:
        environment = {"TERM": term, "COLUMNS": "120"}
        process = command.start(*args, env=environment, **{stream: theirs})
        os.close(theirs)
        seen = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:  # the last process that had it open has ended
                break
            if not block:
                break
            seen += block
    finally:
        os.close(ours)
    out, err = process.communicate(timeout=60)
    return process.returncode, seen.decode(), (out or b"") + (err or b"")


def test_a_terminal_gets_bars_and_then_a_summary(
    command: Command, stored: Path, tmp_path: Path
) -> None:
    status, seen, out = _on_terminal(command, "stderr", "download", stored, tmp_path / "out")
    assert status == 0
    assert _ESCAPE in seen
    assert "downloading" in seen
    assert re.fullmatch(
        r"downloaded 4 objects, .* in .*", seen.splitlines()[-1].split("\x1b[2K")[-1]
    )
    assert out.decode() == f"{tmp_path / 'out'}\n"


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_a_terminal_gets_nothing_if_nothing_is_wanted(
    command: Command, stored: Path, tmp_path: Path, option: str
) -> None:
    status, seen, _ = _on_terminal(command, "stderr", "upload", stored, tmp_path / "out", option)
    assert (status, seen) == (0, "")


def test_a_dumb_terminal_gets_plain_lines(command: Command, stored: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    status, seen, _ = _on_terminal(
        command, "stderr", "upload", stored, tmp_path / "out", term="dumb"
    )
    more = _lines_since(began)
    assert status == 0
    assert _ESCAPE not in seen
    assert re.fullmatch(more + r"uploaded 4 objects, .* in .*", seen.replace("\r", "").strip())


def test_an_error_on_a_terminal_is_one_line(command: Command, tmp_path: Path) -> None:
    status, seen, _ = _on_terminal(command, "stderr", "download", "/nowhere", tmp_path / "out")
    assert status == 1
    assert seen.count("\n") == 1
    assert seen.startswith("storage: error: ")


def test_a_pipe_gets_one_plain_line(command: Command, stored: Path, tmp_path: Path) -> None:
    size = human_size(sum(map(len, FILES.values())))
    for verb, arguments in (
        ("uploaded", ("upload", stored, "memory://models/iris")),
        ("downloaded", ("download", stored, tmp_path / "out")),
        ("copied", ("cp", stored, tmp_path / "copy")),
    ):
        began = time.monotonic()
        result = command(*arguments)
        more = _lines_since(began)
        assert result.status == 0
        line = rf"{verb} 4 objects, {size} (inside the store )?in .*\n"
        assert re.fullmatch(more + line, result.err)
        assert _ESCAPE not in result.err
        assert command(*arguments, "--quiet").err == ""


def test_what_steers_a_terminal_never_reaches_one(command: Command, tmp_path: Path) -> None:
    name = "a\x1b[31mb\nc"
    write_tree(tmp_path / "odd", {name: b"x"})
    _, seen, _ = _on_terminal(command, "stdout", "ls", tmp_path / "odd")
    assert seen == "a?[31mb?c\r\n"
    assert command("ls", tmp_path / "odd").out == f"{name}\n".encode()


def test_json_is_indented_for_a_terminal_only(command: Command, stored: Path) -> None:
    _, seen, _ = _on_terminal(command, "stdout", "spec", "s3://bucket/key", "--json")
    assert len(seen.splitlines()) > 1
    assert len(command("spec", "s3://bucket/key", "--json").lines) == 1


def test_a_closed_stderr_does_not_stop_a_command(
    command: Command, stored: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = command("upload", stored, tmp_path / "out", stderr=writer)
    os.close(writer)
    assert result.status == 0


def test_a_log_gets_a_line_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().reporter() as report:
        for tenth in range(170):
            report(_event(tenth / 10, tenth * 500_000))
        report(_event(17, 90_900_000, finished=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "downloading s3://models/iris: 25.0 MB of 90.9 MB, 3 of 14 objects, 5.0 MB/s",
        "downloading s3://models/iris: 50.0 MB of 90.9 MB, 3 of 14 objects, 5.0 MB/s",
        "downloading s3://models/iris: 75.0 MB of 90.9 MB, 3 of 14 objects, 5.0 MB/s",
    ]


@pytest.mark.parametrize("output", [Output(quiet=True), Output(as_json=True)])
def test_the_last_event_is_kept_where_nothing_is_shown(
    capsys: pytest.CaptureFixture[str], output: Output
) -> None:
    with output.reporter() as report:
        report(_event(60, 1))
        report(_event(70, 2))
    assert report.last == _event(70, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (_event(1.2, 90_900_000), "downloaded 3 objects, 90.9 MB in 1.2 s (75.8 MB/s)"),
        (_event(0.004, 5, present=5), "found 3 objects, 5 B here already, in 4.0 ms"),
        (
            _event(2, 5, present=5, operation="copy"),
            "copied 3 objects, 5 B inside the store in 2.0 s",
        ),
        (_event(2, 0, operation="upload"), "uploaded 3 objects, 0 B in 2.0 s"),
    ],
)
def test_a_summary_says_what_moved(event: Progress, text: str) -> None:
    assert summary(event) == text


def test_sizes_and_times_are_readable() -> None:
    sizes = [0, 999, 1000, 123_456, 999_499, 999_500, 90_900_000, 5 * 10**9, 10**13]
    assert [human_size(size) for size in sizes] == [
        "0 B", "999 B", "1.0 kB", "123 kB", "999 kB", "1.0 MB", "90.9 MB", "5.0 GB", "10.0 TB",
    ]  # fmt: skip
    times = [0.0004, 0.034, 1.25, 59.9, 125]
    assert [human_time(time) for time in times] == [
        "0.4 ms", "34 ms", "1.2 s", "59.9 s", "2 min 5 s",
    ]  # fmt: skip


def _warn(output: Output) -> None:
    with output.one_line_warnings():
        warnings.simplefilter("always")
        warnings.warn("s3://b/k?sig=SECRET cannot\nbe reached", RuntimeWarning, stacklevel=1)
        logging.getLogger("some.sdk").warning("GET /k?sig=SECRET")


def test_a_warning_is_one_line_and_logs_of_libraries_are_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _warn(Output())
    assert capsys.readouterr().err == "storage: warning: s3://b/k?… cannot be reached\n"
    _warn(Output(as_json=True))
    assert '"warning": {"type": "RuntimeWarning"' in capsys.readouterr().err
    _warn(Output(quiet=True))
    assert capsys.readouterr().err == ""


def test_a_stopped_bar_gives_the_cursor_back(command: Command, tmp_path: Path) -> None:
    # The bar is drawn while bytes move; the error comes when the digest is compared.
    (tmp_path / "object").write_bytes(bytes(100_000))
    status, seen, _ = _on_terminal(
        command,
        *("stderr", "download", f"{tmp_path}/object#sha256={'0' * 64}", tmp_path / "out"),
    )
    assert status == 1
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    assert seen.rindex("storage: error: ") > seen.rindex("\x1b[?25h")


def test_stdin_is_left_alone(command: Command, stored: Path, tmp_path: Path) -> None:
    result = command("ls", stored, stdin=subprocess.PIPE)
    assert result.lines == sorted(FILES)
