"""One download from URI to local path: plan, cache, destination, verification."""

from __future__ import annotations

import os
import shutil
import warnings
from typing import TYPE_CHECKING, Any

from storage.cache.snapshots import SnapshotStore, source_id
from storage.config.ambient import is_true
from storage.digest import Digest, hash_file, tree_digest
from storage.errors import IntegrityError, InvalidInput, OfflineError, UnreachableError
from storage.transfer.destination import Destination, check_space, translate_os_errors
from storage.transfer.download import fetch
from storage.transfer.plan import Patterns, Plan, make_plan, resolve
from storage.transfer.progress import Meter, ProgressCallback
from storage.uri import Location

if TYPE_CHECKING:
    from storage.client.client import StorageClient

__all__ = ["Download"]


class Download:
    """What one call of ``download`` was asked for, and the ways to do it."""

    def __init__(
        self,
        client: StorageClient,
        location: Location,
        config: Any,
        patterns: Patterns,
        digest: str | Digest | None,
        unpack: bool,
        offline: bool | str | None,
        overwrite: bool,
        progress: ProgressCallback | None,
    ) -> None:
        """Keep the arguments; refuse what contradicts itself."""
        self._client = client
        self._location = location
        self._config = config
        self._patterns = patterns
        self._expected = _expected(location, digest)
        self._unpack = unpack
        # The Hub's own switch, which its users set already.
        if offline is not False and location.scheme == "hf" and is_true("HF_HUB_OFFLINE"):
            offline = True
        self._offline = client.settings.offline if offline is None else offline
        if self._offline not in (True, False, "auto"):
            raise InvalidInput(f"offline is True, False or 'auto', not {offline!r}")
        self._overwrite = overwrite
        self._progress = progress
        self._cache = SnapshotStore(str(client.settings.cache_dir))

    def run(self, dest: str | None) -> str:
        """Download to ``dest``, or to where the cache keeps it, and return the path."""
        if self._location.is_local:
            return self._from_this_machine(dest)
        if self._offline is True:
            return self._from_cache(dest)
        try:
            return self._from_store(dest)
        except UnreachableError as exc:
            if self._offline != "auto":
                raise
            try:
                path = self._from_cache(dest)
            except OfflineError:
                raise exc from None
            warnings.warn(f"{exc}; the cached copy is used", RuntimeWarning, stacklevel=4)
            return path

    def _from_this_machine(self, dest: str | None) -> str:
        if dest is not None:
            self._refuse_overlap(dest)
        elif not self._unpack and not self._patterns.active:
            return self._in_place()
        return self._from_store(dest)

    def _in_place(self) -> str:
        """Return the path of what is here already, checked if a digest is expected."""
        backend = self._client.backend(self._location, self._config)
        is_tree, objects = resolve(backend, self._location)
        if self._location.scheme == "pvc":
            # Whoever reads the tree follows its links: none of them may lead out of the claim.
            objects = iter(list(objects))
        path = backend.local_path(self._location.key.rstrip("/"))
        assert path is not None
        if self._expected is not None:
            skip = len(self._location.prefix)
            self._check_files(
                path, [info.key[skip:] for info in objects] if is_tree else [], is_tree
            )
        return path

    def _refuse_overlap(self, dest: str) -> None:
        backend = self._client.backend(self._location, self._config)
        source = backend.local_path(self._location.key.rstrip("/"))
        assert source is not None
        source, target = os.path.realpath(source), os.path.realpath(dest)
        inside = os.path.join(target, "")
        # A whole tree may be put onto itself; a part of it would take the rest away.
        onto_itself = source == target and self._patterns.active
        if target.startswith(os.path.join(source, "")) or (
            (source.startswith(inside) or onto_itself) and os.path.isdir(source)
        ):
            raise InvalidInput(
                f"{dest} and the source {source} are inside one another; "
                "choose a destination elsewhere"
            )

    def _from_store(self, dest: str | None) -> str:
        plan = self._client.run_retried(
            make_plan,
            self._client.backend(self._location, self._config),
            self._location,
            self._patterns,
        )
        if dest is None:
            return self._to_cache(plan)
        path = dest
        if not plan.is_tree and not self._unpack and (dest.endswith("/") or os.path.isdir(dest)):
            path = os.path.join(dest, plan.files[0].path)
        return self._fetch(plan, path, self._overwrite)

    def _to_cache(self, plan: Plan) -> str:
        fingerprint = plan.fingerprint()
        snapshot = source_id(self._source, *self._filters, fingerprint)
        path = self._cache.place(snapshot, self._name(plan))
        if fingerprint is not None and os.path.exists(path):
            self._check_present(plan, path)
        else:
            path = self._fetch(plan, path, overwrite=True)
        reference = source_id(self._source, *self._filters)
        is_tree = plan.is_tree or self._unpack
        self._cache.remember(
            reference, self._cache.new_snapshot(str(self._location), path, is_tree)
        )
        return path

    def _from_cache(self, dest: str | None) -> str:
        """Take what the source was when it was cached last; no backend, no socket."""
        reference = source_id(self._source, *self._filters)
        path = self._cache.recall(reference, str(self._location))
        is_tree = os.path.isdir(path)
        if self._expected is not None and not self._unpack:
            self._check_files(path, _files_below(path) if is_tree else [], is_tree)
        if dest is None:
            return path
        if not is_tree and (dest.endswith("/") or os.path.isdir(dest)):
            dest = os.path.join(dest, os.path.basename(path))
        with Destination(
            dest, tree=is_tree, overwrite=self._overwrite, durable=self._durable
        ) as destination:
            with translate_os_errors(dest):
                if is_tree:
                    shutil.copytree(path, destination.content, dirs_exist_ok=True)
                else:
                    shutil.copyfile(path, destination.content)
            return destination.publish()

    def _fetch(self, plan: Plan, path: str, overwrite: bool) -> str:
        """Fetch, verify and publish."""
        if self._unpack and plan.is_tree:
            raise InvalidInput(f"{plan.uri} is a tree; unpack=True is for one archive")
        is_tree = plan.is_tree or self._unpack
        client = self._client
        meter = Meter("download", plan.uri, plan.size, len(plan.files), self._progress)
        with Destination(
            path, tree=is_tree, overwrite=overwrite, durable=self._durable
        ) as destination:
            check_space(os.path.dirname(destination.content), plan.size or 0)
            archive = destination.scratch(plan.files[0].path) if self._unpack else None
            files = fetch(
                client.backend(self._location, self._config),
                plan,
                destination.content if plan.is_tree else None,
                archive if self._unpack else destination.content,
                options=client.transfer_options,
                budget=client.budget,
                meter=meter,
                algorithms=() if self._expected is None else (self._expected.algorithm,),
                expected=None if plan.is_tree else self._expected,
            )
            if plan.is_tree:
                self._check_tree({file.path: file.digests for file in files})
            if archive is not None:
                from storage.container.archive import extract_archive

                with translate_os_errors(path):
                    extract_archive(archive, destination.content)
                    os.unlink(archive)
            published = destination.publish()
        meter.finish()
        return published

    def _check_present(self, plan: Plan, path: str) -> None:
        if self._expected is not None and not self._unpack:
            self._check_files(path, [file.path for file in plan.files], plan.is_tree)
        meter = Meter("download", plan.uri, plan.size, len(plan.files), self._progress)
        meter.add_present(plan.size or 0)
        for _ in plan.files:
            meter.add_object()
        meter.finish()

    def _check_files(self, path: str, files: list[str], is_tree: bool) -> None:
        """Compare files that are here already with the expected digest."""
        assert self._expected is not None
        algorithm = self._expected.algorithm
        with translate_os_errors(path):
            if is_tree:
                self._check_tree(
                    {name: hash_file(os.path.join(path, name), (algorithm,)) for name in files}
                )
                return
            found = hash_file(path, (algorithm,))[algorithm]
        if found != self._expected:
            raise IntegrityError(
                f"{self._location}: expected {self._expected}, but {path} is {found}"
            )

    def _check_tree(self, digests: dict[str, dict[str, Digest]]) -> None:
        if self._expected is None:
            return
        algorithm = self._expected.algorithm
        found = tree_digest({path: each[algorithm] for path, each in digests.items()}, algorithm)
        if found != self._expected:
            raise IntegrityError(
                f"{self._location}: the tree is expected to be {self._expected}, but what "
                f"arrived is {found}; nothing was published"
            )

    @property
    def _durable(self) -> bool:
        return self._client.transfer_options.durable

    @property
    def _source(self) -> str:
        """Identity of the source for the cache; hashed before it is written anywhere."""
        return self._location.url or str(self._location)

    @property
    def _filters(self) -> tuple[object, ...]:
        return self._patterns.allow, self._patterns.ignore, self._unpack

    def _name(self, plan: Plan) -> str:
        if not plan.is_tree:
            return plan.files[0].path
        name = self._location.name or self._location.bucket.replace("/", "--")
        return name if name not in ("", ".", "..") else "model"


def _expected(location: Location, digest: str | Digest | None) -> Digest | None:
    given = None if digest is None else Digest.parse(digest)
    named = None if location.digest is None else Digest.parse(location.digest)
    if given is not None and named is not None and given != named:
        raise InvalidInput(
            f"{location}: the URI expects {named} and the call expects {given}; drop one"
        )
    return given or named


def _files_below(folder: str) -> list[str]:
    return [
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    ]
