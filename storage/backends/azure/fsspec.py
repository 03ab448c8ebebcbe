"""Azure Blob Storage through adlfs: the second, complete driver.

Every method is a few of Azure's own requests, sent by the client that adlfs is built on
(azure-storage-blob, asynchronous) on fsspec's event loop: what adlfs makes of a path (folders,
globs, cached listings, whole blocks in memory, repeated requests) is not what a backend needs.
``filesystem()`` gives the plain ``adlfs.AzureBlobFileSystem``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from storage.backends.azure.answers import (
    check_key,
    described,
    encoded_metadata,
    extent,
    from_headers,
    is_marker,
    quoted,
    translated,
)
from storage.backends.azure.client import Connection, connect, is_refusal
from storage.backends.azure.sign import check_signing, sas_url
from storage.backends.azure.upload import BlockUpload, DamagedError, Unfinished, block_sizes
from storage.backends.base import (
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    check_prefix,
)
from storage.backends.drivers.fsspec import FsspecBackend
from storage.backends.drivers.fsspec_parts import Chunks, arriving, run
from storage.backends.drivers.streams import check_pin, send_payload
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    one_line,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from storage.backends.azure.credentials import Access
    from storage.backends.network import Network

__all__ = ["AzureFsspecBackend"]

T = TypeVar("T")

_PERMISSIONS = {"GET": "r", "HEAD": "r", "PUT": "cw", "DELETE": "d"}
_PAGE = 2000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# Copies wait in a queue of Azure's: so many times the patience with a connection.
_COPY_PATIENCE = 20


class AzureFsspecBackend(FsspecBackend):
    """One container through adlfs; see :class:`~storage.backends.base.Backend`."""

    def __init__(
        self,
        container: str,
        access: Callable[[], Access],
        arguments: Callable[[], Mapping[str, Any]],
        network: Callable[[], Network],
        options: OpenOptions | None = None,
        *,
        signs: bool = False,
        uri: str | None = None,
        name: str = "azure (adlfs)",
    ) -> None:
        """Describe the container; nothing is imported, read or opened yet.

        Args:
            container: its name.
            access: returns the account and the credential.
            arguments: returns those of ``adlfs.AzureBlobFileSystem``.
            network: returns the proxy and the certificates.
            options: how to talk to the store.
            signs: whether ``access`` may have a credential that signs URLs.
            uri: of the container with a trailing slash, for messages.
            name: of the driver, for messages.
        """
        super().__init__("azure", container, {}, options, name)
        self._container = container
        self._make_arguments = arguments
        self._access = access
        self._network = network
        self._signs = signs
        self._uri = uri or self._uri
        self._unfinished = Unfinished()

    @property
    def capabilities(self) -> Capabilities:
        """Everything, but URLs only with a key or an identity."""
        return Capabilities(copy_across=True, if_match=True, sign=self._signs)

    # --- the client ------------------------------------------------------------------------

    def _connect(self) -> Connection:
        with translated(self._uri):
            return connect(self._access(), self._network(), self._options, attempts=1)

    def _disconnect(self, fs: Any) -> None:
        fs.close()

    def _run(self, where: str, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Return what ``work`` makes of the service's client, on the event loop."""
        connection: Connection = self._shared()
        begun = time.monotonic()
        try:
            with translated(where):
                return run(connection, work(connection.service))
        except AuthenticationError as exc:
            tokens = self._access().tokens
            if tokens is None or not is_refusal(exc) or not tokens.renew(begun):
                raise
        with translated(where):
            return run(connection, work(connection.service))

    def _blob(self, service: Any, key: str, container: str | None = None) -> Any:
        return service.get_blob_client(container or self._container, key)

    # --- looking ---------------------------------------------------------------------------

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`."""
        return self._stat_in(None, key, version)

    def _stat_in(self, container: str | None, key: str, version: str | None) -> ObjectInfo:
        check_key(self.where(key), key)
        where = self.where(key) if container is None else f"azure://{container}/{key}"
        named = {} if version is None else {"version_id": version}

        async def ask(service: Any) -> Any:
            return await self._blob(service, key, container).get_blob_properties(**named)

        try:
            found = self._run(where, ask)
        except StorageError as exc:
            if version is None or type(exc) not in (StorageError, InvalidInput):
                raise
            # What Azure says of a version that none of its own could be called.
            raise ModelMissingError(where, f"no version {version} of {where}: {exc}") from exc
        if found.etag is None:
            raise TransientError(f"{where}: the answer describes no blob; check the endpoint")
        info = described(key, found)
        if version is not None and info.version != version:
            raise ModelMissingError(
                where,
                f"no version {version} of {where}: the store answered with "
                f"{info.version or 'an object without version'}",
            )
        if is_marker(key, info.size, info.metadata):
            raise ModelMissingError(where)
        return info

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`. The listing brings metadata and digests along."""
        check_prefix(prefix)
        if prefix:
            check_key(self.where(prefix), prefix)
        pages: Any = None

        async def following(service: Any) -> list[ObjectInfo] | None:
            nonlocal pages
            if pages is None:
                container = service.get_container_client(self._container)
                pages = container.list_blobs(
                    name_starts_with=prefix or None, include=["metadata"], results_per_page=_PAGE
                ).by_page()
            try:
                page = await anext(pages)
            except StopAsyncIteration:
                return None
            if getattr(pages, "service_endpoint", "") is None:
                raise TransientError(
                    f"{self.where(prefix)}: the answer is no listing of blobs; check the endpoint"
                )
            found = [described(blob.name, blob) async for blob in page]
            return [info for info in found if not is_marker(info.key, info.size, info.metadata)]

        while (page := self._run(self.where(prefix), following)) is not None:
            yield from page

    # --- reading ---------------------------------------------------------------------------

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        check_key(self.where(key), key)
        where = self.where(key)
        headers: dict[str, str] = {}
        if span is not None:
            headers["x-ms-range"] = f"bytes={span.start}-{span.end - 1}"
        if pin is not None and pin.etag is not None and not pin.etag.startswith("W/"):
            headers["If-Match"] = pin.etag
        version = pin.version if pin is not None else None
        connection: Connection = self._shared()
        try:
            with translated(where):
                answer = run(connection, connection.get(self._container, key, headers, version))
        except AuthenticationError:
            if version is None or "If-Match" not in headers:
                raise
            # To name a version takes a permission of its own; the entity tag is as strict.
            with translated(where):
                answer = run(connection, connection.get(self._container, key, headers))
        lease = ExitStack()
        lease.callback(answer.drop)
        try:
            size, length = extent(where, span, answer.headers)
            info = from_headers(key, answer.headers, size)
            if info.etag is None:
                raise TransientError(f"{where}: the answer describes no blob; check the endpoint")
            check_pin(info, pin, where)
        except BaseException:
            lease.close()
            raise
        chunks = Chunks(arriving(connection, answer.read, length, where, translated), lease)
        return Body(info, chunks, chunks.close)

    # --- writing ---------------------------------------------------------------------------

    def write(
        self,
        key: str,
        payload: Payload,
        *,
        metadata: Mapping[str, str] | None = None,
        content_type: str | None = None,
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> ObjectInfo:
        """See :meth:`Backend.write`. One request up to 16 MiB, blocks beyond."""
        check_key(self.where(key), key)
        headers = {f"x-ms-meta-{name}": value for name, value in encoded_metadata(metadata).items()}
        if content_type is not None:
            headers["x-ms-blob-content-type"] = content_type
        if if_absent:
            headers["If-None-Match"] = "*"
        elif if_match is not None:
            if if_match.etag is None:
                raise InvalidInput(f"{self.where(key)}: the version to replace has no entity tag")
            headers["If-Match"] = if_match.etag
        try:
            answer, size = self._send_payload(key, payload, headers, on_bytes)
        except DamagedError as exc:
            self._discard(key, str(exc))
            raise TransientError(
                f"{self.where(key)}: the list of its blocks was damaged on the way; what came of "
                "it was removed again"
            ) from exc
        except ObjectExistsError as exc:
            if if_absent:
                raise
            raise AuthenticationError(
                f"{self.where(key)} exists already, and the credentials permit to create and not "
                "to overwrite; use others, or another name"
            ) from exc
        except ObjectChangedError as exc:
            if not if_absent:
                raise
            raise ObjectExistsError(
                f"{self.where(key)} exists already and is not to be overwritten"
            ) from exc
        except BucketMissingError:
            raise
        except ModelMissingError as exc:
            if if_match is None:
                raise
            raise ObjectChangedError(f"{self.where(key)} is not there any more") from exc
        return ObjectInfo(key, size, quoted(answer.get("etag")), answer.get("x-ms-version-id"))

    def _discard(self, key: str, etag: str) -> None:
        """Remove a blob that came out wrong, unless another one is there by now."""

        async def remove(service: Any) -> None:
            from azure.core import MatchConditions

            await self._blob(service, key).delete_blob(
                etag=etag, match_condition=MatchConditions.IfNotModified
            )

        try:
            self._run(self.where(key), remove)
        except (ModelMissingError, ObjectChangedError):
            return
        except StorageError as exc:
            raise IntegrityError(
                f"{self.where(key)}: the list of its blocks was damaged on the way, and what came "
                f"of it could not be removed ({exc}); delete it, or upload it again"
            ) from exc

    def _send_payload(
        self,
        key: str,
        payload: Payload,
        headers: dict[str, str],
        on_bytes: Callable[[int], object] | None,
    ) -> tuple[Mapping[str, str], int]:
        where = self.where(key)
        connection: Connection = self._shared()

        def whole(data: bytes) -> Mapping[str, str]:
            with translated(where):
                request = {**headers, "x-ms-blob-type": "BlockBlob"}
                return run(connection, connection.put(self._container, key, request, data))

        return send_payload(
            payload,
            block_sizes(payload.size, self._options.memory),
            where,
            whole=whole,
            begin=lambda: BlockUpload(
                connection,
                self._container,
                key,
                self._options,
                where,
                self._unfinished,
                on_bytes,
            ),
            complete=lambda upload: upload.complete(headers),
            on_bytes=on_bytes,
        )

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`. Azure may take its time; this waits for the end of it."""
        check_key(self.where(key), key)
        info = self._stat_in(bucket, source, version)
        if source == key and version is None and bucket in (None, self._container):
            return
        sas = self._access().sas

        async def start(service: Any) -> Any:
            from azure.core import MatchConditions

            url = self._blob(service, source, bucket).url.partition("?")[0]
            query = [f"versionid={version}"] if version is not None else []
            query += [sas] if sas is not None else []
            return await self._blob(service, key).start_copy_from_url(
                f"{url}?{'&'.join(query)}" if query else url,
                source_etag=info.etag,
                source_match_condition=MatchConditions.IfNotModified,
            )

        where = self.where(source) if bucket is None else f"azure://{bucket}/{source}"
        try:
            answer = self._run(where, start)
        except BucketMissingError:
            # The source was seen a moment ago.
            raise BucketMissingError(self._uri) from None
        if answer.get("copy_status") == "pending":
            self._await_copy(where, key, str(answer["copy_id"]))

    def _await_copy(self, where: str, key: str, copy_id: str) -> None:
        try:
            status = self._poll(where, key, copy_id)
        except BaseException:
            with suppress(Exception):
                self._run(where, lambda service: self._abort_copy(service, key, copy_id))
            raise
        if status != "success":
            with suppress(Exception):
                self._run(where, lambda service: self._abort_copy(service, key, copy_id))
            raise TransientError(f"{where}: Azure began the copy and then reported {status}")

    def _poll(self, where: str, key: str, copy_id: str) -> str:
        async def ask(service: Any) -> Any:
            return (await self._blob(service, key).get_blob_properties()).copy

        pause = _FIRST_PAUSE
        limit = _COPY_PATIENCE * self._options.stall_timeout
        progress, moved = None, time.monotonic()
        while True:
            found = self._run(where, ask)
            if found.id != copy_id:
                raise TransientError(f"{where}: the copy was overtaken by another one")
            if found.status != "pending":
                return f"{found.status} ({one_line(found.status_description or '')})".replace(
                    "success ()", "success"
                )
            if found.progress != progress:
                progress, moved = found.progress, time.monotonic()
            elif time.monotonic() - moved > limit:
                raise TransientError(
                    f"{where}: Azure has not gone on with the copy for {limit:g} s "
                    f"({progress or 'nothing'} is copied)"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _abort_copy(self, service: Any, key: str, copy_id: str) -> None:
        """End a copy, and remove the empty blob that is left of it."""
        blob = self._blob(service, key)
        found = await blob.get_blob_properties()
        if found.copy.id != copy_id or found.copy.status == "success":
            return
        if found.copy.status == "pending":
            await blob.abort_copy(copy_id)
            found = await blob.get_blob_properties()
        if found.copy.id == copy_id and found.copy.status != "success":
            from azure.core import MatchConditions

            await blob.delete_blob(etag=found.etag, match_condition=MatchConditions.IfNotModified)

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`. Each by a request of its own, many at once."""
        for key in keys:
            check_key(self.where(key), key)
        connection: Connection = self._shared()

        async def remove(key: str) -> None:
            async with connection.slots:
                with suppress(ModelMissingError), translated(self.where(key)):
                    await connection.renewing(self._blob(connection.service, key).delete_blob)

        async def remove_all() -> None:
            tasks = [asyncio.ensure_future(remove(key)) for key in keys]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        with translated(self._uri):
            run(connection, remove_all())

    # --- the rest --------------------------------------------------------------------------

    def sign(self, key: str, method: str, expires: float) -> str:
        """See :meth:`Backend.sign`. A SAS URL, by the account's key or the identity's."""
        permission = _PERMISSIONS.get(method.upper())
        if permission is None or not key:
            raise InvalidInput(
                f"{self.where(key)}: a URL can be signed for an object and one of "
                f"{', '.join(_PERMISSIONS)}, not for {method}"
            )
        access, where = self._access(), self.where(key)
        begin, end = check_signing(where, access, expires)
        return self._run(
            where,
            lambda service: sas_url(
                self._blob(service, key), service, access, permission, begin, end
            ),
        )

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """See :meth:`Backend.filesystem`. An ``adlfs.AzureBlobFileSystem`` with all its habits."""
        try:
            from adlfs import AzureBlobFileSystem
        except ImportError as exc:
            raise ConfigurationError(
                f"{self._uri}: this needs the package adlfs, which is not installed "
                f'({one_line(exc)}); run: pip install "modelstorage[azure]"'
            ) from exc
        with translated(self._uri):
            fs: Any = AzureBlobFileSystem(**self._make_arguments())
            # It takes a connection string of the environment for its own, and it knows neither
            # proxies nor certificates. No connection was made so far.
            connection = connect(self._access(), self._network(), self._options, attempts=None)
            fs.service_client = connection.service
        return fs, self._container
