"""``rclone serve s3``: an S3 with gaps, which a client has to notice rather than trust."""

from __future__ import annotations

from collections.abc import Sequence

from tests.servers.process import HOST, find_program, free_port
from tests.servers.s3 import S3Server


class RcloneS3(S3Server):
    """An S3 in front of a folder: buckets are folders, ``k`` and ``k/child`` exclude each other."""

    name = "rclone-s3"
    # Unsigned, so it is refused; that is an answer.
    health_path = "/"
    health_status = 400

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        data = self.folder / "data"
        data.mkdir()
        keys = f"{self.access_key},{self.secret_key}"
        address = f"{HOST}:{self.port}"
        return [
            find_program("rclone"),
            *("serve", "s3", "--addr", address, "--auth-key", keys, "--config", "", str(data)),
        ]

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket and all that it holds. This server lists no versions and uploads."""
        for key in self.keys_raw(name):
            self.delete_raw(name, key)
        self.raw.delete_bucket(Bucket=name)
