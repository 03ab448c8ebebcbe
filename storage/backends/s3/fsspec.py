"""S3 through s3fs: the second, complete driver.

Every method is a few of S3's own requests, sent by s3fs's client on fsspec's event loop: what
s3fs makes of a path (folders, globs, cached listings, retries, its choice of exceptions) is
not what a backend needs. ``filesystem()`` gives the plain ``s3fs.S3FileSystem``.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from storage.backends.base import (
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    check_prefix,
    md5_hint,
)
from storage.backends.drivers.fsspec import MIB, FsspecBackend
from storage.backends.drivers.fsspec_parts import Chunks, arriving, run
from storage.backends.drivers.streams import Watched, check_pin, extent, genuine, send_payload
from storage.backends.s3.answers import (
    described,
    encrypted,
    from_code,
    kept_with,
    next_page,
    stored_digests,
    translated,
    version_of,
)
from storage.backends.s3.leftovers import Leftovers
from storage.backends.s3.multipart import MultipartUpload, part_sizes
from storage.backends.s3.protection import Protection
from storage.backends.s3.session import (
    PLAIN_ARGUMENTS,
    client_config,
    new_session,
    presigned,
    sending_once,
)
from storage.backends.s3.signed import SignedClient
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
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

__all__ = ["S3FsspecBackend"]

_COPY_LIMIT = 5 * 1024**3
_COPY_PART = 512 * MIB
_MAX_PARTS = 10_000
_DELETE_BATCH = 1000
_METHODS = {
    "GET": "get_object",
    "HEAD": "head_object",
    "PUT": "put_object",
    "DELETE": "delete_object",
}
# XML 1.0 has no way to write these, and DeleteObjects is XML.
_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


class S3FsspecBackend(FsspecBackend):
    """One bucket through s3fs; see :class:`~storage.backends.base.Backend`."""

    def __init__(
        self,
        bucket: str,
        arguments: Mapping[str, Any],
        options: OpenOptions | None = None,
        name: str = "s3 (s3fs)",
        *,
        copy_limit: int = _COPY_LIMIT,
        checksum: str = "sha256",
        client: Callable[[OpenOptions], SignedClient] | None = None,
    ) -> None:
        """Describe the bucket; nothing is imported or opened yet.

        Args:
            bucket: its name.
            arguments: of ``s3fs.S3FileSystem``.
            options: how to talk to the store.
            name: of the driver, for messages.
            copy_limit: bytes of the largest object that one copy request may copy; larger
                ones are copied in parts.
            checksum: ``S3Config.upload_checksum``, but for ``auto``.
            client: returns a client that finds uploads whose name was lost, where there may
                be such.
        """
        super().__init__("s3", bucket, arguments, options, name)
        self._bucket = bucket
        self._copy_limit = copy_limit
        self._protection = Protection(checksum)
        self._leftovers = client and Leftovers(self._uri, client, self._options)

    @property
    def capabilities(self) -> Capabilities:
        """Everything."""
        return Capabilities(copy_across=True, if_match=True, sign=True, checksums=True)

    # --- the client ------------------------------------------------------------------------

    def _implementation(self) -> type[Any]:
        try:
            from s3fs import S3FileSystem
        except ImportError as exc:
            raise ConfigurationError(
                f"{self._uri}: this driver needs the package s3fs, which is not installed "
                f'({one_line(exc)}); run: pip install "modelstorage[s3]"'
            ) from exc
        cls: type[Any] = S3FileSystem
        return cls

    def _from_url(self, cls: type[Any]) -> dict[str, Any]:
        return {}

    def _connect(self) -> Any:
        arguments = dict(self._arguments)
        session = {
            name: arguments.pop(name)
            for name in ("credential_provider", "metadata_endpoint")
            if name in arguments
        }
        given = arguments.get("config_kwargs") or {}
        arguments["config_kwargs"] = {
            **sending_once(),
            **client_config(self._bucket, self._options, given),
        }
        arguments["skip_instance_cache"] = True
        cls = self._implementation()
        if PLAIN_ARGUMENTS.issuperset(arguments):
            arguments["session"] = new_session(**session)
        with translated(self._uri):
            fs = cls(**arguments)
        fs.retries = 1
        # Waiting for a connection is not to look like a store that takes no bytes.
        fs.upload_slots = asyncio.Semaphore(self._options.connections)
        return fs

    def _disconnect(self, fs: Any) -> None:
        creator = getattr(fs, "_s3creator", None)
        if creator is not None:
            run(fs, creator.__aexit__(None, None, None))

    def _request(self, method: str, **arguments: Any) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return one request to the bucket, to be run on the file system's event loop."""
        request: Coroutine[Any, Any, dict[str, Any]] = self._shared()._call_s3(
            method, **{"Bucket": self._bucket, **arguments}
        )
        return request

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return run(self._shared(), self._request(method, **arguments))

    # --- looking ---------------------------------------------------------------------------

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`. The store cannot say here whether the bucket is missing."""
        return self._stat_in(self._bucket, key, version)

    def _stat_in(self, bucket: str, key: str, version: str | None) -> ObjectInfo:
        self._check_key(key)
        answer = self._head(key, version, bucket, ChecksumMode="ENABLED")
        self._check_version(key, version, answer)
        where = f"s3://{bucket}/{key}"
        info = genuine(described(key, answer, answer.get("ContentLength")), where)
        if info.size == 0 and key.endswith("/"):
            raise ModelMissingError(where)
        return info

    def _head(self, key: str, version: str | None, bucket: str, **arguments: str) -> dict[str, Any]:
        arguments |= {"Bucket": bucket, "Key": key}
        where = f"s3://{bucket}/{key}"
        if version is not None:
            arguments["VersionId"] = version
        try:
            with translated(where):
                return self._call("head_object", **arguments)
        except StorageError as exc:
            if type(exc) is not StorageError:
                raise
        # Refused for a reason that only the body of an answer has: expired credentials, or a
        # version that cannot be one. The answer to a HEAD has no body.
        arguments.pop("ChecksumMode", None)
        with translated(where):
            answer = self._call("get_object", **arguments)
        self._drop(answer["Body"])
        return answer

    def _check_key(self, key: str) -> None:
        if not key:
            raise ModelMissingError(self.where(key))
        if "\0" in key:
            raise InvalidInput(f"{self.where(key)!r} holds a NUL character, which no store can")

    def _check_version(self, key: str, version: str | None, answer: Mapping[str, Any]) -> None:
        # A store without versions ignores the question.
        if version is not None and answer.get("VersionId", "null") != version:
            raise ModelMissingError(
                self.where(key),
                f"no version {version} of {self.where(key)}: the store answered with "
                f"{answer.get('VersionId') or 'an object without version'}",
            )

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`."""
        check_prefix(prefix)
        arguments: dict[str, str] = {"Prefix": prefix} if prefix else {}
        while True:
            with translated(self.where(prefix)):
                page = self._call("list_objects_v2", **arguments)
            if "IsTruncated" not in page:
                raise TransientError(
                    f"{self.where(prefix)}: the answer is no listing, and not the store's; if that "
                    "goes on, check the endpoint and the proxy"
                )
            for entry in page.get("Contents", ()):
                if entry["Key"].endswith("/") and entry["Size"] == 0:
                    continue
                yield ObjectInfo(
                    entry["Key"],
                    entry["Size"],
                    entry.get("ETag"),
                    modified=entry.get("LastModified"),
                    hint=md5_hint(entry.get("ETag")),
                )
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = next_page(
                self.where(prefix),
                page.get("NextContinuationToken"),
                arguments.get("ContinuationToken"),
            )

    def is_digest(self, info: ObjectInfo) -> bool:
        """See :meth:`Backend.is_digest`."""
        answer = self._head(info.key, info.version, self._bucket)
        if answer.get("ETag") != info.etag:
            raise ObjectChangedError(f"{self.where(info.key)} was replaced since it was read")
        return not encrypted(answer)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """See :meth:`Backend.checksums`. What a listing leaves out; ``stat`` tells them all."""
        try:
            answer = self._head(info.key, info.version, self._bucket, ChecksumMode="ENABLED")
        except ModelMissingError:
            return ()
        return stored_digests(answer) if answer.get("ETag") == info.etag else ()

    # --- reading ---------------------------------------------------------------------------

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        self._check_key(key)
        answer = self._get(key, span, pin)
        lease = ExitStack()
        lease.callback(self._drop, answer["Body"])
        try:
            size, length = extent(
                self.where(key), span, answer.get("ContentLength"), answer.get("ContentRange")
            )
            info = genuine(described(key, answer, size), self.where(key))
            check_pin(info, pin, self.where(key))
        except BaseException:
            lease.close()
            raise
        stream = arriving(self._shared(), answer["Body"].read, length, self.where(key), translated)
        chunks = Chunks(stream, lease)
        return Body(info, chunks, chunks.close)

    def _get(self, key: str, span: ByteRange | None, pin: ObjectInfo | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {"Key": key}
        if span is not None:
            arguments["Range"] = f"bytes={span.start}-{span.end - 1}"
        if pin is not None and pin.etag is not None and not pin.etag.startswith("W/"):
            arguments["IfMatch"] = pin.etag
        if pin is None or pin.version is None:
            with translated(self.where(key)):
                return self._call("get_object", **arguments)
        try:
            with translated(self.where(key)):
                answer = self._call("get_object", VersionId=pin.version, **arguments)
        except AuthenticationError:
            # To read a version by its name takes a permission of its own. Without the name the
            # entity tag pins as well, as long as no newer version is there.
            if "IfMatch" not in arguments:
                raise
            with translated(self.where(key)):
                return self._call("get_object", **arguments)
        try:
            self._check_version(key, pin.version, answer)
        except BaseException:
            self._drop(answer["Body"])
            raise
        return answer

    def _drop(self, stream: Any) -> None:
        # Frees the connection, and closes it if the body has not been read to its end.
        with suppress(RuntimeError):
            self._shared().loop.call_soon_threadsafe(stream.close)

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
        """See :meth:`Backend.write`. One request up to 16 MiB, parts beyond."""
        attributes: dict[str, Any] = {"Key": key}
        if metadata:
            attributes["Metadata"] = dict(metadata)
        if content_type is not None:
            attributes["ContentType"] = content_type
        self._check_key(key)
        condition = self._condition(key, if_absent, if_match)
        try:
            answer, size = self._send_payload(payload, attributes, condition, on_bytes)
        except ObjectChangedError as exc:
            if not if_absent:
                raise
            raise ObjectExistsError(
                f"{self.where(key)} exists already and is not to be overwritten"
            ) from exc
        except BucketMissingError:
            raise
        except ModelMissingError as exc:
            # The only object that a write can miss is the one it was to replace.
            raise ObjectChangedError(f"{self.where(key)} is not there any more") from exc
        etag = answer.get("ETag")
        return ObjectInfo(key, size, etag, version_of(answer), hint=md5_hint(etag))

    def _condition(self, key: str, if_absent: bool, if_match: ObjectInfo | None) -> dict[str, str]:
        if if_absent:
            return {"IfNoneMatch": "*"}
        if if_match is None:
            return {}
        if if_match.etag is None:
            raise InvalidInput(f"{self.where(key)}: the version to replace has no entity tag")
        return {"IfMatch": if_match.etag}

    def _send_payload(
        self,
        payload: Payload,
        attributes: dict[str, Any],
        condition: dict[str, str],
        on_bytes: Callable[[int], object] | None,
    ) -> tuple[dict[str, Any], int]:
        return send_payload(
            payload,
            part_sizes(payload.size, self._options.memory),
            self.where(attributes["Key"]),
            whole=lambda data: self._put(data, attributes, condition),
            begin=lambda: self._multipart(attributes, on_bytes),
            complete=lambda upload: upload.complete(condition),
            on_bytes=on_bytes,
        )

    def _put(
        self, data: bytes, attributes: dict[str, Any], condition: dict[str, str]
    ) -> dict[str, Any]:
        fs = self._shared()
        where = self.where(attributes["Key"])
        body = Watched(data, self._options.stall_timeout)
        sent = self._protection.of(data, whole=True)
        arguments = {**attributes, **condition, **sent.headers}

        def request() -> Coroutine[Any, Any, dict[str, Any]]:
            return self._request("put_object", Body=body, **arguments)

        with translated(where):
            answer = run(fs, body.sent_by(request, fs.upload_slots))
        try:
            sent.check(where, answer)
        except TransientError:
            if "IfNoneMatch" in condition:
                # It is nobody else's, and the next attempt is not to take it for that.
                self.delete([attributes["Key"]])
            raise
        return answer

    def _multipart(
        self,
        attributes: dict[str, Any],
        on_bytes: Callable[[int], object] | None = None,
        protection: Protection | None = None,
    ) -> MultipartUpload:
        where = self.where(attributes["Key"])
        return MultipartUpload(
            self._shared(),
            self._request,
            attributes,
            self._options,
            where,
            on_bytes,
            protection if protection is not None else self._protection,
            self._leftovers,
        )

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`."""
        self._check_key(key)
        bucket = bucket or self._bucket
        where = f"s3://{bucket}/{source}"
        info = self._stat_in(bucket, source, version)
        if (bucket, source) == (self._bucket, key) and version is None:
            return
        origin = {"Bucket": bucket, "Key": source}
        if version is not None:
            origin["VersionId"] = version
        condition = {"CopySource": origin, "CopySourceIfMatch": info.etag}
        with translated(where):
            if info.size is None or info.size <= self._copy_limit:
                self._call("copy_object", Key=key, **condition)
                return
        self._copy_in_parts(key, info.size, condition)

    def _copy_in_parts(self, key: str, size: int, condition: dict[str, Any]) -> None:
        origin = condition["CopySource"]
        answer = self._head(origin["Key"], origin.get("VersionId"), origin["Bucket"])
        attributes = {"Key": key, **kept_with(answer)}
        step = max(min(self._copy_limit, _COPY_PART), -(-size // _MAX_PARTS))
        with self._multipart(attributes, protection=Protection("off")) as upload:
            for start in range(0, size, step):
                end = min(start + step, size)
                upload.copy(CopySourceRange=f"bytes={start}-{end - 1}", **condition)
            upload.complete({})

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`. A thousand in one request."""
        plain = [key for key in keys if not _NOT_XML.search(key)]
        for start in range(0, len(plain), _DELETE_BATCH):
            objects = [{"Key": key} for key in plain[start : start + _DELETE_BATCH]]
            with translated(self._uri):
                answer = self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
            for problem in answer.get("Errors", ()):
                if problem.get("Code") != "NoSuchKey":
                    raise from_code(
                        self.where(problem.get("Key", "")),
                        problem.get("Code", ""),
                        200,
                        problem.get("Message", ""),
                    )
        for key in keys:
            if _NOT_XML.search(key):
                with translated(self.where(key)):
                    self._call("delete_object", Key=key)

    def sign(self, key: str, method: str, expires: float) -> str:
        """See :meth:`Backend.sign`."""
        operation = _METHODS.get(method.upper())
        if operation is None or not key:
            raise InvalidInput(
                f"{self.where(key)}: a URL can be signed for an object and one of "
                f"{', '.join(_METHODS)}, not for {method}"
            )
        fs = self._shared()
        parameters = {"Bucket": self._bucket, "Key": key}
        if operation == "get_object" and fs.requester_pays:
            parameters["RequestPayer"] = "requester"

        with translated(self.where(key)):
            return run(fs, presigned(fs, operation, parameters, max(1, int(expires))))

    def filesystem(self) -> tuple[AbstractFileSystem, str]:
        """See :meth:`Backend.filesystem`. An ``s3fs.S3FileSystem`` with all its own habits."""
        with translated(self._uri):
            fs: AbstractFileSystem = self._implementation()(**self._arguments)
        return fs, self._bucket
