"""Several sources of one model: the first that gives it, whole and verified, is enough."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from storage.client.offline import Offline, offline_mode, warn_of_copy
from storage.digest import Digest
from storage.errors import (
    ConfigurationError,
    DestinationError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    OfflineError,
    StorageError,
    TransferError,
    UnreachableError,
    one_line,
)
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient

__all__ = ["agreed_digest", "download_first", "fitting_configs"]

_log = logging.getLogger(__name__)
# Silent in programs that never set logging up.
logging.getLogger("storage").addHandler(logging.NullHandler())

# What no other source can mend: the call is wrong, or this machine cannot take the model.
_FINAL = (InvalidInput, DestinationError, ObjectExistsError)


def download_first(
    client: StorageClient,
    uris: Sequence[str | os.PathLike[str]],
    dest: str | os.PathLike[str] | None,
    *,
    config: Any,
    digest: str | Digest | None,
    offline: Offline,
    **options: Any,
) -> str:
    """Download from the first of ``uris`` that gives the model; the others are not asked.

    Offline, each is looked for in the cache in turn. With ``"auto"`` every store is asked
    before the cache is, and the cache only for those that could not be reached: a live mirror
    wins over an old copy.

    Args:
        client: does the work.
        uris: the sources, best first.
        dest: as for one source.
        config: for those sources whose type it fits.
        digest: expected of whatever source; a digest in one of the URIs counts for all.
        offline: as for one source.
        options: the other arguments of ``StorageClient.download``.

    Raises:
        InvalidInput: there is no source, or their digests differ.
        StorageError: all failed, by the most specific error that they share (else
            ``TransferError``); or one failed by what the others cannot mend.
    """
    if not uris:
        raise InvalidInput("the list of sources is empty; name at least one URI")
    locations = [parse_uri(uri) for uri in uris]
    configs = fitting_configs(locations, config)
    expected = agreed_digest(locations, digest)
    modes = [offline_mode(client.settings, location, offline) for location in locations]
    cache_last = "auto" in modes
    failures: dict[int, StorageError] = {}

    def attempt(index: int, offline: bool) -> str | None:
        try:
            return client.download(
                uris[index],
                dest,
                config=configs[index],
                digest=expected,
                offline=offline,
                **options,
            )
        except _FINAL:
            raise
        except StorageError as exc:
            _log.warning("a source failed: %s", _reason(locations[index], exc))
            failures[index] = exc
            return None

    for index, mode in enumerate(modes):
        if cache_last and mode is True:
            continue
        path = attempt(index, mode is True)
        if path is not None:
            return path
    for index in range(len(modes)) if cache_last else ():
        unreachable = failures.get(index)
        if not (unreachable is None or isinstance(unreachable, UnreachableError)):
            continue
        path = attempt(index, True)
        if path is not None:
            if unreachable is not None:
                warn_of_copy(_reason(locations[index], unreachable))
            return path
        if unreachable is not None and isinstance(failures[index], OfflineError):
            failures[index] = unreachable
    errors = [failures[index] for index in range(len(modes))]
    if len(errors) == 1:
        raise errors[0]
    raise _summary(locations, errors) from errors[0]


def agreed_digest(locations: Sequence[Location], digest: str | Digest | None) -> Digest | None:
    """Return the one digest that is expected of all ``locations``, if any.

    Args:
        locations: sources of the same model.
        digest: what the call expects.

    Raises:
        InvalidInput: two are named that are not the same.
    """
    given = None if digest is None else Digest.parse(digest)
    for location in locations:
        named = None if location.digest is None else Digest.parse(location.digest)
        if given is not None and named is not None and named != given:
            raise InvalidInput(
                f"the sources are of one model, but {replace(location, digest=None)} is expected "
                f"to be {named} and another source, or the call, names {given}; keep one digest"
            )
        given = given or named
    return given


def fitting_configs(locations: Sequence[Location], config: Any) -> list[Any]:
    """Return for each location ``config`` if it is of the location's type, else ``None``.

    Raises:
        ConfigurationError: it fits none of them, or it is a mapping that does not tell which.
    """
    if config is None:
        return [None] * len(locations)
    fits = [_is_for(config, location) for location in locations]
    if not any(fits):
        raise ConfigurationError(
            f"the config ({_shown(config)}) fits none of the sources "
            f"{', '.join(map(str, locations))}; pass one for their stores, or none"
        )
    kinds = {location.type for location, fit in zip(locations, fits, strict=True) if fit}
    if isinstance(config, Mapping) and "type" not in config and len(kinds) > 1:
        raise ConfigurationError(
            f"the config is {_shown(config)} without a type, and the sources are in stores of "
            f"several: {', '.join(sorted(kinds))}; add its type, or pass a typed config"
        )
    return [config if fit else None for fit in fits]


def _is_for(config: Any, location: Location) -> bool:
    from storage.config.resolve import config_class, make_config, read_type

    wanted = config_class(location.type)
    if isinstance(config, Mapping):
        kind = config.get("type")
        return wanted is not None and (kind is None or config_class(read_type(kind)) is wanted)
    try:
        make_config(location.type, config, str(location))
    except ConfigurationError:
        return False
    return True


def _shown(config: Any) -> str:
    return "a mapping" if isinstance(config, Mapping) else type(config).__name__


def _reason(location: Location, error: StorageError) -> str:
    # Most messages begin with the source themselves.
    text = one_line(error).removeprefix(f"{location}: ")
    return f"{location}: {_public_types(error)[0].__name__}: {text}"


def _summary(locations: Sequence[Location], errors: Sequence[StorageError]) -> StorageError:
    reasons = "; ".join(map(_reason, locations, errors))
    text = f"none of the {len(errors)} sources gave the model: {reasons}"
    shared = next(
        kind
        for kind in _public_types(errors[0])
        if all(isinstance(error, kind) for error in errors)
    )
    if issubclass(shared, ModelMissingError):
        return shared(str(locations[0]), text)
    return TransferError(text) if shared is StorageError else shared(text)


def _public_types(error: StorageError) -> list[type[StorageError]]:
    """Return what an error is, the most specific first, without types of inner modules."""
    return [
        kind
        for kind in type(error).__mro__
        if issubclass(kind, StorageError) and kind.__module__ == StorageError.__module__
    ]
