"""Who a source is, for the cache: the same for the same content's home, and never a secret."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from storage.cache.index import ObjectKey
from storage.cache.layout import hash_text
from storage.cache.owners import current_owner
from storage.cache.refs import Source, identity_of
from storage.config.origin import origin_of
from storage.transfer.plan import Patterns
from storage.uri import Location

__all__ = ["complete", "object_key", "source_of"]


def source_of(location: Location, config: Any, patterns: Patterns, unpack: bool) -> Source:
    """Return the source that a download asks for.

    Args:
        location: what is asked for.
        config: the config that applies to it.
        patterns: which files of it.
        unpack: whether it is an archive to be unpacked.
    """
    location = complete(location, config)
    return Source(
        location.scheme,
        str(location),
        identity_of(location),
        # What memory holds is gone with its process.
        current_owner().token if location.scheme == "memory" else origin_of(location, config),
        patterns.allow,
        patterns.ignore,
        unpack,
    )


def complete(location: Location, config: Any) -> Location:
    """Return a location with the revision that ``config`` names, if it names none itself."""
    revision = getattr(config, "revision", None)
    if not location.has_revisions or location.version is not None or revision is None:
        return location
    return replace(location, version=revision)


def object_key(source: Source, location: Location, key: str, pin: str | None) -> ObjectKey | None:
    """Return the name in the index of one version of an object; ``None`` if it has no version.

    Args:
        source: what is downloaded, or a part of it.
        location: of ``source``.
        key: of the object.
        pin: its version or strong ETag.
    """
    if pin is None:
        return None
    named = (location.account, location.domain, location.repo_type)
    store = (location.scheme, location.bucket, *(text or "" for text in named))
    # The query of a URL may say which of several objects its path is, and a user sees other files.
    url = identity_of(location) if location.type == "http" else _authority(location.url or "")
    folder, _, name = key.rpartition("/")
    return ObjectKey(hash_text(*store, source.origin, url, folder), name, pin)


def _authority(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]
