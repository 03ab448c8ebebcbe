"""A few requests of Google Cloud Storage's JSON API, for what obstore does not show.

obstore speaks the XML API and shows no headers: no checksums, no generations in a listing. It
also takes an error document that came with status 200 for the end of a listing, or for a copy
or a deletion that was done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from storage.backends.base import ObjectInfo, OpenOptions
from storage.backends.drivers.fsspec_errors import Kind
from storage.backends.drivers.light import LightSession
from storage.backends.gcs.answers import (
    PAGE,
    checksums,
    from_answer,
    page_of,
    removal,
    rewrite,
    said,
)
from storage.backends.network import Network
from storage.digest import Digest
from storage.errors import BucketMissingError, ModelMissingError, TransientError

if TYPE_CHECKING:
    from storage.backends.gcs.auth import TokenSource

__all__ = ["JsonApi", "NoJsonApiError"]


class NoJsonApiError(Exception):
    """The server does not have this API."""


class JsonApi:
    """One bucket by the JSON API. Every request is sent once, but for a token that expired."""

    def __init__(
        self,
        bucket: str,
        endpoint: str,
        tokens: TokenSource | None,
        network: Network,
        options: OpenOptions,
        project: str | None = None,
    ) -> None:
        """Ask nobody yet.

        Args:
            bucket: its name.
            endpoint: URL of the service.
            tokens: where bearer tokens come from; anonymous if none.
            network: proxy and certificates.
            options: time-outs and the number of connections.
            project: who pays for the requests, if not the bucket's owner.
        """
        self._bucket = bucket
        self._root = endpoint.rstrip("/")
        self._tokens = tokens
        self._headers = {"x-goog-user-project": project} if project else {}
        self._session = LightSession(network, options)
        self._connections = options.connections

    def checksums(self, key: str, generation: str | None) -> tuple[Digest, ...]:
        """Return the digests that the store keeps of an object; none if it does not tell.

        Raises:
            ModelMissingError: there is no such generation of it.
            NoJsonApiError: the server knows nothing of this.
        """
        query = {"fields": "md5Hash,crc32c,generation"}
        if generation is not None:
            query["generation"] = generation
        where = self._where(key)
        found = said(where, self._ask(where, "GET", quote(key, safe=""), query))
        if generation is not None and str(found.get("generation")) != generation:
            return ()
        return checksums(found)

    def remove(self, key: str, generation: str) -> None:
        """Delete an object if it is still of that generation; no older one comes back.

        Raises:
            ObjectChangedError: it is another one by now.
            ModelMissingError: it is gone.
            NoJsonApiError: the server knows nothing of this.
        """
        self._delete(key, removal(generation))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with ``prefix``; see :meth:`Backend.list`.

        Raises:
            NoJsonApiError: the server knows nothing of this.
        """
        where = self._where(prefix)
        query = {"prefix": prefix, **PAGE}
        while True:
            found = said(where, self._ask(where, "GET", "", query, BucketMissingError))
            infos, token = page_of(where, found, query.get("pageToken"))
            yield from infos
            if token is None:
                return
            query["pageToken"] = token

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, several at once; one that is missing is no error.

        Raises:
            NoJsonApiError: the server knows nothing of this.
        """

        def delete(key: str) -> None:
            try:
                self._delete(key, {})
            except ModelMissingError as exc:
                if type(exc) is not ModelMissingError:
                    raise

        with ThreadPoolExecutor(
            max(1, min(self._connections, len(keys))), thread_name_prefix="storage-delete"
        ) as pool:
            for _ in pool.map(delete, keys):
                pass

    def copy(self, source: str, key: str) -> None:
        """Let the store copy an object.

        Raises:
            NoJsonApiError: the server knows nothing of this.
        """
        where = self._where(source)
        path = f"{quote(source, safe='')}/rewriteTo/b/{quote(self._bucket, safe='')}/o/"
        path += quote(key, safe="")
        rewrite(where, lambda query: said(where, self._ask(where, "POST", path, query)), {})

    def close(self) -> None:
        """Free the connections. It may be used again."""
        self._session.close()

    def _delete(self, key: str, query: Mapping[str, str]) -> None:
        where = self._where(key)
        # The store says nothing; servers that play it say that in JSON.
        if self._ask(where, "DELETE", quote(key, safe=""), query).strip() not in (b"", b"null"):
            raise TransientError(
                f"{where}: the answer to a deletion has a body, and is not the store's; check "
                "the endpoint and the proxy"
            )

    def _where(self, key: str) -> str:
        return f"gs://{self._bucket}/{key}"

    def _ask(
        self,
        where: str,
        method: str,
        path: str,
        query: Mapping[str, str],
        missing: Kind = ModelMissingError,
    ) -> bytes:
        """Return what the store answers about a path below the bucket's objects."""
        begun = time.monotonic()
        answer = self._send(where, method, path, query)
        if answer.status_code == 401 and self._tokens is not None and self._tokens.renew(begun):
            answer = self._send(where, method, path, query)
        body: bytes = answer.content
        if answer.status_code < 300:
            return body
        if answer.status_code == 404 and b'"error"' not in body:
            raise NoJsonApiError
        raise from_answer(where, answer.status_code, answer.headers, body, missing)

    def _send(self, where: str, method: str, path: str, query: Mapping[str, str]) -> Any:
        headers = {"Accept": "application/json", **self._headers}
        if self._tokens is not None:
            headers["Authorization"] = f"Bearer {self._tokens()[0]}"
        url = f"{self._root}/storage/v1/b/{quote(self._bucket, safe='')}/o"
        if path:
            url += f"/{path}"
        return self._session.request(where, method, url, headers, params=query)
