"""What the test Hub knows: accounts, repositories, branches, commits."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.servers.hub.files import Blob, BlobStore, pointer

__all__ = [
    "LARGE",
    "Account",
    "Change",
    "Commit",
    "CommitError",
    "Entry",
    "Repo",
    "StaleParentError",
    "State",
    "is_large",
    "path_problem",
]

LARGE = 10 * 1024 * 1024
"""Files of more bytes go to large file storage whatever their name is."""
# From the .gitattributes that the Hub gives every new repository.
_LARGE_NAMES = (
    *("*.7z", "*.arrow", "*.bin", "*.ckpt", "*.gz", "*.h5", "*.joblib", "*.msgpack", "*.npy"),
    *("*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt", "*.pth"),
    *("*.rar", "*.safetensors", "*.tar", "*.tar.*", "*.tflite", "*.tgz", "*.wasm", "*.xz"),
    *("*.zip", "*.zst", "*tfevents*"),
)
_SECONDS = itertools.count()
_START = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


class CommitError(Exception):
    """A commit is refused; ``status`` and ``code`` are those of the answer."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class StaleParentError(CommitError):
    """The branch is no longer at the parent that a commit names."""

    def __init__(self) -> None:
        super().__init__("A commit has happened since. Please refresh and try again.", 412)


