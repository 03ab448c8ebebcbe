"""``storage cache …``: looking at the cache, and looking after it."""

from __future__ import annotations

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO

from storage import __version__
from storage.cli.commands import store_config
from storage.cli.output import Output, count, human_size, human_time, iso_time, new_file
from storage.client import StorageClient
from storage.errors import (
    InsufficientSpaceError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    TransferError,
)
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.cache.cache import ModelCache
    from storage.cache.refs import Ref
    from storage.cache.usage import CachedModel
    from storage.cache.verify import Problem

__all__ = ["run"]

# Seconds between two lines about a work that moves nothing.
_LINE_INTERVAL = 5.0


def run(args: Namespace, output: Output) -> None:
    """Run the command below ``storage cache`` that ``args`` names.

    Raises:
        StorageError: it failed, or there are problems.
        ReaderGoneError: nobody reads its result.
    """
    with StorageClient() as client:
        _COMMANDS[args.cache_command](client, args, output)


# -- looking ---------------------------------------------------------------------------------


def _ls(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.usage import models

    found = models(client.cache)
    if args.uri is not None:
        wanted = str(parse_uri(args.uri))
        below = f"{wanted.rstrip('/')}/"
        found = [each for each in found if each.uri == wanted or each.uri.startswith(below)]
        if not found:
            raise _not_cached(client.cache, parse_uri(args.uri))
    output.result([_model(each) for each in found], _model_lines(found))


def _model(model: CachedModel) -> dict[str, Any]:
    source = model.source
    return {
        "uri": model.uri,
        "origin": source.origin or None,
        "allow": source.allow,
        "ignore": source.ignore,
        "unpack": source.unpack,
        "manifest": model.manifest,
        "path": model.path,
        "size": model.size,
        "files": model.files,
        "complete": model.complete,
        "last_used": iso_time(_time(model.last_used)),
        "validated_at": iso_time(_time(model.validated_at)),
        "fetched_at": iso_time(_time(model.fetched_at)),
        "pinned": model.pinned,
        "leased": model.leased,
    }


def _model_lines(models: Iterable[CachedModel]) -> Iterator[str]:
    rows = []
    for model in models:
        used = _time(model.last_used)
        marks = [
            name
            for name, holds in (
                ("pinned", model.pinned),
                ("in-use", model.leased),
                ("incomplete", not model.complete),
            )
            if holds
        ]
        source = model.source
        filters = [f"--allow {pattern}" for pattern in source.allow or ()]
        filters += [f"--ignore {pattern}" for pattern in source.ignore or ()]
        filters += ["--unpack"] * source.unpack
        rows.append(
            (
                str(model.size),
                str(model.files),
                "-" if used is None else f"{used:%Y-%m-%dT%H:%M:%SZ}",
                ",".join(marks) or "-",
                " ".join([model.uri, *filters]),
            )
        )
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for size, files, used_at, state, uri in rows:
        yield (
            f"{size:>{widths[0]}}  {files:>{widths[1]}}  {used_at:<{widths[2]}}  "
            f"{state:<{widths[3]}}  {uri}"
        )


def _time(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _du(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.usage import usage

    found = usage(client.cache)
    total = found.total_bytes
    budget = "none" if found.budget is None else human_size(found.budget)
    lines = [
        f"{human_size(total)}  {found.root}: {count(found.models, 'model')}",
        f"{human_size(found.blob_bytes)}  {count(found.blobs, 'blob')}",
        f"{human_size(found.copy_bytes)}  copies of files that cannot be links",
        f"{human_size(found.partial_bytes)}  downloads under way, or killed",
        f"{human_size(found.quarantine_bytes)}  damaged files in quarantine",
        f"{human_size(found.other_bytes)}  notes",
        f"{human_size(found.counted_bytes)}  count against the budget: {budget}",
        f"{human_size(found.pinned_bytes)}  pinned",
        f"{human_size(found.leased_bytes)}  in use and not pinned",
    ]
    width = max(line.index("  ") for line in lines)
    output.result(
        asdict(found) | {"total_bytes": total},
        (
            f"{amount:>{width}}  {text}"
            for amount, _, text in (line.partition("  ") for line in lines)
        ),
    )


def _path(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.client.download import Download, DownloadOptions
    from storage.transfer.plan import Patterns

    location = parse_uri(args.uri)
    options = DownloadOptions(
        config=store_config(client, args.config),
        patterns=Patterns(args.allow, args.ignore),
        unpack=args.unpack,
        offline=True,
    )
    job = Download(client, location, options)
    try:
        path = job.run(None)
    except ModelMissingError:
        from storage.registry.pull import is_version

        # What is on this machine is used where it is; a version of a registry there cannot be.
        if not is_version(location):
            raise
        path = job.from_cache(None)
    output.result({"uri": str(location), "path": path}, [path])


# -- right or wrong --------------------------------------------------------------------------


def _verify(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.verify import verify

    began = time.perf_counter()
    report = verify(client.cache, full=args.full, progress=_telling(output, "hashed"))
    output.note(
        f"looked at {count(report.checked, 'file')}, hashed {human_size(report.bytes)} in "
        f"{human_time(time.perf_counter() - began)}: {_problems(len(report.problems))}"
    )
    output.result(
        {
            "ok": not report.problems,
            "checked": report.checked,
            "bytes": report.bytes,
            "problems": [asdict(problem) for problem in report.problems],
        },
        map(_problem_line, report.problems),
    )
    if report.problems:
        raise IntegrityError(
            f"the cache {client.cache.upper.path} has {_problems(len(report.problems))}; "
            "`storage cache repair` fetches again what is damaged or missing"
        )


def _problems(number: int) -> str:
    return count(number, "problem") if number else "no problems"


def _problem_line(problem: Problem) -> str:
    moved = f"; moved to {problem.quarantined_to}" if problem.quarantined_to else ""
    models = f"; of {', '.join(problem.uris)}" if problem.uris else ""
    return f"{problem.kind}: {problem.path} {problem.what}{moved}{models}"


def _telling(output: Output, did: str) -> Callable[[int], None]:
    """Return what counts bytes and tells now and then how many there were."""
    total = 0
    told = time.monotonic()

    def tell(size: int) -> None:
        nonlocal total, told
        total += size
        if time.monotonic() - told > _LINE_INTERVAL:
            told = time.monotonic()
            output.note(f"{did} {human_size(total)}")

    return tell


def _repair(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.registry import fetch_again

    config = store_config(client, args.config)
    with output.reporter() as reporter:
        repairs = client.repair(full=args.full, config=config, progress=reporter, fetch=fetch_again)
    failed = [each for each in repairs if each.outcome not in ("repaired", "changed")]
    output.note(
        f"{len(repairs)} not in order, {len(repairs) - len(failed)} repaired"
        if repairs
        else "all is in order"
    )
    document = [{"uri": each.uri, "outcome": each.outcome, "what": each.what} for each in repairs]
    output.result(document, (f"{each.outcome}: {each.uri}: {each.what}" for each in repairs))
    if failed:
        raise TransferError(
            f"{len(failed)} of {len(repairs)} could not be repaired: "
            + "; ".join(f"{each.uri}: {each.what}" for each in failed)
        )


# -- what stays and what goes ----------------------------------------------------------------


def _gc(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.evict import evict, foresee
    from storage.cache.gc import collect, collectable
    from storage.cache.survey import occupied

    cache = client.cache
    cache.check_version()
    if args.grace is not None:
        cache.grace = args.grace
    target = cache.budget if args.size is None else args.size
    if args.dry_run:
        uris, size = foresee(cache, target)
        size += collectable(cache)
        output.note(
            f"would remove about {human_size(size)}: what {count(len(uris), 'source')} had, and "
            "what nothing leads to"
        )
        output.result({"bytes": size, "uris": uris}, uris)
        return
    collected = collect(cache)
    size, counts = collected.bytes, dict(collected.counts)
    if target is not None:
        evicted = evict(cache, target)
        size += evicted.bytes
        for name, number in (("models", evicted.models), ("blobs", evicted.blobs)):
            counts[name] = counts.get(name, 0) + number
    left = occupied(cache)
    went = ", ".join(f"{name}: {number}" for name, number in counts.items() if number)
    output.note(
        f"removed {human_size(size)}{went and f' ({went})'}; {human_size(left)} of content are left"
    )
    output.result({"bytes": size, "removed": counts, "left": left})
    if args.size is not None and left > args.size:
        raise InsufficientSpaceError(
            f"the cache {cache.upper.path} still takes {left} bytes, and {args.size} were asked "
            "for; what is left is pinned, in use, under way, or was used lately (--grace); "
            "nothing of it was removed"
        )


def _pin(client: StorageClient, args: Namespace, output: Output) -> None:
    location = parse_uri(args.uri)
    fresh = client.cache.pin(location)
    output.note(f"pinned {location}" if fresh else f"{location} was pinned already")
    output.result({"ok": True, "uri": str(location), "changed": fresh})


def _unpin(client: StorageClient, args: Namespace, output: Output) -> None:
    location = parse_uri(args.uri)
    was = client.cache.unpin(location)
    output.note(f"unpinned {location}" if was else f"{location} was not pinned")
    output.result({"ok": True, "uri": str(location), "changed": was})


def _rm(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.evict import delete

    location = parse_uri(args.uri)
    gone = delete(client.cache, location)
    output.note(f"removed {location}: {human_size(gone.bytes)}")
    output.result({"ok": True, "uri": str(location)} | asdict(gone))


# -- for a machine without a network ---------------------------------------------------------


def _export(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.parcel import export

    cache = client.cache
    refs = None
    if args.uris:
        refs = [ref for uri in args.uris for ref in _refs(cache, parse_uri(uri))]
    creator = f"modelstorage {__version__}"
    if args.file == "-":
        exported = export(cache, _Counted(output, output), refs, creator)
    else:
        with new_file(args.file) as file:
            exported = export(cache, _Counted(file, output), refs, creator)
    output.note(
        f"exported {count(len(exported.uris), 'model')}, {count(exported.blobs, 'blob')}, "
        f"{human_size(exported.size)}"
    )
    if args.file != "-":
        output.result({"file": args.file} | asdict(exported), [args.file])


def _refs(cache: ModelCache, location: Location) -> list[Ref]:
    found = [ref for root in cache.roots for ref in root.refs.of(location)]
    if not found:
        raise _not_cached(cache, location)
    return found


def _not_cached(cache: ModelCache, location: Location) -> ModelMissingError:
    uri = str(location)
    text = f"{uri} is not in the cache {cache.upper.path}; `storage cache ls` lists what is"
    return ModelMissingError(uri, text)


class _Counted:
    """A stream that tells now and then how much went through it."""

    def __init__(self, stream: Any, output: Output) -> None:
        self._stream = stream
        self._wrote = _telling(output, "wrote")
        self._read = _telling(output, "read")

    def write(self, data: bytes, /) -> None:
        self._stream.write(data)
        self._wrote(len(data))

    def read(self, size: int, /) -> bytes:
        data: bytes = self._stream.read(size)
        self._read(len(data))
        return data


def _import(client: StorageClient, args: Namespace, output: Output) -> None:
    from storage.cache.parcel import import_

    with contextlib.ExitStack() as stack:
        if args.file == "-":
            if sys.stdin is None:
                raise InvalidInput("standard input is closed; expected a parcel there")
            stream: BinaryIO = sys.stdin.buffer
        else:
            try:
                stream = stack.enter_context(open(args.file, "rb"))
            except OSError as exc:
                raise InvalidInput(
                    f"{args.file} cannot be read: {exc.strerror}; expected what `storage cache "
                    "export` wrote"
                ) from exc
        imported = import_(client.cache, _Counted(stream, output))
    output.note(
        f"imported {count(len(imported.uris), 'model')}, {human_size(imported.size)}; "
        f"{imported.new} of {count(imported.blobs, 'blob')} are new"
    )
    output.result(asdict(imported), imported.uris)


_COMMANDS: dict[str, Callable[[StorageClient, Namespace, Output], None]] = {
    "ls": _ls,
    "du": _du,
    "path": _path,
    "verify": _verify,
    "repair": _repair,
    "gc": _gc,
    "pin": _pin,
    "unpin": _unpin,
    "rm": _rm,
    "export": _export,
    "import": _import,
}
