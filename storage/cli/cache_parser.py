"""What ``storage cache …`` accepts."""

from __future__ import annotations

import argparse

from storage.cli.arguments import (
    CommandTable,
    add_commands,
    add_common,
    add_config,
    add_patterns,
    path_argument,
    seconds_argument,
    size_argument,
    uri_argument,
)

__all__ = ["fill"]


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the commands below ``storage cache``."""
    add_commands(parser, "cache_command", _COMMANDS)


def _cache_ls(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "uri",
        metavar="URI",
        nargs="?",
        type=uri_argument,
        help="only what is there or below; all if none",
    )


def _cache_verify(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--full", action="store_true", help="hash everything, not only what is in doubt"
    )


def _cache_repair(parser: argparse.ArgumentParser) -> None:
    _cache_verify(parser)
    add_config(parser, "config of the stores that are asked")


def _cache_gc(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--size",
        type=size_argument,
        metavar="SIZE",
        help="evict until so much is left, as 50GB; else to the budget of the settings, if any",
    )
    parser.add_argument(
        "--grace",
        type=seconds_argument,
        metavar="SECONDS",
        help="keep what was used so lately; else as the settings say",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print which models would go, and remove nothing"
    )


def _cache_uri(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uri", metavar="URI", type=uri_argument)


def _cache_path(parser: argparse.ArgumentParser) -> None:
    _cache_uri(parser)
    parser.add_argument("--unpack", action="store_true", help="the archive that URI is, unpacked")
    add_patterns(parser)
    add_config(parser)


def _cache_export(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "file", metavar="FILE", type=path_argument, help="where to; - for standard output"
    )
    parser.add_argument(
        "uris",
        metavar="URI",
        nargs="*",
        default=(),
        type=uri_argument,
        help="what to export; all if none is given",
    )
    parser.check = _check_export  # type: ignore[attr-defined]


def _check_export(args: argparse.Namespace) -> str | None:
    both = args.json and args.file == "-"
    return "--json and the parcel cannot both go to standard output" if both else None


def _cache_import(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "file", metavar="FILE", type=path_argument, help="what export wrote; - for standard input"
    )


_COMMANDS: CommandTable = {
    "ls": ("list the cached models", _cache_ls),
    "du": ("tell what the cache takes", add_common),
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
