"""ForML's model registry and its inventory of applications, on any store of this library.

ForML 0.93 finds both by their qualified names in its ``config.toml``::

    [REGISTRY.models]
    provider = "storage.integrations.forml:Registry"
    uri = "s3://models/forml"

    [INVENTORY.applications]
    provider = "storage.integrations.forml:Inventory"
    uri = "s3://models/forml"
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import re
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import forml  # type: ignore[import-not-found]
from forml import application as applications
from forml import project as projects
from forml.io import asset  # type: ignore[import-not-found]

from storage.client.parallel import map_parallel
from storage.digest import Digest, hash_file, tree_digest
from storage.errors import BucketMissingError, ModelMissingError, ObjectExistsError, few
from storage.files import sync_tree
from storage.integrations.forml import naming
from storage.integrations.forml.place import Place, digest_of
from storage.integrations.scratch import remove_dead, scratch
from storage.registry import layout
from storage.registry.documents import encode, read_fields
from storage.transfer import events
from storage.transfer.plan import Patterns
from storage.transfer.progress import Meter
from storage.transfer.upload import SourceFile, scan, upload

__all__ = ["Inventory", "Registry"]

_LOGGER = logging.getLogger(__name__)
# As ForML itself leaves out of a folder that it installs.
_CONTENT = Patterns(ignore=("__pycache__/", "*/__pycache__/"))
# ForML reads a manifest, or a descriptor, by an import for which it exchanges sys.path and takes
# entries out of sys.modules. Two threads would get one another's, and lose entries of sys.path.
_one_thread = threading.RLock()


def _after_fork() -> None:
    # The thread that held it does not exist in the child.
    global _one_thread
    _one_thread = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


class Registry(asset.Registry):  # type: ignore[misc]
    """ForML's model registry on any store that can be listed and creates objects only if absent.

    Several processes and machines may use it at once. Two registries are equal if their URIs and
    staging folders are. A pickled one takes along both, and no connection.
    """

    def __init__(
        self, uri: str | os.PathLike[str], staging: str | os.PathLike[str] | None = None
    ) -> None:
        """Address a registry; nothing is asked of the store yet.

        Args:
            uri: where it is, or will be.
            staging: folder that all nodes of a distributed runner reach, where packages are
                installed; a temporary one of this process if ``None``.

        Raises:
            InvalidInput: the URI cannot be written to.
        """
        self._place = Place(uri)
        self._given = (self._place.uri, os.path.abspath(staging) if staging else None)
        # Without one, ForML makes a new folder for every registry that it unpickles.
        with _one_thread:
            super().__init__(self._given[1] or _temporary_staging(self._place.location))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._place.location)!r})"

    def __hash__(self) -> int:
        return hash((type(self), self._place.location, self._staging))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Registry)
            and other._place.location == self._place.location
            and other._staging == self._staging
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given

    # -- listings ----------------------------------------------------------------------------

    def projects(self) -> list[Any]:
        """Return the keys of all projects that have a release."""
        found = {naming.project_of(name) for name in self._place.names(naming.RELEASES)}
        return [asset.Project.Key(name) for name in sorted(filter(None, found))]

    def releases(self, project: Any) -> list[Any]:
        """Return the keys of all releases of ``project``, in no order; none if there is none."""
        found = map(naming.release_of, self._place.names(naming.releases(project)))
        return [asset.Release.Key(version) for version in filter(None, found)]

    def generations(self, project: Any, release: Any) -> list[Any]:
        """Return the keys of all generations of a release; none if there is no such release."""
        found = map(layout.number_of, self._place.names(naming.generations(project, release)))
        return [asset.Generation.Key(number) for number in filter(None, found)]

    # -- packages ----------------------------------------------------------------------------

    def push(self, package: Any) -> None:
        """Store a package, a file or a folder, as the release that its manifest says.

        Nothing happens if the very same package is there already.

        Raises:
            forml.io.asset.Level.Invalid: the release has another package.
            UnsupportedOperation: the store cannot decide between two writers.
        """
        place = self._place
        place.check()
        project, release = package.manifest.name, package.manifest.version
        is_tree, files = scan(str(package.path), _CONTENT)
        digest = _package_digest(is_tree, files)
        name = naming.release(project, release)
        document = {
            "project": str(project),
            "release": str(release),
            "is_tree": is_tree,
            "digest": str(digest),
        }
        there = place.document(name, cached=False)
        if there is None:
            self._upload(naming.package(project, release, digest), is_tree, files)
            if place.objects.create(name, encode(document)):
                return
            there = place.document(name, cached=False)
        if there is None or there.get("digest") != str(digest):
            raise asset.Level.Invalid(
                f"{project}-{release} is released already, with another package; releases never "
                "change, so increment the version"
            )

    def _upload(self, base: str, is_tree: bool, files: Sequence[SourceFile]) -> None:
        """Upload the files of a package to names that begin with ``base``."""
        objects = self._place.objects

        def name_of(file: SourceFile) -> str:
            return f"{base}{file.path if is_tree else naming.PACKAGE}"

        where = objects.where(base)
        with events.transfer("upload", where):
            meter = Meter("upload", where, sum(file.size for file in files), len(files), None)
            upload(
                objects.backend,
                files,
                lambda file: objects.key(name_of(file)),
                where=lambda file: objects.where(name_of(file)),
                options=objects.client.transfer_options,
                budget=objects.client.budget,
                meter=meter,
                # What may be there is of the same package, by its name: the same bytes.
                if_absent=False,
            )
            meter.finish()

    def pull(self, project: Any, release: Any) -> Any:
        """Return the package of a release, verified; it is a copy that lasts like the process.

        Raises:
            forml.MissingError: there is no such release.
            IntegrityError: the store has another package than was pushed.
        """
        return self._pull(project, release, tempfile.mkdtemp(dir=asset.TMPDIR))

    def mount(self, project: Any, release: Any) -> Any:
        """Install the package of a release into the staging folder; return the artifact.

        A package is installed once, whole or not at all, whoever else mounts it meanwhile, in
        another thread, process or machine.

        Raises:
            forml.MissingError: there is no such release.
            IntegrityError: the store has another package than was pushed.
        """
        _, digest = self._released(project, release)
        # ForML tells installed packages by their manifests alone. Those of two registries, or of
        # an installation that was killed, would pass for one another.
        target = self._staging / naming.package(project, release, digest)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=asset.TMPDIR) as folder:
                _install(self._pull(project, release, folder), target)
        else:
            remove_dead(str(target.parent))
        with _one_thread:
            return projects.Package(target).install(target)

    def _pull(self, project: Any, release: Any, folder: str) -> Any:
        is_tree, digest = self._released(project, release)
        name = naming.package(project, release, digest)
        try:
            path = self._place.fetch(
                name if is_tree else f"{name}{naming.PACKAGE}",
                os.path.join(folder, naming.PACKAGE),
                digest,
            )
        except ModelMissingError as exc:
            raise forml.MissingError(f"the package of {project}-{release} is gone: {exc}") from exc
        with _one_thread:
            return projects.Package(path)

    def _released(self, project: Any, release: Any) -> tuple[bool, Digest]:
        """Return whether a release's package is a folder, and its digest."""
        name = naming.release(project, release)
        document = self._place.document(name)
        if document is None:
            raise forml.MissingError(
                f"{self!r} has no release {release} of a project {project}; its releases are "
                f"{few([str(key) for key in sorted(self.releases(project))]) or 'none'}"
            )
        fields = read_fields(document, self._place.objects.where(name), is_tree=bool, digest=str)
        return fields["is_tree"], Digest.parse(fields["digest"])

    # -- states ------------------------------------------------------------------------------

    def write(self, project: Any, release: Any, sid: uuid.UUID, state: bytes) -> None:
        """Keep a state for a generation that is yet to be closed.

        Nothing happens if the very same state is there already.

        Raises:
            forml.io.asset.Level.Invalid: there is no such release, or another state has this id.
            UnsupportedOperation: the store cannot decide between two writers.
        """
        place = self._place
        place.objects.check()
        self._demand(project, release)
        digest = digest_of(state)
        name = f"{naming.state(project, release, sid)}{digest.hex}"
        there = self._staged(project, release, sid)
        if there not in ({}, {digest.hex: len(state)}):
            raise asset.Level.Invalid(
                f"{project}-{release} has another state with the id {sid}; states never change"
            )
        if not there:
            try:
                place.send(name, state, "application/octet-stream", if_absent=True)
                return
            except ObjectExistsError:
                _LOGGER.debug("State %s was written twice at once", sid)
        place.objects.settle(name)

    def read(self, project: Any, release: Any, generation: Any, sid: uuid.UUID) -> bytes:
        """Return a state of a generation, verified; nothing if the generation has no such state.

        Raises:
            forml.io.asset.Level.Invalid: there is no such generation.
            ModelMissingError: the store has lost the state.
            IntegrityError: the store has other bytes than were written.
        """
        name = naming.generation(project, release, generation)
        document = self._place.document(name)
        if document is None:
            raise asset.Level.Invalid(
                f"{self!r} has no generation {generation} of {project}-{release}"
            )
        where = self._place.objects.where(name)
        states = read_fields(document, where, states=dict)["states"]
        if str(sid) not in states:
            _LOGGER.warning(
                "Generation %s of %s-%s has no state %s", generation, project, release, sid
            )
            return b""
        fields = read_fields(states[str(sid)], f"{where}: states", blake3=str)
        digest = Digest("blake3", fields["blake3"])
        return self._place.read(f"{naming.state(project, release, sid)}{digest.hex}", digest)

    def open(self, project: Any, release: Any, generation: Any) -> Any:
        """Return the tag of a generation.

        Raises:
            forml.io.asset.Level.Listing.Empty: there is no such generation.
        """
        name = naming.generation(project, release, generation)
        document = self._place.document(name)
        if document is None:
            raise asset.Level.Listing.Empty(
                f"{self!r} has no generation {generation} of {project}-{release}"
            )
        fields = read_fields(document, self._place.objects.where(name), tag=str)
        return asset.Tag.loads(fields["tag"].encode())

    def close(self, project: Any, release: Any, generation: Any, tag: Any) -> None:
        """Commit a generation: from now on it is seen, with all states that its tag names.

        Of several who close the same number at once, one does. Whoever did not may close the next
        one, as ``asset.Release.put`` does when it is called again: the states are still there.

        Raises:
            forml.io.asset.Level.Invalid: there is no such release, somebody else closed the
                generation, a state is missing, or ForML could not read the tag again.
            UnsupportedOperation: the store cannot decide between two writers.
        """
        objects = self._place.objects
        objects.check()
        self._demand(project, release)
        generation = asset.Generation.Key(generation)
        label = f"generation {generation} of {project}-{release}"
        text = tag.dumps()
        try:
            asset.Tag.loads(text)
        except Exception as exc:
            raise asset.Level.Invalid(
                f"{label}: ForML cannot read the tag {tag} after it was written ({exc!r}); "
                "nothing was committed"
            ) from exc

        def describe(sid: uuid.UUID) -> dict[str, Any]:
            staged = self._staged(project, release, sid)
            if len(staged) != 1:
                found = "two with that id" if staged else "none"
                raise asset.Level.Invalid(f"{label}: expected the state {sid}, found {found}")
            ((digest, size),) = staged.items()
            return {"blake3": digest, "size": size}

        names = [str(sid) for sid in tag.states]
        document = {
            "tag": text.decode(),
            "states": dict(zip(names, map_parallel(describe, tag.states), strict=True)),
            # Ids of states are random, so nobody else commits the same ones.
            "token": None if names else uuid.uuid4().hex,
        }
        if not objects.create(naming.generation(project, release, generation), encode(document)):
            raise asset.Level.Invalid(
                f"{label} was closed by somebody else meanwhile; nothing was committed, and the "
                "states are still there: commit the same tag again, as the next generation"
            )

    def _staged(self, project: Any, release: Any, sid: uuid.UUID) -> dict[str, int | None]:
        """Return the size of each state that was written with an id, by its digest."""
        infos = self._place.objects.infos(naming.state(project, release, sid))
        return {layout.last_part(name): info.size for name, info in infos}

    def _demand(self, project: Any, release: Any) -> None:
        """Refuse a release that is not there."""
        if self._place.document(naming.release(project, release), cached=False) is None:
            raise asset.Level.Invalid(f"{self!r} has no release {release} of a project {project}")


