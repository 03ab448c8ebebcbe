"""What ``storage registry …`` accepts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from storage.cli.arguments import (
    CommandTable,
    add_commands,
    add_common,
    add_config,
    add_fetching,
    add_patterns,
    field_argument,
    path_argument,
    seconds_argument,
    text_argument,
    uri_argument,
)
from storage.errors import InvalidInput
from storage.registry import layout

__all__ = ["fill"]

T = TypeVar("T")


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the commands below ``storage registry``."""
    add_commands(parser, "registry_command", _COMMANDS)


def _registry(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("registry", metavar="REGISTRY", type=uri_argument, help="its URI")
    add_config(parser)


def _model(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    _registry(parser)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?" if optional else None,
        type=_model_argument,
        help="its name",
    )


def _version(parser: argparse.ArgumentParser, text: str) -> None:
    _registry(parser)
    parser.add_argument("version", metavar="MODEL[@VERSION]", type=_version_argument, help=text)


def _push(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    parser.add_argument("src", metavar="SRC", type=path_argument, help="a folder or a file")
    parser.add_argument(
        "--alias",
        action="append",
        type=_alias_argument,
        metavar="ALIAS",
        help="let it name this version afterwards; may be repeated",
    )
    _attributes(parser)
    parser.add_argument(
        "--parent",
        type=_parent_argument,
        metavar="PARENT",
        help="what it was made from: the number of a version, or any text",
    )
    add_patterns(parser)


def _attributes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--description", metavar="TEXT", help="a few words")
    parser.add_argument(
        "--tag",
        action="append",
        type=_tag_argument,
        metavar="NAME[=TEXT]",
        help="a tag; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        type=field_argument,
        metavar="K=V",
        help="configuration; V is text, and in K:=V it is JSON; may be repeated",
    )
    parser.add_argument(
        "--metric",
        action="append",
        type=_metric_argument,
        metavar="NAME=NUMBER",
        help="a metric; may be repeated",
    )


def _pull(parser: argparse.ArgumentParser) -> None:
    _version(parser, "VERSION is a number or an alias; the latest if not given")
    parser.add_argument(
        "dest",
        metavar="DEST",
        nargs="?",
        type=path_argument,
        help="path of the folder; the cache if not given",
    )
    add_fetching(parser)
    parser.add_argument("--offline", action="store_true", help="use the cache, ask no store")
    add_patterns(parser)


def _ls(parser: argparse.ArgumentParser) -> None:
    _model(parser, optional=True)
    parser.add_argument(
        "--after", type=_number_argument, metavar="N", help="only versions with higher numbers"
    )
    parser.add_argument(
        "--limit", type=_number_argument, metavar="COUNT", help="at most so many versions"
    )
    parser.check = _check_ls  # type: ignore[attr-defined]


def _check_ls(args: argparse.Namespace) -> str | None:
    if args.model is None and (args.after is not None or args.limit is not None):
        return "--after and --limit are for the versions of a MODEL"
    return None


def _show(parser: argparse.ArgumentParser) -> None:
    _version(parser, "VERSION is a number or an alias; the latest if not given")


def _alias(parser: argparse.ArgumentParser) -> None:
    _version(parser, "what ALIAS is to name; without ALIAS the aliases of MODEL are listed")
    parser.add_argument("alias", metavar="ALIAS", nargs="?", type=_alias_argument, help="its name")
    parser.add_argument(
        "--expected",
        type=_expected_argument,
        metavar="N",
        help="fail unless ALIAS names version N now; none: unless it names none",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--delete", action="store_true", help="let ALIAS name nothing any more")
    group.add_argument("--history", action="store_true", help="list what ALIAS was, newest first")
    parser.check = _check_alias  # type: ignore[attr-defined]


def _check_alias(args: argparse.Namespace) -> str | None:
    model, reference = args.version
    sets = args.alias is not None and not (args.delete or args.history)
    if args.alias is None and (args.delete or args.history or reference is not None):
        return "ALIAS is missing"
    if sets and reference is None:
        return f"the version is missing, as in {model}@1"
    if not sets and reference is not None:
        return "only to set an alias takes a version"
    if args.expected is not None and (args.alias is None or args.history):
        return "--expected is for setting and deleting an alias"
    return None


def _diff(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    for name, text in (("old", "a number or an alias"), ("new", "the latest if not given")):
        parser.add_argument(
            name,
            metavar=name.upper(),
            nargs=None if name == "old" else "?",
            default=layout.LATEST,
            type=_reference_argument,
            help=text,
        )


def _rm(parser: argparse.ArgumentParser) -> None:
    _version(parser, "the version, by its number")
    parser.add_argument("--force", action="store_true", help="even if an alias names it")
    parser.check = _check_rm  # type: ignore[attr-defined]


def _check_rm(args: argparse.Namespace) -> str | None:
    model, reference = args.version
    if isinstance(reference, int):
        return None
    return f"a version is deleted by its number, as in {model}@1"


def _gc(parser: argparse.ArgumentParser) -> None:
    _registry(parser)
    parser.add_argument(
        "--grace",
        type=seconds_argument,
        metavar="SECONDS",
        help="a publisher that was not heard of for so long is dead; a day if not given",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be removed, and remove nothing"
    )


_COMMANDS: CommandTable = {
    "init": ("make a registry, if there is none yet", _registry),
    "push": ("publish a folder or a file as a version of a model", _push),
    "pull": ("bring a version here and print its path", _pull),
    "ls": ("list the models, or the versions of one", _ls),
    "show": ("describe a version", _show),
    "alias": ("list, set or delete aliases of a model", _alias),
    "diff": ("tell in what two versions differ", _diff),
    "rm": ("delete a version", _rm),
    "gc": ("remove what no version needs", _gc),
}


# -- arguments -------------------------------------------------------------------------------


def _model_argument(text: str) -> str:
    return _checked(layout.check_model, text)


def _alias_argument(text: str) -> str:
    return _checked(layout.check_alias, text)


def _reference_argument(text: str) -> int | str:
    return _checked(layout.parse_reference, text)


def _version_argument(text: str) -> tuple[str, int | str | None]:
    model, at, reference = text.partition("@")
    return _model_argument(model), _reference_argument(reference) if at else None


def _checked(check: Callable[[str], T], text: str) -> T:
    try:
        return check(text)
    except InvalidInput as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def _number_argument(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError("a number is needed")
    return int(text)


def _expected_argument(text: str) -> int:
    return 0 if text == "none" else _number_argument(text)


def _parent_argument(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text_argument(text)


def _tag_argument(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return text_argument(name), value


def _metric_argument(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return text_argument(name), float(value)
    except ValueError as exc:
        raise argparse.ArgumentTypeError("NAME=NUMBER is needed") from exc
