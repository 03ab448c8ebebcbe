"""SFTP, FTP and WebDAV: what they do better by their own means than by fsspec's common ones."""

from __future__ import annotations

import posixpath
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

from storage.backends.base import Buffer, Capabilities, ObjectInfo
from storage.backends.drivers.fsspec import MIB, FsspecBackend
from storage.backends.drivers.fsspec_parts import Source
from storage.backends.drivers.fsspec_webhdfs import WebHdfsBackend
from storage.errors import InvalidInput

__all__ = ["CLASSES", "FtpBackend", "SftpBackend", "WebdavBackend"]

# Larger reads, and more requests at once, are slower with paramiko.
_SFTP_READ = MIB // 4
_PIPELINE = 8 * MIB
# Replies that mean "no such command".
_FTP_UNKNOWN = ("500", "501", "502", "504")


class SftpBackend(FsspecBackend):
    """Files over SSH, through paramiko.

    The keys of hosts that the user's ``known_hosts`` lists are checked; one it does not list
    is accepted unless the option ``host_key_policy`` says otherwise.
    """

    def _defaults(self) -> dict[str, Any]:
        timeout = self._options.connect_timeout
        return {"timeout": timeout, "banner_timeout": timeout, "auth_timeout": timeout}

    def _implementation(self) -> type[Any]:
        plain: Any = super()._implementation()
        checked: type[Any] = _with_known_hosts(plain)
        return checked

    def _connect(self) -> Any:
        fs = super()._connect()
        fs.ftp.get_channel().settimeout(self._options.stall_timeout)
        return fs

    def _disconnect(self, fs: Any) -> None:
        fs.client.close()

    def _usable(self, fs: Any) -> bool:
        transport = fs.client.get_transport()
        return transport is not None and bool(transport.is_active())

    def _pieces(
        self, fs: Any, info: ObjectInfo, start: int, length: int | None
    ) -> Generator[Buffer]:
        end = start + length if length is not None else info.size or 0
        with fs.ftp.open(self._path(fs, info.key), "rb") as file:
            for offset in range(start, end, _PIPELINE):
                position, stop = offset, min(offset + _PIPELINE, end)
                # All requests are sent before the first answer is awaited.
                file.seek(offset)
                file.prefetch(stop)
                while position < stop:
                    piece = file.read(min(_SFTP_READ, stop - position))
                    if not piece:
                        return
                    position += len(piece)
                    yield piece

    def _send(self, fs: Any, path: str, source: Source) -> None:
        with fs.ftp.open(path, "wb") as file:
            file.set_pipelined(True)
            while piece := source.read(MIB):
                file.write(piece)
        source.check()

    def _rename(self, fs: Any, old: str, new: str) -> None:
        fs.ftp.posix_rename(old, new)


class FtpBackend(FsspecBackend):
    """FTP, plain or over TLS."""

    def _defaults(self) -> dict[str, Any]:
        return {"timeout": self._options.stall_timeout}

    def _disconnect(self, fs: Any) -> None:
        fs.ftp.close()

    def _usable(self, fs: Any) -> bool:
        return fs.ftp.sock is not None

    def _path(self, fs: Any, key: str) -> str:
        if "\r" in key or "\n" in key:
            raise InvalidInput(f"{self.where(key)!r}: FTP has no names with line breaks")
        return super()._path(fs, key)

    def _entries(self, fs: Any, path: str) -> Sequence[Mapping[str, Any]]:
        entries = super()._entries(fs, path)
        if [posixpath.basename(raw["name"]) for raw in entries] == [posixpath.basename(path)]:
            # A file is listed as if it were in a folder of its own name. Is it?
            return entries if self._lookup(fs, path)["type"] == "directory" else []
        return entries

    def _lookup(self, fs: Any, path: str) -> Mapping[str, Any]:
        import ftplib

        try:
            answer = fs.ftp.sendcmd(f"MLST {path}").splitlines()[1]
        except ftplib.error_perm as exc:
            if not str(exc).startswith(_FTP_UNKNOWN):
                raise
            # A server of before 2007: fsspec lists the folder for it.
            return super()._lookup(fs, path)
        facts = answer.strip().partition(" ")[0].split(";")
        raw = {name.lower(): value for name, _, value in (fact.partition("=") for fact in facts)}
        kind = raw.get("type", "").lower()
        return {**raw, "type": "directory" if kind.endswith("dir") else kind}

    def _pieces(
        self, fs: Any, info: ObjectInfo, start: int, length: int | None
    ) -> Generator[Buffer]:
        fs.ftp.voidcmd("TYPE I")
        connection = fs.ftp.transfercmd(f"RETR {self._path(fs, info.key)}", rest=start or None)
        ended = False
        try:
            while length is None or length > 0:
                piece = connection.recv(MIB if length is None else min(MIB, length))
                if not piece:
                    break
                if length is not None:
                    length -= len(piece)
                yield piece
            ended = not connection.recv(1)
            if ended and hasattr(connection, "unwrap"):
                connection.unwrap()
        finally:
            connection.close()
            if not ended:
                # What a server says of a transfer broken off differs from one to the next,
                # so this connection is not used again.
                fs.ftp.close()
        if ended:
            fs.ftp.voidresp()
        else:
            fs._connect()
            if fs.tls is True:
                fs.ftp.prot_p()

    def _send(self, fs: Any, path: str, source: Source) -> None:
        try:
            fs.ftp.storbinary(f"STOR {path}", source, blocksize=MIB)
        except BaseException:
            if source.failed:
                # The server takes what it got for a whole file. Once it has said so, the file
                # can be removed; before, it might come after the removal.
                with suppress(Exception):
                    fs.ftp.voidresp()
            raise
        source.check()


