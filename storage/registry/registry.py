"""`ModelRegistry`: what can be done with a registry, in one place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from storage.client.arguments import writable
from storage.errors import InvalidInput, ModelMissingError
from storage.registry import aliases, attributes, layout, marker, reading
from storage.registry.aliases import ANY, AliasEntry, Expected
from storage.registry.diff import VersionDiff, diff
from storage.registry.documents import Parent, Version, encode
from storage.registry.objects import ObjectStore
from storage.uri import parse_uri

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.client.watching import OnChange
    from storage.registry.gc import Collection
    from storage.registry.leases import Pending
    from storage.registry.publish import PendingVersion
    from storage.registry.watching import RegistryWatcher
    from storage.transfer.progress import ProgressCallback
    from storage.uri import Location

__all__ = ["ModelRegistry"]

_PAGE = 100


class ModelRegistry:
    """Models, their versions and aliases on one store. Safe for many threads and processes.

    A version never changes and is a tree of files; a single file is a tree of one. The same
    files are the same version. Content is kept once, whatever models and versions have it.

    Nothing is asked of the store before the first call.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        config: Any = None,
        client: StorageClient | None = None,
    ) -> None:
        """Address the registry at ``uri``.

        Args:
            uri: a folder of a store that can create an object only if it is absent: S3, GCS,
                Azure, the Hub, a claim, a directory, or memory. To read, of any store.
            config: for the store.
            client: moves the bytes; that of the facades if ``None``.
        """
        if client is None:
            from storage.facade import default_client

            client = default_client()
        self.location: Location = writable(parse_uri(uri))
        """Where it is."""

        self.config = config
        self.client = client
        self.store = ObjectStore(client, self.location, config)
        """Its objects."""

        self._opened = False
        self._hints: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"ModelRegistry({str(self.location)!r})"

    # -- the registry ------------------------------------------------------------------------

    def init(self) -> None:
        """Make a registry at the URI, unless there is one.

        Raises:
            UnsupportedOperation: the store cannot hold one: two writers could not be told apart.
            InvalidInput: something else is there.
        """
        marker.make(self.store)
        self._opened = True

    def exists(self) -> bool:
        """Tell whether there is a registry at the URI.

        Raises:
            UnsupportedOperation: it is of a format that this release does not know.
        """
        return marker.is_there(self.store)

    def _open(self, model: str | None = None, *, to_write: bool = False) -> None:
        """Check the name of a model, what the store can, and once that there is a registry."""
        if model is not None:
            layout.check_model(model)
        if to_write:
            self.store.check()
        if not self._opened and not self.exists():
            raise ModelMissingError(
                str(self.location),
                f"there is no registry at {self.location}: expected {layout.MARKER} there; check "
                "the URI, or make one by ModelRegistry(uri).init() (storage registry init)",
            )
        self._opened = True

    # -- looking -----------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Return the names of all models that have a version, sorted."""
        self._open()
        return reading.models(self.store)

    def numbers(self, model: str) -> list[int]:
        """Return the numbers of all versions of a model, sorted; none if there is no such model.

        Costs a listing, and no look at any version.
        """
        self._open(model)
        return reading.numbers(self.store, model)

    def versions(
        self,
        model: str,
        *,
        page_size: int = _PAGE,
        after: int | None = None,
        newest_first: bool = False,
    ) -> list[Version]:
        """Return one page of the versions of a model.

        Args:
            model: its name.
            page_size: versions at most.
            after: the number of the last version of the page before.
            newest_first: from the highest number down.

        Raises:
            ModelMissingError: there is no such model.
        """
        numbers = self._paged(model, page_size, after, newest_first)
        return reading.read_all(self.store, model, numbers[:page_size])

    def each_version(
        self,
        model: str,
        *,
        page_size: int = _PAGE,
        after: int | None = None,
        newest_first: bool = False,
    ) -> Iterator[Version]:
        """Yield all that :meth:`versions` gives page by page, by one listing of the numbers.

        Raises:
            ModelMissingError: there is no such model.
        """
        numbers = self._paged(model, page_size, after, newest_first)
        for start in range(0, len(numbers), page_size):
            yield from reading.read_all(self.store, model, numbers[start : start + page_size])

    def _paged(
        self, model: str, page_size: int, after: int | None, newest_first: bool
    ) -> list[int]:
        if page_size < 1:
            raise InvalidInput(f"a page has one version at least, not {page_size}")
        numbers = self.numbers(model)
        if not numbers:
            raise reading.missing_model(self.store, model)
        if newest_first:
            numbers.reverse()
        if after is None:
            return numbers
        return [each for each in numbers if (each < after if newest_first else each > after)]

    def resolve(self, model: str, reference: int | str = layout.LATEST) -> int:
        """Return the number of a version.

        Args:
            model: its name.
            reference: a number, an alias, or ``latest`` for the highest number.

        Raises:
            ModelMissingError: there is no such version, alias or model.
            InvalidInput: it cannot be one.
        """
        self._open(model)
        return reading.resolve(self.store, model, reference)

    def find(self, model: str, reference: int | str = layout.LATEST) -> Version:
        """Return a version as it was published; see :meth:`show`."""
        self._open(model)
        return reading.find(self.store, model, reference)

    def show(self, model: str, reference: int | str = layout.LATEST) -> Version:
        """Return a version with what is said of it now.

        Args:
            model: its name.
            reference: a number, an alias, or ``latest`` for the highest number.

        Raises:
            ModelMissingError: there is no such version, alias or model.
            IntegrityError: its document is damaged.
        """
        self._open(model)
        return reading.find(self.store, model, reference, changed=True)

    def diff(
        self,
        model: str,
        old: int | str,
        new: int | str = layout.LATEST,
        *,
        other_model: str | None = None,
    ) -> VersionDiff:
        """Compare two versions.

        Args:
            model: of the old one.
            old: number or alias.
            new: number or alias.
            other_model: of the new one, if it is another model's.
        """
        return diff(self.show(model, old), self.show(other_model or model, new))

    def pending(self) -> list[Pending]:
        """Return the versions that are being published, or were when their publisher died."""
        from storage.registry.leases import list_pending

        self._open()
        return list_pending(self.store)

    # -- publishing --------------------------------------------------------------------------

    def push(
        self,
        model: str,
        source: str | os.PathLike[str],
        *,
        description: str = "",
        tags: attributes.Tags = (),
        configuration: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: Parent = None,
        allow_patterns: str | Iterable[str] | None = None,
        ignore_patterns: str | Iterable[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> Version:
        """Publish a file or a folder as a new version, unless its content is one already.

        Args:
            model: its name; a new model needs nothing else.
            source: a file or a folder of this machine. Links are followed.
            description: text for people.
            tags: names and values, or names alone.
            configuration: how the model was made: whatever JSON holds.
            metrics: how good it is: finite numbers.
            parent: what it was made from: the number of a version of this model, or a text.
            allow_patterns: only these paths.
            ignore_patterns: not these.
            progress: called while bytes move.

        Returns:
            The new version, or the one that has the same files; of that nothing is changed. Its
            ``is_new`` tells which.

        Raises:
            InvalidInput: an argument cannot be used, or there is nothing to publish, or too much.
            ModelMissingError: there is no registry, or no such parent.
            IntegrityError: a file changed meanwhile; nothing is published.
            TransferError: the store does not answer.
        """
        pending = self._pending(model, description, tags, configuration, metrics, parent)
        with pending:
            pending.scan(source, "", allow_patterns, ignore_patterns)
            return pending.commit(progress=progress)

    def begin(
        self,
        model: str,
        *,
        description: str = "",
        tags: attributes.Tags = (),
        configuration: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        parent: Parent = None,
    ) -> PendingVersion:
        """Begin a version that is uploaded first and committed later, or never.

            with registry.begin("iris") as pending:
                pending.add("out/model")
                validate()
                version = pending.commit()

        Args:
            model: its name.
            description: as for :meth:`push`; the others, too.
            tags: see there.
            configuration: see there.
            metrics: see there.
            parent: see there.
        """
        return self._pending(model, description, tags, configuration, metrics, parent).begin()

    def _pending(
        self,
        model: str,
        description: str,
        tags: attributes.Tags,
        configuration: Mapping[str, Any] | None,
        metrics: Mapping[str, float] | None,
        parent: Parent,
    ) -> PendingVersion:
        from storage.registry.publish import PendingVersion

        said = attributes.make_attributes(description, tags, configuration, metrics)
        self._open(model, to_write=True)
        if isinstance(parent, int):
            parent = self.find(model, parent).number
        elif parent is not None and not isinstance(parent, str):
            raise InvalidInput(f"a parent is the number of a version, or a text, not {parent!r}")
        encode({"parent": parent})  # now, and not after all was uploaded
        return PendingVersion(self.store, model, said, parent, self._hints)

    def update(
        self,
        model: str,
        reference: int | str = layout.LATEST,
        *,
        description: str | None = None,
        tags: attributes.Tags | None = None,
        configuration: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float | None] | None = None,
    ) -> Version:
        """Change what is said of a version; its files stay what they are.

        Args:
            model: its name.
            reference: number or alias of the version.
            description: instead of the old one.
            tags: added to the others, or instead of those of the same name; ``None`` as value
                takes one away. Likewise for the next two.
            configuration: see ``tags``.
            metrics: see ``tags``.

        Returns:
            The version with what is said of it now.

        Raises:
            ModelMissingError: there is no such version, alias or model.
            InvalidInput: it is nothing that a registry can write down.
        """
        self._open(model, to_write=True)
        return attributes.change(
            self.store,
            self.find(model, reference),
            description=description,
            tags=tags,
            configuration=configuration,
            metrics=metrics,
        )

    # -- aliases -----------------------------------------------------------------------------

    def set_alias(
        self,
        model: str,
        alias: str,
        version: int | str = layout.LATEST,
        *,
        expected: Expected = ANY,
    ) -> int:
        """Set an alias to a version.

        Args:
            model: its name.
            alias: its name; made if it is not there.
            version: a number, another alias, or ``latest`` for what that is now.
            expected: the number that it has to be set to before, ``None`` if it must not be set.

        Returns:
            The number of the version.

        Raises:
            ObjectChangedError: it is set to something else than ``expected``; nothing is changed.
            ModelMissingError: there is no such version.
        """
        layout.check_alias(alias)
        self._open(model, to_write=True)
        number = self.find(model, version).number
        aliases.set_alias(self.store, model, alias, number, expected)
        return number

    def delete_alias(self, model: str, alias: str, *, expected: Expected = ANY) -> None:
        """Delete an alias; its history stays. One that is not set is no error.

        Raises:
            ObjectChangedError: it is set to something else than ``expected``; nothing is changed.
        """
        self._open(model, to_write=True)
        aliases.set_alias(self.store, model, layout.check_alias(alias), None, expected)

    def aliases(self, model: str) -> dict[str, int]:
        """Return the version of each alias of a model; ``latest`` is not among them."""
        self._open(model)
        return aliases.targets(self.store, model)

    def alias_history(self, model: str, alias: str) -> list[AliasEntry]:
        """Return what an alias was set to, the newest first."""
        self._open(model)
        return aliases.history(self.store, model, layout.check_alias(alias))

    # -- bringing here, removing -------------------------------------------------------------

    def pull(
        self,
        model: str,
        reference: int | str = layout.LATEST,
        dest: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> str:
        """Bring a version here, every file held to its digest, and return the folder's path.

        Args:
            model: its name.
            reference: a number, an alias, or ``latest`` for the highest number.
            dest: the folder; a path in the cache if ``None``.
            options: as for :meth:`storage.Storage.download`: ``allow_patterns``,
                ``ignore_patterns``, ``digest``, ``offline``, ``freshness``, ``cache``, ``link``,
                ``durable``, ``overwrite``, ``progress``, ``require_signature``.

        Raises:
            ModelMissingError: there is no such version, alias or model.
            IntegrityError: what arrived is not what was published; nothing is handed over.
            OfflineError: the store may not be asked, and the cache does not have the version.
        """
        from storage.registry.pull import make_pull

        return make_pull(self, model, reference, **options).run(dest)

    def watch(
        self,
        model: str,
        on_change: OnChange | None = None,
        *,
        alias: int | str = layout.LATEST,
        **options: Any,
    ) -> RegistryWatcher:
        """Return what tells a server of each version that ``alias`` is set to, as it is moved.

        Args:
            model: its name.
            on_change: called with a :class:`storage.WatchedModel`; its ``version`` is the number.
            alias: ``latest`` for the highest number.
            options: those of :class:`storage.ModelWatcher` but ``client``, ``config``, ``unpack``.
        """
        from storage.registry.watching import RegistryWatcher

        return RegistryWatcher(self, model, alias, on_change, **options)

    def delete(self, model: str, version: int, *, force: bool = False) -> None:
        """Delete a version, for good. Its number is not given again.

        What no other version needs of it is removed by :meth:`gc`.

        Args:
            model: its name.
            version: its number.
            force: even if an alias is set to it.

        Raises:
            ModelMissingError: there is no such version.
            InvalidInput: an alias is set to it.
        """
        from storage.registry.deletion import delete_version

        self._open(model, to_write=True)
        number = layout.parse_reference(version)
        if not isinstance(number, int):
            raise InvalidInput(f"a version is deleted by its number, not by the alias {version!r}")
        delete_version(self.store, model, number, force=force)

    def gc(self, *, grace: float | None = None, dry_run: bool = False) -> Collection:
        """Remove content that no version needs, and what dead publishers left.

        Others may publish, delete and collect meanwhile.

        Args:
            grace: seconds after which a publisher counts as dead that was not heard of; 24 hours
                if ``None``.
            dry_run: only tell what would be removed.
        """
        from storage.registry.gc import collect
        from storage.registry.leases import GRACE

        self._open(to_write=True)
        return collect(self.store, grace=GRACE if grace is None else grace, dry_run=dry_run)
