"""Models of a cache in one file, for a machine without a network.

A parcel is a plain tar archive, so that everybody can look into it::

    parcel.json                    format, address algorithm, who made it, how much follows
    manifests/<id>.json            what the models consist of
    refs.json                      which source had which
    blobs/<algorithm>/ab/<hex>     the content, each once

The order is fixed, and no time or user is in it: the same models give the same bytes, but for
when they were fetched. What comes in is believed only as far as it can be checked: every byte
of a model is what its list of files says. *Which* source had the model is the word of whoever
made the parcel.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from io import FileIO
from typing import Any

from storage.cache.blobs import State
from storage.cache.cache import CacheShortfallError, ModelCache
from storage.cache.index import Known
from storage.cache.manifests import Manifest
from storage.cache.members import Members, Reader, Writer, damaged, write_end, write_member
from storage.cache.partials import new_partial
from storage.cache.records import DamagedRecordError
from storage.cache.refs import Ref, Source
from storage.digest import Digest, MultiHasher
from storage.errors import (
    ConfigurationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    one_line,
)
from storage.files import check_space
from storage.uri import parse_uri

__all__ = ["Exported", "Imported", "export", "import_"]

_FORMAT = 1
_PIECE = 1024 * 1024
_HEADER = "parcel.json"
_REFS = "refs.json"
# Bytes of all that is not content; it is held in memory.
_MAX_RECORDS = 256 * 1024 * 1024
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Exported:
    """What went into a parcel."""

    uris: tuple[str, ...]
    """Of the models, without credentials."""

    blobs: int
    size: int
    """Bytes of the blobs."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What came out of a parcel."""

    uris: tuple[str, ...]
    """Of the models, without credentials."""

    blobs: int
    size: int
    """Bytes of the blobs."""

    new: int
    """How many of the blobs were not here before."""


# -- out -------------------------------------------------------------------------------------


def export(
    cache: ModelCache, stream: Writer, refs: Iterable[Ref] | None = None, creator: str = ""
) -> Exported:
    """Write models to a stream. They are not evicted meanwhile.

    Args:
        cache: what has them.
        stream: where to. What is written before an error is no parcel.
        refs: of the models; of all that there are if ``None``.
        creator: program and version, for the record.

    Raises:
        ModelMissingError: there is nothing to write.
        IntegrityError: a model is not whole, or a file of it is damaged.
        OSError: the stream cannot be written.
    """
    cache.check_version()
    chosen = _chosen(_all_refs(cache) if refs is None else refs)
    ids = sorted({ref.manifest for ref in chosen})
    try:
        cache.hold(manifests=ids)
        if refs is None:
            # What was evicted before it was held is not there to be exported.
            there = _chosen(_all_refs(cache))
            chosen = [ref for ref in chosen if ref in there]
        if not chosen:
            raise ModelMissingError(
                cache.upper.path, f"the cache {cache.upper.path} holds no model; no parcel was made"
            )
        used = sorted({ref.manifest for ref in chosen})
        manifests = [_whole(cache, chosen, manifest_id) for manifest_id in used]
        sizes = {file.digest: file.size for each in manifests for file in each.files}
        records = [(f"manifests/{each.id}.json", _dump(each.as_record())) for each in manifests]
        records.append((_REFS, _dump({"refs": [_ref_record(ref) for ref in chosen]})))
        header = {
            "format": _FORMAT,
            "algorithm": cache.algorithm,
            "creator": creator,
            "manifests": len(manifests),
            "records": sum(len(data) for _, data in records),
            "blobs": len(sizes),
            "size": sum(sizes.values()),
        }
        for name, data in [(_HEADER, _dump(header)), *records]:
            write_member(stream, name, len(data), (data,))
        for digest in sorted(sizes):
            size = sizes[digest]
            write_member(stream, _blob_name(digest), size, _content(cache, digest, size))
        write_end(stream)
    finally:
        for manifest_id in ids:
            cache.leases.release(manifest_id)
    uris = tuple(sorted({ref.source.uri for ref in chosen}))
    return Exported(uris, len(sizes), sum(sizes.values()))


