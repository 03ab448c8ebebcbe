"""OCI registries: model images and artifacts, read by the registry's HTTP API.

One backend is one repository at one tag or digest. What the tag means is asked anew by each
``stat`` and ``list`` (one HEAD); what they return names the manifest (``ObjectInfo.version``), and
reads pinned to it are of that manifest whatever happens to the tag meanwhile.

A file that is a blob by itself is read from the registry, by ranges. The layers of an image have to
be unpacked before anybody knows what they hold; that is done once for each manifest.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from storage.backends.base import (
    Body,
    ByteRange,
    ObjectInfo,
    OpenOptions,
)
from storage.backends.oci.answers import body, content_start, translated
from storage.backends.oci.content import Content
from storage.backends.oci.manifests import (
    ACCEPT,
    INDEXES,
    Layer,
    Manifest,
    check_digest,
    choose,
    machine_platform,
    parse_json,
    read_diff_ids,
)
from storage.backends.oci.session import RegistrySession
from storage.backends.readonly import READ_ONLY, ReadOnlyBackend
from storage.backends.repositories import check_folder, check_path
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    DestinationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
)
from storage.uri import Location

if TYPE_CHECKING:
    import requests

    from storage.config import OCIConfig

__all__ = ["OCIBackend", "open_backend"]

_DEFAULT_TAG = "latest"
_DEFAULT_FOLDER = "/models"
# Registries take manifests of 4 MiB at least, and most no larger ones.
_MAX_MANIFEST = 8 * 1024 * 1024
_MAX_CONFIG = 32 * 1024 * 1024
_MAX_NESTING = 3
# Manifests of which is remembered what they hold: what is, and what was read from before.
_KEPT = 2
_CHUNK = 1024 * 1024


def open_backend(location: Location, config: OCIConfig | None, options: OpenOptions) -> OCIBackend:
    """Return a backend for the image or artifact of ``location``; inert."""
    return OCIBackend(location, config, options)


class OCIBackend(ReadOnlyBackend):
    """One repository at one tag or digest; see :class:`~storage.backends.base.Backend`."""

    name = "oci"
    capabilities = replace(READ_ONLY, repository=True)
    why_read_only = "images and artifacts are read here, and pushed by other programs"

    def __init__(self, location: Location, config: OCIConfig | None, options: OpenOptions) -> None:
        """Describe the repository; nothing is imported or asked yet."""
        registry, _, repository = location.bucket.partition("/")
        self._location = replace(location, key="", digest=None)
        self._reference = location.version or _DEFAULT_TAG
        self._platform = (config.platform if config is not None else None) or machine_platform()
        self._folder = config.model_folder if config is not None else _DEFAULT_FOLDER
        self.session = RegistrySession(registry, repository, config, options)
        self._lock = threading.Lock()
        self._contents: dict[str, Content] = {}
        self._ranged = True

    def where(self, key: str) -> str:
        return str(replace(self._location, key=key))

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        where = self.where(key)
        check_path(key, where)
        # The tag or digest of the URI, too, is a version to whoever asks.
        is_now = version in (None, self._location.version)
        try:
            content = self._now(where) if is_now else self._at(version or "", where)
        except ObjectChangedError as exc:
            raise ModelMissingError(where, f"{where}: there is no version {version}") from exc
        found = content.find(key)
        if found is None:
            raise ModelMissingError(where)
        return self._told(found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        where = self.where(prefix)
        check_folder(prefix, where)
        content = self._now(where)
        found = False
        for info in content.all():
            if info.key.startswith(prefix):
                found = True
                yield self._told(info)
        if not found and not prefix and content.has_layers:
            raise ModelMissingError(
                where,
                f"{where}: the image has no files in {self._folder}, where KServe and others "
                "expect the model; name another folder by model_folder of OCIConfig",
            )

    def current_version(self) -> str:
        """Return the version that all objects have now; one HEAD."""
        where = self.where("")
        digest, is_index = self._head(where)
        if digest is None:
            return self._now(where).version
        return self._version(digest, is_index)

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        where = self.where(key)
        check_path(key, where)
        if pin is not None and pin.version is not None:
            content = self._at(pin.version, where)
        else:
            content = self._now(where)
        layer = content.blobs.get(key)
        file = None if layer is not None else content.packed_file(key)
        if layer is not None:
            info = self._told(content.info(key, layer.size, layer.digest))
        elif file is not None:
            info = content.info(key, file.size)
        else:
            raise ModelMissingError(where)
        if pin is not None and info.differs_from(pin):
            raise ObjectChangedError(f"{where} is no longer the file that was asked for")
        size = info.size or 0
        start, end = (span.start, span.end) if span is not None else (0, size)
        if span is not None and not 0 <= start < end <= size:
            raise InvalidInput(
                f"bytes {start}-{end} of {where} were asked for, but it has {size} bytes"
            )
        if file is not None:
            return _file_body(info, content, start, end, where)
        assert layer is not None
        return self._blob_body(info, layer, start, end, where)

    def close(self) -> None:
        """Free connections, and remove what was unpacked."""
        with self._lock:
            contents, self._contents = self._contents, {}
        for content in contents.values():
            content.close()
        self.session.close()

    # -- manifests ---------------------------------------------------------------------------

    def _told(self, info: ObjectInfo) -> ObjectInfo:
        return info if self._ranged or not info.digests else replace(info, ranged=False)

    def _version(self, digest: Digest, is_index: bool) -> str:
        """Return the version of all objects, told by all that they depend on."""
        parts = [str(digest)]
        if is_index:
            parts.append(f"platform={self._platform}")
        if self._folder != _DEFAULT_FOLDER:
            parts.append(f"folder={self._folder}")
        return ";".join(parts)

    def _now(self, where: str) -> Content:
        """Return what the tag means now."""
        digest, is_index = self._head(where)
        if digest is not None:
            with self._lock:
                known = self._contents.get(self._version(digest, is_index))
            if known is not None:
                return known
        try:
            return self._load(str(digest or self._reference), digest, where)
        except BucketMissingError:
            raise
        except ModelMissingError:
            self._check_repository(where)
            raise

    def _check_repository(self, where: str) -> None:
        """Tell a missing repository from a missing tag; not all registries do.

        Raises:
            BucketMissingError: it is the repository.
        """
        try:
            self.session.ask("GET", self.session.tags_url(), where).close()
        except ModelMissingError as exc:
            if isinstance(exc, BucketMissingError):
                raise
        except StorageError:
            pass  # who may read one tag may not list them all

    def _at(self, version: str, where: str) -> Content:
        """Return what an earlier answer was about."""
        with self._lock:
            known = self._contents.get(version)
        if known is not None:
            return known
        try:
            digest = Digest.parse(version.partition(";")[0])
            content = self._load(str(digest), digest, where)
        except (ModelMissingError, InvalidInput) as exc:
            raise ObjectChangedError(f"{where}: {version} is no longer in the registry") from exc
        if content.version != version:
            raise ObjectChangedError(f"{where} is no longer what was asked for")
        return content

    def _head(self, where: str) -> tuple[Digest | None, bool]:
        """Return the digest that the registry tells, if it does, and whether it is of an index."""
        url = self.session.manifest_url(self._reference)
        try:
            response = self.session.ask("HEAD", url, where, {"Accept": ACCEPT})
        except (ModelMissingError, UnsupportedOperation):
            # A GET tells why, or answers where there is no HEAD.
            return None, False
        response.close()
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        digest = _digest_told(response)
        if ":" in self._reference:
            digest = Digest.parse(self._reference)
        return (digest if kind else None), kind in INDEXES

    def _load(self, reference: str, digest: Digest | None, where: str) -> Content:
        """Fetch manifests until one of an image or artifact comes; look at its layers."""
        table, first, kind = self._manifest(reference, digest, where)
        found, is_index = first, False
        for _ in range(_MAX_NESTING):
            if kind not in INDEXES and "manifests" not in table:
                break
            is_index = True
            found = choose(table, self._platform, where)
            table, _, kind = self._manifest(str(found), found, where)
        manifest = Manifest.parse(table, found, where)
        diff_ids: tuple[Digest, ...] = ()
        if manifest.is_image and manifest.config is not None and manifest.config.size > 2:
            config = parse_json(self._config(manifest.config, where), where)
            if "rootfs" in config:
                diff_ids = read_diff_ids(config, len(manifest.layers), where)
        version = self._version(first, is_index)
        content = Content(
            manifest, version, self._folder, diff_ids, self.where(""), self._start_layer
        )
        old: list[Content] = []
        with self._lock:
            # Another thread may have been faster.
            content = self._contents.setdefault(version, content)
            # A tag that moves on and on would fill the disk with what nobody wants any more.
            for other in [one for one in self._contents if one != version][: -(_KEPT - 1)]:
                old.append(self._contents.pop(other))
        for each in old:
            each.close()
        return content

    def _manifest(
        self, reference: str, digest: Digest | None, where: str
    ) -> tuple[Any, Digest, str]:
        """Return a manifest, its digest and its media type.

        Raises:
            IntegrityError: it is not the one that was asked for.
        """
        url = self.session.manifest_url(reference)
        response = self.session.ask("GET", url, where, {"Accept": ACCEPT})
        data = _small(response, _MAX_MANIFEST, where)
        if digest is None:
            digest = _digest_told(response) or Digest("sha256", _sha256(data))
        check_digest(data, digest, where, "the manifest")
        table = parse_json(data, where)
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        return table, digest, str(table.get("mediaType") or kind)

    def _config(self, layer: Layer, where: str) -> bytes:
        url = self.session.blob_url(str(layer.digest))
        data = _small(self.session.ask("GET", url, where), _MAX_CONFIG, where)
        check_digest(data, layer.digest, where, "the image's config")
        return data

    # -- blobs -------------------------------------------------------------------------------

    def _open_blob(
        self, layer: Layer, start: int, end: int, where: str
    ) -> tuple[requests.Response, int]:
        """Ask for bytes of a blob; return the answer and the offset that it starts from."""
        whole = start == 0 and end == layer.size
        headers = {} if whole else {"Range": f"bytes={start}-{end - 1}"}
        url = self.session.blob_url(str(layer.digest))
        response = self.session.ask("GET", url, where, headers)
        try:
            first = content_start(response, where)
            if response.status_code == 206 and first != start:
                raise TransientError(f"{where}: the registry gave another part than was asked for")
        except BaseException:
            response.close()
            raise
        if not whole and response.status_code == 200:
            self._ranged = False
        return response, first

    def _blob_body(self, info: ObjectInfo, layer: Layer, start: int, end: int, where: str) -> Body:
        if start == end:
            return Body(info, iter(()))
        try:
            response, first = self._open_blob(layer, start, end, where)
        except BucketMissingError:
            raise
        except ModelMissingError as exc:
            raise ObjectChangedError(
                f"{where}: the registry has lost the blob {layer.digest}"
            ) from exc
        return Body(info, body(response, start - first, end - start, where), response.close)

    def _start_layer(self, layer: Layer, start: int) -> tuple[int, Iterator[bytes]]:
        where = self.where("")
        response, first = self._open_blob(layer, start, layer.size, where)
        first = first if response.status_code == 206 else 0
        return first, _closing(response, body(response, 0, layer.size - first, where))


def _closing(response: requests.Response, chunks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from chunks
    finally:
        response.close()


def _file_body(info: ObjectInfo, content: Content, start: int, end: int, where: str) -> Body:
    opened = content.open_packed(info.key)

    def chunks() -> Iterator[memoryview]:
        view = memoryview(bytearray(min(_CHUNK, end - start)))
        with opened:
            opened.seek(start)
            left = end - start
            while left:
                count = opened.readinto(view[: min(left, len(view))]) or 0  # type: ignore[attr-defined]
                if not count:
                    raise DestinationError(
                        f"{where}: what was unpacked of it was cut in the folder for temporary "
                        "files; ask again"
                    )
                left -= count
                yield view[:count]
            content.was_read(info.key, end - start)

    return Body(info, chunks(), opened.close)


def _small(response: requests.Response, limit: int, where: str) -> bytes:
    """Return a body that has to be small."""
    data = bytearray()
    try:
        with translated(where):
            for piece in response.raw.stream(64 * 1024, decode_content=False):
                data += piece
                if len(data) > limit:
                    raise StorageError(
                        f"{where}: a manifest or config of more than {limit} bytes was refused"
                    )
    finally:
        response.close()
    return bytes(data)


def _digest_told(response: requests.Response) -> Digest | None:
    text = response.headers.get("Docker-Content-Digest", "")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", text):
        return None
    return Digest.parse(text)


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
