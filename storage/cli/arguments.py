"""What the parsers of all commands share; an argument that is wrong by itself is found here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from storage.cli.output import Output
from storage.errors import InvalidInput
from storage.uri import parse_uri

__all__ = [
    "CommandParser",
    "CommandTable",
    "MisuseError",
    "Parser",
    "add_commands",
    "add_common",
    "add_config",
    "add_fetching",
    "add_patterns",
    "digest_argument",
    "field_argument",
    "freshness_argument",
    "path_argument",
    "seconds_argument",
    "size_argument",
    "text_argument",
    "uri_argument",
]


class MisuseError(Exception):
    """The command was not called as it can be; the text says how."""


class Parser(argparse.ArgumentParser):
    """Reports misuse by an exception, so that it is one line like every other error."""

    def __init__(self, **options: Any) -> None:
        """Take the options of ``argparse``."""
        # An abbreviation would change its meaning when an option is added.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        where = f"{command}: " if command else ""
        raise MisuseError(f"{where}{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        # Help is a result like others: its reader may go away.
        Output().write(message.encode())


class CommandParser(Parser):
    """Lets options stand between the operands too, as in ``download URI --json DEST``."""

    fill: Callable[[argparse.ArgumentParser], None] | None = None
    """Adds the arguments; not called for commands that are not used, as it takes its time."""

    check: Callable[[argparse.Namespace], str | None] | None = None
    """Returns what is wrong with the arguments together, if anything is."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.fill is not None:
            self.fill(self)
        args = args or ()
        if self._subparsers is None:
            args = self._options_first(args)
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            names = ", ".join(repr(text) for text in unknown if text != "--")
            self.error(f"not understood: {names}")
        problem = None if self.check is None else self.check(known)
        if problem is not None:
            self.error(problem)
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
        return [*options, "--", *operands] if operands else options


CommandTable = Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]]
"""Name → what it does, in a few words, and what adds its arguments."""


def add_commands(parser: argparse.ArgumentParser, dest: str, table: CommandTable) -> None:
    """Let ``parser`` take one of several commands, whose name becomes the attribute ``dest``."""
    commands = parser.add_subparsers(
        dest=dest, metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for name, (text, fill) in table.items():
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description)
        command.fill = fill


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command."""
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout; errors as JSON on stderr"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, no summary, no warnings on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_patterns(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose files of a tree."""
    for option, text in (("--allow", "only these relative paths"), ("--ignore", "not these")):
        parser.add_argument(
            option,
            action="append",
            type=text_argument,
            metavar="PATTERN",
            help=f"{text}; * matches slashes too; may be repeated",
        )


def add_fetching(parser: argparse.ArgumentParser) -> None:
    """Add the options about how a model comes here; see ``commands.fetch_options``."""
    parser.add_argument(
        "--require-signature",
        type=path_argument,
        metavar="FILE",
        help="hand over only what is signed with this public key, or a certificate that leads to "
        "one of these",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="let a tree replace a folder that this command did not put there",
    )
    parser.add_argument(
        "--freshness",
        type=freshness_argument,
        metavar="POLICY",
        help="revalidate: ask the store each time; cache-first: only if nothing is cached; "
        "max-age=SECONDS: if what is cached is older",
    )
    parser.add_argument(
        "--cache", action="store_true", help="keep a copy in the cache although there is a DEST"
    )
    parser.add_argument(
        "--link",
        choices=("hardlink", "symlink"),
        help="make cached files at DEST links instead of copies; never write to them",
    )


def add_config(parser: argparse.ArgumentParser, text: str = "config of the store") -> None:
    """Add the option that names the config of a store."""
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        type=text_argument,
        help=f"{text}: a name of the settings, or a TOML or JSON file",
    )


def uri_argument(text: str) -> str:
    """Take a URI or a path."""
    try:
        parse_uri(text)
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return text


def digest_argument(text: str) -> str:
    """Take a digest, and return it with its algorithm."""
    from storage.digest import Digest

    try:
        return str(Digest.parse(text))
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def freshness_argument(text: str) -> float:
    """Take a policy of freshness; see :func:`storage.config.freshness.read_freshness`."""
    from storage.config.freshness import read_freshness

    try:
        return read_freshness(text)
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def size_argument(text: str) -> int:
    """Take a number of bytes, as ``50GB``."""
    from storage.config.plain import read_size

    try:
        size: int = read_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return size


def seconds_argument(text: str) -> float:
    """Take a number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("a number of seconds is needed")
    return seconds


def field_argument(text: str) -> tuple[str, Any]:
    """Take ``KEY=TEXT`` or ``KEY:=JSON``, and return key and value."""
    import json

    key, equals, value = text.partition("=")
    is_json = key.endswith(":")
    key = key.removesuffix(":")
    if not key or not equals:
        raise argparse.ArgumentTypeError("KEY=TEXT or KEY:=JSON is needed")
    if not is_json:
        return key, value
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise argparse.ArgumentTypeError(f"the value of {key!r} is not JSON") from exc


def path_argument(text: str) -> str:
    """Take a path of this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a URI, and a local path is needed (storage cp copies between stores)"
        )
    return text_argument(text)


def text_argument(text: str) -> str:
    """Take anything but nothing."""
    if not text:
        raise argparse.ArgumentTypeError("it may not be empty")
    return text