def _all_refs(cache: ModelCache) -> Iterator[Ref]:
    return (ref for root in cache.roots for ref in root.refs.all())


def _chosen(refs: Iterable[Ref]) -> list[Ref]:
    """Return the refs, without an origin; of several that are then of one source, the latest."""
    chosen: dict[tuple[str, str], Ref] = {}
    for ref in refs:
        plain = replace(ref, source=replace(ref.source, origin=""))
        key = (plain.source.uri, plain.source.variant)
        if key not in chosen or chosen[key].validated_at < plain.validated_at:
            chosen[key] = plain
    return [chosen[key] for key in sorted(chosen)]


def _whole(cache: ModelCache, refs: Iterable[Ref], manifest_id: str) -> Manifest:
    try:
        manifest = cache.manifest(manifest_id)
        cache.check(manifest)
    except CacheShortfallError as exc:
        uri = next(ref.source.uri for ref in refs if ref.manifest == manifest_id)
        raise IntegrityError(
            f"{uri} {exc}; no parcel was made; `storage cache repair` fetches it again, or name "
            "the models that are to go into it"
        ) from exc
    return manifest


def _ref_record(ref: Ref) -> dict[str, Any]:
    record = asdict(ref)
    # Of an archive that was unpacked nothing is left that its digest could be compared with.
    del record["archive"]
    return record


def _content(cache: ModelCache, digest: Digest, size: int) -> Iterator[bytes]:
    """Yield a blob in pieces.

    Raises:
        IntegrityError: it is not what its name says; some of it was yielded then.
    """
    path = cache.blob_path(digest)
    hasher = MultiHasher((digest.algorithm,))
    left = size
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                hasher.update(piece)
                left -= len(piece)
                if left < 0:
                    break
                yield piece
    except OSError as exc:
        raise IntegrityError(f"{path} cannot be read: {exc.strerror}; no parcel was made") from exc
    if left or hasher.digests()[digest.algorithm] != digest:
        raise IntegrityError(
            f"{path} is damaged; no parcel was made; `storage cache repair --full` finds what is "
            "damaged and fetches it again"
        )


def _blob_name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.hex[:2]}/{digest.hex}"


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# -- in --------------------------------------------------------------------------------------


def import_(cache: ModelCache, stream: Reader) -> Imported:
    """Take the models of a parcel into a cache; synced to the disk when this returns.

    No model is known before all of the parcel was read and found right. What the cache has
    already is not written again, and what it was told later by a store is not forgotten.

    Args:
        cache: where to.
        stream: what :func:`export` wrote.

    Raises:
        IntegrityError: it is no parcel, not all of it, or not as it was made.
        ConfigurationError: it is of another format, or of a cache with other addresses.
        InsufficientSpaceError: there is no room for it.
        DestinationError: the cache cannot be written.
    """
    with cache.writing():
        return _Import(cache, Members(stream)).run()


