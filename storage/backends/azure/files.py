"""Azure Files: one share, read by ``azure-storage-file-share``. It cannot be written to.

The service knows no conditions for reads. Its answers name the entity tag of the file, each of
them is compared with the one that is expected, and each part comes with an MD5 that is checked.
"""

from __future__ import annotations

import builtins
import os
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import md5
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from storage.addresses import azure_account, azure_host
from storage.backends.azure.answers import translated
from storage.backends.azure.client import is_refusal
from storage.backends.azure.credentials import Access, find_access
from storage.backends.azure.tokens import Tokens
from storage.backends.base import Body, ByteRange, ObjectInfo, OpenOptions
from storage.backends.network import Network, with_timeouts
from storage.backends.readonly import ReadOnlyBackend
from storage.backends.repositories import check_folder, check_path
from storage.errors import (
    BucketMissingError,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    TransientError,
)
from storage.uri import Location

if TYPE_CHECKING:
    from storage.config import AzureConfig

__all__ = ["AzureFilesBackend", "open_backend"]

T = TypeVar("T")

# The most for which the service makes an MD5.
_PART = 4 * 1024 * 1024
_TOTAL = re.compile(r"/(\d+)$")
_ENDPOINT = re.compile(r"(?:^|;)\s*FileEndpoint\s*=\s*([^;?]+)", re.IGNORECASE)
_ACCOUNT = re.compile(r"(?:^|;)\s*AccountName\s*=\s*([^;]+)", re.IGNORECASE)


def open_backend(
    location: Location, config: AzureConfig | None, options: OpenOptions
) -> AzureFilesBackend:
    """Return a backend for the share of ``location``; inert."""
    return AzureFilesBackend(location, config, with_timeouts(options, config))


def _endpoint(location: Location, config: AzureConfig | None, account: str) -> str:
    """Return the URL of the account's file service."""
    given = config.connection_string if config is not None else None
    ambient = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    for text in (given.get_secret_value() if given is not None else "", ambient):
        named, found = _ACCOUNT.search(text), _ENDPOINT.search(text)
        if found is not None and (named is None or named[1].strip() == account):
            return found[1].strip().rstrip("/")
    # A custom address serves what it is said to serve; the one of blobs has no files.
    custom = config.endpoint_url if config is not None else None
    if custom is not None and azure_account(urlsplit(custom).hostname or "") is None:
        return custom
    return f"https://{azure_host(account, 'file', location.domain)}"


