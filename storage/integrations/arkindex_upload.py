"""How an archive goes to the object store: whole to one signed URL, or in parts, each to its own.

For parts Arkindex stands between its clients and S3. These operations are about the object that
``object_type`` and ``object_id`` name; an ``upload_id`` tells one upload of it from others.

============================  ==================================================================
``CreateMultipartUpload``     gives the ``upload_id``
``CreateMultipartUploadPart`` gives the ``url`` to which one part is put, with the ``Content-MD5``
                              that was told
``CompleteMultipartUpload``   is told number, ETag and MD5 of each part; S3 puts them together,
                              and Arkindex makes the version available if its size is right
``AbortMultipartUpload``      lets S3 forget the parts
============================  ==================================================================
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from storage.backends.base import BatchItem, Payload
from storage.client import StorageClient
from storage.digest import MultiHasher
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    StorageError,
    TransferError,
    one_line,
)
from storage.integrations.arkindex_answers import Client, ask
from storage.transfer import events
from storage.transfer.progress import Meter
from storage.transfer.sending import send_item
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.config import HTTPConfig
    from storage.transfer.progress import ProgressCallback

__all__ = ["PartsUpload", "put_whole"]

_log = logging.getLogger(__name__)

_CONTENT_TYPE = "application/zstd"
_PART = 16 * 1024 * 1024
# As many as S3 takes of one object.
_PARTS = 10_000
_BLOCK = 1024 * 1024


def put_whole(
    path: str | os.PathLike[str],
    url: str,
    id: str,
    config: HTTPConfig | None,
    progress: ProgressCallback | None,
) -> None:
    """Send an archive to the one URL that was signed for it.

    Raises:
        AuthenticationError: the store refuses it.
        TransferError: it could not be sent.
        StorageError: the URL is none of HTTP.
    """
    location = _target(url, id)
    with StorageClient() as store:
        # Given like this it is sent to URLs of the older signature too, which covers it.
        with_type = _with_header(store, location, config, "Content-Type", _CONTENT_TYPE)
        store.upload(path, url, config=with_type, progress=progress)


class PartsUpload:
    """One upload in parts, begun; it is to be completed or aborted."""

    def __init__(self, client: Client, id: str) -> None:
        """Begin one for the archive of the model version ``id``.

        Raises:
            AuthenticationError: Arkindex takes none.
            TransferError: Arkindex could not be reached, or failed.
        """
        self._client, self._id = client, id
        self._about: dict[str, Any] = {"object_type": "model_version", "object_id": id}
        try:
            answer = self._ask("CreateMultipartUpload", checksum_algorithm=None)
        except TransferError:
            raise
        except StorageError as exc:
            raise AuthenticationError(
                f"the model version {id}: Arkindex gives no URL to send the archive to, and takes "
                "no parts of it; whose client it is needs the right to validate versions of the "
                f"model ({exc})"
            ) from exc
        self._about["upload_id"] = _text(answer, "upload_id", id)
        self._parts: list[dict[str, Any]] = []

    def send(
        self,
        path: str | os.PathLike[str],
        md5: str,
        config: HTTPConfig | None,
        progress: ProgressCallback | None,
    ) -> None:
        """Send all parts, one after the other; one that fails for a passing reason again.

        Args:
            path: of the archive.
            md5: of the archive, hex.
            config: how the object store is reached.
            progress: called meanwhile.

        Raises:
            AuthenticationError: Arkindex gives no URL, or the store refuses a part.
            IntegrityError: the archive is not the one that ``md5`` tells.
            TransferError: a part could not be sent.
        """
        size = os.path.getsize(path)
        step = max(_PART, -(-size // _PARTS))
        whole = MultiHasher(("md5",))
        meter: Meter | None = None
        with StorageClient() as store, ExitStack() as transfer:
            # There is one of no bytes, too.
            for number, start in enumerate(range(0, max(size, 1), step), 1):
                end = min(start + step, size)
                payload = _payload(path, start, end)
                own = _md5(payload, whole)
                location = self._sign(number, own)
                where = str(location)
                if meter is None:
                    transfer.enter_context(events.transfer("upload", where))
                    meter = Meter("upload", where, size, 1, progress)
                backend = store.backend(
                    location, _with_header(store, location, config, "Content-MD5", own)
                )
                info = send_item(
                    backend,
                    BatchItem(location.key, payload),
                    store.transfer_options.retry,
                    meter,
                    where=where,
                )
                if info.etag is None:
                    raise StorageError(
                        f"{where}: the answer to a part has no ETag, and S3 needs it to put the "
                        "parts together; check what is between here and the store"
                    )
                self._parts.append(
                    {"part_number": number, "etag": info.etag, "checksum": None, "md5_hash": own}
                )
                # The next part has a URL, and so a connection, of its own.
                store.close()
            found = whole.digests()["md5"].hex
            if found != md5:
                raise IntegrityError(
                    f"{os.fspath(path)}: expected the MD5 {md5}, found {found}; it changed while "
                    "it was being uploaded, and is not published"
                )
            if meter is not None:
                meter.add_object()
                meter.finish()

    def complete(self) -> None:
        """Have the parts put together, and the version made available.

        Raises:
            StorageError: see :func:`storage.integrations.arkindex.publish_model_version`. The
                version may be available all the same.
        """
        self._ask("CompleteMultipartUpload", checksum_algorithm=None, parts=self._parts)

    def abort(self) -> None:
        """Have the parts forgotten; a failure is logged."""
        try:
            self._ask("AbortMultipartUpload")
        except StorageError as exc:
            _log.warning(
                "the upload in parts of the model version %s is left behind: %s", self._id, exc
            )

    def _sign(self, number: int, md5: str) -> Location:
        answer = self._ask(
            "CreateMultipartUploadPart",
            checksum_algorithm=None,
            part_number=number,
            checksum=None,
            md5_hash=md5,
        )
        return _target(_text(answer, "url", self._id), self._id)

    def _ask(self, operation: str, **more: Any) -> Any:
        return ask(self._client, operation, self._id, body={**self._about, **more})


def _text(answer: Any, name: str, id: str) -> str:
    """Return what an answer says under a name."""
    found = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(found, str) or not found:
        raise StorageError(
            f"the model version {id}: Arkindex was to tell the {name} of an upload in parts, and "
            "did not; check the address of the client"
        )
    return found


def _target(url: str, id: str) -> Location:
    """Return where a signed URL leads.

    Raises:
        StorageError: not to a server of HTTP.
    """
    location = parse_uri(url)
    # A server has no business with the files and stores of its clients.
    if location.type != "http":
        raise StorageError(
            f"the model version {id}: its archive was to be sent to {one_line(location)}, "
            "and a signed URL of HTTP is needed"
        )
    return location


def _with_header(
    store: StorageClient, location: Location, config: HTTPConfig | None, name: str, value: str
) -> HTTPConfig:
    """Return the config that applies to a URL, with one header more."""
    from storage.config import HTTPConfig

    found = store.resolve_config(location, config)
    fields = {} if found is None else {n: getattr(found, n) for n in found.model_fields_set}
    return HTTPConfig(headers={**fields.pop("headers", {}), name: value}, **fields)


def _md5(payload: Payload, whole: MultiHasher) -> str:
    """Return the MD5 of a part as headers have it; feed the part to the hash of the whole."""
    own = MultiHasher(("md5",))
    with payload.open() as stream:
        while block := stream.read(_BLOCK):
            own.update(block)
            whole.update(block)
    return base64.b64encode(bytes.fromhex(own.digests()["md5"].hex)).decode("ascii")


def _payload(path: str | os.PathLike[str], start: int, end: int) -> Payload:
    return Payload(lambda: io.BufferedReader(_Part(path, start, end)), end - start)


class _Part(io.FileIO):
    """The bytes of a file from ``start`` up to ``end``."""

    def __init__(self, path: str | os.PathLike[str], start: int, end: int) -> None:
        super().__init__(path)
        self._end = end
        self.seek(start)

    def readinto(self, buffer: Any, /) -> int:
        left = max(0, self._end - self.tell())
        return super().readinto(memoryview(buffer).cast("B")[:left]) or 0

    def readall(self) -> bytes:
        return self.read(max(0, self._end - self.tell())) or b""