class _Import:
    """One parcel on its way in."""

    def __init__(self, cache: ModelCache, members: Members) -> None:
        self._cache = cache
        self._members = members
        self._records = 0

    def run(self) -> Imported:
        header = self._read_header()
        self._records = 0
        manifests = self._read_manifests(header["manifests"])
        refs = self._read_refs(manifests)
        if self._records != header["records"]:
            raise damaged("its lists are not as long as it says")
        wanted: dict[Digest, Known] = {}
        for manifest in manifests.values():
            for file in manifest.files:
                known = Known(file.digest, file.size, file.others)
                found = wanted.get(file.digest, known)
                if found.size != file.size:
                    raise damaged(f"{file.digest} has two sizes")
                others = {*found.others, *file.others}
                if len({digest.algorithm for digest in others}) != len(others):
                    raise damaged(f"{file.digest} has two digests of one algorithm")
                wanted[file.digest] = replace(known, others=tuple(sorted(others)))
        size = sum(known.size for known in wanted.values())
        if (len(wanted), size) != (header["blobs"], header["size"]):
            raise damaged("its models are not as large as it says")
        with ExitStack() as stack:
            self._hold(stack, manifests, wanted)
            new = self._read_blobs(wanted)
            if self._members.next() is not None:
                raise damaged("more follows than it says")
            self._publish(manifests.values(), refs)
        uris = tuple(sorted({ref.source.uri for ref in refs}))
        return Imported(uris, len(wanted), size, new)

    def _hold(
        self, stack: ExitStack, manifests: Mapping[str, Manifest], blobs: Iterable[Digest]
    ) -> None:
        """Let nobody evict anything of it; before anything of it is looked for."""
        leases, texts = self._cache.leases, [str(digest) for digest in blobs]
        stack.callback(leases.release_blobs, texts)
        for manifest_id in manifests:
            stack.callback(leases.release, manifest_id)
        self._cache.hold(manifests, texts)

    # -- records -----------------------------------------------------------------------------

    def _read_record(self, expected: str | None) -> tuple[str, dict[str, Any]]:
        member = self._members.next()
        if member is None:
            raise damaged("it ends too early")
        name, size = member
        if expected not in (None, name):
            raise damaged(f"{expected} was expected and {one_line(name, 80)!r} found")
        self._records += size
        if self._records > _MAX_RECORDS:
            raise damaged(f"its lists take more than {_MAX_RECORDS} bytes")
        try:
            value = json.loads(b"".join(self._members.read()))
        except (ValueError, RecursionError) as exc:
            raise damaged(f"{one_line(name, 80)!r} cannot be read") from exc
        if not isinstance(value, dict):
            raise damaged(f"{one_line(name, 80)!r} cannot be read")
        return name, value

    def _read_header(self) -> dict[str, Any]:
        _, header = self._read_record(_HEADER)
        if header.get("format") != _FORMAT:
            raise ConfigurationError(
                f"the parcel is of format {one_line(repr(header.get('format')), 40)}; this "
                f"version reads format {_FORMAT}; make it with the version that reads it"
            )
        if header.get("algorithm") != self._cache.algorithm:
            found = one_line(repr(header.get("algorithm")), 40)
            raise ConfigurationError(
                f"the parcel is of a cache with {found} addresses, and this one has "
                f"{self._cache.algorithm}; set digest_algorithm, and another cache_dir, for it"
            )
        for name in ("manifests", "records", "blobs", "size"):
            if type(header.get(name)) is not int or header[name] < 0:
                raise damaged(f"{_HEADER} does not say {name}")
        if header["records"] > _MAX_RECORDS:
            raise damaged(f"its lists take more than {_MAX_RECORDS} bytes")
        return header

    def _read_manifests(self, count: int) -> dict[str, Manifest]:
        manifests: dict[str, Manifest] = {}
        for _ in range(count):
            name, record = self._read_record(None)
            try:
                manifest = Manifest.from_record(record)
            except DamagedRecordError as exc:
                raise damaged(one_line(exc)) from exc
            if name != f"manifests/{manifest.id}.json" or manifest.id in manifests:
                raise damaged(f"{one_line(name, 80)!r} is not what its name says")
            if any(
                file.size < 0 or file.digest.algorithm != self._cache.algorithm
                for file in manifest.files
            ):
                raise damaged(f"{one_line(name, 80)!r} has files that cannot be")
            manifests[manifest.id] = manifest
        return manifests

    def _read_refs(self, manifests: Mapping[str, Manifest]) -> list[Ref]:
        _, record = self._read_record(_REFS)
        found = record.get("refs")
        if not isinstance(found, list):
            raise damaged(f"{_REFS} cannot be read")
        refs = []
        for item in found:
            try:
                refs.append(_checked_ref(item))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
                raise damaged(f"{_REFS}: {one_line(exc)}") from exc
        if {ref.manifest for ref in refs} != manifests.keys():
            raise damaged("its sources and its models do not belong together")
        return refs

    # -- content -----------------------------------------------------------------------------

    def _read_blobs(self, wanted: Mapping[Digest, Known]) -> int:
        """Take all blobs in, and return how many are new."""
        cache = self._cache
        absent = {
            digest
            for digest, known in wanted.items()
            if cache.upper.blobs.settle(digest, known.size) is not State.CLEAN
        }
        needed = sum(wanted[digest].size for digest in absent)
        if cache.budget is not None:
            from storage.cache.evict import make_room

            make_room(cache, needed)
        with new_partial(cache.upper.path) as folder:
            check_space(folder, needed)
            for digest in sorted(wanted):
                known = wanted[digest]
                if self._members.next() != (_blob_name(digest), known.size):
                    raise damaged(f"{_blob_name(digest)} of {known.size} bytes was expected")
                if digest not in absent and cache.upper.blobs.secure(digest):
                    self._copy(known, None)
                else:
                    place = os.path.join(folder, "blob")
                    with open(place, "wb", buffering=0) as file:
                        self._copy(known, file)
                    cache.upper.blobs.add(place, digest, known.size, durable=True)
                cache.upper.index.learn(known, None)
        return len(absent)

    def _copy(self, known: Known, file: FileIO | None) -> None:
        """Read a blob, compare it with every digest that is said of it, and write it."""
        digests = (known.digest, *known.others)
        hasher = MultiHasher(digest.algorithm for digest in digests)
        for piece in self._members.read():
            hasher.update(piece)
            if file is not None:
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]
        found = hasher.digests()
        for digest in digests:
            if found[digest.algorithm] != digest:
                raise damaged(
                    f"a file of it is expected to be {digest} and is {found[digest.algorithm]}"
                )

    def _publish(self, manifests: Iterable[Manifest], refs: Iterable[Ref]) -> None:
        cache = self._cache
        for manifest in manifests:
            try:
                cache.upper.manifests.save(manifest, durable=True)
                cache.check(manifest)
                cache.open(manifest, durable=True)
            except CacheShortfallError as exc:
                raise IntegrityError(
                    f"a model {exc}, right after it was imported; something takes files away "
                    f"from the cache {cache.upper.path}"
                ) from exc
        for ref in refs:
            known = list(cache.upper.refs.alike(ref.source))
            # Where the same source is known with its endpoint, that is found first.
            for source in {ref.source, *(old.source for old in known)}:
                newer = any(
                    old.source == source and old.validated_at > ref.validated_at for old in known
                )
                if not newer:
                    cache.upper.refs.set(replace(ref, source=source), durable=True)


