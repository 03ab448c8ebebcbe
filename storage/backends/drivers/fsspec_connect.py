"""From a URL to an fsspec file system: its class, its arguments, its connections, its paths."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar
from urllib.parse import unquote

from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec_errors import Kind, translated
from storage.backends.drivers.fsspec_parts import Pool
from storage.errors import (
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
    redact,
)

__all__ = ["FsspecStore", "supported_schemes"]

# Schemes with a backend of their own, and fsspec's other names for them.
_OWN = frozenset(
    ("abfs", "abfss", "az", "azure", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3")
)
# An installed sshfs takes the name "sftp" over, and returns whole files for ranges.
_CLASSES = {
    "dav": "webdav4.fsspec.WebdavFileSystem",
    "davs": "webdav4.fsspec.WebdavFileSystem",
    "sftp": "fsspec.implementations.sftp.SFTPFileSystem",
    "ssh": "fsspec.implementations.sftp.SFTPFileSystem",
    "webdav": "webdav4.fsspec.WebdavFileSystem",
    "webdavs": "webdav4.fsspec.WebdavFileSystem",
}
# What pip calls a package, where its module has another name.
_PACKAGES = {
    "fsspec_xrootd": "fsspec-xrootd",
    "gdrive_fsspec": "gdrive-fsspec",
    "lakefs_spec": "lakefs-spec",
    "smbclient": "smbprotocol",
}
_SEGMENTS = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|\0")
# Failures after which a connection is as good as before.
_HARMLESS = (
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    UnsupportedOperation,
    GeneratorExit,
)


def supported_schemes() -> list[str]:
    """Return the schemes that this driver serves, if their packages are installed."""
    from fsspec.registry import known_implementations, registry

    return sorted({*known_implementations, *registry, *_CLASSES} - _OWN)


class FsspecStore:
    """One store and the file systems that reach it, each in one process and one thread."""

    error_kinds: ClassVar[Mapping[str, Kind]] = {}
    """Hook. Kinds of error by ``package.Class``, beside those that ``classify`` knows."""

    def __init__(
        self,
        scheme: str,
        authority: str,
        arguments: Mapping[str, Any],
        options: OpenOptions | None = None,
        name: str | None = None,
    ) -> None:
        """Describe the store; nothing is imported or opened yet.

        Args:
            scheme: which of fsspec's file systems.
            authority: of the URL: host, bucket, or whatever the scheme has there. May hold
                a user's name and password, which no message repeats.
            arguments: of the file system's class.
            options: how to talk to the store.
            name: of the driver, for messages.
        """
        self._scheme = scheme
        self._authority = authority
        self._arguments = dict(arguments)
        self._options = options or OpenOptions()
        self._name = name or f"{scheme} (fsspec)"
        self._uri = redact(f"{scheme}://{authority}").removesuffix("/") + "/"
        self._pool = Pool()
        self._inherited: list[Pool] = []

    @property
    def name(self) -> str:
        """Driver and store."""
        return self._name

    def where(self, key: str) -> str:
        """Return the URI of ``key``, for messages."""
        return f"{self._uri}{key}"

    def _implementation(self) -> type[Any]:
        """Hook. Return the file system's class.

        Raises:
            ConfigurationError: its package is not installed.
        """
        from fsspec.registry import get_filesystem_class, known_implementations

        named = _CLASSES.get(self._scheme)
        try:
            if named is not None:
                module, _, attribute = named.rpartition(".")
                cls: type[Any] = getattr(importlib.import_module(module), attribute)
            else:
                cls = get_filesystem_class(self._scheme)
        except ImportError as exc:
            path = named or known_implementations.get(self._scheme, {}).get("class", "")
            raise ConfigurationError(
                f"{self._uri}: its file system {path} cannot be imported ({one_line(exc)}); run: "
                f"pip install {_package(str(path), exc)}"
            ) from exc
        return cls

    def _from_url(self, cls: type[Any]) -> dict[str, Any]:
        """Hook. Return the arguments that the URL's authority stands for."""
        found = dict(cls._get_kwargs_from_urls(f"{self._scheme}://{self._authority}/"))
        for name in ("username", "password"):
            if isinstance(found.get(name), str):
                found[name] = unquote(found[name])
        return found

    def _defaults(self) -> dict[str, Any]:
        """Hook. Return arguments that follow from the options."""
        return {}

    def _connect(self) -> Any:
        """Hook. Return a new file system, connected."""
        cls = self._implementation()
        arguments = {**self._defaults(), **self._from_url(cls), **self._arguments}
        with translated(self._uri, self.error_kinds):
            try:
                fs = cls(**{**arguments, "skip_instance_cache": True})
            except (TypeError, ValueError, FileNotFoundError) as exc:
                raise ConfigurationError(
                    f"{self._uri}: {cls.__name__} refuses its arguments "
                    f"({', '.join(sorted(arguments)) or 'none'}): {one_line(exc)}; give them "
                    "in FsspecConfig(options={...})"
                ) from exc
        dircache = getattr(fs, "dircache", None)
        if dircache is not None and hasattr(dircache, "use_listings_cache"):
            dircache.use_listings_cache = False
        return fs

    def _disconnect(self, fs: Any) -> None:
        """Hook. Close the connections of ``fs``."""

    def _usable(self, fs: Any) -> bool:
        """Hook. Whether the connection of ``fs`` is alive, as far as this side knows."""
        return True

    def _root(self, cls: type[Any]) -> str:
        """Hook. Return the file system's path of the empty key."""
        return str(cls._strip_protocol(f"{self._scheme}://{self._authority}/"))

    def _path(self, fs: Any, key: str) -> str:
        """Hook. Return the file system's path of a key.

        Raises:
            InvalidInput: the file system would change it.
        """
        root = self._root(type(fs))
        if not key:
            return root
        separator = "" if not root or root.endswith("/") else "/"
        path = f"{root}{separator}{key}"
        if _SEGMENTS.search(key) or fs._strip_protocol(path) != path:
            raise InvalidInput(
                f"{self.where(key)}: {self.name} cannot keep this key as it is; use one without "
                "empty, '.' and '..' parts"
            )
        return path

    @contextmanager
    def _lease(self) -> Iterator[Any]:
        """Lend a file system to one thread; one that failed is not lent again."""
        pool = self._here()
        fs = pool.take()
        while fs is not None and not self._usable(fs):
            self._close_one(fs)
            fs = pool.take()
        if fs is None:
            fs = self._connect()
        try:
            yield fs
        except _HARMLESS:
            self._give_back(pool, fs)
            raise
        except BaseException as exc:
            lost = type(exc) is StorageError and not self._usable(fs)
            # Nobody knows in which state the connection is; idle ones may be dead likewise.
            for broken in (fs, *pool.empty()):
                self._close_one(broken)
            if lost:
                raise TransientError(f"{exc}; the connection was lost") from exc
            raise
        self._give_back(pool, fs)

    def _give_back(self, pool: Pool, fs: Any) -> None:
        if self._usable(fs):
            pool.give(fs)
        else:
            self._close_one(fs)

    def _shared(self) -> Any:
        """Return the one file system of this process, of a kind that serves many threads."""
        pool = self._here()
        with pool.lock:
            if pool.shared is None:
                pool.shared = self._connect()
            return pool.shared

    def _here(self) -> Pool:
        pool = self._pool
        if pool.pid != os.getpid():
            # Kept, because closing the parent's connections would end them for the parent.
            self._inherited.append(pool)
            pool = self._pool = Pool()
        return pool

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        for fs in self._here().empty():
            self._close_one(fs)

    def _close_one(self, fs: Any) -> None:
        with suppress(Exception):
            self._disconnect(fs)


def _package(path: str, exc: ImportError) -> str:
    """Return what ``pip install`` has to be told, for a class that could not be imported."""
    missing = exc.name or (exc.__cause__.name if isinstance(exc.__cause__, ImportError) else None)
    module = (missing or path).partition(".")[0]
    return _PACKAGES.get(module, module)
