"""What the command accepts. What is wrong with an argument by itself is found here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from storage import __version__
from storage.errors import InvalidInput
from storage.uri import parse_uri

__all__ = ["MisuseError", "build_parser"]

_EPILOG = """\
A URI is s3://bucket/path, pvc://claim/path, file:///path, a plain path, memory://name/path,
or one of any scheme that an installed fsspec package knows. A trailing slash means a tree.
Exit status: 0 done, 1 failed (one line on stderr), 2 misused.
"""


class MisuseError(Exception):
    """The command was not called as it can be; the text says how."""


class _Parser(argparse.ArgumentParser):
    """Reports misuse by an exception, so that it is one line like every other error."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation would change its meaning when an option is added.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        where = f"{command}: " if command else ""
        raise MisuseError(f"{where}{message}; see {self.prog} --help")


class _CommandParser(_Parser):
    """Lets options stand between the operands too, as in ``download URI --json DEST``."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known, unknown = super().parse_known_args(self._options_first(args or ()), namespace)
        if unknown:
            self.error(f"not understood: {', '.join(repr(text) for text in unknown)}")
        return known, unknown

    def _options_first(self, args: Sequence[str]) -> list[str]:
        # argparse gives an optional operand up at the first option behind its predecessor.
        options: list[str] = []
        operands: list[str] = []
        rest = iter(args)
        for text in rest:
            if text == "--":
                operands += rest
            elif text == "-" or not text.startswith("-"):
                operands.append(text)
            else:
                options.append(text)
                action = self._option_string_actions.get(text)
                if action is not None and action.nargs is None:
                    options += [value for value in (next(rest, None),) if value is not None]
        return [*options, "--", *operands]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="storage",
        description="Move models between stores and this machine, whole and verified.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"storage {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    _add_download(commands)
    _add_upload(commands)
    _add_ls(commands)
    _add_stat(commands)
    _add_cp(commands)
    _add_rm(commands)
    _add_cat(commands)
    _add_spec(commands)
    _add_quickstart(commands)
    return parser


_Commands = Any  # argparse keeps the type of its groups of commands to itself


def _add_download(commands: _Commands) -> None:
    parser = _add(commands, "download", "bring an object or a tree here and print its path")
    parser.add_argument("uri", metavar="URI", type=_uri, help="what to download")
    parser.add_argument(
        "dest",
        metavar="DEST",
        nargs="?",
        type=_path,
        help="file, folder to put it into, or the tree's own path; the cache if not given",
    )
    parser.add_argument(
        "--digest",
        type=_digest,
        metavar="D",
        help="expected digest, sha256:… or blake3:…; of a tree: the digest of its listing",
    )
    parser.add_argument(
        "--unpack", action="store_true", help="extract the archive that URI is (tar, zip, …)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="let a tree replace a folder that this command did not put there",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be fetched, and fetch nothing"
    )
    group.add_argument("--offline", action="store_true", help="use the cache, ask no store")
    _add_patterns(parser)
    _add_config(parser)


def _add_upload(commands: _Commands) -> None:
    parser = _add(commands, "upload", "store a file or a folder")
    parser.add_argument("src", metavar="SRC", type=_path, help="a file or a folder")
    parser.add_argument("uri", metavar="URI", type=_uri, help="where to")
    parser.add_argument(
        "--no-overwrite", action="store_true", help="fail if something is there already"
    )
    _add_patterns(parser)
    _add_config(parser)


def _add_ls(commands: _Commands) -> None:
    parser = _add(commands, "ls", "list the objects at a URI, with paths relative to it")
    parser.add_argument("uri", metavar="URI", type=_uri)
    parser.add_argument(
        "-l", dest="long", action="store_true", help="with size in bytes and time of modification"
    )
    _add_patterns(parser)
    _add_config(parser)


def _add_stat(commands: _Commands) -> None:
    parser = _add(commands, "stat", "describe an object or a tree")
    parser.add_argument("uri", metavar="URI", type=_uri)
    _add_config(parser)


def _add_cp(commands: _Commands) -> None:
    parser = _add(commands, "cp", "copy an object or a tree between any two stores")
    parser.add_argument("src_uri", metavar="SRC_URI", type=_uri)
    parser.add_argument("dest_uri", metavar="DEST_URI", type=_uri)
    _add_config(parser, "config of the source, and of the destination if it is of the same type")
    parser.add_argument(
        "--dest-config", metavar="NAME|FILE", type=_text, help="config of the destination"
    )


def _add_rm(commands: _Commands) -> None:
    parser = _add(commands, "rm", "delete an object, or with -r a tree")
    parser.add_argument("uri", metavar="URI", type=_uri)
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="delete all objects of a tree"
    )
    _add_config(parser)


def _add_cat(commands: _Commands) -> None:
    parser = _add(commands, "cat", "write the bytes of an object to standard output")
    parser.add_argument("uri", metavar="URI", type=_uri)
    _add_config(parser)


def _add_spec(commands: _Commands) -> None:
    parser = _add(commands, "spec", "show what a URI says, without asking the store")
    parser.add_argument("uri", metavar="URI", type=_uri)


def _add_quickstart(commands: _Commands) -> None:
    parser = _add(commands, "quickstart", "make a small model and move it through a store")
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="?",
        type=_path,
        help="new or empty folder for everything; a temporary one, which stays, if not given",
    )


def _add(commands: _Commands, name: str, text: str) -> argparse.ArgumentParser:
    description = f"{text[0].upper()}{text[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description)
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout; errors as JSON on stderr"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, no summary, no warnings on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_patterns(parser: argparse.ArgumentParser) -> None:
    for option, text in (("--allow", "only these relative paths"), ("--ignore", "not these")):
        parser.add_argument(
            option,
            action="append",
            type=_text,
            metavar="PATTERN",
            help=f"{text}; * matches slashes too; may be repeated",
        )


def _add_config(parser: argparse.ArgumentParser, text: str = "config of the store") -> None:
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        type=_text,
        help=f"{text}: a name of the settings, or a TOML or JSON file",
    )


def _uri(text: str) -> str:
    try:
        parse_uri(text)
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return text


def _digest(text: str) -> str:
    from storage.digest import Digest

    try:
        return str(Digest.parse(text))
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _path(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a URI, and a local path is needed (storage cp copies between stores)"
        )
    return _text(text)


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it may not be empty")
    return text
