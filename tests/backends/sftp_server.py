"""An SFTP server in front of a folder: ``python sftp_server.py PORT FOLDER USER PASSWORD``.

Its files are the operating system's: a handle keeps reading the file that it was opened on,
and a rename replaces in one step, as with OpenSSH's.
"""

from __future__ import annotations

import asyncio
import sys

import asyncssh

HOST = "127.0.0.1"


class Door(asyncssh.SSHServer):
    """Lets one user in by password."""

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return [username, password] == sys.argv[3:]


class Folder(asyncssh.SFTPServer):
    """Shows one folder as the root."""

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
        super().__init__(channel, chroot=sys.argv[2].encode())


async def main() -> None:
    await asyncssh.listen(
        HOST,
        int(sys.argv[1]),
        server_factory=Door,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        sftp_factory=Folder,
    )
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