class _Credential:
    """Bearer tokens as the SDK wants them."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def get_token(self, *scopes: str, **options: Any) -> Any:
        from azure.core.credentials import AccessToken

        token, expires = self._tokens.fetch()
        return AccessToken(token, int(expires.timestamp()))


class AzureFilesBackend(ReadOnlyBackend):
    """One share; see :class:`~storage.backends.base.Backend`."""

    why_read_only = "shares of Azure Files are read only here; mount the share, or use azcopy"

    def __init__(
        self, location: Location, config: AzureConfig | None, options: OpenOptions
    ) -> None:
        """Describe the share; nothing is imported or asked yet.

        Args:
            location: in the share.
            config: how to come there.
            options: limits, the time-outs of ``config`` among them.
        """
        self._location = location
        self._config = config
        self._options = options
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None
        self._access = cache(self._find_access)

    @property
    def name(self) -> str:
        """Driver and store."""
        return "azure files"

    def where(self, key: str) -> str:
        """Return the URI of a key, for messages."""
        place = self._location
        return str(
            Location("azurefile", place.bucket, key, account=place.account, domain=place.domain)
        )

    def stat(self, key: str, version: str | None = None) -> ObjectInfo:
        """See :meth:`Backend.stat`. There are no versions."""
        where = self.where(key)
        self._check(key, version, where)
        with translated(where):
            found = self._renewing(lambda share: share.get_file_client(key).get_file_properties())
            return _described(key, found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See :meth:`Backend.list`."""
        check_folder(prefix, self.where(prefix))
        self._check_name(prefix, self.where(prefix))
        pending = [prefix.removesuffix("/")]
        while pending:
            folder = pending.pop()
            try:
                with translated(self.where(folder)):
                    for item in self._items(folder):
                        key = f"{folder}/{item.name}" if folder else str(item.name)
                        if item.is_directory:
                            pending.append(key)
                        else:
                            yield _described(key, item)
            except BucketMissingError:
                raise
            except ModelMissingError:
                if not folder:
                    raise BucketMissingError(self.where("")) from None
                # Nothing there, a file, or removed while the tree was being listed.
                continue

    def _items(self, folder: str) -> Iterator[Any]:
        marker: str | None = None

        def page(share: Any) -> tuple[builtins.list[Any], str | None]:
            directory = share.get_directory_client(folder or None)
            pages = directory.list_directories_and_files(
                include=["timestamps", "Etag"], include_extended_info=True
            ).by_page(marker)
            return list(next(pages)), pages.continuation_token

        while True:
            items, marker = self._renewing(page)
            yield from items
            if not marker:
                return

    def read(self, key: str, span: ByteRange | None = None, pin: ObjectInfo | None = None) -> Body:
        """See :meth:`Backend.read`."""
        self._check(key, None, self.where(key))
        if pin is None or pin.size is None:
            pin = self.stat(key)
        where, size = self.where(key), pin.size or 0
        if span is not None and span.end > size:
            raise ObjectChangedError(
                f"{where}: bytes up to {span.end} were asked for, the file has {size}"
            )
        begin, end = (span.start, span.end) if span is not None else (0, size)
        info = ObjectInfo(key, size, pin.etag, modified=pin.modified)
        if begin == end:
            return Body(info, iter(()))
        # The first one now, so that what is wrong is said here.
        first = self._part(info, begin, end)
        return Body(info, self._parts(info, first, begin, end))

    def _parts(self, info: ObjectInfo, first: bytes, begin: int, end: int) -> Iterator[bytes]:
        yield first
        for start in range(begin + _PART, end, _PART):
            yield self._part(info, start, end)

    def _part(self, info: ObjectInfo, start: int, end: int) -> bytes:
        """Return the bytes of one request, checked: whose they are, how many, and their MD5."""
        where = self.where(info.key)
        length = min(_PART, end - start)
        answers: list[Any] = []
        with translated(where):
            # The SDK's own check of the MD5 loses what it is not to decompress.
            found = self._renewing(
                lambda share: share.get_file_client(info.key).download_file(
                    offset=start,
                    length=length,
                    max_concurrency=1,
                    decompress=False,
                    headers={"x-ms-range-get-content-md5": "true"},
                    raw_response_hook=answers.append,
                )
            )
            data = b"".join(found.chunks())
        now = _described(info.key, found.properties, _total(found))
        if info.differs_from(now):
            raise ObjectChangedError(f"{where} was replaced since it was looked at")
        if len(data) != length:
            raise TransientError(f"{where}: {length} bytes were expected and {len(data)} came")
        told = answers[-1].http_response.headers.get("Content-MD5")
        made = b64encode(md5(data, usedforsecurity=False).digest()).decode("ascii")
        if told is not None and told != made:
            raise TransientError(
                f"{where}: the MD5 of a part is {made}, and the service says {told}; it was "
                "damaged on its way"
            )
        return data

    def close(self) -> None:
        """Free the connections. It may be used again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def _check(self, key: str, version: str | None, where: str) -> None:
        check_path(key, where)
        self._check_name(key, where)
        if version is not None:
            raise ModelMissingError(where, f"{where}: files in a share have no versions")

    def _check_name(self, key: str, where: str) -> None:
        # The service would take it for a slash.
        if "\\" in key:
            raise InvalidInput(f"{where}: there is a backslash, which no file in a share has")

    # -- the SDK -----------------------------------------------------------------------------

    def _find_access(self) -> Access:
        return find_access(self._location, self._config, Network.of(self._config))

    def _renewing(self, request: Callable[[Any], T]) -> T:
        """Make a request, once more with a new token if the service refused the old one."""
        begun = time.monotonic()
        share = self._share()
        try:
            return request(share)
        except Exception as exc:
            tokens = self._access().tokens
            if tokens is None or not is_refusal(exc) or not tokens.renew(begun):
                raise
        with self._lock:
            # The SDK's client keeps the token that it was given until that expires.
            if self._opened is not None and self._opened[1] is share:
                self._opened = None
        return request(self._share())

    def _share(self) -> Any:
        with self._lock:
            # Sockets stayed with the parent.
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), self._connect())
            return self._opened[1]

    def _connect(self) -> Any:
        where = self.where("")
        try:
            from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential
            from azure.core.pipeline.transport import RequestsTransport
            from azure.storage.fileshare import ShareClient
        except ImportError as exc:
            raise ConfigurationError(
                f"{where}: Azure Files needs the package azure-storage-file-share, which is not "
                'installed; run: pip install "modelstorage[azure]"'
            ) from exc
        from requests.utils import get_environ_proxies

        access = self._access()
        url = _endpoint(self._location, self._config, access.account)
        network = Network.of(self._config)
        credential: Any = None
        if access.key is not None:
            credential = AzureNamedKeyCredential(access.account, access.key)
        elif access.sas is not None:
            credential = AzureSasCredential(access.sas)
        elif access.tokens is not None:
            if not url.startswith("https://"):
                raise ConfigurationError(
                    f"{where}: a bearer token is sent over https only, not to {url}; use an "
                    "endpoint with TLS, or a shared key"
                )
            credential = _Credential(access.tokens)
        proxy = network.proxy
        proxies = {"http": proxy, "https": proxy} if proxy else get_environ_proxies(url)
        verify = (network.bundle or True) if network.verify else False
        # Without the environment: a password of ~/.netrc would take the place of ours.
        transport = RequestsTransport(
            use_env_settings=False,
            connection_verify=verify,
            connection_timeout=self._options.connect_timeout,
            read_timeout=self._options.stall_timeout,
        )
        with translated(where):
            return ShareClient(
                url,
                self._location.bucket,
                credential=credential,
                # Rights on files as such: there is no user of a share behind a token.
                token_intent="backup" if access.tokens is not None else None,
                allow_trailing_dot=True,
                transport=transport,
                proxies=dict(proxies),
                retry_total=0,
                # The service leads nowhere, and the SDK would log in wherever it is led to.
                permit_redirects=False,
                max_single_get_size=_PART,
                max_chunk_get_size=_PART,
                logging_enable=False,
            )


def _described(key: str, found: Any, size: int | None = None) -> ObjectInfo:
    settings = getattr(found, "content_settings", None)
    return ObjectInfo(
        key,
        int(found.size) if size is None else size,
        _quoted(found.etag),
        modified=found.last_modified,
        content_type=getattr(settings, "content_type", None),
    )


def _quoted(etag: str | None) -> str | None:
    # Listings and answers are not of one mind about the quotes.
    stripped = (etag or "").strip('"')
    return f'"{stripped}"' if stripped else None


def _total(found: Any) -> int | None:
    """Return the size of the file that is being read."""
    total = _TOTAL.search(str(found.properties.content_range or ""))
    return int(total[1]) if total is not None else None
