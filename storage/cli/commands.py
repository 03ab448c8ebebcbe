"""What each command does: a call of the client, and a result for people and for programs."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import TYPE_CHECKING, Any

from storage.cli.output import (
    Output,
    Reporter,
    amounts,
    count,
    human_size,
    human_time,
    iso_time,
)
from storage.errors import IntegrityError, ModelMissingError, TransferError, one_line
from storage.uri import parse_uri

if TYPE_CHECKING:
    from storage.backends.base import ObjectInfo
    from storage.client import StorageClient
    from storage.client.signatures import SignaturePolicy
    from storage.digest import Digest

__all__ = ["fetch_options", "run", "store_config"]

_BLOCK = 1024 * 1024


def run(args: Namespace, output: Output) -> None:
    """Run the command that ``args`` names.

    Raises:
        StorageError: it failed.
        ReaderGoneError: nobody reads its result.
    """
    _COMMANDS[args.command](args, output)


def _client() -> StorageClient:
    # Here, because what it imports takes longer than what some commands do.
    from storage.client import StorageClient

    return StorageClient()


def store_config(client: StorageClient, name: str | None) -> Any:
    """Return the config that ``--config`` names; ``None`` if it was not given."""
    if name is None:
        return None
    from storage.config import named_config

    return named_config(name, client.settings)


def fetch_options(args: Namespace) -> dict[str, Any]:
    """Return the options of a download that ``add_fetching`` and ``--offline`` ask for."""
    return {
        "offline": True if args.offline else None,
        "freshness": args.freshness,
        "cache": args.cache or None,
        "link": args.link,
        "overwrite": args.overwrite,
        "require_signature": _policy(args.require_signature),
    }


def _policy(file: str | None) -> SignaturePolicy | None:
    if file is None:
        return None
    from storage.client.signatures import SignaturePolicy

    return SignaturePolicy.read(file)


def _download(args: Namespace, output: Output) -> None:
    began = time.perf_counter()
    with _client() as client, output.reporter() as reporter:
        config = store_config(client, args.config)
        if args.dry_run:
            _print_plan(client, config, args, output)
            return
        options = {"config": config} | fetch_options(args)
        if args.locked is not None:
            _download_locked(client, args, options, reporter, output)
            return
        path = client.download(
            [args.uri, *args.mirror] if args.mirror else args.uri,
            args.dest,
            allow_patterns=args.allow,
            ignore_patterns=args.ignore,
            digest=args.digest,
            unpack=args.unpack,
            progress=reporter,
            **options,
        )
    output.note_summary(reporter)
    document = {"uri": _shown(args.uri), "path": path} | amounts(reporter, began)
    output.result(document, [path])


def _download_locked(
    client: StorageClient,
    args: Namespace,
    options: dict[str, Any],
    reporter: Reporter,
    output: Output,
) -> None:
    from storage.client.lockfile import LockFile

    began = time.perf_counter()
    lock = LockFile.read(args.locked)
    if args.uri is not None:
        path = client.download_locked(lock, args.uri, args.dest, progress=reporter, **options)
        output.note_summary(reporter)
        document = {"uri": _shown(args.uri), "path": path} | amounts(reporter, began)
        output.result(document, [path])
        return
    # Of several at once no bar could tell.
    paths = client.download_locked(lock, None, args.dest, **options)
    output.note(f"downloaded {count(len(paths), 'model')} in {_elapsed(began)}")
    models = [
        {"uri": model.uri, "path": path} for model, path in zip(lock.models, paths, strict=True)
    ]
    output.result({"models": models}, paths)


def _print_plan(client: StorageClient, config: Any, args: Namespace, output: Output) -> None:
    plan = client.plan_download(
        args.uri, config=config, allow_patterns=args.allow, ignore_patterns=args.ignore
    )
    entries = [(file.path, file.info) for file in plan.files]
    document = {
        "uri": plan.uri,
        "type": "tree" if plan.is_tree else "object",
        "size": plan.size,
        "objects": len(entries),
        "files": [_entry(path, info) for path, info in entries],
    }
    size = "unknown size" if plan.size is None else human_size(plan.size)
    output.note(f"would download {count(len(entries), 'object')}, {size}, from {plan.uri}")
    output.result(document, _long_lines(entries))


def _upload(args: Namespace, output: Output) -> None:
    began = time.perf_counter()
    with _client() as client, output.reporter() as reporter:
        client.upload(
            args.src,
            args.uri,
            config=store_config(client, args.config),
            overwrite=not args.no_overwrite,
            allow_patterns=args.allow,
            ignore_patterns=args.ignore,
            progress=reporter,
        )
    output.note_summary(reporter)
    document = {"ok": True, "source": args.src, "uri": _shown(args.uri)}
    output.result(document | amounts(reporter, began))


def _ls(args: Namespace, output: Output) -> None:
    from storage.transfer.plan import Patterns

    patterns = Patterns(args.allow, args.ignore)
    with _client() as client:
        found = client.list_infos(args.uri, config=store_config(client, args.config))
    entries = [(path, info) for path, info in found if patterns.wants(path)]
    if not entries:
        shown = _shown(args.uri)
        raise ModelMissingError(
            shown,
            f"{shown}: none of its {count(len(found), 'object')} matches the patterns; "
            f"allowed {patterns.allow}, ignored {patterns.ignore}",
        )
    lines = _long_lines(entries) if args.long else (path for path, _ in entries)
    output.result([_entry(path, info) for path, info in entries], lines)


def _stat(args: Namespace, output: Output) -> None:
    with _client() as client:
        found = client.get_object_metadata(args.uri, config=store_config(client, args.config))
    output.result(found, _field_lines(found))


def _cp(args: Namespace, output: Output) -> None:
    began = time.perf_counter()
    with _client() as client, output.reporter() as reporter:
        client.copy_object(
            args.src_uri,
            args.dest_uri,
            config=store_config(client, args.config),
            dest_config=store_config(client, args.dest_config),
            progress=reporter,
        )
    output.note_summary(reporter)
    document = {"ok": True, "source": _shown(args.src_uri), "uri": _shown(args.dest_uri)}
    output.result(document | amounts(reporter, began))


def _mirror(args: Namespace, output: Output) -> None:
    from storage.cli.mirror_command import run

    run(args, output)


def _rm(args: Namespace, output: Output) -> None:
    with _client() as client:
        client.delete_object(
            args.uri, config=store_config(client, args.config), recursive=args.recursive
        )
    output.note(f"deleted {_shown(args.uri)}")
    output.result({"ok": True, "uri": _shown(args.uri)})


def _cat(args: Namespace, output: Output) -> None:
    from storage.digest import Digest, MultiHasher

    location = parse_uri(args.uri)
    with (
        _client() as client,
        client.open(args.uri, "rb", config=store_config(client, args.config)) as stream,
    ):
        known: list[tuple[str, Digest]] = []
        if location.digest is not None:
            known.append(("the URI expects", Digest.parse(location.digest)))
        # One digest of the store's is enough, and it names the cheapest first.
        known += [("the store says", digest) for digest in stream.raw.info.digests[:1]]  # type: ignore[attr-defined]
        hasher = MultiHasher({digest.algorithm for _, digest in known})
        block = stream.read(_BLOCK)
        while True:
            hasher.update(block)
            following = stream.read(_BLOCK) if block else b""
            if not following:
                # The last block is held back: whoever gets all bytes gets the right ones.
                _check(str(location), known, hasher.digests())
            output.write(block)
            if not following:
                return
            block = following


def _check(where: str, known: Iterable[tuple[str, Digest]], found: Mapping[str, Digest]) -> None:
    for source, digest in known:
        if found[digest.algorithm] != digest:
            raise IntegrityError(
                f"{where}: {source} {digest}, but the bytes that arrived are "
                f"{found[digest.algorithm]}; the last of them were not written"
            )


def _spec(args: Namespace, output: Output) -> None:
    spec = parse_uri(args.uri).spec()
    output.result(spec, _field_lines(spec))


def _lock(args: Namespace, output: Output) -> None:
    with _client() as client, output.reporter() as reporter:
        lock = client.lock(
            args.uris,
            config=store_config(client, args.config),
            allow_patterns=args.allow,
            ignore_patterns=args.ignore,
            progress=reporter,
        )
    # JSON in any case: this is the file.
    output.write(lock.dumps().encode())


def _prefetch(args: Namespace, output: Output) -> None:
    began = time.perf_counter()
    with _client() as client:
        results = client.prefetch(args.file, config=store_config(client, args.config), pin=args.pin)
    failed = [result for result in results if result.error is not None]
    models = [
        {
            "uri": result.uri,
            "path": result.path,
            "error": None if result.error is None else one_line(result.error, 2000),
        }
        for result in results
    ]
    output.note(f"fetched {count(len(results) - len(failed), 'model')} in {_elapsed(began)}")
    output.result({"models": models}, [result.path for result in results if result.path])
    if failed:
        reasons = "; ".join(f"{result.uri}: {result.error}" for result in failed)
        raise TransferError(f"{len(failed)} of {count(len(results), 'model')} failed: {reasons}")


def _cache(args: Namespace, output: Output) -> None:
    from storage.cli.cache_commands import run

    run(args, output)


def _container(args: Namespace, output: Output) -> None:
    from storage.cli.container_commands import run

    run(args, output)


def _archive(args: Namespace, output: Output) -> None:
    from storage.cli.archive_commands import run

    run(args, output)


def _registry(args: Namespace, output: Output) -> None:
    from storage.cli.registry_commands import run

    run(args, output)


def _quickstart(args: Namespace, output: Output) -> None:
    from storage.cli.quickstart import quickstart

    report = quickstart(args.dir)
    output.result(report.document(), [report.folder] if output.quiet else report.lines())


_COMMANDS = {
    "download": _download,
    "upload": _upload,
    "ls": _ls,
    "stat": _stat,
    "cp": _cp,
    "mirror": _mirror,
    "rm": _rm,
    "cat": _cat,
    "spec": _spec,
    "lock": _lock,
    "prefetch": _prefetch,
    "cache": _cache,
    "archive": _archive,
    "container": _container,
    "registry": _registry,
    "quickstart": _quickstart,
}


def _shown(uri: str) -> str:
    """Return the canonical URI, without what may be a credential."""
    return str(parse_uri(uri))


def _elapsed(began: float) -> str:
    return human_time(time.perf_counter() - began)


def _entry(path: str, info: ObjectInfo) -> dict[str, Any]:
    return {
        "path": path,
        "size": info.size,
        "modified_time": iso_time(info.modified),
        "etag": info.etag,
    }


def _long_lines(entries: Iterable[tuple[str, ObjectInfo]]) -> Iterable[str]:
    rows = [
        (
            "-" if info.size is None else str(info.size),
            "-" if info.modified is None else f"{info.modified.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            path,
        )
        for path, info in entries
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return (f"{size:>{widths[0]}}  {when:<{widths[1]}}  {path}" for size, when, path in rows)


def _field_lines(fields: Mapping[str, Any]) -> Iterable[str]:
    """Return a line for each field that says something; a dict's fields below its name."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}: {item}" for inner, item in value.items())
        elif hasattr(value, "isoformat"):
            yield f"{name}: {value.isoformat()}"
        elif value is not None:
            yield f"{name}: {value}"
