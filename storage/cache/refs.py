"""Refs: what a source had when it was asked last, and which downloads of it did not end."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any
from urllib.parse import unquote_plus, urlsplit

from storage.cache.index import ObjectKey
from storage.cache.layout import Layout, hash_text, listed
from storage.cache.records import DamagedRecordError, read_record, write_record
from storage.digest import Digest
from storage.uri import Location

__all__ = ["Pending", "Ref", "Refs", "Source", "identity_of"]

_REF = ".json"
_PENDING = ".pending"
# What signs a URL changes with every signature; what it signs stays the same. By the names that
# tell a signature: all that belong to it, which may mean anything elsewhere.
_SIGNING = {
    ("x-amz-signature",): r"x-amz-.*",
    ("x-goog-signature",): r"x-goog-.*",
    ("signature", "awsaccesskeyid"): r"signature|awsaccesskeyid|expires|x-amz-.*",
    ("signature", "googleaccessid"): r"signature|googleaccessid|expires",
    ("signature", "key-pair-id"): r"signature|key-pair-id|expires|policy",
    ("sig", "sv"): r"sig|sv|ss|srt|sp|se|st|spr|sr|sip|si|sdd|skoid|sktid|skt|ske|sks|skv",
}


@dataclass(frozen=True, slots=True)
class Source:
    """What a download asked for."""

    scheme: str
    uri: str
    """Canonical, without anything that may be a credential."""

    identity: str
    """Hash of all that tells this source from others of the same ``uri``: a URL's query."""

    origin: str = ""
    """Endpoint and account, where they are not the store's usual ones."""

    allow: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    unpack: bool = False

    @property
    def variant(self) -> str:
        """Name of the ref among those of the same URI."""
        return hash_text(self.identity, self.origin, self.filters)[:32]

    @property
    def id(self) -> str:
        """A hash that no other source has."""
        return hash_text(self.scheme, self.uri, self.variant)

    @property
    def filters(self) -> str:
        """The filters as one text."""
        return repr((self.allow, self.ignore, self.unpack))


def identity_of(location: Location) -> str:
    """Return the identity that a source at ``location`` has; never a secret."""
    if location.url is not None and location.has_revisions:
        # Who asks, and not what for.
        return hash_text(str(location), location.url)
    if location.url is None or location.type != "http":
        return hash_text(location.url or str(location))
    parts = urlsplit(location.url)
    # What stays is kept as it was written: how a server reads it is not known.
    query = parts.query.split("&")
    names = {_name(field).lower() for field in query}
    for telling, pattern in _SIGNING.items():
        if names.issuperset(telling):
            signing = re.compile(pattern, re.IGNORECASE)
            query = [field for field in query if not signing.fullmatch(_name(field))]
    return hash_text(parts._replace(query="&".join(query)).geturl())


def _name(field: str) -> str:
    """Return the name of one field of a query."""
    return unquote_plus(field.partition("=")[0])


@dataclass(frozen=True, slots=True)
class Ref:
    """What a source had."""

    source: Source
    manifest: str
    """Id of the manifest."""

    fetched_at: float
    """When its content came here, in seconds since the epoch."""

    validated_at: float
    """When the store was last seen to have it."""

    fingerprint: str | None = None
    """The state that the store told; see ``Plan.fingerprint``."""

    archive: tuple[Digest, ...] = ()
    """Digests of the archive that was unpacked, where it was one."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A download that began; it is in the cache as far as it got."""

    source: Source
    files: int
    """How many files it was to have."""

    keys: tuple[ObjectKey, ...]
    """The keys of its objects in the index."""


