"""Mirrors: all objects of one place to another one, by as many processes and machines as there are.

Both ends are listed first, and the listings are the plan. It is cut into batches, which are plain
values, and a batch is done by a function of a module, so any ``concurrent.futures.Executor`` can
run it: threads, processes, a Dask cluster. A batch may be done twice, or in part and once more:
what is in place already stays. So a worker that dies costs its batch another try, and a mirror
that was interrupted goes on when it is asked for again.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from storage import cancellation
from storage.client.arguments import expected_digest, writable
from storage.client.mirror.batch import Batch, Ends, ItemOutcome, copy_batch
from storage.client.mirror.crew import TRIES, AnyExecutor, Crew, GoneError
from storage.client.mirror.links import check_links
from storage.client.mirror.options import MirrorFailure, MirrorOptions, MirrorResult
from storage.client.mirror.plan import MirrorItem, MirrorPlan
from storage.config.origin import origin_of
from storage.config.plain import PlainTransfer
from storage.digest import digest_of_ordered
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    MirrorError,
    ModelMissingError,
    UnsupportedOperation,
    few,
    one_line,
)
from storage.transfer import events
from storage.transfer.plan import Patterns, local_paths, resolve
from storage.transfer.progress import Meter
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.backends.base import Backend, ObjectInfo
    from storage.client.client import StorageClient

__all__ = ["mirror"]

_MIB = 1024 * 1024
_BATCH_BYTES = 1024 * _MIB
# Nothing has to be sent anywhere, so a batch here may be as long as it takes to keep all
# connections busy.
_BATCH_HERE = 1000
_MOST_FAILURES = 1000
_NAP = 1.0
# How long a file system on the network may go on telling that a file is not there.
_SEEN_WITHIN = 60.0


def mirror(
    client: StorageClient, src_uri: Any, dest_uri: Any, options: MirrorOptions
) -> MirrorResult:
    """Mirror; see :meth:`storage.StorageOperations.mirror`."""
    source, target = parse_uri(src_uri), writable(parse_uri(dest_uri))
    with events.transfer("mirror", str(source)), MirrorPlan() as plan:
        return _Mirror(client, source, target, options, plan).run()


class _Mirror:
    """One mirror under way."""

    def __init__(
        self,
        client: StorageClient,
        source: Location,
        target: Location,
        options: MirrorOptions,
        plan: MirrorPlan,
    ) -> None:
        self._client = client
        self._target = target
        self._options = options
        self._plan = plan
        self._patterns = Patterns(options.allow_patterns, options.ignore_patterns)
        self._expected = expected_digest(source, options.digest)
        # What it is a digest of is known when the source was asked.
        self._source = replace(source, digest=None)
        self._began = time.monotonic()
        self._name = uuid.uuid4().hex
        self._numbers = 0
        self._copied = self._skipped = self._deleted = self._bytes = self._resubmitted = 0
        self._failures: list[MirrorFailure] = []
        self._gone: GoneError | None = None
        self._last_copied: MirrorItem | None = None
        dest_config = options.dest_config
        if dest_config is None and source.type == target.type:
            dest_config = options.config
        self._check()
        self._origin = client.backend(source, options.config)
        self._backend = client.backend(target, dest_config)
        self._ends = Ends(
            self._source,
            target,
            client.resolve_config(source, options.config),
            client.resolve_config(target, dest_config),
            _plain(client.settings.transfer),
            durable=client.settings.durable,
            algorithm=None if self._expected is None else self._expected.algorithm,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
        )

    def _check(self) -> None:
        """Refuse what cannot be right, before anybody is asked."""
        source, target, executor = self._source, self._target, self._options.executor
        # "local" is what the generic driver calls this machine.
        here = target.is_local or target.scheme == "local"
        if here and self._client.signature_policy is not None:
            raise UnsupportedOperation(
                f"{source} would be mirrored to this machine without its signature being "
                "verified, which this client requires; download it"
            )
        in_memory = "memory" in (source.scheme, target.scheme)
        if in_memory and executor is not None and not isinstance(executor, ThreadPoolExecutor):
            raise UnsupportedOperation(
                "what memory:// holds is in this process, and other workers have a memory of "
                "their own; mirror without an executor, or by a ThreadPoolExecutor"
            )

    # -- the plan ----------------------------------------------------------------------------

    def run(self) -> MirrorResult:
        self._list()
        objects, size = self._plan.totals()
        if not objects:
            raise ModelMissingError(
                str(self._source),
                f"{self._source}: none of its objects matches the patterns; allowed "
                f"{self._patterns.allow}, ignored {self._patterns.ignore}",
            )
        meter = Meter("mirror", str(self._source), size, objects, self._options.progress)
        if self._options.executor is None:
            self._run_here(meter)
        else:
            self._run_on(self._options.executor, meter)
        if self._failures or self._gone is not None:
            cause = None if self._gone is None else self._gone.__cause__
            raise MirrorError(self._describe_failures(objects), self._result(objects)) from cause
        self._check_seen()
        self._check_digest(objects)
        if self._options.delete:
            self._delete()
        meter.finish()
        return self._result(objects)

    def _list(self) -> None:
        source, client = self._source, self._client
        writes = self._backend.capabilities
        if not writes.write:
            raise UnsupportedOperation(f"{self._target}: {self._backend.name} cannot be written to")
        if not (self._options.overwrite or writes.if_absent):
            raise UnsupportedOperation(
                f"{self._target}: {self._backend.name} cannot decide safely whether something is "
                "there already; mirror with overwrite=True, or to another place"
            )

        if self._options.delete and not (writes.list and writes.delete):
            raise UnsupportedOperation(
                f"{self._target}: {self._backend.name} cannot list objects or delete them; mirror "
                "without delete"
            )

        def wanted() -> bool:
            is_tree, found = resolve(self._origin, source)
            self._plan.list_wanted(self._items(is_tree, found), str(source))
            return is_tree

        is_tree = client.run_retried(wanted, where=str(source))
        self._check_places(is_tree)
        folder = self._plan.find_folder() if self._target.is_local else None
        if folder is not None:
            raise InvalidInput(
                f"{source}: {folder!r} is below what would be a file at {self._target}; rename "
                "one of them, or choose by patterns"
            )
        if is_tree and writes.list:
            client.run_retried(self._list_present, where=str(self._target))
        if is_tree:
            self._check_links()
        # Of a tree it is the digest of the listing, and nothing that an object could have.
        digest = None if is_tree or self._expected is None else str(self._expected)
        self._ends = replace(self._ends, is_tree=is_tree, source=replace(source, digest=digest))

    def _items(self, is_tree: bool, found: Iterable[ObjectInfo]) -> Iterator[MirrorItem]:
        source, target = self._source, self._target
        for info in found:
            cancellation.check()
            path = info.key[len(source.prefix) :] if is_tree else info.filename or source.name
            if not self._patterns.wants(path):
                continue
            if target.is_local:
                path = local_paths([path], str(source))[0]
            into = is_tree or target.forces_tree
            yield MirrorItem(path, info, target.child(path).key if into else target.key)

    def _list_present(self) -> None:
        prefix = self._target.prefix
        try:
            found = self._backend.list(prefix)
            self._plan.list_present(info.key[len(prefix) :] for info in found)
        except BucketMissingError:
            # In memory, a bucket appears with its first object.
            if self._target.scheme != "memory":
                raise
            self._plan.list_present(())
        except AuthenticationError:
            # Who may write may not list. Then each object has to be looked for.
            if self._options.delete:
                raise

    def _check_places(self, is_tree: bool) -> None:
        source, target = self._source, self._target
        if not is_tree and self._options.delete:
            raise InvalidInput(
                f"{source} is one object, and delete=True would remove all but it from "
                f"{target}; leave delete out"
            )
        one, two = self._places(is_tree)
        if is_tree and one and two and (one.startswith(two) or two.startswith(one)):
            raise InvalidInput(f"{source} and {target} overlap; mirror to another place")
        if not is_tree and one and one == two:
            raise InvalidInput(f"{source} cannot be mirrored onto itself")

    def _places(self, is_tree: bool) -> tuple[str, str]:
        """Return names of both ends that tell whether they overlap; empty if they cannot."""
        source, target = self._source, self._target
        end = "/" if is_tree else ""
        paths = [_path_here(self._origin, source), _path_here(self._backend, target)]
        if None not in paths:
            one, two = (os.path.realpath(path or "").rstrip("/") + end for path in paths)
            return one, two
        stores = [
            (location.scheme, location.bucket, location.account, location.version, origin)
            for location, origin in (
                (source, origin_of(source, self._ends.config)),
                (target, origin_of(target, self._ends.target_config)),
            )
        ]
        if stores[0] != stores[1]:
            return "", ""
        if not is_tree:
            return f"/{source.key}", f"/{target.key}"
        return f"/{source.prefix}", f"/{target.prefix}"

    def _check_links(self) -> None:
        root = self._backend.local_path(self._target.key.rstrip("/"))
        if root is None:
            return
        leftovers = (path for page in self._leftovers() for path in page)
        check_links(
            root,
            self._plan.paths(),
            leftovers if self._options.delete else (),
            _path_here(self._origin, self._source),
        )

    def _batches(self, size: int) -> Iterator[Batch]:
        items: list[MirrorItem] = []
        total = 0
        for item in self._plan.items():
            items.append(item)
            total += item.info.size or 0
            if len(items) == size or total >= _BATCH_BYTES:
                yield Batch(self._next_name(), self._ends, tuple(items))
                items, total = [], 0
        if items:
            yield Batch(self._next_name(), self._ends, tuple(items))

    def _next_name(self) -> str:
        self._numbers += 1
        return f"{self._name}-{self._numbers}"

    # -- doing it ----------------------------------------------------------------------------

    def _run_here(self, meter: Meter) -> None:
        for batch in self._batches(_BATCH_HERE):
            self._settle(batch, copy_batch(self._client, batch, meter), meter, counted=True)
            if len(self._failures) >= _MOST_FAILURES:
                return

    def _run_on(self, executor: AnyExecutor, meter: Meter) -> None:
        with Crew(executor) as crew:
            batches = self._batches(self._options.batch_size)
            while True:
                while crew.running < self._options.in_flight and self._want_more():
                    batch = next(batches, None)
                    if batch is None:
                        break
                    self._submit(crew, batch)
                if not crew.running:
                    return
                for batch, outcomes, error in crew.finished():
                    if error is None:
                        self._settle(batch, outcomes, meter)
                    else:
                        self._try_again(crew, batch, error)

    def _want_more(self) -> bool:
        return self._gone is None and len(self._failures) < _MOST_FAILURES

    def _submit(self, crew: Crew, batch: Batch) -> bool:
        try:
            crew.submit(batch)
        except GoneError as exc:
            # What is under way may still bring its results.
            self._gone = exc
        return self._gone is None

    def _try_again(self, crew: Crew, batch: Batch, error: BaseException) -> None:
        """Give a batch to another worker; its own has died, or something like it."""
        if not self._want_more():
            return
        tried = crew.tried(batch)
        if tried < TRIES:
            again = batch.again(self._next_name())
            crew.replace(batch, again)
            self._resubmitted += self._submit(crew, again)
            return
        reason = one_line(
            f"its batch brought no result, {tried} times; the last time {type(error).__name__}: "
            f"{error}; look at the workers' logs"
        )
        self._failures += [MirrorFailure(item.path, "WorkerLost", reason) for item in batch.items]

    def _settle(
        self,
        batch: Batch,
        outcomes: Iterable[ItemOutcome],
        meter: Meter,
        counted: bool = False,
    ) -> None:
        moved = present = done = 0
        for item, outcome in zip(batch.items, outcomes, strict=True):
            if outcome.error is not None:
                self._failures.append(MirrorFailure(item.path, outcome.error, outcome.reason))
                continue
            done += 1
            if outcome.copied:
                self._copied += 1
                self._bytes += outcome.size
                self._last_copied = item
            else:
                self._skipped += 1
            if outcome.moved:
                moved += outcome.size
            else:
                present += outcome.size
            if outcome.size != item.info.size:
                meter.resize(item.info.size, outcome.size)
        if not (counted or self._options.dry_run):
            meter.add(moved, present, done)
        self._plan.add_digests(
            (outcome.path, outcome.digest) for outcome in outcomes if outcome.digest is not None
        )

    # -- afterwards --------------------------------------------------------------------------

    def _check_seen(self) -> None:
        """Look for what workers say that they wrote to a file system: is it this one?"""
        item = self._last_copied
        away = self._options.executor is not None and not self._options.dry_run
        if item is None or not (away and self._backend.local_path(item.key)):
            return
        end = time.monotonic() + _SEEN_WITHIN
        while True:
            try:
                self._backend.stat(item.key)
            except ModelMissingError as exc:
                if time.monotonic() > end:
                    raise UnsupportedOperation(
                        f"{self._target}: the workers say that they wrote {item.path}, and it is "
                        "not here; a mirror to files needs a file system that they share"
                    ) from exc
                cancellation.pause(_NAP)
            else:
                return

    def _check_digest(self, objects: int) -> None:
        if self._expected is None or self._options.dry_run or not self._ends.is_tree:
            return
        found = digest_of_ordered(self._plan.digests(), self._expected.algorithm)
        if found != self._expected:
            raise IntegrityError(
                f"{self._source}: expected the digest {self._expected} of its {objects} objects, "
                f"found {found}; {self._target} holds the objects as they are at the source, and "
                "none was deleted; ask whoever gave the digest"
            )

    def _delete(self) -> None:
        for paths in self._leftovers():
            if paths and not self._options.dry_run:
                keys = [self._target.child(path).key for path in paths]
                self._client.run_retried(self._backend.delete, keys, where=str(self._target))
            self._deleted += len(paths)

    def _leftovers(self) -> Iterator[list[str]]:
        """Yield what only the destination has, and the patterns do not leave out."""
        for page in self._plan.leftovers():
            yield [path for path in page if self._patterns.wants(path)]

    def _describe_failures(self, objects: int) -> str:
        done = self._copied + self._skipped
        failed = len(self._failures)
        text = f"{self._source}: {done} of {objects} objects are in place at {self._target}"
        if failed:
            shown = few([f"{one.path}: {one.error}: {one.reason}" for one in self._failures])
            text += f", {failed} failed ({shown})"
        if left := objects - done - failed:
            text += f", {left} were not tried"
        if self._gone is not None:
            text += (
                f"; the executor takes no more work ({one_line(self._gone)}): pass a function that "
                "makes it, as executor=lambda: ProcessPoolExecutor(4), so that there can be another"
            )
        return f"{text}; mirror again to go on from there"

    def _result(self, objects: int) -> MirrorResult:
        return MirrorResult(
            str(self._source),
            str(self._target),
            objects,
            self._copied,
            self._skipped,
            self._deleted,
            self._bytes,
            tuple(self._failures),
            self._resubmitted,
            time.monotonic() - self._began,
        )


def _path_here(backend: Backend, location: Location) -> str | None:
    """Return the path of what is on this machine, in whatever way it is named."""
    if location.scheme == "local" and location.url is not None:
        # The generic driver knows no more than that it has a path.
        return os.path.abspath(location.url.partition("://")[2])
    return backend.local_path(location.key.rstrip("/"))


def _plain(transfer: Any) -> PlainTransfer:
    """Return the settings of transfers as a value that can be hashed and sent anywhere."""
    fields = PlainTransfer.__dataclass_fields__
    return PlainTransfer(**{name: getattr(transfer, name) for name in fields})
