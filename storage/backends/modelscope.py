"""ModelScope: the models of one repository, by the HTTP API that its own client uses.

Only reading. That client sends everything by one session with retries of its own, and writes the
files itself; one call here is one attempt, and the bytes go where the transfer layer wants them,
so the requests are ours.

The listing tells the SHA-256 of every file, which is verified. There is no way to ask for the
files of one moment: a file that is replaced while it is fetched is noticed by its digest.
"""

from __future__ import annotations

import builtins
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from storage.backends.base import Body, ByteRange, ObjectInfo, OpenOptions
from storage.backends.drivers.web import WebSession, cut, extent
from storage.backends.readonly import READ_ONLY, ReadOnlyBackend
from storage.backends.repositories import check_folder, check_path
from storage.digest import Digest
from storage.errors import (
    BucketMissingError,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransientError,
    UnsupportedOperation,
    one_line,
)
from storage.uri import Location

if TYPE_CHECKING:
    import requests

    from storage.config import ModelScopeConfig

__all__ = ["ModelScopeBackend", "open_backend"]

_PUBLIC = "https://www.modelscope.cn"
_DEFAULT = "master"
# A listing holds no more, and does not say so when there is more.
_LISTED = 3000
_MAX_ANSWER = 64 * 1024 * 1024
# What parsing and looking at an answer raises if it is not as it should be.
_NOT_UNDERSTOOD = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_backend(
    location: Location, config: ModelScopeConfig | None, options: OpenOptions
) -> ModelScopeBackend:
    """Return a backend for the repository and revision of ``location``; inert."""
    revision = location.version or (config.revision if config is not None else None)
    return ModelScopeBackend(location.bucket, revision, config, options)