class Refs:
    """The refs of one cache."""

    def __init__(self, layout: Layout) -> None:
        """Use those below the root of ``layout``."""
        self._layout = layout

    def get(self, source: Source) -> Ref | None:
        """Return what ``source`` had.

        An origin that the source does not name may be any: an edge node need not know the
        endpoint that its models once came from. The one that was validated last is taken.

        Raises:
            DamagedRecordError: the ref is damaged.
        """
        ref = self.read(self._path(source, _REF))
        if ref is not None:
            return ref
        return max(self.alike(source), key=lambda ref: ref.validated_at, default=None)

    def alike(self, source: Source) -> Iterator[Ref]:
        """Yield the refs of ``source``, of any origin if one of the two names none."""
        for ref in self._in(self._layout.ref_folder(source.scheme, source.uri)):
            if (
                ref.source.identity == source.identity
                and ref.source.filters == source.filters
                and (not source.origin or ref.source.origin in (source.origin, ""))
            ):
                yield ref

    def of(self, location: Location) -> Iterator[Ref]:
        """Yield the refs of what is at ``location``, whatever their origin and filters."""
        identity = identity_of(location)
        for ref in self._in(self._layout.ref_folder(location.scheme, str(location))):
            if ref.source.identity == identity:
                yield ref

    def set(self, ref: Ref, *, durable: bool = False) -> None:
        """Note what a source has; the download of it has ended.

        Raises:
            OSError: the cache cannot be written.
        """
        record = asdict(ref) | {"archive": [str(digest) for digest in ref.archive]}
        write_record(self._layout, self._path(ref.source, _REF), record, durable=durable)
        self.end(ref.source)

    def begin(self, pending: Pending) -> None:
        """Note that a download begins.

        Raises:
            OSError: the cache cannot be written.
        """
        write_record(self._layout, self._path(pending.source, _PENDING), asdict(pending))

    def end(self, source: Source) -> None:
        """Note that a download ended, or that nothing came of it."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(source, _PENDING))

    def pending(self, source: Source) -> Pending | None:
        """Return the download of ``source`` that began and did not end."""
        with contextlib.suppress(DamagedRecordError, KeyError, TypeError):
            record = read_record(self._path(source, _PENDING))
            if record is not None:
                keys = tuple(ObjectKey(**key) for key in record["keys"])
                return Pending(_source(record), record["files"], keys)
        return None

    def delete(self, source: Source) -> None:
        """Forget what a source had."""
        for suffix in (_REF, _PENDING):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(source, suffix))

    def all(self) -> Iterator[Ref]:
        """Yield every ref that can be read."""
        for folder in self._folders():
            yield from self._in(folder)

    def paths(self) -> Iterator[tuple[str, bool]]:
        """Yield every file there is, and whether it is a ref; else a download began."""
        for folder in self._folders():
            for name in listed(folder):
                yield os.path.join(folder, name), name.endswith(_REF)

    def path(self, source: Source) -> str:
        """Return the path of a ref, there or not."""
        return self._path(source, _REF)

    def read(self, path: str) -> Ref | None:
        """Return the ref in a file, ``None`` if there is none.

        Raises:
            DamagedRecordError: it is damaged.
        """
        record = read_record(path)
        return None if record is None else _ref(record)

    def _folders(self) -> Iterator[str]:
        for scheme in listed(self._layout.refs):
            folder = os.path.join(self._layout.refs, scheme)
            for name in listed(folder):
                yield os.path.join(folder, name)

    def _in(self, folder: str) -> Iterator[Ref]:
        for name in listed(folder):
            if name.endswith(_REF):
                with contextlib.suppress(DamagedRecordError):
                    ref = self.read(os.path.join(folder, name))
                    if ref is not None:
                        yield ref

    def _path(self, source: Source, suffix: str) -> str:
        folder = self._layout.ref_folder(source.scheme, source.uri)
        return os.path.join(folder, source.variant + suffix)


def _source(record: dict[str, Any]) -> Source:
    known = {field.name for field in fields(Source)}
    values = {name: value for name, value in record["source"].items() if name in known}
    for name in ("allow", "ignore"):
        values[name] = None if values[name] is None else tuple(values[name])
    return Source(**values)


def _ref(record: dict[str, Any]) -> Ref:
    try:
        return Ref(
            _source(record),
            record["manifest"],
            record["fetched_at"],
            record["validated_at"],
            record["fingerprint"],
            tuple(Digest.parse(text) for text in record["archive"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DamagedRecordError(f"a ref cannot be read: {exc}") from exc
