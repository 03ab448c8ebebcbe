"""What the command accepts: the parser of everything, and of the commands without a family."""

from __future__ import annotations

import argparse

from storage import __version__
from storage.cli.arguments import (
    CommandTable,
    Parser,
    add_commands,
    add_common,
    add_config,
    add_fetching,
    add_patterns,
    digest_argument,
    path_argument,
    text_argument,
    uri_argument,
)

__all__ = ["build_parser"]

_EPILOG = """\
A URI is s3://bucket/path, pvc://claim/path, file:///path, a plain path, memory://name/path,
or one of any scheme that an installed fsspec package knows. A trailing slash means a tree.
Exit status: 0 done, 1 failed (one line on stderr), 2 misused.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = Parser(
        prog="storage",
        description="Move models between stores and this machine, whole and verified.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"storage {__version__}")
    add_commands(parser, "command", _COMMANDS)
    return parser


def _download(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "uri",
        metavar="URI",
        nargs="?",
        type=uri_argument,
        help="what to download; with --locked: only it",
    )
    parser.add_argument(
        "dest",
        metavar="DEST",
        nargs="?",
        type=path_argument,
        help="file, folder to put it into, or the tree's own path; the cache if not given",
    )
    parser.add_argument(
        "--mirror",
        action="append",
        type=uri_argument,
        metavar="URI",
        help="another source of the same model, asked if those before it fail; may be repeated",
    )
    parser.add_argument(
        "--locked",
        type=path_argument,
        metavar="FILE",
        help="download exactly what this lock file says (storage lock makes it), or fail",
    )
    parser.add_argument(
        "--digest",
        type=digest_argument,
        metavar="D",
        help="expected digest, sha256:… or blake3:…; of a tree: the digest of its listing",
    )
    parser.add_argument(
        "--unpack", action="store_true", help="extract the archive that URI is (tar, zip, …)"
    )
    add_fetching(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--dry-run", action="store_true", help="print what would be fetched, and fetch nothing"
    )
    group.add_argument("--offline", action="store_true", help="use the cache, ask no store")
    add_patterns(parser)
    add_config(parser)
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
    add_common(parser)
    parser.add_argument("src", metavar="SRC", type=path_argument, help="a file or a folder")
    parser.add_argument("uri", metavar="URI", type=uri_argument, help="where to")
    parser.add_argument(
        "--no-overwrite", action="store_true", help="fail if something is there already"
    )
    add_patterns(parser)
    add_config(parser)


def _ls(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uri", metavar="URI", type=uri_argument)
    parser.add_argument(
        "-l", dest="long", action="store_true", help="with size in bytes and time of modification"
    )
    add_patterns(parser)
    add_config(parser)


def _stat(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uri", metavar="URI", type=uri_argument)
    add_config(parser)


def _cp(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("src_uri", metavar="SRC_URI", type=uri_argument)
    parser.add_argument("dest_uri", metavar="DEST_URI", type=uri_argument)
    add_config(parser, "config of the source, and of the destination if it is of the same type")
    parser.add_argument(
        "--dest-config", metavar="NAME|FILE", type=text_argument, help="config of the destination"
    )


def _mirror(parser: argparse.ArgumentParser) -> None:
    from storage.cli.mirror_command import fill

    fill(parser)


def _rm(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uri", metavar="URI", type=uri_argument)
    parser.add_argument(
        "-r", "--recursive", action="store_true", help="delete all objects of a tree"
    )
    add_config(parser)


def _cat(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uri", metavar="URI", type=uri_argument)
    add_config(parser)


def _spec(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uri", metavar="URI", type=uri_argument)


def _quickstart(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="?",
        type=path_argument,
        help="new or empty folder for everything; a temporary one, which stays, if not given",
    )


def _lock(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("uris", metavar="URI", nargs="+", type=uri_argument, help="what to lock")
    add_patterns(parser)
    add_config(parser)


def _prefetch(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        type=path_argument,
        help="a lock file, or text with one source a line",
    )
    parser.add_argument("--pin", action="store_true", help="never evict what it names")
    add_config(parser)


def _cache(parser: argparse.ArgumentParser) -> None:
    from storage.cli.cache_parser import fill

    fill(parser)


def _archive(parser: argparse.ArgumentParser) -> None:
    from storage.cli.archive_commands import fill

    fill(parser)


def _container(parser: argparse.ArgumentParser) -> None:
    from storage.cli.container_parser import fill

    fill(parser)


def _registry(parser: argparse.ArgumentParser) -> None:
    from storage.cli.registry_parser import fill

    fill(parser)


_COMMANDS: CommandTable = {
    "download": ("bring an object or a tree here and print its path", _download),
    "upload": ("store a file or a folder", _upload),
    "ls": ("list the objects at a URI, with paths relative to it", _ls),
    "stat": ("describe an object or a tree", _stat),
    "cp": ("copy an object or a tree between any two stores", _cp),
    "mirror": ("copy what another place lacks of a tree, by several processes if asked", _mirror),
    "rm": ("delete an object, or with -r a tree", _rm),
    "cat": ("write the bytes of an object to standard output", _cat),
    "spec": ("show what a URI says, without asking the store", _spec),
    "lock": ("write down what models are now, for download --locked", _lock),
    "prefetch": ("fill the cache with all that a file names", _prefetch),
    "cache": ("look at and look after what is kept on this machine", _cache),
    "archive": ("make and extract archives of models", _archive),
    "container": ("make, open and sign model containers", _container),
    "registry": ("publish and use versions of models, on any store", _registry),
    "quickstart": ("make a small model and move it through a store", _quickstart),
}
