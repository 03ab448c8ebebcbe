"""Google Cloud Storage through gcsfs: the second, complete driver.

Every method is a few of the store's own requests, sent once each by the HTTP client of gcsfs on
fsspec's event loop: what gcsfs makes of a path (folders, cached listings, six retries, its
choice of exceptions) is not what a backend needs. Objects are read by the XML API, as obstore
reads them, so that both drivers give an object the same entity tag; all else goes by the JSON
API. ``filesystem()`` gives the plain ``gcsfs.GCSFileSystem``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

from storage.backends.base import (
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    Payload,
    check_prefix,
)
from storage.backends.drivers.fsspec import MIB
from storage.backends.drivers.fsspec_parts import Chunks, arriving, run
from storage.backends.drivers.obstore_errors import fits_header
from storage.backends.drivers.streams import check_pin, check_size, exactly, extent
from storage.backends.gcs.answers import (
    PAGE,
    damage,
    encoded,
    from_answer,
    info_of_headers,
    info_of_resource,
    page_of,
    removal,
    rewrite,
    said,
    translated,
)
from storage.backends.gcs.client import GcsClient, lower_names, quoted, refusal
from storage.backends.gcs.upload import Answer, ResumableUpload, chunk_size
from storage.digest import Digest, MultiHasher, available
from storage.errors import (
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
)

__all__ = ["GcsFsspecBackend"]

_SINGLE_REQUEST_LIMIT = 8 * MIB
# An object that moves to another place is rewritten by so many bytes at a time; the store would
# otherwise go on for as long as a request may stay without an answer.
_STEP = 256 * MIB


class GcsFsspecBackend(GcsClient):
    """One bucket through gcsfs; see :class:`~storage.backends.base.Backend`."""

    @property
    def capabilities(self) -> Capabilities:
        """Everything; presigned URLs only with a key to sign with."""
        can_sign = self._signer is not None and self._signer.usable
        return Capabilities(copy_across=True, if_match=True, sign=can_sign)

    # --- looking ---------------------------------------------------------------------------

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`."""
        return self._stat_in(self._bucket, key, version)

    def _stat_in(self, bucket: str, key: str, version: str | None) -> ObjectInfo:
        self._check_key(key)
        where = f"gs://{bucket}/{key}"
        if version is not None and not (version.isascii() and version.isdigit()):
            raise ModelMissingError(where, f"no generation {version!r} of {where}: it is a number")
        query = {"generation": version} if version is not None else {}
        resource = self._call(where, "GET", self._object(key, bucket), query)
        info = info_of_resource(key, resource)
        if info.size == 0 and key.endswith("/"):
            raise ModelMissingError(where)
        if version is not None and info.version != version:
            raise ModelMissingError(
                where,
                f"no generation {version} of {where}: the store answered with {info.version}",
            )
        return info

    def _check_key(self, key: str) -> None:
        if not key:
            raise ModelMissingError(self.where(key))
        if "\0" in key:
            raise InvalidInput(f"{self.where(key)!r} holds a NUL character, which no store can")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`."""
        check_prefix(prefix)
        path = f"/storage/v1/b/{quoted(self._bucket)}/o"
        query = {"prefix": prefix, **PAGE}
        while True:
            found = self._call(self.where(prefix), "GET", path, query, BucketMissingError)
            infos, token = page_of(self.where(prefix), found, query.get("pageToken"))
            yield from infos
            if token is None:
                return
            query["pageToken"] = token

    def is_digest(self, info: ObjectInfo) -> bool:
        """See :meth:`Backend.is_digest`. Composed and encrypted objects have other tags."""
        try:
            return info.hint in self.stat(info.key, info.version).digests
        except ModelMissingError as exc:
            self._replaced(info.key, info, exc)
            raise

    # --- reading ---------------------------------------------------------------------------

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        self._check_key(key)
        # Or an object stored in gzip's encoding would be sent decoded, and without ranges.
        headers = {"Accept-Encoding": "gzip"}
        query: dict[str, str] = {}
        if span is not None:
            headers["Range"] = f"bytes={span.start}-{span.end - 1}"
        if pin is not None and pin.version is not None:
            query["generation"] = pin.version
        if pin is not None and pin.etag is not None and not pin.etag.startswith("W/"):
            headers["If-Match"] = pin.etag
        where = self.where(key)
        fs = self._shared()
        path = f"/{quoted(self._bucket)}/{quoted(key)}"
        with translated(where):
            begun = time.monotonic()
            response = run(fs, self._open("GET", path, query, headers=headers)())
            if response.status == 401 and self._renewed(begun):
                self._drop(response)
                response = run(fs, self._open("GET", path, query, headers=headers)())
        lease = ExitStack()
        lease.callback(self._drop, response)
        try:
            known = lower_names(response.headers)
            if response.status not in (200, 206):
                with translated(where):
                    problem = run(fs, response.content.read(16 * 1024))
                raise from_answer(where, response.status, known, problem, ModelMissingError)
            if info_of_headers(key, known, None).pin is None:
                raise TransientError(
                    f"{where}: the answer says nothing of the object; it is not the store's"
                )
            size, length = extent(
                where, span, _number(known.get("content-length")), known.get("content-range")
            )
            info = info_of_headers(key, known, size)
            check_pin(info, pin, where)
        except BaseException as exc:
            lease.close()
            if type(exc) is ModelMissingError and pin is not None:
                self._replaced(key, pin, exc)
            raise
        stream = arriving(fs, response.content.read, length, where, translated)
        chunks = Chunks(stream, lease)
        return Body(info, chunks, chunks.close)

    def _replaced(self, key: str, pin: ObjectInfo, exc: ModelMissingError) -> None:
        # A bucket that keeps no versions does not know a generation that was overwritten.
        with suppress(ModelMissingError):
            now = self.stat(key)
            raise ObjectChangedError(
                f"{self.where(key)} was replaced since it was looked at: generation "
                f"{pin.version} is gone, {now.version} is there"
            ) from exc

    def _drop(self, response: Any) -> None:
        # Frees the connection, and closes it if the body has not been read to its end.
        with suppress(RuntimeError):
            self._shared().loop.call_soon_threadsafe(response.close)

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
        """See :meth:`Backend.write`. One request up to 8 MiB, a resumable upload beyond."""
        self._check_key(key)
        resource: dict[str, Any] = {"metadata": dict(metadata or {})}
        resource["contentType"] = content_type or "application/octet-stream"
        if not fits_header("Content-Type", resource["contentType"]):
            raise InvalidInput(f"{self.where(key)}: {content_type!r} cannot be a content type")
        query = self._condition(key, if_absent, if_match)
        try:
            answer, size, digest = self._send_payload(key, payload, resource, query, on_bytes)
        except ObjectChangedError as exc:
            if not if_absent:
                raise
            raise ObjectExistsError(
                f"{self.where(key)} exists already and is not to be overwritten"
            ) from exc
        info = info_of_resource(key, answer)
        problem = damage(answer, resource, info, size, digest)
        if problem is not None:
            self._discard(key, info, problem)
        return ObjectInfo(key, size, version=info.version, digests=info.digests)

    @contextmanager
    def _looking_back(
        self, key: str, resource: Mapping[str, Any], size: int, digest: Digest
    ) -> Iterator[None]:
        """Look at what is stored if no answer tells; a damaged object of ours is removed.

        Google's service refuses such a one. A store that does not would have it for good,
        because the next try takes it, by the digests in its metadata, for its own.
        """
        try:
            yield
        except TransientError as exc:
            if not resource["metadata"] or exc.throttled or isinstance(exc, UnreachableError):
                raise
            try:
                info = self.stat(key)
            except StorageError:
                raise exc from exc.__cause__
            kept = info.metadata.items()
            if resource["metadata"].items() <= kept and info.size == size:
                problem = damage({}, resource, info, size, digest)
                if problem is not None:
                    self._discard(key, info, problem)
            raise

    def _discard(self, key: str, info: ObjectInfo, problem: str) -> NoReturn:
        """Remove what arrived otherwise than it was sent, that very generation; raise."""
        where = self.where(key)
        try:
            if info.version is None:
                raise UnsupportedOperation(f"{where}: the store tells no generations")
            self._delete_one(where, key, removal(info.version), tries=3)
        except (ModelMissingError, ObjectChangedError):
            pass  # somebody else's is there by now
        except StorageError as exc:
            raise IntegrityError(
                f"{where}: {problem}, and what the store has could not be removed ({exc}); delete "
                "it, or upload it again"
            ) from exc
        raise TransientError(f"{where}: {problem}; it was removed again")

    def _condition(self, key: str, if_absent: bool, if_match: ObjectInfo | None) -> dict[str, str]:
        if if_absent:
            return {"ifGenerationMatch": "0"}
        if if_match is None:
            return {}
        return {"ifGenerationMatch": self.generation(key, if_match)}

    def generation(self, key: str, info: ObjectInfo) -> str:
        """Return the generation that ``info`` is about.

        Raises:
            InvalidInput: ``info`` identifies no content.
            ObjectChangedError: it is not there any more.
        """
        if info.version is not None:
            return info.version
        if info.pin is None:
            raise InvalidInput(
                f"{self.where(key)}: the version to replace has no generation and no entity tag"
            )
        # A listing by the XML API tells no generation.
        try:
            with self.read(key, None, info) as body:
                found = body.info.version
        except ModelMissingError as exc:
            raise ObjectChangedError(f"{self.where(key)} is not there any more") from exc
        if found is None:
            raise UnsupportedOperation(f"{self.where(key)}: the store tells no generations")
        return found

    def _send_payload(
        self,
        key: str,
        payload: Payload,
        resource: dict[str, Any],
        query: dict[str, str],
        on_bytes: Callable[[int], object] | None,
    ) -> tuple[dict[str, Any], int, Digest]:
        """Return the store's answer, and the size and a digest of what was sent."""
        where = self.where(key)
        # Not in a body, where a damaged byte would make it another object's name.
        query = {"name": key, **query}
        chunk = chunk_size(self._options.memory)
        small = payload.size is not None and payload.size <= _SINGLE_REQUEST_LIMIT
        with payload.open() as stream:
            part = exactly(stream, _SINGLE_REQUEST_LIMIT if small else chunk)
            following = exactly(stream, chunk) if part else b""
            if not following and len(part) <= _SINGLE_REQUEST_LIMIT:
                check_size(where, payload.size, len(part))
                digest = _digest("md5", part)
                with self._looking_back(key, resource, len(part), digest):
                    answer = self._put(where, part, digest, resource, query)
                if on_bytes is not None and part:
                    on_bytes(len(part))
                return answer, len(part), digest
            if small:
                check_size(where, payload.size, len(part) + len(following))
            algorithm = "crc32c" if available("crc32c") else "md5"
            hasher = MultiHasher([algorithm])
            with self._resumable(where, resource, query) as upload:
                total = 0
                while part:
                    total += len(part)
                    hasher.update(part)
                    if following:
                        upload.send(part, last=False)
                    else:
                        check_size(where, payload.size, total)
                        digest = hasher.digests()[algorithm]
                        checksum = f"{algorithm}={encoded(digest)}"
                        with self._looking_back(key, resource, total, digest):
                            upload.send(part, last=True, checksum=checksum)
                    if on_bytes is not None:
                        on_bytes(len(part))
                    part, following = following, b""
                    if part:
                        following = exactly(stream, chunk)
                return upload.answer, total, digest

    def _put(
        self,
        where: str,
        data: bytes,
        digest: Digest,
        resource: dict[str, Any],
        query: dict[str, str],
    ) -> dict[str, Any]:
        # The store refuses bytes that were damaged on their way.
        described = {**resource, "md5Hash": encoded(digest)}
        boundary = secrets.token_hex(16)
        body = b"".join(
            (
                f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n".encode(),
                json.dumps(described).encode(),
                f"\r\n--{boundary}\r\nContent-Type: {resource['contentType']}\r\n\r\n".encode(),
                data,
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        answer = self._sent(
            where,
            body,
            "POST",
            self._uploads(),
            {"uploadType": "multipart", **query},
            {"Content-Type": f"multipart/related; boundary={boundary}"},
        )
        return said(where, answer.body)

    def _uploads(self) -> str:
        return f"/upload/storage/v1/b/{quoted(self._bucket)}/o"

    def _resumable(
        self, where: str, resource: dict[str, Any], query: dict[str, str]
    ) -> ResumableUpload:
        def begin() -> str:
            answer = self._sent(
                where,
                json.dumps(resource).encode(),
                "POST",
                self._uploads(),
                {"uploadType": "resumable", **query},
                {
                    "Content-Type": "application/json; charset=UTF-8",
                    "X-Upload-Content-Type": resource["contentType"],
                },
            )
            return answer.headers.get("location", "")

        def put(url: str, data: bytes, headers: Mapping[str, str]) -> Answer:
            # Or the client would name another type than was said at the beginning.
            headers = {**headers, "Content-Type": resource["contentType"]}
            # What is missing is the upload itself: it begins again.
            return self._sent(where, data, "PUT", url, {}, headers, TransientError)

        def cancel(url: str) -> int:
            return run(self._shared(), self._answer("DELETE", url, {}, data=b"")).status

        return ResumableUpload(where, begin, put, cancel)

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`."""
        self._check_key(source)
        self._check_key(key)
        bucket = bucket or self._bucket
        info = self._stat_in(bucket, source, version)
        if (bucket, source) == (self._bucket, key) and version is None:
            return
        path = f"{self._object(source, bucket)}/rewriteTo/b/{quoted(self._bucket)}/o/{quoted(key)}"
        query = {"maxBytesRewrittenPerCall": str(_STEP)}
        if info.version is not None:
            query["sourceGeneration"] = info.version
        where = f"gs://{bucket}/{source}"
        # A large object, or one on its way elsewhere, is copied in several steps.
        try:
            rewrite(where, lambda query: self._call(where, "POST", path, query), query)
        except ModelMissingError as exc:
            if type(exc) is ModelMissingError and version is None:
                # The bucket keeps no versions, and this one has been replaced meanwhile.
                self._stat_in(bucket, source, None)
                raise TransientError(f"{where} was replaced while it was being copied") from exc
            raise

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`. Several at once."""
        for key in keys:
            self._check_key(key)
        begun = time.monotonic()
        refused = self._delete_each(keys)
        if refused and self._renewed(begun):
            refused = self._delete_each(list(refused))
        for problem in refused.values():
            raise problem

    def _delete_one(self, where: str, key: str, query: Mapping[str, str], tries: int) -> None:
        try:
            with translated(where):
                answer = run(self._shared(), self._answer("DELETE", self._object(key), query))
            if (problem := refusal(where, answer)) is not None:
                raise problem
        except TransientError:
            if tries == 1:
                raise
            self._delete_one(where, key, query, tries - 1)

    def _delete_each(self, keys: Sequence[str]) -> dict[str, StorageError]:
        """Delete objects; return the keys that took another token, and what was said of it."""
        fs = self._shared()
        slots = asyncio.Semaphore(self._options.connections)
        refused: dict[str, StorageError] = {}

        async def delete(key: str, request: Coroutine[Any, Any, Answer]) -> None:
            async with slots:
                with translated(self.where(key)):
                    answer = await request
                    problem = refusal(self.where(key), answer)
                    if problem is not None and answer.status == 401:
                        refused[key] = problem
                    elif problem is not None:
                        raise problem

        async def delete_all() -> list[BaseException | None]:
            return await asyncio.gather(
                *(delete(key, request) for key, request in requests), return_exceptions=True
            )

        requests = [(key, self._answer("DELETE", self._object(key), {})) for key in keys]
        for problem in run(fs, delete_all()):
            if problem is not None and type(problem) is not ModelMissingError:
                raise problem
        return refused

    # --- the rest --------------------------------------------------------------------------

    def sign(self, key: str, method: str, expires: float) -> str:
        """See :meth:`Backend.sign`."""
        if self._signer is None:
            raise UnsupportedOperation(f"{self.where(key)}: there is no key to sign a URL with")
        return self._signer(key, method, expires)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _digest(algorithm: str, data: bytes) -> Digest:
    hasher = MultiHasher([algorithm])
    hasher.update(data)
    return hasher.digests()[algorithm]
