"""The few requests of S3 that obstore cannot send, signed by AWS's own runtime.

They carry no content: what the store says of an object with its checksums, what unfinished
uploads to it have left behind, and listings, of which obstore takes an error document that came
with status 200 for the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_plus, urlsplit
from xml.etree import ElementTree

from storage.backends.base import ObjectInfo, OpenOptions, md5_hint
from storage.backends.drivers.light import LightSession
from storage.backends.network import Network
from storage.backends.s3.answers import from_code, next_page
from storage.errors import (
    ConfigurationError,
    StorageError,
    TransientError,
    one_line,
)

__all__ = ["Part", "Pending", "Refusal", "SignedClient"]

Refusal = Callable[[str, str, int, str, Mapping[str, Any]], StorageError]
"""Says what an error answer means, as :func:`from_code` does."""

_EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_UNESCAPED = "/-_.~"


class _Credentials:
    """What a provider of obstore's gives, asked again only when it runs out."""

    # As long before that as obstore wants new ones.
    _margin = timedelta(minutes=5)

    def __init__(self, provider: Callable[[], dict[str, Any]]) -> None:
        self._provider = provider
        self._lock = threading.Lock()
        self._kept: dict[str, Any] | None = None

    def __call__(self) -> dict[str, Any]:
        with self._lock:
            kept = self._kept
            expiry = kept["expires_at"] if kept is not None else None
            if kept is None or (expiry is not None and expiry - self._margin < datetime.now(UTC)):
                kept = self._kept = self._provider()
            return kept


class Pending(NamedTuple):
    """An upload in parts that was neither completed nor aborted."""

    upload: str
    """Its id."""

    age: timedelta
    """How long ago it began, by the store's own clock."""


class Part(NamedTuple):
    """One part of such an upload."""

    number: int
    size: int
    etag: str


