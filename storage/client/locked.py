"""Locking what sources are now, and downloading exactly that later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from storage.client.arguments import local_path
from storage.client.download import Download, DownloadOptions
from storage.client.lockfile import LockedFile, LockedModel, LockFile, lockable, repeated
from storage.client.parallel import map_parallel
from storage.client.sources import agreed_digest, fitting_configs
from storage.digest import hash_file
from storage.errors import IntegrityError, InvalidInput, few, one_line
from storage.files import translate_os_errors
from storage.transfer.plan import Patterns, Plan
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.transfer.progress import ProgressCallback

__all__ = ["download_locked", "download_model", "make_lock"]

_HASHING_THREADS = 2


# -- making ----------------------------------------------------------------------------------


def make_lock(
    client: StorageClient,
    uris: Sequence[str | os.PathLike[str]],
    config: Any,
    patterns: Patterns,
    progress: ProgressCallback | None,
) -> LockFile:
    """Return the lock of what ``uris`` are now; see :meth:`StorageClient.lock`."""
    if not uris:
        raise InvalidInput("there is nothing to lock; name at least one URI")
    locations = [parse_uri(uri) for uri in uris]
    names = [lockable(location) for location in locations]
    twice = repeated(names)
    if twice is not None:
        raise InvalidInput(f"{twice} is to be locked twice; name it once")
    models = []
    for uri, name, its_config in zip(uris, names, fitting_configs(locations, config), strict=True):
        path = client.download(
            uri,
            config=its_config,
            allow_patterns=patterns.allow,
            ignore_patterns=patterns.ignore,
            progress=progress,
        )
        is_tree, paths = _paths_of(client, uri, its_config, path, patterns)
        hashed = map_parallel(partial(_hash, path, is_tree), paths, _HASHING_THREADS)
        models.append(LockedModel(name, is_tree, tuple(hashed), patterns.allow, patterns.ignore))
    return LockFile(tuple(models))


def _paths_of(
    client: StorageClient,
    uri: str | os.PathLike[str],
    config: Any,
    path: str,
    patterns: Patterns,
) -> tuple[bool, list[str]]:
    """Return whether ``path`` is a tree, and the relative paths of its files, sorted."""
    if not os.path.isdir(path):
        return False, [os.path.basename(path)]
    if parse_uri(uri).is_local and not patterns.active:
        # Nothing was copied: what belongs to it is what a download would take.
        paths = [name for name, _ in client.list_infos(uri, config=config)]
    else:
        paths = [
            os.path.relpath(os.path.join(root, name), path)
            for root, _, names in os.walk(path)
            for name in names
        ]
    return True, sorted(paths, key=os.fsencode)


def _hash(path: str, is_tree: bool, name: str) -> LockedFile:
    size = 0

    def count(more: int) -> None:
        nonlocal size
        size += more

    with translate_os_errors(path):
        digests = hash_file(os.path.join(path, name) if is_tree else path, ("sha256",), count)
    return LockedFile(name, size, digests["sha256"].hex)


# -- using -----------------------------------------------------------------------------------


def download_locked(
    client: StorageClient,
    lock: LockFile | str | os.PathLike[str],
    uri: str | os.PathLike[str] | None,
    dest: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> str | list[str]:
    """Download exactly what was locked; see :meth:`StorageClient.download_locked`."""
    if not isinstance(lock, LockFile):
        lock = LockFile.read(lock)
    if uri is not None:
        model = lock.find(uri)
        agreed_digest([parse_uri(uri)], model.digest)
        return download_model(client, model, dest, options)
    if dest is not None and len(lock.models) != 1:
        raise InvalidInput(
            f"a destination is for one model, and the lock file has {len(lock.models)}; name one"
        )
    if not lock.models:
        return []
    locations = [parse_uri(model.uri) for model in lock.models]
    configs = fitting_configs(locations, options.get("config"))

    def download(item: tuple[LockedModel, Any]) -> str:
        return download_model(client, item[0], dest, {**options, "config": item[1]})

    return map_parallel(download, list(zip(lock.models, configs, strict=True)))


def download_model(
    client: StorageClient,
    model: LockedModel,
    dest: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> str:
    """Download exactly what one entry of a lock says.

    Args:
        client: does the work.
        model: the entry.
        dest: as for any download.
        options: of the download, by the names of ``DownloadOptions``.

    Raises:
        IntegrityError: the source is not what was locked.
    """
    asked = DownloadOptions(
        patterns=Patterns(model.allow, model.ignore),
        digest=model.digest,
        files=model.digests if model.is_tree else None,
        **options,
    )
    path = _LockedDownload(client, model, asked).run(None if dest is None else local_path(dest))
    # The listing of a tree could be the very text that an object was.
    if os.path.isdir(path) != model.is_tree:
        raise _unlike(model, [_kinds(not model.is_tree)])
    return path


class _LockedDownload(Download):
    """A download that ends before the first byte if the store tells of other files."""

    def __init__(self, client: StorageClient, model: LockedModel, options: DownloadOptions) -> None:
        super().__init__(client, parse_uri(model.uri), options)
        self._model = model

    def run(self, dest: str | None) -> str:
        if self.location.is_local:
            # Its files may be used where they are, without a plan.
            self.make_plan()
        return super().run(dest)

    def make_plan(self, location: Location | None = None) -> Plan:
        plan = super().make_plan(location)
        found = _compare(self._model, plan)
        if found:
            raise _unlike(self._model, found)
        return plan


def _unlike(model: LockedModel, found: Sequence[str]) -> IntegrityError:
    return IntegrityError(
        f"{model.uri} is not what was locked: {'; '.join(found)}; lock it anew if that is right"
    )


def _kinds(is_tree: bool) -> str:
    now, then = ("a tree", "one object") if is_tree else ("one object", "a tree")
    return f"it is {now} and was {then}"


def _compare(model: LockedModel, plan: Plan) -> list[str]:
    """Return in what a plan differs from the lock, as far as the store tells that."""
    if plan.is_tree != model.is_tree:
        return [_kinds(plan.is_tree)]
    locked = {file.path: file for file in model.files}
    # The name of a single object may be up to its server.
    names = [file.path for file in (plan if model.is_tree else model).files]
    found = dict(zip(names, (file.info for file in plan.files), strict=True))
    digests = model.digests
    missing = [path for path in locked if path not in found]
    extra = [path for path in found if path not in locked]
    changed = [
        path
        for path, info in found.items()
        if path in locked
        and (
            info.size not in (None, locked[path].size)
            or any(each.algorithm == "sha256" and each != digests[path] for each in info.digests)
        )
    ]
    return [
        f"{what} {_listed(paths)}"
        for what, paths in (("missing:", missing), ("not locked:", extra), ("changed:", changed))
        if paths
    ]


def _listed(paths: Sequence[str]) -> str:
    return few([one_line(path, 80) for path in sorted(paths)])
