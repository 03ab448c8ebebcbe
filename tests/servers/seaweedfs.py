"""SeaweedFS, the main S3 of the tests: real, and it checks signatures and permissions."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

from tests.servers.process import (
    GRPC_OFFSET,
    HOST,
    START_TIMEOUT,
    STOP_TIMEOUT,
    ServerError,
    find_program,
    free_ports,
)
from tests.servers.s3 import Keys, S3Server

READABLE_BUCKET = "onebucket"
READABLE_KEY = "model.bin"
PUBLIC_BUCKET = "public"


class SeaweedFS(S3Server):
    """A whole SeaweedFS in one process.

    Beside the administrator it knows three others, for buckets that a test has to create:

    * ``reader`` reads every object of ``READABLE_BUCKET`` but may list nothing,
    * ``object_reader`` reads only the object ``READABLE_KEY`` in it (and any key that starts
      with these letters; the server can express no less),
    * unsigned requests read and list ``PUBLIC_BUCKET``.

    Every bucket takes volumes of its own and a few tenths of a second: re-use buckets with fresh
    prefixes, and delete what is not shared. Writing to a bucket that is not
    there does not make it.
    """

    name = "seaweedfs"
    health_path = "/healthz"
    reader = Keys("AKIDREADER", "SECRETREADER")
    object_reader = Keys("AKIDONEOBJECT", "SECRETONEOBJECT")

    def __init__(
        self,
        parent: str | os.PathLike[str] | None = None,
        *,
        options: Sequence[str] = (),
    ) -> None:
        """Start nothing yet; ``options`` are more options of ``weed mini``."""
        super().__init__(parent)
        self._options = options
        self._sockets: list[Path] = []
        self._filer = 0
        self._command: Sequence[str] = ()

    def command(self) -> Sequence[str]:
        """Write the identities and return the command line."""
        master, volume, filer, self.port, admin = free_ports(5, grpc=True)
        self._filer = filer
        # It puts these under /tmp whatever TMPDIR says, and leaves them when it is killed.
        self._sockets = [
            Path(f"/tmp/seaweedfs-{part}-grpc-{port + GRPC_OFFSET}.sock")
            for part, port in {
                "master": master,
                "volume": volume,
                "filer": filer,
                "s3": self.port,
                "admin": admin,
            }.items()
        ]
        data = self.folder / "data"
        data.mkdir()
        identities = self.folder / "s3.json"
        identities.write_text(json.dumps({"identities": self._identities()}), encoding="utf-8")
        self._command = [
            find_program("weed"),
            f"-logdir={self.folder}",
            "mini",
            f"-dir={data}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={self.port}",
            f"-admin.port={admin}",
            # Relative to its working folder: the path of a socket holds 107 characters at most.
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            f"-s3.config={identities}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-volume.max=2000",
            "-volume.preStopSeconds=0",
            *self._options,
        ]
        return self._command

    def _identities(self) -> list[dict[str, object]]:
        def identity(name: str, keys: Keys, *actions: str) -> dict[str, object]:
            credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
            return {"name": name, "credentials": credentials, "actions": actions}

        return [
            identity("admin", self.admin, "Admin", "Read", "Write", "List", "Tagging"),
            identity("reader", self.reader, f"Read:{READABLE_BUCKET}"),
            identity("one", self.object_reader, f"Read:{READABLE_BUCKET}/{READABLE_KEY}*"),
            {
                "name": "anonymous",
                "actions": [f"Read:{PUBLIC_BUCKET}", f"List:{PUBLIC_BUCKET}"],
            },
        ]

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket and all that it holds; this server does so in one request."""
        self.raw.delete_bucket(Bucket=name)

    def empty_bucket(self, name: str) -> None:
        """Delete all that a bucket holds, and the empty folders that S3 does not show.

        A folder that is left of the key ``a/b`` would be in the way of an object ``a``.
        """
        for key, upload in self.pending_uploads(name):
            self.raw.abort_multipart_upload(Bucket=name, Key=key, UploadId=upload)
        filer = f"http://{HOST}:{self._filer}"
        while True:
            request = Request(f"{filer}/buckets/{name}/", headers={"Accept": "application/json"})
            with urlopen(request, timeout=30) as answer:
                entries = json.load(answer)["Entries"] or []
            if not entries:
                return
            for entry in entries:
                path = quote(entry["FullPath"])
                deletion = Request(f"{filer}{path}?recursive=true", method="DELETE")
                urlopen(deletion, timeout=30).close()

    @property
    def is_running(self) -> bool:
        """Whether there is a process: not before the start, and not after :meth:`halt`."""
        return self._process is not None

    def halt(self) -> None:
        """End the process, so that nobody answers; what it holds stays for :meth:`resume`."""
        assert self._process is not None, f"{self.name} is not running"
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT)
        self._process = None
        self._remove_sockets()

    def resume(self) -> None:
        """Start again after :meth:`halt`, on the same ports and with the same data.

        Raises:
            ServerError: it does not answer in time.
        """
        assert self._process is None, f"{self.name} is running"
        deadline = time.monotonic() + START_TIMEOUT
        self._launch(self._command)
        self._wait_until_ready()
        self._wait_until_readable(deadline)

    def _wait_until_readable(self, deadline: float) -> None:
        """Wait until its parts have found each other: it answers before, with an error or late."""
        from botocore.exceptions import BotoCoreError, ClientError

        while True:
            try:
                # All of them: each may be in a part that comes later.
                for bucket in self.raw.list_buckets()["Buckets"]:
                    for key in self.keys_raw(bucket["Name"]):
                        self.get_raw(bucket["Name"], key)
            except (BotoCoreError, ClientError) as exc:
                if time.monotonic() > deadline:
                    raise ServerError(f"{self.name} cannot be read: {exc}") from exc
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        """Stop the server and remove the sockets that it leaves behind when killed."""
        super().stop()
        self._remove_sockets()
        self._sockets = []

    def _remove_sockets(self) -> None:
        for socket in self._sockets:
            with contextlib.suppress(OSError):
                socket.unlink()
