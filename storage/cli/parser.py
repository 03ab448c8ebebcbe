"""What the command accepts. What is wrong with an argument by itself is found here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
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
    _add_commands(commands, _COMMANDS)
    return parser


_Commands = Any  # argparse keeps the type of its groups of commands to itself
_Table = Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]]


def _add_commands(commands: _Commands, table: _Table) -> None:
    for name, (text, fill) in table.items():
        description = f"{text[0].upper()}{text[1:]}."
        parser = commands.add_parser(name, help=text, description=description)
        parser.fill = fill


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout; errors as JSON on stderr"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, no summary, no warnings on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _download(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "uri", metavar="URI", nargs="?", type=_uri, help="what to download; with --locked: only it"
    )
    parser.add_argument(
        "dest",
        metavar="DEST",
        nargs="?",
        type=_path,
        help="file, folder to put it into, or the tree's own path; the cache if not given",
    )
    parser.add_argument(
        "--mirror",
        action="append",
        type=_uri,
        metavar="URI",
        help="another source of the same model, asked if those before it fail; may be repeated",
    )
    parser.add_argument(
        "--locked",
        type=_path,
        metavar="FILE",
        help="download exactly what this lock file says (storage lock makes it), or fail",
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
    parser.add_argument(
        "--freshness",
        type=_freshness,
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
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be fetched, and fetch nothing"
    )
    group.add_argument("--offline", action="store_true", help="use the cache, ask no store")
    _add_patterns(parser)
    _add_config(parser)
    parser.check = _check_download  # type: ignore[attr-defined]


def _check_download(args: argparse.Namespace) -> str | None:
    if args.locked is None:
        if args.uri is None:
            return "URI is missing"
        return "--dry-run knows no --mirror" if args.dry_run and args.mirror else None
    for name in ("mirror", "digest", "unpack", "dry_run", "allow", "ignore"):
        if getattr(args, name):
            return f"--{name.replace('_', '-')} is decided by the file of --locked"
    return None


def _upload(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("src", metavar="SRC", type=_path, help="a file or a folder")
    parser.add_argument("uri", metavar="URI", type=_uri, help="where to")
    parser.add_argument(
        "--no-overwrite", action="store_true", help="fail if something is there already"
    )
    _add_patterns(parser)
    _add_config(parser)


def _ls(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uri", metavar="URI", type=_uri)
    parser.add_argument(
        "-l", dest="long", action="store_true", help="with size in bytes and time of modification"
    )
    _add_patterns(parser)
    _add_config(parser)


def _stat(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uri", metavar="URI", type=_uri)
    _add_config(parser)


def _cp(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("src_uri", metavar="SRC_URI", type=_uri)
    parser.add_argument("dest_uri", metavar="DEST_URI", type=_uri)
    _add_config(parser, "config of the source, and of the destination if it is of the same type")
    parser.add_argument(
        "--dest-config", metavar="NAME|FILE", type=_text, help="config of the destination"
    )


def _rm(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uri", metavar="URI", type=_uri)
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="delete all objects of a tree"
    )
    _add_config(parser)


def _cat(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uri", metavar="URI", type=_uri)
    _add_config(parser)


def _spec(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uri", metavar="URI", type=_uri)


def _quickstart(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="?",
        type=_path,
        help="new or empty folder for everything; a temporary one, which stays, if not given",
    )


def _lock(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uris", metavar="URI", nargs="+", type=_uri, help="what to lock")
    _add_patterns(parser)
    _add_config(parser)


def _prefetch(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "file", metavar="FILE", type=_path, help="a lock file, or text with one source a line"
    )
    parser.add_argument("--pin", action="store_true", help="never evict what it names")
    _add_config(parser)


def _cache(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(
        dest="cache_command", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    _add_commands(commands, _CACHE_COMMANDS)


def _cache_ls(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "uri", metavar="URI", nargs="?", type=_uri, help="only what is there or below; all if none"
    )


def _cache_verify(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "--full", action="store_true", help="hash everything, not only what is in doubt"
    )


def _cache_repair(parser: argparse.ArgumentParser) -> None:
    _cache_verify(parser)
    _add_config(parser, "config of the stores that are asked")


def _cache_gc(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "--size",
        type=_size,
        metavar="SIZE",
        help="evict until so much is left, as 50GB; else to the budget of the settings, if any",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        metavar="SECONDS",
        help="keep what was used so lately; else as the settings say",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print which models would go, and remove nothing"
    )


def _cache_uri(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("uri", metavar="URI", type=_uri)


def _cache_path(parser: argparse.ArgumentParser) -> None:
    _cache_uri(parser)
    parser.add_argument("--unpack", action="store_true", help="the archive that URI is, unpacked")
    _add_patterns(parser)
    _add_config(parser)


def _cache_export(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("file", metavar="FILE", type=_path, help="where to; - for standard output")
    parser.add_argument(
        "uris",
        metavar="URI",
        nargs="*",
        default=(),
        type=_uri,
        help="what to export; all if none is given",
    )
    parser.check = _check_export  # type: ignore[attr-defined]


def _check_export(args: argparse.Namespace) -> str | None:
    both = args.json and args.file == "-"
    return "--json and the parcel cannot both go to standard output" if both else None


def _cache_import(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "file", metavar="FILE", type=_path, help="what export wrote; - for standard input"
    )


_COMMANDS: _Table = {
    "download": ("bring an object or a tree here and print its path", _download),
    "upload": ("store a file or a folder", _upload),
    "ls": ("list the objects at a URI, with paths relative to it", _ls),
    "stat": ("describe an object or a tree", _stat),
    "cp": ("copy an object or a tree between any two stores", _cp),
    "rm": ("delete an object, or with -r a tree", _rm),
    "cat": ("write the bytes of an object to standard output", _cat),
    "spec": ("show what a URI says, without asking the store", _spec),
    "lock": ("write down what models are now, for download --locked", _lock),
    "prefetch": ("fill the cache with all that a file names", _prefetch),
    "cache": ("look at and look after what is kept on this machine", _cache),
    "quickstart": ("make a small model and move it through a store", _quickstart),
}

_CACHE_COMMANDS: _Table = {
    "ls": ("list the cached models", _cache_ls),
    "du": ("tell what the cache takes", _add_common),
    "path": ("print where a cached model is, without asking its store", _cache_path),
    "verify": ("look for what is damaged or missing", _cache_verify),
    "repair": ("verify, and fetch again what is damaged or missing", _cache_repair),
    "gc": ("remove what is not needed", _cache_gc),
    "pin": ("never evict what a source has", _cache_uri),
    "unpin": ("let it be evicted again", _cache_uri),
    "rm": ("remove what a source has from the cache", _cache_uri),
    "export": ("write cached models to one file", _cache_export),
    "import": ("take the models of such a file into the cache", _cache_import),
}


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


def _freshness(text: str) -> float:
    from storage.config.freshness import read_freshness

    try:
        return read_freshness(text)
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _size(text: str) -> int:
    from storage.config.plain import read_size

    try:
        size: int = read_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("a number of seconds is needed")
    return seconds


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
