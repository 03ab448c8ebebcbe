"""A git repository at one revision, over HTTP. It can be read, not written.

A commit is fetched whole, without its history, by the first call that needs to know what is in
it, and kept on the disk as long as the backend lives. What ``stat`` and ``list`` return names the
commit (``ObjectInfo.version``): reads pinned to it are of that commit whatever happens to the
branch meanwhile.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from storage.backends.base import Body, Buffer, ByteRange, ObjectInfo, OpenOptions
from storage.backends.drivers.web import WebSession
from storage.backends.git.lfs import MAX_POINTER, LargeFiles, Pointer
from storage.backends.git.pack import Pack
from storage.backends.git.remote import Remote
from storage.backends.readonly import READ_ONLY, ReadOnlyBackend
from storage.backends.repositories import check_folder, check_path
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    conceal,
    one_line,
)
from storage.uri import Location

if TYPE_CHECKING:
    from storage.config import GitConfig

__all__ = ["GitBackend", "open_backend"]

_FOLDER, _LINK, _SUBMODULE = 0o040000, 0o120000, 0o160000
_KIND = 0o170000
_MAX_LINKS = 40
_MAX_TARGET = 4096
# A few trees, or links to a folder, can make more paths than anybody could list.
_MAX_ENTRIES = 1_000_000
_MAX_DEPTH = 128
_KEPT = 2
_TOKEN_USER = "x-access-token"


def open_backend(location: Location, config: GitConfig | None, options: OpenOptions) -> GitBackend:
    """Return a backend for the repository and revision of ``location``; inert."""
    url = location.url or f"{location.scheme.removeprefix('git+')}://{location.bucket}"
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    url = parts._replace(netloc=netloc).geturl()
    authorization = _basic(parts.username, parts.password, config)
    session = WebSession(
        config,
        options,
        store="the git server",
        address="the URI",
        home=lambda: url,
        credentials=lambda: {"Authorization": authorization} if authorization else {},
    )
    revision = location.version or (config.revision if config is not None else None)
    return GitBackend(location.scheme, location.bucket, url, revision, session)


def _basic(user: str | None, password: str | None, config: GitConfig | None) -> str | None:
    """Return the header by which a user logs in, if one is named."""
    if config is not None:
        given = config.token or config.password
        user = unquote(user) if user is not None else config.username
        if user is None and config.token is not None:
            user = _TOKEN_USER
        secret = given.get_secret_value() if given is not None and password is None else None
    else:
        user, secret = unquote(user) if user is not None else None, None
    if password is not None:
        secret = unquote(password)
    if secret is None and user is None:
        return None
    text = f"{user or ''}:{secret or ''}".encode("utf-8", "surrogateescape")
    encoded = base64.b64encode(text).decode("ascii")
    # A user without a password may be an access token.
    conceal(encoded, *([] if secret else [user or ""]))
    return f"Basic {encoded}"


@dataclass(frozen=True, slots=True)
class _Node:
    """What a tree has under a name."""

    mode: int
    name: bytes
    """Of the object."""

    @property
    def kind(self) -> int:
        return self.mode & _KIND


_Entry = tuple[str, str, _Node, int]
"""Key, real place, what is there, and how many links were followed on the way."""


@dataclass(frozen=True)
class _Snapshot:
    """One commit."""

    commit: str
    root: _Node
    pack: Pack


class GitBackend(ReadOnlyBackend):
    """One repository; see :class:`~storage.backends.base.Backend`."""

    capabilities = replace(READ_ONLY, repository=True)
    why_read_only = "git repositories are read only here; commit and push by git"

    def __init__(
        self, scheme: str, bucket: str, url: str, revision: str | None, session: WebSession
    ) -> None:
        """Describe the repository; nothing is imported or asked yet.

        Args:
            scheme: of the URI.
            bucket: host and path of the repository.
            url: to ask, without a user.
            revision: branch, tag or commit; ``HEAD`` if none.
            session: to send requests by.
        """
        self._place = (scheme, bucket)
        self._revision = revision
        self._session = session
        self._remote = Remote(url, session, self.where(""))
        self._large = LargeFiles(url, session)
        self._lock = threading.Lock()
        self._snapshots: dict[str, _Snapshot] = {}

    @property
    def name(self) -> str:
        """Driver and store."""
        return "git"

    def where(self, key: str) -> str:
        """Return the URI of a key, for messages."""
        return str(Location(*self._place, key, self._revision))

    def current_version(self) -> str:
        """Return the commit that the revision is now; see ``RepositoryBackend``."""
        return self._remote.commit_of(self._revision or "HEAD")

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`."""
        check_path(key, self.where(key))
        named = version not in (None, self._revision)
        snapshot = self._snapshot(self._remote.commit_of(version) if named and version else None)
        found, _ = self._find(snapshot, key)
        if found is None or found.kind == _FOLDER:
            raise ModelMissingError(self.where(key))
        return self._describe(snapshot, key, found)[0]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`."""
        check_folder(prefix, self.where(prefix))
        snapshot = self._snapshot()
        found, path = self._find(snapshot, prefix.removesuffix("/"))
        if found is None or found.kind != _FOLDER:
            return
        for count, info in enumerate(self._walk(snapshot, found, prefix, path)):
            if count >= _MAX_ENTRIES:
                raise UnsupportedOperation(
                    f"{self.where(prefix)}: the folder has more than {_MAX_ENTRIES} files and "
                    "folders, links followed; choose a smaller one"
                )
            if info is not None:
                yield info

    def _walk(
        self, snapshot: _Snapshot, folder: _Node, prefix: str, path: str
    ) -> Iterator[ObjectInfo | None]:
        """Yield the files of a folder, and ``None`` for each folder in it.

        Args:
            snapshot: the commit.
            folder: of it.
            prefix: what the keys begin with.
            path: where the folder really is, links followed; ends in a slash, or is empty.
        """

        def entries(folder: _Node, prefix: str, path: str, links: int) -> Iterator[_Entry]:
            for name, node in self._entries(snapshot, folder).items():
                yield prefix + name, path + name, node, links

        pending = [entries(folder, prefix, path, 0)]
        while pending:
            entry = next(pending[-1], None)
            if entry is None:
                pending.pop()
                continue
            key, place, node, links = entry
            if node.kind == _LINK:
                links += 1
                node, place = self._follow(snapshot, key, place, node, links)
            if node.kind != _FOLDER:
                yield self._describe(snapshot, key, node)[0]
                continue
            if len(pending) > _MAX_DEPTH:
                raise UnsupportedOperation(
                    f"{self.where(key)}: the path goes through more than {_MAX_DEPTH} folders"
                )
            yield None
            pending.append(entries(node, f"{key}/", f"{place}/", links))

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        check_path(key, self.where(key))
        where = self.where(key)
        try:
            snapshot = self._snapshot(pin.version if pin is not None else None)
        except BucketMissingError:
            raise
        except ModelMissingError as exc:
            if pin is None:
                raise
            raise ObjectChangedError(f"{where}: the commit {pin.version} is gone") from exc
        found, _ = self._find(snapshot, key)
        if found is None or found.kind == _FOLDER:
            raise ModelMissingError(where)
        info, pointer = self._describe(snapshot, key, found)
        if pin is not None and pin.etag not in (None, info.etag):
            raise ObjectChangedError(f"{where} is no longer the file that was asked for")
        if span is not None and info.size is not None and span.end > info.size:
            raise ObjectChangedError(
                f"{where}: bytes up to {span.end} were asked for, the file has {info.size}"
            )
        if pointer is not None:
            return self._large.read(pointer, info, span, where)
        chunks = snapshot.pack.read(found.name)
        return Body(info, chunks if span is None else _part(chunks, span))

    def close(self) -> None:
        """Free the connections, and the disk."""
        with self._lock:
            self._snapshots.clear()
        self._session.close()

    # -- commits -----------------------------------------------------------------------------

    def _snapshot(self, commit: str | None = None) -> _Snapshot:
        """Return a commit, fetched if it is not here; by default what the revision is now."""
        commit = commit or self.current_version()
        # One fetch at a time: what many threads ask for first is one commit.
        with self._lock:
            snapshot = self._snapshots.get(commit)
            if snapshot is None:
                snapshot = self._open(commit, self._remote.fetch(commit))
                while len(self._snapshots) >= _KEPT:
                    del self._snapshots[next(iter(self._snapshots))]
                self._snapshots[commit] = snapshot
            return snapshot

    def _open(self, commit: str, pack: Pack) -> _Snapshot:
        from dulwich.objects import Commit, Tag

        name = bytes.fromhex(commit)
        for _ in range(_MAX_LINKS):
            if name not in pack:
                break
            kind = pack.kind_of(name)
            with self._parsed(name):
                if kind == b"commit":
                    root = bytes.fromhex(Commit.from_string(pack.content(name)).tree.decode())
                    return _Snapshot(commit, _Node(_FOLDER, root), pack)
                if kind != b"tag":
                    break
                _, target = Tag.from_string(pack.content(name)).object
                name = bytes.fromhex(target.decode())
        raise ModelMissingError(
            self.where(""), f"{self.where('')}: the revision is no commit, nor a tag of one"
        )

    @contextmanager
    def _parsed(self, name: bytes) -> Iterator[None]:
        """Turn what ``dulwich`` raises of an object in the block into an error of ours."""
        try:
            yield
        except StorageError:
            raise
        except Exception as exc:  # what it raises of damaged ones has no common base
            raise StorageError(
                f"{self.where('')}: the object {name.hex()} of the repository is damaged "
                f"({one_line(exc) or type(exc).__name__}); `git fsck` tells more"
            ) from exc

    # -- trees -------------------------------------------------------------------------------

    def _entries(self, snapshot: _Snapshot, folder: _Node) -> dict[str, _Node]:
        from dulwich.objects import parse_tree

        self._demand(snapshot, folder)
        entries = {}
        with self._parsed(folder.name):
            for name, mode, found in parse_tree(snapshot.pack.content(folder.name), 20):
                node = found if len(found) == 20 else bytes.fromhex(found.decode("ascii"))
                entries[name.decode("utf-8", "surrogateescape")] = _Node(mode, node)
        return entries

    def _demand(self, snapshot: _Snapshot, node: _Node) -> None:
        if node.name not in snapshot.pack:
            raise TransientError(
                f"{self.where('')}: the server sent commit {snapshot.commit} without its object "
                f"{node.name.hex()}"
            )
        kind = b"tree" if node.kind == _FOLDER else b"blob"
        if snapshot.pack.kind_of(node.name) != kind:
            raise StorageError(
                f"{self.where('')}: the object {node.name.hex()} of the repository is no "
                f"{kind.decode()}, and a folder says that it is one"
            )

    def _find(self, snapshot: _Snapshot, key: str, links: int = 0) -> tuple[_Node | None, str]:
        """Return what is at a path, links followed, and where it really is (with a slash)."""
        node, place = snapshot.root, ""
        for name in filter(None, key.split("/")):
            if node.kind != _FOLDER:
                return None, ""
            found = self._entries(snapshot, node).get(name)
            if found is None:
                return None, ""
            node, place = found, place + name
            if node.kind == _LINK:
                links += 1
                node, place = self._follow(snapshot, key, place, node, links)
            place += "/"
        return node, place

    def _follow(
        self, snapshot: _Snapshot, key: str, place: str, link: _Node, links: int
    ) -> tuple[_Node, str]:
        """Return what a symbolic link means, and where that really is.

        Raises:
            StorageError: it leads out of the repository, to nothing, or in a circle.
        """
        where = self.where(key)
        self._demand(snapshot, link)
        if links > _MAX_LINKS or snapshot.pack.size_of(link.name) > _MAX_TARGET:
            raise StorageError(f"{where}: symbolic links lead in a circle, or much too far")
        target = snapshot.pack.content(link.name).decode("utf-8", "surrogateescape")
        parts = place.split("/")[:-1]
        for part in target.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part == ".." or target.startswith("/"):
                raise StorageError(
                    f"{where}: the symbolic link leads out of the repository; it is not followed"
                )
            elif part not in ("", "."):
                parts.append(part)
        node, real = self._find(snapshot, "/".join(parts), links)
        if node is None:
            raise StorageError(
                f"{where}: the symbolic link leads to {'/'.join(parts)!r}, which is not there"
            )
        return node, real.removesuffix("/")

    def _describe(
        self, snapshot: _Snapshot, key: str, node: _Node
    ) -> tuple[ObjectInfo, Pointer | None]:
        if node.kind == _SUBMODULE:
            raise UnsupportedOperation(
                f"{self.where(key)} is a submodule, which is another repository; download that "
                f"one at the commit {node.name.hex()}, or choose another folder"
            )
        self._demand(snapshot, node)
        size = snapshot.pack.size_of(node.name)
        etag = f'"{node.name.hex()}"'
        if size <= MAX_POINTER:
            pointer = Pointer.read(snapshot.pack.content(node.name), self.where(key))
            if pointer is not None:
                digest = Digest("sha256", pointer.oid)
                return (
                    ObjectInfo(key, pointer.size, etag, snapshot.commit, digests=(digest,)),
                    pointer,
                )
        # Read whole, from the beginning: it is compressed.
        return ObjectInfo(key, size, etag, snapshot.commit, ranged=False), None


def _part(chunks: Any, span: ByteRange) -> Iterator[Buffer]:
    """Yield a part of a content that is read from its beginning."""
    position = 0
    with closing(chunks):
        for chunk in chunks:
            view = memoryview(chunk)[max(0, span.start - position) : span.end - position]
            position += len(chunk)
            if len(view):
                yield view
            if position >= span.end:
                return