class ModelScopeBackend(ReadOnlyBackend):
    """One repository of models; see :class:`~storage.backends.base.Backend`."""

    capabilities = replace(READ_ONLY, pinned_read=False)
    why_read_only = "repositories of ModelScope are read only here; upload by its own client"

    def __init__(
        self,
        repository: str,
        revision: str | None,
        config: ModelScopeConfig | None,
        options: OpenOptions,
    ) -> None:
        """Describe the repository; nothing is asked yet.

        Args:
            repository: ``owner/name``.
            revision: branch or tag; ``master`` if none.
            config: how to come there.
            options: limits.
        """
        self._repository = repository
        self._revision = revision
        self._config = config
        self._session = WebSession(
            config,
            options,
            store="ModelScope",
            address="the endpoint",
            home=self._endpoint,
            credentials=self._credentials,
        )

    def _endpoint(self) -> str:
        given = self._config.endpoint if self._config is not None else None
        return (given or os.environ.get("MODELSCOPE_ENDPOINT") or _PUBLIC).rstrip("/")

    def _credentials(self) -> Mapping[str, str]:
        config = self._config
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        if config is not None and config.token is not None:
            token = config.token.get_secret_value()
        if not token or (config is not None and config.anonymous):
            return {}
        # Some of the service's addresses look at the one, some at the other.
        return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}

    @property
    def name(self) -> str:
        """Driver and store."""
        return "modelscope"

    def where(self, key: str) -> str:
        """Return the URI of a key, for messages."""
        return str(Location("modelscope", self._repository, key, self._revision))

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`. There are no versions of single files."""
        check_path(key, self.where(key))
        if version not in (None, self._revision):
            raise ModelMissingError(
                self.where(key), f"{self.where(key)}: files of ModelScope have no versions"
            )
        folder, _, _ = key.rpartition("/")
        for info in self._entries(folder, self.where(key), recursive=False)[0]:
            if info.key == key:
                return info
        raise ModelMissingError(self.where(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`."""
        check_folder(prefix, self.where(prefix))
        pending = [prefix.removesuffix("/")]
        while pending:
            folder = pending.pop()
            where = self.where(f"{folder}/" if folder else "")
            files, folders = self._entries(folder, where, recursive=True)
            if len(files) + len(folders) >= _LISTED:
                # Cut, without a word: then folder by folder.
                files, folders = self._entries(folder, where, recursive=False)
                if len(files) + len(folders) >= _LISTED:
                    raise UnsupportedOperation(
                        f"{where}: ModelScope lists {_LISTED} entries of a folder and does not say "
                        "what else there is; choose smaller folders"
                    )
                # Whoever names a folder in itself would be asked for ever.
                below = f"{folder}/" if folder else ""
                pending += [one for one in folders if one.startswith(below) and one != below]
            yield from (info for info in files if info.key.startswith(prefix))

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        check_path(key, self.where(key))
        where = self.where(key)
        pin = self.stat(key) if pin is None else pin
        query = urlencode({"Revision": self._revision or _DEFAULT, "FilePath": key})
        headers = {} if span is None else {"Range": f"bytes={span.start}-{span.end - 1}"}
        response = self._session.request("GET", self._url(f"repo?{query}"), where, headers=headers)
        if response.status_code not in (200, 206):
            raise self._refusal(response, where)
        try:
            size, skip, _ = extent(where, span, response, None)
            linked = response.headers.get("X-Linked-ETag", "").strip('"').lower()
            found = _info(key, size, linked)
            # Of a small file nothing says which one it is but its content.
            info = found if found.etag is not None else replace(pin, key=key, size=size)
            if pin.differs_from(info):
                raise ObjectChangedError(f"{where} was replaced since it was looked at")
        except BaseException:
            response.close()
            raise
        if span is None:
            return Body(info, self._session.chunks(response, where, size), response.close)
        chunks = cut(self._session.chunks(response, where, None), skip, len(span), where)
        return Body(info, chunks, response.close)

    def close(self) -> None:
        """Free the connections."""
        self._session.close()

    # -- the API -----------------------------------------------------------------------------

    def _url(self, action: str = "") -> str:
        tail = f"/{action}" if action else ""
        return f"{self._endpoint()}/api/v1/models/{self._repository}{tail}"

    def _entries(
        self, folder: str, where: str, *, recursive: bool
    ) -> tuple[builtins.list[ObjectInfo], builtins.list[str]]:
        """Return the files and the folders that a listing has; none of a folder that is not."""
        query = {"Revision": self._revision or _DEFAULT, "Recursive": str(recursive)}
        if folder:
            query["Root"] = folder
        response = self._session.request("GET", self._url(f"repo/files?{urlencode(query)}"), where)
        if response.status_code == 404 and folder:
            # So it answers for a folder that is not there, and for a repository.
            response.close()
            self._check_repository(where)
            return [], []
        data = self._answer(response, where)
        try:
            entries = data if isinstance(data, list) else data["Files"] or []
            files = [_described(entry) for entry in entries if entry.get("Type") != "tree"]
            folders = [str(entry["Path"]) for entry in entries if entry.get("Type") == "tree"]
        except _NOT_UNDERSTOOD as exc:
            raise _damaged(where, exc) from exc
        return files, folders

    def _check_repository(self, where: str) -> None:
        self._answer(self._session.request("GET", self._url(), where), where)

    def _answer(self, response: requests.Response, where: str) -> Any:
        """Return what an answer holds, in the envelope that all have."""
        if response.status_code != 200:
            raise self._refusal(response, where)
        text = self._session.read(response, where, _MAX_ANSWER)
        try:
            found = json.loads(text)
            success, data = found.get("Success", True), found["Data"]
        except _NOT_UNDERSTOOD as exc:
            raise _damaged(where, exc) from exc
        if not success:
            said = f"{found.get('Code')}: {found.get('Message')}"
            raise StorageError(f"{where}: ModelScope refuses ({one_line(said)})")
        return data

    def _refusal(self, response: requests.Response, where: str) -> StorageError:
        message = None
        if "json" in response.headers.get("Content-Type", ""):
            try:
                found = json.loads(self._session.read(response, where, 64 * 1024))
                message = one_line(found.get("Message") or "")
            except (*_NOT_UNDERSTOOD, StorageError):
                message = None
        if response.status_code == 404:
            response.close()
            said = f" ({message})" if message else ""
            kind = ModelMissingError if "FilePath=" in (response.url or "") else BucketMissingError
            return kind(
                where,
                f"{where}: ModelScope shows no such repository, revision or file{said}; the name "
                "is wrong, or it is private and the token is missing",
            )
        return self._session.error(response, where, message)


def _described(entry: Mapping[str, Any]) -> ObjectInfo:
    size = int(entry["Size"])
    if size < 0:
        raise ValueError("a size below zero")
    return _info(str(entry["Path"]), size, str(entry.get("Sha256") or "").lower())


def _info(key: str, size: int | None, sha256: str) -> ObjectInfo:
    known = _SHA256.fullmatch(sha256) is not None
    digests = (Digest("sha256", sha256),) if known else ()
    return ObjectInfo(key, size, f'"{sha256}"' if known else None, digests=digests)


def _damaged(where: str, exc: Exception) -> StorageError:
    return TransientError(
        f"{where}: the answer is damaged, or none of ModelScope ({type(exc).__name__}); check the "
        "endpoint and the proxy"
    )
