"""Google Cloud Storage through obstore: what is its own beside the driver of all three stores."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from storage.backends.base import (
    Backend,
    Body,
    ByteRange,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    check_prefix,
    md5_hint,
)
from storage.backends.drivers.obstore import ObstoreBackend, is_lost, obstore
from storage.backends.drivers.obstore_errors import fits_header
from storage.backends.drivers.renewal import renewing
from storage.backends.drivers.streams import HashedPayload
from storage.backends.gcs.answers import from_code
from storage.backends.gcs.json_api import JsonApi, NoJsonApiError
from storage.backends.gcs.sign import Signer
from storage.digest import Digest, available
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
)

__all__ = ["GcsObstoreBackend"]

T = TypeVar("T")

# The store copies what does not move to another place or class at once, whatever its size. What
# does may take longer than one request may; the second driver copies that in steps.
_COPY_LIMIT = 1024**3
# What obstore sends in one request gets its MD5 for an entity tag.
_MD5_LIMIT = 8 * 1024**2


class GcsObstoreBackend(ObstoreBackend):
    """One bucket through obstore; see :class:`~storage.backends.base.Backend`."""

    _versions_are_guarded = False

    def __init__(
        self,
        bucket: str,
        arguments: Callable[[], dict[str, Any]],
        options: OpenOptions,
        second: Callable[[], Backend],
        signer: Signer,
        json_api: Callable[[], JsonApi],
        renew: Callable[[float], bool],
        *,
        reads_only: bool,
    ) -> None:
        """Describe the bucket; nothing is opened yet.

        Args:
            bucket: its name.
            arguments: returns those of ``obstore.store.GCSStore``.
            options: how to talk to the store.
            second: returns the second driver for the same bucket.
            signer: makes presigned URLs.
            json_api: returns what asks for what obstore does not show.
            renew: gets a new token in place of one that was refused, if it can; it is told
                when the refused request began, by ``time.monotonic``.
            reads_only: whether the second driver makes all changes.
        """
        capabilities = Capabilities(copy_across=True, if_match=True, checksums=True)
        super().__init__(
            f"gs://{bucket}/",
            "gs",
            lambda: _make_store(bucket, arguments()),
            options,
            capabilities,
            second,
            from_code,
            _COPY_LIMIT,
        )
        self._bucket = bucket
        self._arguments = arguments
        self._signer = signer
        self._make_json_api = json_api
        self._renew = renew
        self._reads_only = reads_only
        self._reader_lock = threading.Lock()
        self._reader_opened: tuple[int, Any] | None = None
        self._json_api_opened: JsonApi | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Everything; presigned URLs only with a key to sign with."""
        return replace(self._capabilities, sign=self._signer.usable)

    def _reader(self) -> Any:
        self._store()  # which keeps in mind that this process, and no child of it, uses obstore
        # Or an object stored in gzip's encoding would be sent decoded, and without ranges.
        with self._reader_lock:
            opened = self._reader_opened
            if opened is None or opened[0] != os.getpid():
                arguments = self._arguments()
                client = dict(arguments["client_options"])
                client["default_headers"] = {
                    **client.get("default_headers", {}),
                    "accept-encoding": "gzip",
                }
                store = _make_store(self._bucket, {**arguments, "client_options": client})
                opened = self._reader_opened = (os.getpid(), store)
            return opened[1]

    @property
    def _json_api(self) -> JsonApi:
        with self._reader_lock:
            if self._json_api_opened is None:
                self._json_api_opened = self._make_json_api()
            return self._json_api_opened

    def _again(self, call: Callable[[], T]) -> T:
        """Return what ``call`` does; again with a new token if the store refused the old one."""
        return renewing(call, self._renew, self._forget)

    def _forget(self) -> None:
        with self._lock:
            self._opened = None
        with self._reader_lock:
            self._reader_opened = None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`. By the JSON API, with digests and generations."""
        check_prefix(prefix)
        try:
            yield from self._json_api.list(prefix)
        except NoJsonApiError:
            yield from self._second().list(prefix) if is_lost() else self._list(prefix)

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the same by the XML API."""
        empty: set[str] = set()
        with self._translated(prefix):
            for page in obstore().list(self._store(), prefix[:-1] or None, chunk_size=1000):
                for meta in page:
                    key, etag = meta["path"], meta["e_tag"]
                    if meta["size"] == 0:
                        # obstore drops the slash of a directory marker, so "a/" looks like
                        # an empty file "a". Only the store knows which it is.
                        if key in empty or not self._exists(key):
                            continue
                        empty.add(key)
                    if etag and not etag.endswith('"'):
                        # Some servers quote it in the header only.
                        etag = f'"{etag}"'
                    yield ObjectInfo(
                        key, meta["size"], etag, modified=meta["last_modified"], hint=md5_hint(etag)
                    )

    def _exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except ModelMissingError:
            return False
        return True

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        """See :meth:`Backend.checksums`."""
        try:
            return self._json_api.checksums(info.key, info.version)
        except (ModelMissingError, NoJsonApiError):
            return ()

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`."""
        try:
            stat = super().stat
            return self._again(lambda: stat(key, version))
        except TransientError as exc:
            if not _is_beyond_obstore(exc):
                raise
        return self._second().stat(key, version)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        try:
            read = super().read
            return self._again(lambda: read(key, span, pin))
        except TransientError as exc:
            if not _is_beyond_obstore(exc):
                raise
            return self._second().read(key, span, pin)
        except ModelMissingError as exc:
            if type(exc) is ModelMissingError and pin is not None:
                self._replaced(key, exc)
            raise

    def _replaced(self, key: str, exc: ModelMissingError) -> None:
        # A bucket that keeps no versions does not know a generation that was overwritten.
        with suppress(ModelMissingError):
            self.stat(key)
            raise ObjectChangedError(
                f"{self._where(key)} was replaced since it was looked at"
            ) from exc

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
        """See :meth:`Backend.write`."""
        # A listing tells no generation, and the conditions of writes are about that alone.
        nameless = if_match is not None and if_match.version is None
        # Headers hold plain ASCII; the other API has no headers for it.
        foreign = not all(
            f"{name}{value}".isascii() and fits_header(name, value)
            for name, value in (metadata or {}).items()
        )
        algorithms = ["md5"] if payload.size is None or payload.size <= _MD5_LIMIT else []
        algorithms += ["crc32c"] if payload.size is None or payload.size > _MD5_LIMIT else []
        # Nobody could tell whether what arrived in parts is what was sent.
        blind = not all(map(available, algorithms))
        if self._reads_only or nameless or foreign or blind:
            return self._second().write(
                key,
                payload,
                metadata=metadata,
                content_type=content_type,
                if_absent=if_absent,
                if_match=if_match,
                on_bytes=on_bytes,
            )
        hashed = HashedPayload(payload, *algorithms)
        write = super().write
        info = self._again(
            lambda: write(
                key,
                hashed.payload,
                metadata=metadata,
                content_type=content_type,
                if_absent=if_absent,
                if_match=if_match,
                on_bytes=on_bytes,
            )
        )
        if not info.digests:  # else the second driver sent it, and looked
            self._check_stored(info, hashed.digests, conditional=if_absent or if_match is not None)
        return info

    def _check_stored(
        self, info: ObjectInfo, sent: Mapping[str, Digest], *, conditional: bool
    ) -> None:
        """Raise unless the store has what was sent, by its entity tag or its checksums."""
        if info.hint in sent.values():
            return
        where = self._where(info.key)
        try:
            known = self._json_api.checksums(info.key, info.version)
        except NoJsonApiError:
            # Then the tag is all there is. Of an object in one piece it is the MD5.
            known = (info.hint,) if info.hint is not None else ()
        except (AuthenticationError, ModelMissingError):
            return  # who may write only cannot look; or it was replaced already
        wrong = [one for one in known if sent.get(one.algorithm, one) != one]
        if not wrong:
            return
        problem = (
            f"{sent[wrong[0].algorithm]} was sent, and the store has {wrong[0]}: it was damaged on "
            "the way"
        )
        try:
            if info.version is not None:
                self._json_api.remove(info.key, info.version)
        except (ModelMissingError, ObjectChangedError):
            pass  # somebody else's is there by now
        except (StorageError, NoJsonApiError) as exc:
            if conditional:
                # The next try would find it there and take it for its own.
                raise IntegrityError(
                    f"{where}: {problem}, and it could not be removed; delete it"
                ) from exc
        raise TransientError(f"{where}: {problem}")

    def _second_can_write(self) -> bool:
        try:
            self._json_api.checksums("-", None)
        except (NoJsonApiError, TransientError):
            return False
        except StorageError:
            pass  # it speaks that API, as the second driver does
        return True

    def _mode(self, key: str, if_absent: bool, if_match: ObjectInfo | None) -> Any:
        if if_match is None:
            return super()._mode(key, if_absent, if_match)
        if if_match.version is None:
            raise InvalidInput(f"{self._where(key)}: if_match needs a generation to compare with")
        return {"version": if_match.version}

    def copy(
        self, source: str, key: str, *, version: str | None = None, bucket: str | None = None
    ) -> None:
        """See :meth:`Backend.copy`."""
        if self._reads_only:
            self._second().copy(source, key, version=version, bucket=bucket)
            return
        copy = super().copy
        self._again(lambda: copy(source, key, version=version, bucket=bucket))

    def _copy(self, source: str, key: str) -> None:
        try:
            self._json_api.copy(source, key)
        except NoJsonApiError:
            super()._copy(source, key)

    def delete(self, keys: Sequence[str]) -> None:
        """See :meth:`Backend.delete`."""
        if self._reads_only:
            self._second().delete(keys)
            return
        for key in keys:
            self._takes(key)  # refuses what is no key
        with suppress(NoJsonApiError):
            self._json_api.delete(keys)
            return
        delete = super().delete
        self._again(lambda: delete(keys))

    def sign(self, key: str, method: str, expires: float) -> str:
        """See :meth:`Backend.sign`."""
        return self._signer(key, method, expires)

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        with self._reader_lock:
            self._reader_opened = None
            json_api, self._json_api_opened = self._json_api_opened, None
        if json_api is not None:
            json_api.close()
        super().close()


def _is_beyond_obstore(exc: TransientError) -> bool:
    """Tell whether obstore stumbled over metadata that is not ASCII, or a packed error."""
    said = str(exc.__cause__)
    return "Metadata value for" in said or "invalid utf-8 sequence" in said


def _make_store(bucket: str, arguments: dict[str, Any]) -> Any:
    try:
        from obstore.store import GCSStore
    except ImportError as exc:
        raise ConfigurationError(
            "Google Cloud Storage needs the package obstore, which is not installed; "
            'run: pip install "modelstorage[gcs]"'
        ) from exc
    if provider := arguments.get("credential_provider"):
        provider()  # what fails in here keeps its own error; obstore would wrap it
    return GCSStore(bucket, **arguments)