def _checked_ref(record: Mapping[str, Any]) -> Ref:
    """Return the ref that a stranger wrote down.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: it is none.
    """
    source = record["source"]
    scheme, uri, identity = source["scheme"], source["uri"], source["identity"]
    patterns = {}
    for name in ("allow", "ignore"):
        value = source[name]
        if value is not None and not all(isinstance(item, str) for item in value):
            raise InvalidInput("a pattern is no text")
        patterns[name] = None if value is None else tuple(value)
    if not _SCHEME.fullmatch(scheme) or not _HASH.fullmatch(identity):
        raise InvalidInput("it is no source")
    uri.encode("utf-8", "surrogateescape")
    location = parse_uri(uri)
    if location.scheme != scheme or str(location) != uri:
        raise InvalidInput(f"{one_line(uri, 80)!r} is no canonical URI")
    fetched_at, validated_at = float(record["fetched_at"]), float(record["validated_at"])
    if not math.isfinite(fetched_at) or not math.isfinite(validated_at):
        raise InvalidInput("a time is none")
    fingerprint = record["fingerprint"]
    if not isinstance(fingerprint, str | None) or not isinstance(record["manifest"], str):
        raise InvalidInput("it is no state of a source")
    return Ref(
        Source(scheme, uri, identity, "", **patterns, unpack=source["unpack"] is True),
        record["manifest"],
        min(fetched_at, time.time()),
        min(validated_at, time.time()),
        fingerprint,
    )
