"""S3 through obstore: what the driver of all three stores does not know about this one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from storage.backends.base import (
    Backend,
    Capabilities,
    ObjectInfo,
    OpenOptions,
    Payload,
    check_prefix,
)
from storage.backends.drivers.obstore import SINGLE_PUT_LIMIT, ObstoreBackend
from storage.backends.drivers.obstore_blocks import Blocks, md5
from storage.backends.drivers.streams import exactly
from storage.backends.s3.answers import EXPIRED, damaged, encrypted, from_code, stored_digests
from storage.backends.s3.leftovers import Leftovers
from storage.backends.s3.signed import Refusal, SignedClient
from storage.digest import Digest
from storage.errors import (
    AuthenticationError,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
)

__all__ = ["S3ObstoreBackend"]

_MAX_PARTS = 10_000
# Seconds after a renewal of the credentials in which requests signed before may be refused.
_RENEWAL = 30.0


class S3ObstoreBackend(ObstoreBackend):
    """One bucket through ``obstore``; see :class:`~storage.backends.base.Backend`."""

    def __init__(
        self,
        uri: str,
        make_store: Callable[[], Any],
        options: OpenOptions,
        capabilities: Capabilities,
        second: Callable[[], Backend],
        copy_limit: int,
        client: Callable[[OpenOptions, Refusal], SignedClient],
        renewed: Callable[[], bool],
        *,
        checksum: str,
    ) -> None:
        """Describe the bucket; nothing is opened yet.

        Args:
            uri: see :class:`ObstoreBackend`, and for what is not said here.
            make_store: the same.
            options: the same.
            capabilities: the same.
            second: the same.
            copy_limit: the same.
            client: returns a client for what obstore cannot ask, which takes error answers for
                what it is told.
            renewed: looks for credentials anew; tells whether they are others than those that
                the store was made with.
            checksum: ``S3Config.upload_checksum``.
        """
        super().__init__(
            uri, "s3", make_store, options, capabilities, second, self._classified, copy_limit
        )
        self._client = client
        self._renewed = renewed
        self._renewed_at: float | None = None
        self._renewal = threading.Lock()
        self._checksum = checksum
        self._leftovers = Leftovers(uri, self._light, options)

    # --- credentials that have run out ----------------------------------------------------------

    def _classified(
        self,
        where: str,
        code: str,
        status: int,
        message: str,
        headers: Mapping[str, Any] | None = None,
    ) -> StorageError:
        if code in EXPIRED and self._renew():
            return TransientError(f"{where}: the credentials had expired; others were found")
        return from_code(where, code, status, message, headers)

    def _renew(self) -> bool:
        """Tell whether another attempt is worth it, with other credentials than the last.

        obstore asks for new ones only when the old ones say that they are about to expire;
        those of a file do not say, and may be revoked before.
        """
        with self._renewal:
            now = time.monotonic()
            if self._renewed():
                self._renewed_at = now
                with self._lock:
                    self._opened = self._second_opened = None
            # Others' requests may still be refused that were signed before.
            return self._renewed_at is not None and now - self._renewed_at < _RENEWAL

    # --- what obstore does not ask --------------------------------------------------------------

    def _light(self, options: OpenOptions) -> SignedClient:
        return self._client(options, self._classified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        client = self._light(self._options)
        return client.objects(prefix) if client.usable else self._second().list(prefix)

    def checksums(self, info: ObjectInfo) -> tuple[Digest, ...]:
        if not self._light(self._options).usable:
            return self._second().checksums(info)
        answer = self._head(info)
        return () if answer is None else stored_digests(answer)

    def is_digest(self, info: ObjectInfo) -> bool:
        if not self._light(self._options).usable:
            return self._second().is_digest(info)
        answer = self._head(info)
        if answer is None:
            raise ObjectChangedError(f"{self._where(info.key)} was replaced since it was read")
        return not encrypted(answer)

    def _head(self, info: ObjectInfo) -> Mapping[str, str] | None:
        """Return what the store says of this very object, unless it is another one by now."""
        client = self._light(self._options)
        etag = info.etag if info.etag is not None and not info.etag.startswith("W/") else None
        try:
            try:
                answer = client.head(info.key, info.version, etag)
            except AuthenticationError:
                if info.version is None or etag is None:
                    raise
                # To name a version takes a permission of its own; the ETag is as strict.
                answer = client.head(info.key, None, etag)
        except (ModelMissingError, ObjectChangedError):
            return None
        # A store may ignore what it does not know.
        return answer if info.etag in (None, answer.get("etag")) else None

    # --- is what arrived what was sent? ---------------------------------------------------------

    def _hashed(self, size: int | None) -> int:
        if self._checksum == "md5":
            return _MAX_PARTS
        if self._checksum == "off":
            return 0
        # One that fits into one request. In parts it would cost two seconds for each GiB, and
        # every store that is more than a test's checks the signed hash of each part.
        return 1 if size is None or size <= SINGLE_PUT_LIMIT else 0

    def _check_arrived(self, stored: ObjectInfo, blocks: Blocks, *, created: bool) -> None:
        etag = (stored.etag or "").strip('"')
        expected = ""
        if len(blocks.md5s) == blocks.count:
            if etag.endswith(f"-{blocks.count}"):
                expected = f"{md5(b''.join(blocks.md5s)).hex()}-{blocks.count}"
            elif stored.hint is not None and blocks.count == 1:
                expected = blocks.md5s[0].hex()
        if expected in ("", etag):
            return
        answer = self._head(stored)
        if answer is None or encrypted(answer):
            return
        if created:
            # It is nobody else's, and the next attempt is not to take it for that.
            self.delete([stored.key])
        raise damaged(self._where(stored.key), expected, etag)

    # --- what failed uploads leave behind -------------------------------------------------------

    @contextmanager
    def _in_parts(self, key: str, payload: Payload, blocks: Blocks) -> Iterator[None]:
        def is_ours(upload: str, etags: Mapping[int, str]) -> bool:
            last = max(etags, default=0)
            if last > blocks.count:
                return False
            with payload.open() as stream:
                for number in range(1, last + 1):
                    found = md5(exactly(stream, blocks.part_size)).hex()
                    if etags.get(number, found) != found:
                        return False
            return True

        with self._leftovers.removed(key) as failed:
            try:
                yield
            except BaseException as exc:
                # Refused before anything began, and not for the moment: nothing can be left.
                definite = isinstance(exc, StorageError) and not isinstance(exc, TransientError)
                if blocks.count or not definite:
                    failed(is_ours)
                raise