class WebdavBackend(FsspecBackend):
    """WebDAV, through webdav4: ``webdav://`` and ``dav://`` over HTTP, with an ``s`` over TLS.

    The option ``base_url`` names the address when it has a path of its own.
    """

    @property
    def capabilities(self) -> Capabilities:
        """WebDAV copies. Its entity tags are made of whole seconds by some servers."""
        return replace(super().capabilities, copy=True)

    def _defaults(self) -> dict[str, Any]:
        return {"retry": False, "timeout": self._timeout()}

    def _timeout(self) -> Any:
        import httpx

        return httpx.Timeout(self._options.stall_timeout, connect=self._options.connect_timeout)

    def _from_url(self, cls: type[Any]) -> dict[str, Any]:
        userinfo, at, host = self._authority.rpartition("@")
        scheme = "https" if self._scheme.endswith("s") else "http"
        found: dict[str, Any] = {"base_url": f"{scheme}://{host}"}
        if at:
            user, _, password = userinfo.partition(":")
            found["auth"] = (unquote(user), unquote(password))
        return found

    def _connect(self) -> Any:
        fs = super()._connect()
        # It has no method to close it, and whoever got it by ``filesystem()`` drops it.
        weakref.finalize(fs, fs.client.http.close)
        return fs

    def _disconnect(self, fs: Any) -> None:
        fs.client.http.close()

    def _root(self, cls: type[Any]) -> str:
        return ""

    def _path(self, fs: Any, key: str) -> str:
        super()._path(fs, key)
        # webdav4 takes a part of a URL for what it calls a path.
        return quote(key)

    def _pieces(
        self, fs: Any, info: ObjectInfo, start: int, length: int | None
    ) -> Generator[Buffer]:
        headers = {"Accept-Encoding": "identity"}
        if start or length is not None:
            last = "" if length is None else start + length - 1
            headers["Range"] = f"bytes={start}-{last}"
        url = fs.client.join_url(self._path(fs, info.key))
        with fs.client.http.stream("GET", url, headers=headers) as answer:
            answer.raise_for_status()
            yield from _ranged(answer, start, length)

    def _send(self, fs: Any, path: str, source: Source) -> None:
        fs.client.upload_fileobj(source, path, overwrite=True, chunk_size=MIB, size=source.size)
        source.check()

    def _renames(self, fs: Any) -> bool:
        return True

    def _rename(self, fs: Any, old: str, new: str) -> None:
        fs.client.move(old, new, overwrite=True)


def _ranged(answer: Any, start: int, length: int | None) -> Generator[Buffer]:
    """Yield the asked part of an HTTP answer, also of one that holds more."""
    skip = start if answer.status_code == 200 else 0
    for piece in answer.iter_raw(MIB):
        if skip >= len(piece):
            skip -= len(piece)
            continue
        part = piece[skip:]
        skip = 0
        if length is not None:
            part = part[:length]
            length -= len(part)
        yield part
        if length == 0:
            return


@cache
def _with_known_hosts(cls: Any) -> Any:
    import paramiko

    class KnownHosts(cls):  # type: ignore[misc]  # a class that is known only now
        def _connect(self) -> None:
            self.client = paramiko.SSHClient()
            self.client.load_system_host_keys()
            # Releases of fsspec before 2026.9 have no such option.
            policy = getattr(self, "host_key_policy", None) or paramiko.AutoAddPolicy()
            self.client.set_missing_host_key_policy(policy)
            self.client.connect(self.host, **self.ssh_kwargs)
            self.ftp = self.client.open_sftp()

    return KnownHosts


CLASSES: dict[str, type[FsspecBackend]] = {
    "dav": WebdavBackend,
    "davs": WebdavBackend,
    "ftp": FtpBackend,
    "sftp": SftpBackend,
    "ssh": SftpBackend,
    "webdav": WebdavBackend,
    "webdavs": WebdavBackend,
    "webhdfs": WebHdfsBackend,
}
