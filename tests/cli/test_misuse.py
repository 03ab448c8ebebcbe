from __future__ import annotations

import contextlib
import io
import json
from argparse import Namespace
from pathlib import Path

import pytest

from storage import __version__
from storage.cli import commands, main
from storage.cli.output import Output
from tests.cli.conftest import Command

_URI = "file:///models/iris"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fetch", _URI],
        ["download"],
        ["download", _URI, "a", "b"],
        ["download", _URI, ""],
        ["download", _URI, "s3://bucket/key"],
        ["download", _URI, "--offline", "--dry-run"],
        ["download", _URI, "--digest", "sha256:12"],
        ["download", _URI, "--digest"],
        ["download", _URI, "--allow", ""],
        ["download", "s3:///no-bucket"],
        ["download", ""],
        ["upload", "s3://bucket/key", _URI],
        ["upload", "model"],
        ["cp", _URI],
        ["cp", _URI, "hf://"],
        ["ls", _URI, "--unpack"],
        ["ls", _URI, "--digest", "0" * 64],
        ["ls", "--jso", _URI],
        ["stat", _URI, "--allow", "*"],
        ["rm", _URI, "--offline"],
        ["spec", _URI, "--config", "name"],
        ["spec", "https://"],
        ["quickstart", "a", "b"],
        ["cache"],
        ["cache", "fetch"],
        ["cache", "--quiet", "ls"],
        ["cache", "ls", "a", "b"],
        ["cache", "du", "a"],
        ["cache", "path"],
        ["cache", "pin"],
        ["cache", "verify", "--ful"],
        ["cache", "gc", "--size", "much"],
        ["cache", "gc", "--grace", "-1"],
        ["cache", "gc", "--grace", "nan"],
        ["cache", "export"],
        ["cache", "import"],
        ["cache", "import", "s3://bucket/key"],
        ["cache", "rm", "s3:///x"],
        ["lock"],
        ["prefetch"],
        ["prefetch", "a", "b"],
        ["download", "--locked"],
        ["download", "--locked", "models.lock", _URI, "--digest", "0" * 64],
        ["download", "--locked", "models.lock", "--unpack"],
        ["download", "--locked", "models.lock", "--dry-run"],
        ["download", _URI, "--mirror", "s3:///x"],
        ["download", _URI, "--mirror", _URI, "--dry-run"],
        ["download", _URI, "--freshness", "sometimes"],
        ["download", _URI, "--link", "reflink"],
    ],
)
def test_misuse_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("storage: error: ")
    assert err.endswith("--help\n")
    assert err.count("\n") == 1


def test_misuse_of_the_real_command(command: Command) -> None:
    result = command("download", "s3:///no-bucket", "out")
    assert (result.status, result.out) == (2, b"")
    assert "there is no name of a bucket" in result.error


def test_misuse_with_json_is_json(command: Command) -> None:
    result = command("ls", "--json", "--unpack", _URI)
    assert (result.status, result.out) == (2, b"")
    assert result.json_error["type"] == "InvalidInput"
    assert "--unpack" in result.json_error["message"]


def test_no_secret_of_an_argument_is_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://user:PASSWORD@host.example/x?sig=SECRET"
    for arguments in (["ls", "a", url], ["upload", url, "b"], [url], ["ls", "a", "--digest", url]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "PASSWORD" not in err
        assert "SECRET" not in err


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["ls", "memory://nowhere/iris"], "BucketMissingError"),
        (["ls", "/nowhere/iris"], "ModelMissingError"),
        (["ls", "nosuchscheme://bucket/iris"], "UnsupportedScheme"),
        (["upload", "/nowhere/iris", "memory://models/iris"], "InvalidInput"),
    ],
)
def test_a_failure_is_one_line_and_status_1(
    command: Command, arguments: list[str], kind: str
) -> None:
    plain, document = command(*arguments), command(*arguments, "--json")
    assert (plain.status, plain.out) == (1, b"")
    assert (document.status, document.out) == (1, b"")
    assert document.json_error == {"type": kind, "message": plain.error}


def test_debug_shows_where_an_error_came_from(command: Command) -> None:
    result = command("ls", "/nowhere/iris", "--debug")
    assert result.status == 1
    first, *_, last = result.err.splitlines()
    assert first.startswith("Traceback")
    assert last.startswith("storage: error: no model at")


def _fail(args: Namespace, output: Output) -> None:
    raise KeyError("https://host.example/x?sig=SECRET")


def test_the_unexpected_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(commands._COMMANDS, "spec", _fail)
    assert main(["spec", _URI]) == 1
    err = capsys.readouterr().err
    assert err.startswith("storage: error: unexpected KeyError: ")
    assert "--debug" in err
    assert err.count("\n") == 1
    assert main(["spec", _URI, "--json"]) == 1
    assert json.loads(capsys.readouterr().err)["error"]["type"] == "KeyError"
    assert main(["spec", _URI, "--debug"]) == 1
    err += capsys.readouterr().err
    assert "Traceback" in err
    assert "SECRET" not in err


def test_a_caller_may_collect_the_text() -> None:
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        assert main(["spec", "s3://bucket/größe"]) == 0
        assert main(["ls", "/nowhere/iris"]) == 1
    assert "größe" in printed.getvalue()
    assert complained.getvalue().startswith("storage: error: no model at")


def test_version_and_help_are_no_errors(command: Command) -> None:
    version = command("--version")
    assert (version.status, version.lines) == (0, [f"storage {__version__}"])
    assert "quickstart" in command("--help").out.decode()
    assert "--dry-run" in command("download", "--help").out.decode()


def test_what_needs_no_store_loads_nothing_heavy(command: Command, tmp_path: Path) -> None:
    code = (
        "import sys, storage.cli as cli\n"
        "assert cli.main(['spec', 's3://bucket/key', '--json']) == 0\n"
        "heavy = {'boto3', 'fsspec', 'obstore', 'pydantic', 'requests', 'rich'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    assert command.python(script) == 0