class SignedClient:
    """One bucket, by small signed requests; each is sent once. Safe for threads and forks."""

    def __init__(
        self,
        bucket: str,
        arguments: Mapping[str, Any],
        network: Network,
        options: OpenOptions,
        refusal: Refusal = from_code,
    ) -> None:
        """Describe the bucket; nothing is imported or opened yet.

        Args:
            bucket: its name.
            arguments: those of obstore for the same bucket.
            network: proxy, certificates.
            options: time-outs and the number of connections.
            refusal: says what error answers mean.
        """
        region = arguments["region"]
        virtual = arguments["virtual_hosted_style_request"]
        base = arguments.get("endpoint")
        if base is None:
            host = f"s3.{region}.amazonaws.com"
            base = f"https://{bucket}.{host}" if virtual else f"https://{host}"
        self._uri = f"s3://{bucket}/"
        self._base = base if virtual else f"{base}/{bucket}"
        self._region = region
        provider = arguments.get("credential_provider")
        self._credentials = _Credentials(provider) if provider is not None else None
        self._payer = bool(arguments.get("request_payer"))
        self._session = LightSession(network, options)
        self._patience = options.stall_timeout
        self._refusal = refusal

    @property
    def usable(self) -> bool:
        """Whether what signs the requests is installed, if they have to be signed."""
        return self._credentials is None or find_spec("awscrt") is not None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with ``prefix``; see :meth:`Backend.list`."""
        where = f"{self._uri}{prefix}"
        # XML has no way to write some characters of keys.
        query = {"list-type": "2", "encoding-type": "url"} | ({"prefix": prefix} if prefix else {})
        while True:
            _, page = self._listing("ListBucketResult", prefix, query, bucket=True)
            truncated = page.findtext("IsTruncated")
            decoded = unquote_plus if page.findtext("EncodingType") == "url" else str
            try:
                found = [_listed(entry, decoded) for entry in page.iter("Contents")]
            except (TypeError, ValueError):
                truncated = None
            if truncated is None:
                raise TransientError(
                    f"{where}: the answer is no listing, and not the store's; if that goes on, "
                    "check the endpoint and the proxy"
                )
            # What ends in a slash and is empty stands for a directory.
            yield from (info for info in found if info.size or not info.key.endswith("/"))
            if truncated != "true":
                return
            token = page.findtext("NextContinuationToken")
            query["continuation-token"] = next_page(where, token, query.get("continuation-token"))

    def head(
        self, key: str, version: str | None = None, etag: str | None = None
    ) -> Mapping[str, str]:
        """Return the headers, names in lower case, of an answer to HEAD that has checksums.

        Args:
            key: the object.
            version: which one.
            etag: the object has to have.

        Raises:
            StorageError: the store refuses; :class:`ObjectChangedError` if it has another one.
        """
        query = {} if version is None else {"versionId": version}
        headers = {"x-amz-checksum-mode": "ENABLED"}
        if etag is not None:
            headers["if-match"] = etag
        return self._send("HEAD", key, query, headers)[0]

    def pending(self, key: str) -> list[Pending]:
        """Return the unfinished uploads of exactly ``key``."""
        found: list[Pending] = []
        query = {"uploads": "", "prefix": key}
        while True:
            headers, page = self._listing("ListMultipartUploadsResult", key, query, bucket=True)
            now = _now(headers)
            keys: list[str] = []
            for upload in page.iter("Upload"):
                keys.append(upload.findtext("Key") or "")
                began = _moment(upload.findtext("Initiated"))
                name = upload.findtext("UploadId")
                if keys[-1] == key and name and began is not None:
                    found.append(Pending(name, now - began))
            marker = page.findtext("NextKeyMarker") or ""
            # They are in the order of their keys, and the prefix itself is the first of them.
            if page.findtext("IsTruncated") != "true" or marker != key or keys[-1:] != [key]:
                return found
            following = page.findtext("NextUploadIdMarker") or ""
            if following == query.get("upload-id-marker"):
                return found
            query |= {"key-marker": marker, "upload-id-marker": following}

    def parts(self, key: str, upload: str) -> list[Part]:
        """Return the first thousand parts that an unfinished upload has."""
        _, page = self._listing("ListPartsResult", key, {"uploadId": upload})
        return [
            Part(
                int(part.findtext("PartNumber") or 0),
                int(part.findtext("Size") or 0),
                part.findtext("ETag") or "",
            )
            for part in page.iter("Part")
        ]

    def abort(self, key: str, upload: str) -> None:
        """End an unfinished upload and free what its parts take up."""
        self._send("DELETE", key, {"uploadId": upload})

    def url(self, key: str, query: Mapping[str, str]) -> str:
        """Return where ``key`` is asked for, or the bucket if that is empty."""
        url = f"{self._base}/{quote(key, safe=_UNESCAPED)}" if key else self._base
        pairs = (f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
        return f"{url}?{'&'.join(pairs)}" if query else url

    def _listing(
        self, kind: str, key: str, query: Mapping[str, str], *, bucket: bool = False
    ) -> tuple[Mapping[str, str], ElementTree.Element]:
        """Return the headers and the document ``kind``, about a key or asked of the bucket."""
        headers, body = self._send("GET", key, query, bucket=bucket)
        try:
            page = ElementTree.fromstring(body)
        except ElementTree.ParseError:
            page = ElementTree.Element("")
        for element in page.iter():
            element.tag = element.tag.rpartition("}")[2]
        if page.tag != kind:
            raise TransientError(
                f"{self._uri}{key}: a {kind} was expected of the store and "
                f"{one_line(page.tag) or 'something else'} came; check the endpoint and the proxy"
            )
        return headers, page

    def _send(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        *,
        bucket: bool = False,
    ) -> tuple[Mapping[str, str], bytes]:
        where = f"{self._uri}{key}"
        given = dict(headers or {})
        if self._payer:
            given["x-amz-request-payer"] = "requester"
        answer = self._session.request(
            where,
            method,
            self.url("" if bucket else key, query),
            # What requests adds by itself, and a proxy may change.
            {"accept-encoding": "identity", **given},
            auth=lambda request: self._signed(request, given),
        )
        found = {name.lower(): value for name, value in answer.headers.items()}
        if not 200 <= answer.status_code < 300:
            code, message = _problem(answer.content)
            raise self._refusal(where, code, answer.status_code, message, found)
        return found, answer.content

    def _signed(self, request: Any, headers: Mapping[str, str]) -> Any:
        """Sign a request of requests. As its ``auth``, this keeps ``.netrc`` away from it."""
        if self._credentials is None:
            return request
        try:
            from awscrt import auth, http  # type: ignore[import-untyped]
        except ImportError as exc:
            raise ConfigurationError(
                f"{self._uri}: the package awscrt is needed, which is not installed "
                f'({one_line(exc)}); run: pip install "modelstorage[s3]"'
            ) from exc
        found = self._credentials()
        target = urlsplit(request.url)
        # Only what is sent as it is: the others are added below this.
        bare = http.HttpHeaders([("Host", target.netloc), *headers.items()])
        path = f"{target.path or '/'}{'?' if target.query else ''}{target.query}"
        config = auth.AwsSigningConfig(
            algorithm=auth.AwsSigningAlgorithm.V4,
            signature_type=auth.AwsSignatureType.HTTP_REQUEST_HEADERS,
            credentials_provider=auth.AwsCredentialsProvider.new_static(
                found["access_key_id"], found["secret_access_key"], found["token"]
            ),
            region=self._region,
            service="s3",
            use_double_uri_encode=False,
            should_normalize_uri_path=False,
            signed_body_value=_EMPTY_SHA256,
            signed_body_header_type=auth.AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
        )
        plain = http.HttpRequest(request.method, path, bare)
        auth.aws_sign_request(plain, config).result(self._patience)
        request.headers.update(dict(plain.headers))
        return request


def _problem(body: bytes) -> tuple[str, str]:
    """Return the code and the message of an error document, empty if it is none."""
    with suppress(ElementTree.ParseError):
        problem = ElementTree.fromstring(body)
        return problem.findtext("Code") or "", problem.findtext("Message") or ""
    return "", ""


def _listed(entry: ElementTree.Element, decoded: Callable[[str], str]) -> ObjectInfo:
    key, etag = entry.findtext("Key"), entry.findtext("ETag")
    if not key:
        raise ValueError("an object without a key")
    return ObjectInfo(
        decoded(key),
        int(entry.findtext("Size") or ""),
        etag,
        modified=_moment(entry.findtext("LastModified")),
        hint=md5_hint(etag),
    )


def _now(headers: Mapping[str, str]) -> datetime:
    with suppress(KeyError, ValueError):
        found = parsedate_to_datetime(headers["date"])
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return datetime.now(UTC)


def _moment(text: str | None) -> datetime | None:
    with suppress(TypeError, ValueError):
        found = datetime.fromisoformat(text or "")
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return None
