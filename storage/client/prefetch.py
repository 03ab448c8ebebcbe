"""Filling the cache with all that a file names, before it is needed."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from storage.client.locked import download_model
from storage.client.lockfile import LockFile
from storage.client.parallel import map_parallel
from storage.client.sources import agreed_digest, fitting_configs
from storage.client.sourcing import complete
from storage.errors import ConfigurationError, InvalidInput, ModelMissingError, StorageError
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.client.signatures import RequireSignature

__all__ = ["PrefetchResult", "prefetch"]


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """What became of one entry of the file."""

    uri: str
    """The source, without credentials; several, separated by spaces, if they are of one model."""

    path: str | None
    """Where it is now; ``None`` if it failed."""

    error: StorageError | None
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class _Entry:
    locations: tuple[Location, ...]
    download: Callable[[Any], str]
    """Called with the config."""


def prefetch(
    client: StorageClient,
    file: str | os.PathLike[str],
    config: Any,
    pin: bool,
    jobs: int,
    require_signature: RequireSignature,
) -> list[PrefetchResult]:
    """Download what ``file`` names; see :meth:`StorageClient.prefetch`."""
    if jobs < 1:
        raise InvalidInput(f"jobs is {jobs}; expected at least 1")
    entries = _read(client, file, require_signature)
    if not entries:
        return []
    # One config for the whole file: it has to fit something in it, not every entry.
    configs = iter(fitting_configs([each for entry in entries for each in entry.locations], config))
    work = []
    for entry in entries:
        fitting = [next(configs) for _ in entry.locations]
        work.append((entry, config if any(each is not None for each in fitting) else None))

    def run(item: tuple[_Entry, Any]) -> PrefetchResult:
        entry, its_config = item
        uri = " ".join(map(str, entry.locations))
        try:
            path = entry.download(its_config)
            if pin:
                _pin(client, entry.locations, its_config)
        except StorageError as exc:
            return PrefetchResult(uri, None, exc)
        return PrefetchResult(uri, path, None)

    return map_parallel(run, work, jobs)


def _pin(client: StorageClient, locations: Sequence[Location], config: Any) -> None:
    """Pin what is cached of the sources of one model; not every one of them was needed."""
    for location, its_config in zip(locations, fitting_configs(locations, config), strict=True):
        try:
            client.cache.pin(complete(location, client.resolve_config(location, its_config)))
        except ModelMissingError:
            if len(locations) == 1 and not location.is_local:
                raise


def _read(
    client: StorageClient, file: str | os.PathLike[str], require_signature: RequireSignature
) -> list[_Entry]:
    name = os.fspath(file)
    try:
        with open(file, "rb") as stream:
            # Some editors begin a text with this mark.
            data = stream.read().removeprefix(codecs.BOM_UTF8)
    except OSError as exc:
        raise ConfigurationError(f"{name} cannot be read: {exc.strerror}") from exc
    if data.lstrip().startswith(b"{"):
        options = {"durable": True, "require_signature": require_signature}

        def download(model: Any, config: Any) -> str:
            return download_model(client, model, None, options | {"config": config})

        return [
            _Entry((parse_uri(model.uri),), partial(download, model))
            for model in LockFile.read(file).models
        ]
    return [
        _Entry(locations, partial(_download, client, uris, require_signature))
        for uris, locations in _read_lines(data, name)
    ]


def _download(
    client: StorageClient, uris: Sequence[str], require_signature: RequireSignature, config: Any
) -> str:
    return client.download(uris, config=config, durable=True, require_signature=require_signature)


def _read_lines(data: bytes, name: str) -> list[tuple[list[str], tuple[Location, ...]]]:
    """Return the sources that each line names."""
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            uris = [] if line.lstrip().startswith(b"#") else line.decode().split()
            if any(uri.startswith("#") for uri in uris):
                raise InvalidInput("a comment needs a line of its own, which begins with '#'")
            locations = tuple(parse_uri(uri) for uri in uris)
            agreed_digest(locations, None)
        except (InvalidInput, UnicodeDecodeError) as exc:
            why = exc if isinstance(exc, InvalidInput) else "it is not UTF-8 text"
            raise ConfigurationError(f"{name}, line {number}: {why}") from exc
        if uris:
            found.append((uris, locations))
    return found
