"""Servers for the generic driver: SFTP, FTP and WebDAV, each in front of a folder."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.servers.process import HOST, Server, find_program, free_port

USER = "user"
# With a character that would end the user's part of a URL.
PASSWORD = "pass@word"


class FolderServer(Server):
    """Serves ``folder / "data"`` to one user."""

    protocol: str
    health_path = "/"
    health_status = 401

    @property
    def data(self) -> Path:
        """What is served."""
        return self.folder / "data"

    @property
    def url(self) -> str:
        """Where it serves, with its user and password."""
        return f"{self.protocol}://{USER}:pass%40word@{HOST}:{self.port}/"

    def is_healthy(self) -> bool:
        """Ask the server once whether it is ready."""
        if self.protocol == "webdav":
            return super().is_healthy()
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                return bool(connection.recv(3))
        except OSError:
            return False


class SftpServer(FolderServer):
    """``sftp_server.py``."""

    name = protocol = "sftp"

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        self.data.mkdir()
        script = Path(__file__).with_name("sftp_server.py")
        return [sys.executable, str(script), str(self.port), str(self.data), USER, PASSWORD]


class RcloneServer(FolderServer):
    """``rclone serve``."""

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        self.data.mkdir()
        return [
            find_program("rclone"),
            *("serve", self.protocol, "--addr", f"{HOST}:{self.port}", "--config", ""),
            *("--user", USER, "--pass", PASSWORD),
            # Or it shows what is put there around it only after a while.
            *("--dir-cache-time", "0s"),
            str(self.data),
        ]


class FtpServer(RcloneServer):
    """FTP by rclone."""

    name = protocol = "ftp"


class WebdavServer(RcloneServer):
    """WebDAV by rclone."""

    name = protocol = "webdav"


class FolderRaw:
    """A served folder through the file system."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, data: bytes) -> None:
        path = self._folder / key
        if key.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            # At once, as careful writers do: these protocols tell times in whole seconds, so
            # nobody notices a file that is changed in place twice in one.
            partial = self._folder.parent / f"{self._folder.name}-partial"
            partial.write_bytes(data)
            partial.replace(path)

    def get(self, key: str) -> bytes:
        return (self._folder / key).read_bytes()

    def keys(self) -> set[str]:
        return {
            str(path.relative_to(self._folder))
            for path in self._folder.rglob("*")
            if path.is_file()
        }
