"""``storage registry …``: publishing, looking at and using versions of models."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

from storage.cli.commands import fetch_options, store_config
from storage.cli.output import Output, amounts, count, human_size
from storage.client import StorageClient
from storage.registry import ANY, AliasEntry, ModelRegistry, Version, VersionFile, layout
from storage.registry.reading import missing_model

__all__ = ["run"]

# Each page costs listings. Of a version on it only the summary is kept.
_PAGE = 1000


def run(args: Namespace, output: Output) -> None:
    """Run the command below ``storage registry`` that ``args`` names.

    Raises:
        StorageError: it failed.
        ReaderGoneError: nobody reads its result.
    """
    with StorageClient() as client:
        config = store_config(client, args.config)
        registry = ModelRegistry(args.registry, config=config, client=client)
        _COMMANDS[args.registry_command](registry, args, output)


def _init(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    # A store that cannot hold one is not even asked.
    registry.store.check()
    there = registry.exists()
    registry.init()
    where = str(registry.location)
    output.note(f"there is a registry at {where} already" if there else f"made {where} a registry")
    output.result({"ok": True, "uri": where, "created": not there})


# -- publishing and using --------------------------------------------------------------------


def _push(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    began = time.perf_counter()
    with output.reporter() as reporter:
        version = registry.push(
            args.model,
            args.src,
            description=args.description or "",
            tags=dict(args.tag or ()),
            configuration=dict(args.set or ()),
            metrics=dict(args.metric or ()),
            parent=args.parent,
            allow_patterns=args.allow,
            ignore_patterns=args.ignore,
            progress=reporter,
        )
    name = _name(version)
    for alias in args.alias or ():
        registry.set_alias(version.model, alias, version.number)
    output.note_summary(reporter)
    output.note(f"published {name}" if version.is_new else f"{name} has these files already")
    document = {
        "model": version.model,
        "number": version.number,
        "content": version.content,
        "existing": not version.is_new,
        "aliases": args.alias or [],
    }
    output.result(document | amounts(reporter, began), [name])


def _pull(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    from storage.registry.pull import make_pull

    began = time.perf_counter()
    model, reference = _reference(args)
    with output.reporter() as reporter:
        pull = make_pull(
            registry,
            model,
            reference,
            allow_patterns=args.allow,
            ignore_patterns=args.ignore,
            progress=reporter,
            **fetch_options(args),
        )
        path = pull.run(args.dest)
    output.note_summary(reporter)
    document = {"model": model, "version": reference, "number": pull.number, "path": path}
    output.result(document | amounts(reporter, began), [path])


# -- looking ---------------------------------------------------------------------------------


def _ls(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    if args.model is None:
        models = registry.models()
        output.result(models, models)
        return
    names = _names(registry, args.model)
    versions = [_summary(version, names) for version in _listed(registry, args)]
    output.result(versions, _version_lines(versions))


def _listed(registry: ModelRegistry, args: Namespace) -> Iterator[Version]:
    size = _PAGE if args.limit is None else max(1, min(args.limit, _PAGE))
    return islice(registry.each_version(args.model, page_size=size, after=args.after), args.limit)


def _names(registry: ModelRegistry, model: str) -> dict[int, list[str]]:
    """Return the aliases of a model by the numbers that they are set to."""
    names: dict[int, list[str]] = {}
    for alias, number in sorted(registry.aliases(model).items()):
        names.setdefault(number, []).append(alias)
    return names


def _summary(version: Version, names: dict[int, list[str]]) -> dict[str, Any]:
    return {
        "model": version.model,
        "number": version.number,
        "aliases": names.get(version.number, []),
        "created": version.created,
        "size": version.size,
        "objects": len(version.files),
        "content": version.content,
        "parent": version.parent,
        **version.attributes.document(),
    }


def _version_lines(versions: Iterable[dict[str, Any]]) -> Iterator[str]:
    rows = [
        (
            str(version["number"]),
            str(version["size"]),
            str(version["objects"]),
            f"{version['created']:%Y-%m-%dT%H:%M:%SZ}",
            ",".join(version["aliases"]) or "-",
            _line(version["description"]),
        )
        for version in versions
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
    for number, size, files, created, aliases, description in rows:
        yield (
            f"{number:>{widths[0]}}  {size:>{widths[1]}}  {files:>{widths[2]}}  {created}  "
            f"{aliases:<{widths[4]}}  {description}"
        ).rstrip()


def _show(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    version = registry.show(*_reference(args))
    document = _summary(version, _names(registry, version.model))
    files = [_file(file) for file in version.files]
    lines = [*_said_lines(document), *_file_lines(version.files)]
    output.result(document | {"files": files}, lines)


def _file(file: VersionFile) -> dict[str, Any]:
    found = asdict(file)
    # Where it is in the registry is no concern of a user.
    del found["blob"]
    return found


def _said_lines(document: dict[str, Any]) -> Iterator[str]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from (_line(f"{name}.{key}: {below}") for key, below in value.items())
        elif isinstance(value, list):
            yield from (f"{name}: {','.join(value)}",) if value else ()
        elif hasattr(value, "isoformat"):
            yield f"{name}: {value.isoformat()}"
        elif value not in (None, ""):
            yield _line(f"{name}: {value}")


def _file_lines(files: Sequence[VersionFile]) -> Iterator[str]:
    width = max((len(str(file.size)) for file in files), default=0)
    for file in files:
        yield f"{file.size:>{width}}  {file.path}"


def _line(text: str) -> str:
    """Return a text of somebody as one line."""
    return " ".join(text.splitlines())


def _diff(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    found = registry.diff(args.model, args.old, args.new)
    document = {
        "model": args.model,
        "old": found.old.number,
        "new": found.new.number,
        "added": [_file(file) for file in found.added],
        "removed": [_file(file) for file in found.removed],
        "changed": [{"old": _file(old), "new": _file(new)} for old, new in found.changed],
        "unchanged": [file.path for file in found.unchanged],
        "attributes": {
            name: {"old": old, "new": new} for name, (old, new) in found.attributes.items()
        },
        "fetched": found.fetched,
    }
    output.note(
        f"{_name(found.old)} to {_name(found.new)}: {len(found.added)} added, "
        f"{len(found.removed)} removed, {len(found.changed)} changed, "
        f"{len(found.unchanged)} unchanged; {human_size(found.fetched)} to fetch"
    )
    lines = [
        *(("+", file.path) for file in found.added),
        *(("-", file.path) for file in found.removed),
        *(("~", new.path) for _, new in found.changed),
    ]
    lines.sort(key=lambda line: line[1])
    said = [
        (":", _line(f"{name}: {old} -> {new}")) for name, (old, new) in found.attributes.items()
    ]
    output.result(document, (f"{mark} {text}" for mark, text in lines + said))


# -- aliases ---------------------------------------------------------------------------------


def _alias(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    model, reference = args.version
    expected = ANY if args.expected is None else args.expected or None
    if args.alias is None:
        found = registry.aliases(model)
        if not found and not registry.numbers(model):
            raise missing_model(registry.store, model)
        output.result(found, (f"{alias} {number}" for alias, number in sorted(found.items())))
    elif args.history:
        entries = registry.alias_history(model, args.alias)
        if not entries:
            output.note(f"{args.alias} of {model} was never set")
        output.result([asdict(entry) for entry in entries], map(_entry_line, entries))
    elif args.delete:
        registry.delete_alias(model, args.alias, expected=expected)
        output.note(f"{args.alias} of {model} is not set any more")
        output.result({"ok": True, "model": model, "alias": args.alias, "number": None})
    else:
        number = registry.set_alias(model, args.alias, reference, expected=expected)
        output.note(f"{args.alias} of {model} is version {number}")
        output.result({"ok": True, "model": model, "alias": args.alias, "number": number})


def _entry_line(entry: AliasEntry) -> str:
    shown = "-" if entry.version is None else str(entry.version)
    return f"{entry.at:%Y-%m-%dT%H:%M:%SZ}  {shown}"


# -- removing --------------------------------------------------------------------------------


def _rm(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    model, number = args.version
    registry.delete(model, number, force=args.force)
    output.note(f"deleted {model}@{number}; `storage registry gc` frees what only it had")
    output.result({"ok": True, "model": model, "number": number})


def _gc(registry: ModelRegistry, args: Namespace, output: Output) -> None:
    found = registry.gc(grace=args.grace, dry_run=args.dry_run)
    verb = "would remove" if args.dry_run else "removed"
    output.note(
        f"{verb} {count(found.removed, 'blob')}, {human_size(found.freed)}; "
        f"kept {found.kept}, {human_size(found.kept_bytes)}"
    )
    output.result(asdict(found))


_COMMANDS: dict[str, Callable[[ModelRegistry, Namespace, Output], None]] = {
    "init": _init,
    "push": _push,
    "pull": _pull,
    "ls": _ls,
    "show": _show,
    "alias": _alias,
    "diff": _diff,
    "rm": _rm,
    "gc": _gc,
}


def _reference(args: Namespace) -> tuple[str, int | str]:
    model, reference = args.version
    return model, layout.LATEST if reference is None else reference


def _name(version: Version) -> str:
    return f"{version.model}@{version.number}"
