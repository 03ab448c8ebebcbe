"""Publishing versions of models in Arkindex, as the training helper of its workers does.

    from arkindex import ArkindexClient
    from storage.integrations.arkindex import publish_model_version

    version = publish_model_version(ArkindexClient(...), "model/", model_id, tag="v3")

A folder becomes a tar.zst archive, which goes to the object store by a URL that Arkindex signs;
then Arkindex is told its size and hashes, and makes the version available. If it has a version
of the same content, that one is used and the pending one removed. Where Arkindex signs no URL
for all of the archive, it goes in parts.

The operations are those of Arkindex's OpenAPI document; they are asked for by name through the
caller's own client, which knows the address and the credentials.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

from storage.container import Archive, create_archive
from storage.digest import hash_file
from storage.errors import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ObjectExistsError,
    StorageError,
)
from storage.integrations.arkindex_answers import (
    AVAILABLE,
    Client,
    ask,
    existing_version,
    is_available,
    read_version,
    translated,
)
from storage.integrations.arkindex_upload import PartsUpload, put_whole

if TYPE_CHECKING:
    from storage.config import HTTPConfig
    from storage.transfer.progress import ProgressCallback

__all__ = ["Client", "ModelVersionPublisher", "publish_model_version"]

_log = logging.getLogger(__name__)

_TAG_TAKEN = re.compile(r"\btag\b.*\balready exists")
_ARCHIVE_NEEDED = re.compile(r"\b(?:size|archive_hash)\b.*\brequired\b")


def publish_model_version(
    client: Client,
    model_path: str | os.PathLike[str],
    model_id: str | UUID,
    tag: str | None = None,
    description: str | None = None,
    configuration: Mapping[str, Any] | None = None,
    parent: str | UUID | None = None,
    *,
    read_only: bool | None = None,
    config: HTTPConfig | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any] | None:
    """Publish the content of a folder as a version of a model, unless there is one of it.

    Args:
        client: asks Arkindex.
        model_path: the folder.
        model_id: of the model.
        tag: of the version. If another version has it, this one gets none, and a warning is
            logged.
        description: of the version.
        configuration: of the version.
        parent: id of the version that this one was made from.
        read_only: whether to do nothing; as the client's own attribute ``is_read_only`` says
            if ``None``.
        config: how the object store is reached: proxy, authorities, time-outs.
        progress: called while the archive is sent.

    Returns:
        The version that is available now, as Arkindex describes it; ``None`` if nothing was
        done.

    Raises:
        InvalidInput: the folder or an attribute is not accepted.
        AuthenticationError: Arkindex or the object store refuses it.
        ModelMissingError: there is no such model.
        TransferError: Arkindex or the object store could not be reached, or failed too often.
        StorageError: anything else. A version that was made here is removed again.
    """
    publisher = ModelVersionPublisher(client, read_only=read_only, config=config)
    return publisher.publish_model_version(
        model_path, model_id, tag, description, configuration, parent, progress=progress
    )


class ModelVersionPublisher:
    """A version of a model on its way: made first, perhaps, and published when it is trained.

    Its methods have the meaning of those of the training helper. Not for several threads.

    Attributes:
        model_version: as Arkindex described it last; ``None`` as long as there is none.
    """

    def __init__(
        self,
        client: Client,
        model_version: Mapping[str, Any] | None = None,
        *,
        read_only: bool | None = None,
        config: HTTPConfig | None = None,
    ) -> None:
        """Ask for nothing yet.

        Args:
            client: asks Arkindex.
            model_version: one that is to be published, as Arkindex describes it.
            read_only: whether to do nothing; as the client's own attribute ``is_read_only``
                says if ``None``.
            config: how the object store is reached.
        """
        self.model_version = None if model_version is None else read_version(model_version)
        self._client = client
        self._read_only = read_only
        self._config = config

    def publish_model_version(
        self,
        model_path: str | os.PathLike[str],
        model_id: str | UUID,
        tag: str | None = None,
        description: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        parent: str | UUID | None = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> dict[str, Any] | None:
        """Publish the version that there is, with these attributes, or a new one.

        A version that was made by this call is removed again if the call fails. One that was
        made before stays, and the call can be repeated.

        See :func:`publish_model_version` for arguments, result and errors.
        """
        if self._skips():
            return None
        if self.model_version is not None:
            version = self._pending()
            known = str(version.get("model_id", model_id))
            if known != str(model_id):
                raise InvalidInput(
                    f"the model version {version['id']} is one of the model {known} and cannot be "
                    f"published as one of {model_id}; use another publisher for that"
                )
        attributes = _attributes(tag, description, configuration, parent)
        # First, for it may fail, and the signed URL that comes next does not last for ever.
        with create_archive(model_path, digests=()) as archive:
            new = self.model_version is None
            if new:
                self._create(
                    model_id, _attributes(tag, description, configuration or {}, parent), archive
                )
            elif attributes:
                self._update(attributes, insist=False)
            pending = self._pending()["id"]
            try:
                self._upload(archive.path, archive.archive_hash, progress)
                if not is_available(self._current()):
                    self.validate_model_version(
                        hash=archive.content_hash,
                        size=archive.size,
                        archive_hash=archive.archive_hash,
                    )
            except BaseException:
                if new:
                    self._discard(pending)
                raise
        if self._current()["id"] != pending and attributes:
            _log.warning("the model version %s gets the given attributes", self._current()["id"])
            self._update(attributes, insist=False)
        return self.model_version

    def create_model_version(
        self,
        model_id: str | UUID,
        tag: str | None = None,
        description: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        parent: str | UUID | None = None,
    ) -> dict[str, Any] | None:
        """Make a pending version, and return it; see :func:`publish_model_version`.

        Raises:
            InvalidInput: there is one already, or an attribute is not accepted.
            StorageError: see :func:`publish_model_version`.
        """
        if self._skips():
            return None
        if self.model_version is not None:
            raise InvalidInput(
                f"the model version {self.model_version['id']} was made already; "
                "use another publisher for one more"
            )
        self._create(model_id, _attributes(tag, description, configuration or {}, parent))
        return self.model_version

    def update_model_version(
        self,
        tag: str | None = None,
        description: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        parent: str | UUID | None = None,
    ) -> dict[str, Any] | None:
        """Change attributes of the version, and return it. What is ``None`` stays as it is.

        Raises:
            InvalidInput: there is no version yet, or an attribute is not accepted.
            StorageError: see :func:`publish_model_version`.
        """
        if self._skips():
            return None
        self._update(_attributes(tag, description, configuration, parent), insist=True)
        return self.model_version

    def upload_archive(
        self, archive_path: str | os.PathLike[str], *, progress: ProgressCallback | None = None
    ) -> None:
        """Send an archive to where Arkindex wants it.

        What fails for a passing reason is repeated. If the signed URL is refused, Arkindex is
        asked for another one, once: it may have expired. If there is none, the archive goes in
        parts, and is validated by that: the version is available then.

        Raises:
            InvalidInput: there is no version yet, or no such file.
            ObjectExistsError: the version is available already.
            AuthenticationError: Arkindex gives no URL, or the store refuses it.
            TransferError: it could not be sent.
            StorageError: see :func:`publish_model_version`.
        """
        if not self._skips():
            self._upload(archive_path, None, progress)

    def validate_model_version(
        self, hash: str, size: int, archive_hash: str
    ) -> dict[str, Any] | None:
        """Make the version available, and return it, or an available one of the same content.

        In the second case the pending one is removed. If Arkindex fails, the version is looked
        at: it may be available although the answer did not say so.

        Args:
            hash: MD5 of the content, hex.
            size: bytes of the archive.
            archive_hash: MD5 of the archive, hex.

        Raises:
            InvalidInput: there is no version yet, or Arkindex does not find the archive right.
            ObjectExistsError: the version is available already.
            IntegrityError: Arkindex says that there is a version of the same content, and names
                one that is not.
            StorageError: see :func:`publish_model_version`.
        """
        if self._skips():
            return None
        pending = self._pending()
        body = {
            "state": AVAILABLE,
            "size": size,
            "hash": hash,
            "archive_hash": archive_hash,
        }
        problem: Exception | None = None
        try:
            answer = self._client.request("PartialUpdateModelVersion", id=pending["id"], body=body)
        except Exception as exc:  # noqa: BLE001 -- whose client it is, is not known
            problem = exc
        if problem is None:
            self._use_available(read_version(answer))
        else:
            existing = existing_version(problem)
            if existing in (None, pending["id"]):
                error = translated("PartialUpdateModelVersion", pending["id"], problem)
                self._settle(pending["id"], archive_hash, error)
            else:
                self._use_instead(existing, pending["id"], hash)
        _log.info("the model version %s is available", self._current()["id"])
        return self.model_version

    # -- steps ---------------------------------------------------------------------------------

    def _skips(self) -> bool:
        read_only = self._read_only
        if read_only is None:
            read_only = bool(getattr(self._client, "is_read_only", False))
        if read_only:
            _log.warning("read-only: nothing is published")
        return read_only

    def _current(self) -> dict[str, Any]:
        if self.model_version is None:
            raise InvalidInput("there is no model version yet; create_model_version makes one")
        return self.model_version

    def _pending(self) -> dict[str, Any]:
        """Return the version if it can still get an archive."""
        version = self._current()
        if is_available(version):
            raise ObjectExistsError(
                f"the model version {version['id']} is available already, and its archive stays "
                "as it is; use another publisher for a new version"
            )
        return version

    def _create(
        self, model_id: str | UUID, attributes: dict[str, Any], archive: Archive | None = None
    ) -> None:
        """Make a version; with what is known of its archive if Arkindex wants that at once."""
        try:
            self._save("CreateModelVersion", str(model_id), attributes, insist=False)
        except InvalidInput as exc:
            if archive is None or not _ARCHIVE_NEEDED.search(str(exc)):
                raise
            told = {"size": archive.size, "archive_hash": archive.archive_hash}
            self._save("CreateModelVersion", str(model_id), attributes | told, insist=False)
        _log.info("the model version %s was created", self._current()["id"])

    def _update(self, attributes: Mapping[str, Any], *, insist: bool) -> None:
        id = self._current()["id"]
        self._save("UpdateModelVersion", id, attributes, insist=insist)
        _log.info("the model version %s was updated", id)

    def _save(
        self, operation: str, id: str, attributes: Mapping[str, Any], *, insist: bool
    ) -> None:
        """Write attributes; without the tag if that is taken, unless somebody insists on it."""
        try:
            answer = self._request(operation, id, dict(attributes))
        except InvalidInput as exc:
            if insist or "tag" not in attributes or not _TAG_TAKEN.search(str(exc)):
                raise
            _log.warning(
                "another version of the model has the tag %r; this one is published without it",
                attributes["tag"],
            )
            rest = {name: value for name, value in attributes.items() if name != "tag"}
            answer = self._request(operation, id, rest)
        self.model_version = read_version(answer)

    def _upload(
        self,
        path: str | os.PathLike[str],
        archive_hash: str | None,
        progress: ProgressCallback | None,
    ) -> None:
        version = self._pending()
        if not os.path.isfile(path):
            raise InvalidInput(f"{os.fspath(path)} is no file; an archive is one")
        id, url = version["id"], version.get("s3_put_url")
        _log.info("sending the archive of the model version %s", id)
        if not url:
            archive_hash = archive_hash or hash_file(path, ("md5",))["md5"].hex
            self._send_parts(path, version, archive_hash, progress)
            return
        try:
            put_whole(path, url, id, self._config, progress)
        except AuthenticationError as refused:
            try:
                fresh = self._retrieve(id)
            except StorageError:
                raise refused from refused.__cause__
            if fresh.get("s3_put_url") in (None, url):
                raise
            self.model_version = fresh
            put_whole(path, fresh["s3_put_url"], id, self._config, progress)

    def _send_parts(
        self,
        path: str | os.PathLike[str],
        version: Mapping[str, Any],
        archive_hash: str,
        progress: ProgressCallback | None,
    ) -> None:
        """Send an archive in parts; that makes the version available."""
        id = version["id"]
        told = {"size": os.path.getsize(path), "archive_hash": archive_hash}
        if any(version.get(name) != value for name, value in told.items()):
            self._save("UpdateModelVersion", id, told, insist=True)
        parts = PartsUpload(self._client, id)
        try:
            parts.send(path, archive_hash, self._config, progress)
            try:
                parts.complete()
            except StorageError as exc:
                self._settle(id, archive_hash, exc)
        except BaseException:
            parts.abort()
            raise
        if not is_available(self._current()):
            self._use_available(self._retrieve(id))
        _log.info("the model version %s is available", id)

    def _use_available(self, version: dict[str, Any]) -> None:
        """Go on with the version, which is to be available now."""
        if not is_available(version):
            raise StorageError(
                f"the model version {version['id']} was to become available, and Arkindex "
                f"says that it is {version.get('state')!r}; look at it, and publish again"
            )
        self.model_version = version

    def _settle(self, id: str, archive_hash: str, error: StorageError) -> None:
        """Take the version for available if it is, whatever the answer was; else raise."""
        try:
            found = self._retrieve(id)
        except StorageError:
            raise error from error.__cause__
        if not (is_available(found) and found.get("archive_hash") == archive_hash):
            raise error
        self.model_version = found

    def _use_instead(self, existing: str, pending: str, hash: str) -> None:
        """Go on with a version of the same content, and remove the pending one."""
        found = self._retrieve(existing)
        if not is_available(found) or found.get("hash") not in (None, hash):
            raise IntegrityError(
                f"the model version {existing}: Arkindex says that it is available and its "
                f"content has the MD5 {hash}; found the state {found.get('state')!r} and the MD5 "
                f"{found.get('hash')}; look at both, and publish again"
            )
        _log.warning(
            "the model version %s is available and has the same content (MD5 %s); "
            "it is used instead of the pending one",
            existing,
            hash,
        )
        try:
            self._request("DestroyModelVersion", pending)
        except StorageError as exc:
            _log.error("the pending version %s could not be removed: %s", pending, exc)
        self.model_version = found

    def _discard(self, id: str) -> None:
        """Remove a version that could not be published; what is available stays."""
        try:
            found = self._retrieve(id)
            if is_available(found):
                self.model_version = found
                return
            self._request("DestroyModelVersion", id)
        except StorageError as exc:
            _log.warning("the pending version %s is left behind: %s", id, exc)
            return
        self.model_version = None

    def _retrieve(self, id: str) -> dict[str, Any]:
        return read_version(self._request("RetrieveModelVersion", id))

    def _request(self, operation: str, id: str, body: Any = None) -> Any:
        return ask(self._client, operation, id, id=id, **({} if body is None else {"body": body}))


def _attributes(
    tag: str | None,
    description: str | None,
    configuration: Mapping[str, Any] | None,
    parent: str | UUID | None,
) -> dict[str, Any]:
    """Return the attributes that are given, as JSON has them."""
    given = {
        "tag": tag,
        "description": description,
        "configuration": None if configuration is None else dict(configuration),
        "parent": None if parent is None else str(parent),
    }
    return {name: value for name, value in given.items() if value is not None}
