"""Sources that are files or folders of this machine: a mounted claim, above all.

They are linked to and not copied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from storage.client.client import StorageClient
from storage.client.download import Download, DownloadOptions
from storage.errors import InvalidInput, ModelMissingError
from storage.files import shown, translate_os_errors
from storage.integrations.kserve.notes import is_reserved
from storage.uri import Location

if TYPE_CHECKING:
    from storage.integrations.kserve.wish import Wish
    from storage.transfer.plan import Patterns

__all__ = ["ARCHIVE", "demand", "link", "on_this_machine", "path_of"]

_FILE = "file://"
ARCHIVE = re.compile(r"\.(?:tar(?:\.(?:gz|bz2|xz))?|tgz|taz|tz|tbz2?|txz|zip)$", re.IGNORECASE)
"""Names of archives that are unpacked."""

# Of the root of a volume, or of a mounted config map.
_OF_VOLUME = re.compile(r"lost\+found|\.\..*")

_DIGEST = re.compile(r"(?:sha256|blake3)=[0-9a-fA-F]{64}")


def on_this_machine(uri: str) -> str | None:
    """Return the path of a source that is a file or folder here, and there; else ``None``.

    Raises:
        ModelMissingError: it can only be one, and is not there.
    """
    path = path_of(uri)
    if path is not None and not os.path.exists(path):
        raise ModelMissingError(
            path,
            f"{shown(path or uri)} is not there: expected a file or folder of this machine; check "
            "the path, and that its volume is mounted",
        )
    return path


def path_of(uri: str) -> str | None:
    """Return the path that a source can only be; ``None`` if it is something else."""
    if "://" not in uri:
        return uri if os.path.exists(uri) else _without_digest(uri)
    if not uri.startswith(_FILE):
        return uri if os.path.exists(uri) else None
    path = uri.removeprefix(_FILE)
    path = path.removeprefix("localhost") if path.startswith("localhost/") else path
    return path if os.path.exists(path) else _without_digest(path) or path


def _without_digest(path: str) -> str | None:
    """Return the path before a digest that is expected of it, if there is one, and the path is."""
    plain, _, digest = path.rpartition("#")
    return plain if _DIGEST.fullmatch(digest) and os.path.exists(plain) else None


def demand(path: str, uri: str) -> None:
    """Refuse what is here if it has not the digest, or the signature, that it has to have.

    Raises:
        IntegrityError: its digest is another than the one in ``uri``.
        SignatureError: the settings demand a signature, and it has no valid one.
    """
    location = Location("file", "", os.path.abspath(path).lstrip("/"))
    if not uri.endswith(path):
        digest = uri.rpartition("#")[2].replace("=", ":").lower()
        location = replace(location, digest=digest)
    with StorageClient() as client:
        if location.digest is not None or client.signature_policy is not None:
            Download(client, location, DownloadOptions()).run(None)


def link(wish: Wish, path: str) -> str:
    """Put links to a file, or to what is in a folder, into the folder that is wished for.

    One archive is unpacked instead.

    Returns:
        The folder; ``path`` itself if none is wished for.

    Raises:
        InvalidInput: a link would take the place of what it leads to.
        ModelMissingError: there is nothing, or nothing of it is wanted.
        StorageError: the folder cannot be written, or the archive cannot be unpacked.
    """
    if wish.folder is None:
        return path
    source = os.path.abspath(path)
    real, target = os.path.realpath(source), os.path.realpath(wish.folder)
    if real == target:
        return wish.folder
    if os.path.isdir(real) and target.startswith(os.path.join(real, "")):
        raise InvalidInput(
            f"the destination {shown(wish.folder)} is inside of the source {shown(path)}; choose "
            "one elsewhere"
        )
    names = _linked(source, wish.patterns)
    archive = next(iter(names.values())) if len(names) == 1 else None
    if archive is not None and not (ARCHIVE.search(archive) and os.path.isfile(archive)):
        archive = None
    if archive is None:
        if os.path.isfile(real) and real == os.path.join(target, os.path.basename(source)):
            return wish.folder
        _refuse_own(names, target)
    with wish.place(wish.folder) as place:
        with translate_os_errors(wish.folder):
            os.mkdir(place.content)
        if archive is not None:
            from storage.container.archives.extract import extract_into

            with translate_os_errors(wish.folder):
                extract_into(archive, place.content)
        else:
            with translate_os_errors(wish.folder):
                for name, origin in names.items():
                    entry = os.path.join(place.content, name)
                    os.makedirs(os.path.dirname(entry), exist_ok=True)
                    os.symlink(origin, entry)
        place.publish()
    return wish.folder


def _refuse_own(names: Mapping[str, str], target: str) -> None:
    """Refuse to put a link where the very file or folder is that it would lead to."""
    for name, origin in names.items():
        place, real = os.path.join(target, name), os.path.realpath(origin)
        if real == place or real.startswith(os.path.join(place, "")):
            raise InvalidInput(
                f"{shown(origin)} is {shown(real)}, and the destination has a place for it where "
                "that would be lost; choose a destination elsewhere"
            )


def _is_model(name: str) -> bool:
    """Tell whether what has this name at the top of a folder is a part of a model."""
    return not _OF_VOLUME.fullmatch(name) and not is_reserved(name)


def _linked(source: str, patterns: Patterns) -> dict[str, str]:
    """Return what is linked to: absolute paths, by the name of the link.

    Raises:
        ModelMissingError: there is nothing, or nothing of it is wanted.
    """
    if not os.path.isdir(source):
        return {os.path.basename(source): source}
    found: dict[str, str] = {}
    total = 0
    with translate_os_errors(source):
        if not patterns.active:
            names = sorted(os.listdir(source))
            found = {name: os.path.join(source, name) for name in names if _is_model(name)}
        else:
            for path, place in _files(source):
                total += 1
                if patterns.wants(path):
                    found[path] = place
    if not found:
        what = f"none of its {total} files matches the patterns" if total else "it is empty"
        raise ModelMissingError(source, f"{shown(source)}: {what}; there is no model")
    return found


def _files(source: str) -> Iterator[tuple[str, str]]:
    """Yield all files below a folder, links to folders followed: relative and absolute paths."""

    def fail(error: OSError) -> None:
        raise error

    seen = {os.path.realpath(source)}
    for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
        base = os.path.relpath(folder, source)
        if base == ".":
            folders[:] = filter(_is_model, folders)
        folders[:] = [name for name in folders if not is_reserved(name)]
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if os.path.islink(os.path.join(folder, name)) and real in seen:
                folders.remove(name)
            seen.add(real)
        for name in sorted(names):
            if is_reserved(name):
                continue
            yield os.path.normpath(os.path.join(base, name)), os.path.join(folder, name)
