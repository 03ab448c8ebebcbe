"""What a mirror has to do, kept on the disk: two million objects fit into no process."""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, Self

from storage.backends.base import ObjectInfo
from storage.digest import Digest
from storage.errors import DestinationError, InvalidInput

__all__ = ["MirrorItem", "MirrorPlan"]

_PAGE = 1000
_TABLES = """
CREATE TABLE wanted (path BLOB PRIMARY KEY, size INTEGER, item BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE present (path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE found (path BLOB PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class MirrorItem:
    """One object of a mirror."""

    path: str
    """Relative to both ends; the name of a single object."""

    info: ObjectInfo
    """The object, as its store listed it."""

    key: str
    """Where it goes, in the bucket of the destination."""

    look: bool = True
    """Whether something may be there already."""


class MirrorPlan:
    """The listings of both ends, sorted by the bytes of the paths; used by one thread.

    They are in a database of SQLite's without a name: in memory while they are small, then in a
    file in the folder for temporary files that is gone when it is closed, or its process ends.
    """

    def __init__(self) -> None:
        """Begin empty."""
        with _reporting():
            self._db = sqlite3.connect("", isolation_level=None)
            self._db.executescript(_TABLES)
        self._listed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._db.close()

    def list_wanted(self, items: Iterable[MirrorItem], where: str) -> None:
        """Take the objects of the source, instead of those taken before.

        Raises:
            InvalidInput: two of them would be the same one at the destination.
        """
        with self._transaction():
            self._db.execute("DELETE FROM wanted")
            for item in items:
                self._want(item, where)

    def _want(self, item: MirrorItem, where: str) -> None:
        path = os.fsencode(item.path)
        row = (path, item.info.size, pickle.dumps(item))
        try:
            self._db.execute("INSERT INTO wanted VALUES (?, ?, ?)", row)
        except sqlite3.IntegrityError as exc:
            (other,) = self._one("SELECT item FROM wanted WHERE path = ?", path) or (b"",)
            if pickle.loads(other).info.key != item.info.key:
                raise InvalidInput(
                    f"{where}: two objects would both become {item.path!r} at the destination; "
                    "rename one, or choose by patterns"
                ) from exc
            # Replaced while it was listed, it may be on two pages.
            self._db.execute("INSERT OR REPLACE INTO wanted VALUES (?, ?, ?)", row)

    def list_present(self, paths: Iterable[str]) -> None:
        """Take the objects that the destination has, instead of those taken before."""
        with self._transaction():
            self._db.execute("DELETE FROM present")
            rows = ((os.fsencode(path),) for path in paths)
            self._db.executemany("INSERT OR IGNORE INTO present VALUES (?)", rows)
        self._listed = True

    def totals(self) -> tuple[int, int | None]:
        """Return how many objects are wanted, and their bytes, if all sizes are known."""
        row = self._one("SELECT count(*), count(size), total(size) FROM wanted")
        count, known, size = row or (0, 0, 0)
        return int(count), int(size) if known == count else None

    def find_folder(self) -> str | None:
        """Return a path that would have to be a file and a folder at once, if there is one."""
        for path in map(os.fsencode, self.paths()):
            parents = (path[:index] for index, byte in enumerate(path) if byte == 0x2F)
            if any(self._one("SELECT 1 FROM wanted WHERE path = ?", one) for one in parents):
                return os.fsdecode(path)
        return None

    def paths(self) -> Iterator[str]:
        """Yield the paths of all that is wanted, in order."""
        for (path,) in self._pages("SELECT path FROM wanted WHERE path > ?"):
            yield os.fsdecode(path)

    def items(self) -> Iterator[MirrorItem]:
        """Yield all that is wanted, in order, with what is known of the destination."""
        query = (
            "SELECT path, item, EXISTS(SELECT 1 FROM present WHERE present.path = wanted.path) "
            "FROM wanted WHERE path > ?"
        )
        for _, item, there in self._pages(query):
            found: MirrorItem = pickle.loads(item)
            # Without a listing of the destination nobody knows.
            yield replace(found, look=False) if self._listed and not there else found

    def leftovers(self) -> Iterator[list[str]]:
        """Yield the paths that only the destination has, a page at a time."""
        query = (
            "SELECT path FROM present WHERE path > ? "
            "AND NOT EXISTS(SELECT 1 FROM wanted WHERE wanted.path = present.path)"
        )
        rows = self._pages(query)
        while page := [os.fsdecode(path) for (path,) in islice(rows, _PAGE)]:
            yield page

    def add_digests(self, digests: Iterable[tuple[str, Digest]]) -> None:
        """Keep the digests of objects."""
        rows = [(os.fsencode(path), str(digest)) for path, digest in digests]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO found VALUES (?, ?)", rows)

    def digests(self) -> Iterator[tuple[str, Digest]]:
        """Yield the digests that were kept, in order."""
        for path, digest in self._pages("SELECT path, digest FROM found WHERE path > ?"):
            yield os.fsdecode(path), Digest.parse(digest)

    def _pages(self, query: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of ``query``, page by page: nothing stays open while they are used."""
        last = b""
        while True:
            with _reporting():
                rows = self._db.execute(f"{query} ORDER BY path LIMIT {_PAGE}", (last,))
                page = rows.fetchall()
            yield from page
            if len(page) < _PAGE:
                return
            last = page[-1][0]

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        with _reporting():
            row: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
        return row

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _reporting(), self._db:
            self._db.execute("BEGIN")
            yield


@contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise DestinationError(
            f"the plan of a mirror cannot be kept in the folder for temporary files: {exc}; "
            "free some space there, or let TMPDIR name another folder"
        ) from exc