class Inventory(asset.Inventory):  # type: ignore[misc]
    """ForML's descriptors of applications on any store that can be listed and written.

    It may have the URI of a :class:`Registry`. Equal if the URI is; picklable.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        """Address an inventory; nothing is asked of the store yet.

        Args:
            uri: where it is, or will be.

        Raises:
            InvalidInput: the URI cannot be written to.
        """
        self._place = Place(uri)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._place.location)!r})"

    def __hash__(self) -> int:
        return hash((type(self), self._place.location))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inventory) and other._place.location == self._place.location

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._place.uri,)

    def list(self) -> Iterable[str]:
        """Return the names of all applications, sorted."""
        found = map(naming.application_of, self._place.names(naming.APPLICATIONS))
        return sorted(filter(None, found))

    def get(self, application: str) -> Any:
        """Return the descriptor of an application.

        Raises:
            forml.MissingError: there is no such application.
            forml.InvalidError: what is stored is no descriptor.
        """
        with tempfile.TemporaryDirectory(dir=asset.TMPDIR) as folder:
            # ForML imports it as a module of this name.
            path = os.path.join(folder, f"{re.sub(r'[^0-9A-Za-z_]', '_', application)}.py")
            try:
                self._place.fetch(naming.application(application), path)
            except BucketMissingError:
                raise
            except ModelMissingError as exc:
                raise forml.MissingError(f"{self!r} has no application {application}") from exc
            with _one_thread:
                return applications.Descriptor.Handle(path).descriptor

    def put(self, descriptor: Any) -> None:
        """Store the descriptor of an application, in place of the one that it had.

        Args:
            descriptor: a ``forml.application.Descriptor.Handle``.
        """
        name = naming.application(descriptor.descriptor.name)
        data = pathlib.Path(descriptor.path).read_bytes()
        self._place.send(name, data, "text/x-python", if_absent=False)


# -- contents --------------------------------------------------------------------------------


def _package_digest(is_tree: bool, files: Iterable[SourceFile]) -> Digest:
    """Return the SHA-256 of a package as every download knows it."""
    digests = {file.path: hash_file(file.local, ("sha256",))["sha256"] for file in files}
    if is_tree:
        return tree_digest(digests)
    (digest,) = digests.values()
    return digest


@functools.cache
def _temporary_staging(location: Any) -> str:
    """Return the folder into which this process installs what comes from ``location``."""
    _LOGGER.warning("%s: packages are staged in a temporary folder of this process", location)
    folder: str = str(asset.mkdtemp(prefix="staging-"))
    return folder


def _install(package: Any, target: pathlib.Path) -> None:
    """Install a package so that ``target`` appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch(str(target.parent)) as folder:
        partial = pathlib.Path(folder, "package")
        with _one_thread:
            try:
                package.install(partial)
            finally:
                # ForML imports from wherever it installed something.
                gone = str(partial.parent.resolve() / partial.name)
                sys.path[:] = [path for path in sys.path if path != gone]
        sync_tree(str(partial))
        try:
            partial.rename(target)
        except OSError:
            # Somebody else was faster.
            if not target.exists():
                raise
