"""What ``storage container …`` accepts."""

from __future__ import annotations

import argparse
import os

from storage.cli.arguments import (
    CommandTable,
    add_commands,
    add_common,
    add_config,
    field_argument,
    path_argument,
    text_argument,
    uri_argument,
)

__all__ = ["fill"]


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the commands below ``storage container``."""
    add_commands(parser, "container_command", _COMMANDS)


def _source(parser: argparse.ArgumentParser, text: str) -> None:
    add_common(parser)
    parser.add_argument("src", metavar="SRC", type=uri_argument, help=text)
    _add_cache(parser)
    add_config(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", action="store_true", help="fetch all of SRC into the cache, and read it there"
    )


def _build(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("out", metavar="OUT", type=uri_argument, help="path or URI of the new one")
    parser.add_argument(
        "--from",
        dest="src",
        metavar="SRC",
        type=uri_argument,
        help="begin with all that this container, a path or a URI, has",
    )
    parser.add_argument(
        "--training", metavar="FILE", type=path_argument, help="the training model, as it is"
    )
    parser.add_argument(
        "--helper",
        metavar="NAME",
        type=text_argument,
        help="what reads the training model; for FILE.npz numpyhelper and for FILE.safetensors "
        "safetensors if not given, else none is noted",
    )
    parser.add_argument(
        "--inference", metavar="FILE", type=path_argument, help="the inference model, as it is"
    )
    parser.add_argument(
        "--format",
        metavar="FMT",
        type=text_argument,
        help="of the inference model, as onnx; the ending of FILE if not given",
    )
    parser.add_argument(
        "--meta",
        action="append",
        type=field_argument,
        metavar="K=V",
        help="metadata; V is text, and in K:=V it is JSON; may be repeated",
    )
    parser.add_argument("--id", metavar="ID", type=text_argument, help="model id; else a new one")
    _add_cache(parser)
    add_config(parser, "config of SRC, and of OUT if it is of the same type")
    parser.add_argument(
        "--dest-config", metavar="NAME|FILE", type=text_argument, help="config of OUT"
    )
    parser.check = _check_build  # type: ignore[attr-defined]


def _check_build(args: argparse.Namespace) -> str | None:
    if args.src is None and args.training is None and args.inference is None:
        return "--training, --inference or --from is missing"
    if args.helper is not None and args.training is None:
        return "--helper goes with --training"
    if args.inference is None:
        return None if args.format is None else "--format goes with --inference"
    if args.format is None:
        args.format = os.path.splitext(args.inference)[1].removeprefix(".") or None
    return "--format is missing, and the file has no ending" if args.format is None else None


def _inspect(parser: argparse.ArgumentParser) -> None:
    _source(parser, "path or URI of a container; only what is needed is read")
    parser.add_argument(
        "--checksum", action="store_true", help="with the SHA-256 of all of it, which is read"
    )


def _extract(parser: argparse.ArgumentParser) -> None:
    _source(parser, "path or URI of a container; no other part of it is read")
    parser.add_argument(
        "part",
        metavar="training|inference|files/NAME",
        type=_part_argument,
        help="the training model, the inference model, or an attached file",
    )
    parser.add_argument(
        "dest", metavar="DEST", type=path_argument, help="file or folder; - for standard output"
    )
    parser.check = _check_extract  # type: ignore[attr-defined]


def _part_argument(text: str) -> str:
    if text in ("training", "inference") or (text.startswith("files/") and text != "files/"):
        return text
    raise argparse.ArgumentTypeError(f"training, inference or files/NAME is needed, not {text!r}")


def _check_extract(args: argparse.Namespace) -> str | None:
    both = args.json and args.dest == "-"
    return "--json and the content cannot both go to standard output" if both else None


def _sign(parser: argparse.ArgumentParser) -> None:
    _source(
        parser,
        "path or URI of a container; with a key of a NIST curve: a folder or a file, which gets "
        "an OpenSSF model-signing bundle",
    )
    parser.add_argument(
        "--key", metavar="PEM", type=path_argument, required=True, help="file of the private key"
    )
    parser.add_argument(
        "--password-file",
        metavar="FILE",
        type=path_argument,
        help="its first line is what the key is encrypted with",
    )
    parser.add_argument("--signer", metavar="ID", type=text_argument, help="who signs a container")
    parser.add_argument(
        "--certificate",
        metavar="PEM",
        type=path_argument,
        help="of the key: the bundle is verified by whoever trusts its issuer",
    )
    parser.add_argument(
        "--chain",
        action="append",
        metavar="PEM",
        type=path_argument,
        help="certificates between that one and the root; may be repeated",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=path_argument,
        help="where to; standard output if not given, and for a bundle SRC/model.sig or SRC.sig",
    )
    _add_ignore(parser)
    parser.check = _check_sign  # type: ignore[attr-defined]


def _add_ignore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore",
        action="append",
        metavar="PATH",
        type=text_argument,
        help="a path in a folder that its bundle leaves out; may be repeated",
    )


def _check_sign(args: argparse.Namespace) -> str | None:
    if args.chain and args.certificate is None:
        return "--chain goes with --certificate"
    if args.signer is not None and args.certificate is not None:
        return "--signer is for containers; a certificate says itself who signs"
    return None


def _verify(parser: argparse.ArgumentParser) -> None:
    _source(parser, "what was signed: path or URI of a container, or a folder or file")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--key", metavar="PEM", type=path_argument, help="file of the public key")
    group.add_argument(
        "--root",
        action="append",
        metavar="PEM",
        type=path_argument,
        help="certificates whose issues are trusted; may be repeated",
    )
    parser.add_argument(
        "--signature",
        metavar="FILE|BASE64",
        type=text_argument,
        help="what sign gave; for a bundle SRC/model.sig or SRC.sig if not given",
    )
    _add_ignore(parser)


_COMMANDS: CommandTable = {
    "build": ("make a container of files, or another one of a container", _build),
    "inspect": ("tell what a container holds", _inspect),
    "extract": ("take one part out of a container", _extract),
    "sign": ("sign a container, a folder or a file", _sign),
    "verify": ("check the signature of a container, a folder or a file", _verify),
}