@dataclass(frozen=True, slots=True)
class Account:
    """Who sends a token, and what it permits."""

    name: str
    token: str
    writes: bool = True
    orgs: tuple[str, ...] = ()

    def owns(self, repo: Repo) -> bool:
        return repo.id.partition("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file at one commit."""

    path: str
    sha256: str
    size: int
    git: str
    """Object id in git; of the pointer where the file is in large file storage."""

    lfs: bool

    @classmethod
    def of(cls, path: str, blob: Blob, lfs: bool) -> Entry:
        git = blob.git
        if lfs:
            text = pointer(blob.sha256, blob.size)
            git = hashlib.sha1(b"blob %d\0" % len(text) + text, usedforsecurity=False).hexdigest()
        return cls(path, blob.sha256, blob.size, git, lfs)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git

    def described(self) -> dict[str, object]:
        answer: dict[str, object] = {
            "type": "file",
            "oid": self.git,
            "size": self.size,
            "path": self.path,
        }
        if self.lfs:
            answer["lfs"] = {
                "oid": self.sha256,
                "size": self.size,
                "pointerSize": len(pointer(self.sha256, self.size)),
            }
        return answer


@dataclass(frozen=True, slots=True)
class Commit:
    """A state of all files."""

    id: str
    parent: str | None
    title: str
    message: str
    date: datetime
    author: str
    files: Mapping[str, Entry]

    @property
    def stamp(self) -> str:
        return self.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a commit: ``entry`` put at ``path``, or, without one, ``path`` deleted."""

    path: str
    entry: Entry | None = None
    folder: bool = False


@dataclass(slots=True)
class Repo:
    """A repository with its history."""

    type: str
    id: str
    private: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)
    """Accounts that accepted the terms of a gated repository."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    """SHA-256 of what was uploaded to this repository's large file storage."""

    lock: threading.RLock = field(default_factory=threading.RLock)

    def find(self, revision: str) -> Commit | None:
        """Return the commit that a branch, tag, reference or id means."""
        with self.lock:
            for names in (self.branches, self.tags, self.pulls):
                if revision in names:
                    return self.commits[names[revision]]
            name = revision.removeprefix("refs/heads/")
            if name in self.branches:
                return self.commits[self.branches[name]]
            return self.commits.get(revision)

    def head(self, branch: str = "main") -> Commit:
        return self.commits[self.branches[branch]]

    def commit(
        self,
        changes: Iterable[Change],
        title: str,
        message: str = "",
        *,
        branch: str = "main",
        parent: str | None = None,
        author: str = "owner",
        pull: bool = False,
    ) -> Commit:
        """Add a commit to a branch, or a pull request on top of it.

        Raises:
            CommitError: the branch or a file is missing, or paths contradict each other.
        """
        with self.lock:
            heads = self.pulls if branch in self.pulls else self.branches
            if branch not in heads:
                raise CommitError(f"Invalid rev id: {branch}", 404, "RevisionNotFound")
            head = self.commits[heads[branch]]
            if parent is not None and parent != head.id:
                raise StaleParentError
            files = _changed(head.files, changes)
            commit = self._new(head.id, title, message, author, files)
            if pull:
                heads, branch = self.pulls, f"refs/pr/{len(self.pulls) + 1}"
            heads[branch] = commit.id
            return commit

    def begin(self) -> None:
        """Make the first, empty commit."""
        self.branches["main"] = self._new(None, "initial commit", "", "owner", {}).id

    def _new(
        self,
        parent: str | None,
        title: str,
        message: str,
        author: str,
        files: Mapping[str, Entry],
    ) -> Commit:
        number = next(_SECONDS)
        text = f"{self.type} {self.id} {parent} {number} {title}".encode()
        oid = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        date = datetime.fromtimestamp(_START + number, UTC)
        commit = Commit(oid, parent, title, message, date, author, files)
        self.commits[oid] = commit
        return commit


def _changed(files: Mapping[str, Entry], changes: Iterable[Change]) -> dict[str, Entry]:
    new = dict(files)
    added: list[str] = []
    for change in changes:
        if problem := path_problem(change.path.removesuffix("/") if change.folder else change.path):
            raise CommitError(f"Invalid path {change.path!r}: {problem}")
        if change.entry is not None:
            new[change.path] = change.entry
            added.append(change.path)
        elif change.folder:
            prefix = change.path.rstrip("/") + "/"
            below = [path for path in new if path.startswith(prefix)]
            if not below:
                raise _missing(change.path)
            for path in below:
                del new[path]
        elif new.pop(change.path, None) is None:
            raise _missing(change.path)
    if added:
        _refuse_conflicts(new, added)
    return new


def _refuse_conflicts(files: Mapping[str, Entry], added: Iterable[str]) -> None:
    """Refuse a file where git needs a folder; ``added`` paths are the only new ones."""
    for path in added:
        parts = path.split("/")
        for length in range(1, len(parts)):
            if "/".join(parts[:length]) in files:
                raise CommitError(f"Invalid path {path!r}: a part of it is a file")
    prefixes = tuple(f"{path}/" for path in added)
    for path in files:
        if path.startswith(prefixes):
            raise CommitError(f"Invalid path: a file cannot be put in the place of {path!r}")


def _missing(path: str) -> CommitError:
    return CommitError(f"A file with this name doesn't exist: {path}", 404, "EntryNotFound")


def path_problem(path: str) -> str | None:
    """Tell why git cannot hold a file at ``path``."""
    parts = path.split("/")
    if "\0" in path:
        return "it holds a NUL"
    if any(part in ("", ".", "..") for part in parts):
        return "it holds an empty or a dot segment"
    if any(part.lower() == ".git" for part in parts):
        return "it holds a folder named .git"
    return None


def is_large(path: str, size: int) -> bool:
    """Tell whether a file belongs into large file storage."""
    name = path.rsplit("/", 1)[-1]
    named = any(fnmatch.fnmatchcase(name, pattern) for pattern in _LARGE_NAMES)
    return size > LARGE or (size > 0 and named)


class State:
    """All repositories and accounts."""

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs
        self.repos: dict[tuple[str, str], Repo] = {}
        self.accounts: dict[str, Account] = {}
        self.renamed: dict[tuple[str, str], str] = {}
        self.lock = threading.Lock()

    def add_repo(self, repo: Repo) -> Repo:
        """Add a repository with its first commit.

        Raises:
            ValueError: the name is no name, or taken.
        """
        if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]{1,96}", repo.id):
            raise ValueError(f"{repo.id!r} is not the name of a repository")
        with self.lock:
            if (repo.type, repo.id) in self.repos:
                raise ValueError(f"{repo.id} exists already")
            repo.begin()
            self.repos[repo.type, repo.id] = repo
        return repo

    def put(self, repo: Repo, files: Mapping[str, bytes], branch: str = "main") -> Commit:
        """Commit files, around HTTP."""
        changes = []
        for path, data in files.items():
            blob = self.blobs.add(data)
            large = is_large(path, blob.size)
            if large:
                repo.lfs.add(blob.sha256)
            changes.append(Change(path, Entry.of(path, blob, large)))
        return repo.commit(changes, f"Put {', '.join(list(files)[:3])}", branch=branch)
