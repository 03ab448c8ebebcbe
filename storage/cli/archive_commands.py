"""The commands ``storage archive …``: what they accept, and what they do."""

from __future__ import annotations

import argparse
import os
from typing import Any

from storage.cli.arguments import (
    CommandTable,
    add_commands,
    add_common,
    add_config,
    path_argument,
    size_argument,
    uri_argument,
)
from storage.cli.commands import store_config
from storage.cli.output import Output

__all__ = ["fill", "run"]


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the commands of archives to ``parser``."""
    add_commands(parser, "archive_command", _TABLE)


def run(args: argparse.Namespace, output: Output) -> None:
    """Run the command that ``args`` names.

    Raises:
        StorageError: it failed.
    """
    (_create if args.archive_command == "create" else _extract)(args, output)


def _fill_create(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("folder", metavar="FOLDER", type=path_argument, help="what to archive")
    parser.add_argument(
        "archive",
        metavar="ARCHIVE",
        nargs="?",
        type=path_argument,
        help="the archive, or a folder to put it into; FOLDER.tar.zst here if not given",
    )
    parser.add_argument(
        "--level",
        type=_level,
        metavar="N",
        help="of zstd, negative (fast) to 22; 1 if not given",
    )


def _fill_extract(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "archive",
        metavar="ARCHIVE",
        type=uri_argument,
        help="a tar (plain, gz, bz2, xz, zst) or zip: a path, or the URI of one in any store",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=path_argument, help="where to: absent or empty"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is in FOLDER, as a whole"
    )
    parser.add_argument(
        "--max-size", type=size_argument, metavar="SIZE", help="of all files; 1TiB if not given"
    )
    parser.add_argument(
        "--max-ratio",
        type=_ratio,
        metavar="N",
        help="of the files to the archive, if it becomes more than 1 GiB; 200 if not given",
    )
    parser.add_argument(
        "--max-entries", type=_count, metavar="N", help="in the archive; 1000000 if not given"
    )
    add_config(parser)
    parser.check = _check_extract  # type: ignore[attr-defined]


_LIMITS = {"max_size": "total_size", "max_ratio": "ratio", "max_entries": "entries"}


def _check_extract(args: argparse.Namespace) -> str | None:
    if "://" in args.archive:
        for name in _LIMITS:
            if getattr(args, name) is not None:
                return f"--{name.replace('_', '-')} is for archives on this machine"
    elif args.config is not None:
        return "--config is for the URI of an archive"
    return None


_TABLE: CommandTable = {
    "create": ("make a tar.zst of a folder and print its hashes", _fill_create),
    "extract": ("extract an archive to a folder, safely", _fill_extract),
}


def _create(args: argparse.Namespace, output: Output) -> None:
    from storage.container.archives.create import DIGESTS, LEVEL, SUFFIX, create_archive

    name = os.path.basename(os.path.abspath(args.folder)) or "archive"
    archive = create_archive(
        args.folder,
        args.archive or name + SUFFIX,
        digests=DIGESTS,
        level=LEVEL if args.level is None else args.level,
    )
    document: dict[str, Any] = {
        "path": str(archive.path),
        "size": archive.size,
        "content_hash": archive.content_hash,
        "archive_hash": archive.archive_hash,
        "content_sha256": archive.content_sha256,
        "content_blake3": archive.content_blake3,
        "archive_sha256": archive.archive_sha256,
        "archive_blake3": archive.archive_blake3,
        "content_size": archive.content_size,
        "files": archive.file_count,
    }
    lines = [f"{name}: {value}" for name, value in document.items()]
    output.result(document, [document["path"]] if output.quiet else lines)


def _extract(args: argparse.Namespace, output: Output) -> None:
    if "://" in args.archive:
        path = _extract_stored(args, output)
    else:
        from storage.container.archives.extract import extract_archive
        from storage.unpacking.extraction import ExtractionLimits

        given = {field: getattr(args, name) for name, field in _LIMITS.items()}
        limits = {field: value for field, value in given.items() if value is not None}
        path = extract_archive(
            args.archive,
            args.folder,
            limits=ExtractionLimits(**limits),
            overwrite=args.overwrite,
        )
    output.result({"path": path}, [path])


def _extract_stored(args: argparse.Namespace, output: Output) -> str:
    from storage.client import StorageClient

    with StorageClient() as client, output.reporter() as reporter:
        config = store_config(client, args.config)
        return client.download(
            args.archive,
            args.folder,
            config=config,
            unpack=True,
            overwrite=args.overwrite,
            progress=reporter,
        )


def _level(text: str) -> int:
    if not text.removeprefix("-").isdecimal() or not -100 <= int(text) <= 22:
        raise argparse.ArgumentTypeError("a number from -100 to 22 is needed")
    return int(text)


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not ratio >= 1:
        raise argparse.ArgumentTypeError("a number of at least 1 is needed")
    return ratio


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("a number is needed")
    return int(text)
