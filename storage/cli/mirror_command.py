"""The command ``storage mirror``: what it accepts, and what it does."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from storage.cli.arguments import (
    add_common,
    add_config,
    add_patterns,
    digest_argument,
    text_argument,
    uri_argument,
)
from storage.cli.commands import store_config
from storage.cli.output import Output, count, human_size, human_time
from storage.errors import MirrorError

if TYPE_CHECKING:
    from storage.client.mirror import MirrorResult

__all__ = ["fill", "run"]


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_common(parser)
    parser.add_argument("src_uri", metavar="SRC_URI", type=uri_argument)
    parser.add_argument("dest_uri", metavar="DEST_URI", type=uri_argument)
    parser.add_argument(
        "--digest",
        type=digest_argument,
        metavar="D",
        help="expected digest, sha256:… or blake3:…; of a tree: the digest of its listing",
    )
    parser.add_argument(
        "--delete",
        action="store_true",
        help="at last, if nothing failed, delete what the source does not have",
    )
    parser.add_argument(
        "--no-overwrite",
        action="store_true",
        help="leave objects with other content as they are, and fail",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="compare, tell what would be done, and do nothing"
    )
    parser.add_argument(
        "--processes", type=_number, metavar="N", help="share the work among N processes"
    )
    add_patterns(parser)
    add_config(parser, "config of the source, and of the destination if it is of the same type")
    parser.add_argument(
        "--dest-config", metavar="NAME|FILE", type=text_argument, help="config of the destination"
    )


def run(args: argparse.Namespace, output: Output) -> None:
    """Mirror.

    Raises:
        MirrorError: some objects failed; which, was written with ``--json``.
        StorageError: it failed as a whole.
    """
    from storage.client import StorageClient
    from storage.client.mirror import MirrorResult

    with StorageClient() as client, output.reporter() as reporter:
        try:
            result = client.mirror(
                args.src_uri,
                args.dest_uri,
                config=store_config(client, args.config),
                dest_config=store_config(client, args.dest_config),
                executor=None if args.processes is None else _processes(args.processes),
                allow_patterns=args.allow,
                ignore_patterns=args.ignore,
                digest=args.digest,
                overwrite=not args.no_overwrite,
                delete=args.delete,
                dry_run=args.dry_run,
                progress=reporter,
            )
        except MirrorError as exc:
            if isinstance(exc.result, MirrorResult):
                output.result({"ok": False} | _document(exc.result))
            raise
    output.note(_summary(result, args.dry_run))
    output.result({"ok": True} | _document(result))


def _document(result: MirrorResult) -> dict[str, Any]:
    return asdict(result) | {"seconds": round(result.seconds, 3)}


def _summary(result: MirrorResult, dry_run: bool) -> str:
    would = "would have " if dry_run else ""
    copied = f"{would}copied {count(result.copied, 'object')}, {human_size(result.bytes)}"
    deleted = f", {would}deleted {result.deleted}" if result.deleted else ""
    return f"{copied}{deleted}; {result.skipped} in place already; {human_time(result.seconds)}"


def _processes(number: int) -> Any:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Fresh ones: connections and threads of this process are of no use to them.
    return functools.partial(ProcessPoolExecutor, number, mp_context=get_context("spawn"))


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError("a number of processes is needed, from 1 to 1024")
    return int(text)
