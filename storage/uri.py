"""Storage URIs: text in, a frozen :class:`Location` out. No network, no disk.

A key is literal: nothing in it is percent-decoded, globbed or normalised, so every name that
a store can hold can be written as a URI. Only two suffixes mean something, and only in this
exact form: a version pin (``?versionId=…``, ``?generation=…``) and an expected digest
(``#sha256=<64 hex>`` or ``#blake3=<64 hex>``, pip's convention). For ``http`` and ``https``
the text is a URL and follows RFC 3986 instead.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from storage import oci_names
from storage.addresses import azure_account, azure_host, git_repository
from storage.errors import InvalidInput, one_line, redact

__all__ = [
    "AZURE_URI_FORMAT",
    "GCS_URI_FORMAT",
    "HF_URI_FORMAT",
    "HTTP_URI_FORMAT",
    "LOCAL_URI_FORMAT",
    "OCI_URI_FORMAT",
    "PVC_URI_FORMAT",
    "S3_URI_FORMAT",
    "SUPPORTED_PROTOCOLS",
    "Location",
    "parse_uri",
]

S3_URI_FORMAT = "s3://bucket-name/path/to/model/"
GCS_URI_FORMAT = "gs://bucket-name/path/to/model/"
AZURE_URI_FORMAT = "azure://container-name/path/to/model/"
PVC_URI_FORMAT = "pvc://pvc-name/path/to/model/"
LOCAL_URI_FORMAT = "file:///path/to/model/"
HTTP_URI_FORMAT = "https://example.com/model.tar.gz"
HF_URI_FORMAT = "hf://username/model-name"
OCI_URI_FORMAT = "oci://registry.example/repository:tag"

SUPPORTED_PROTOCOLS: dict[str, str] = {
    "s3": "Amazon S3 and S3-compatible storage",
    "gs": "Google Cloud Storage",
    "azure": "Azure Blob Storage",
    "pvc": "Kubernetes Persistent Volume Claims",
    "file": "Local filesystem",
    "http": "HTTP/HTTPS downloads",
    "https": "Secure HTTP downloads",
    "hf": "HuggingFace Hub models",
}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_DIGEST = re.compile(r"#(sha256|blake3)=([0-9a-fA-F]{64})$")
_CANONICAL = {"gcs": "gs", "az": "azure", "abfs": "azure", "abfss": "azure", "oci+fetch": "oci"}
_PIN = {
    "s3": re.compile(r"\?versionId=([^?&#/]+)$"),
    "gs": re.compile(r"\?generation=([0-9]+)$"),
    "azure": re.compile(r"\?versionId=([^?&#/]+)$"),
}
# A name that reaches a host name or a folder: nothing in it may end the one or leave the other.
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._$-]{0,254}")
_REVISED = frozenset(("hf", "git+http", "git+https", "modelscope", "oci"))
_HF_REPO = re.compile(r"(?:[A-Za-z0-9_-][\w.-]*/)?[A-Za-z0-9_-][\w.-]*", re.ASCII)
_HF_SPECIAL_REVISION = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)")
_HF_KINDS = {"datasets": "dataset", "spaces": "space", "models": "model"}


@dataclass(frozen=True, slots=True)
class Location:
    """Where a model is: a store and a literal key in it.

    Attributes:
        scheme: canonical scheme (``gs`` for ``gcs``, ``azure`` for all its forms).
        bucket: bucket, container, claim, Hub repository, or host; empty for local paths.
        key: the literal key; for ``file`` the absolute path without its leading slash.
        version: object version or generation that the URI pins; of a repository the revision.
        digest: expected digest of the content as ``algorithm:hex``.
        account: Azure storage account named by the URI.
        domain: domain suffix of that account's cloud (``windows.net`` and its siblings), or
            its DNS zone (``z00.storage.azure.net``).
        repo_type: ``model``, ``dataset`` or ``space`` for Hub URIs.
        url: the complete URL for ``http``, ``https`` and generic schemes; of a git repository
            if it names a user. May hold a credential; it is not part of the representation.
        query: credential-bearing query of an Azure URL (a SAS token); not shown either.
    """

    scheme: str
    bucket: str
    key: str
    version: str | None = None
    digest: str | None = None
    account: str | None = None
    domain: str | None = None
    repo_type: str | None = None
    url: str | None = field(default=None, repr=False)
    query: str | None = field(default=None, repr=False)

    @property
    def type(self) -> str:
        """The kind of store: the scheme, with ``http`` for ``https`` too, and the like."""
        return _TYPES.get(self.scheme, self.scheme)

    @property
    def has_revisions(self) -> bool:
        """Whether ``version`` is a revision of a whole repository, not a version of one object."""
        return self.scheme in _REVISED

    @property
    def is_local(self) -> bool:
        """Whether the bytes are on a file system of this machine already."""
        return self.scheme in ("file", "pvc")

    @property
    def forces_tree(self) -> bool:
        """Whether only a tree can be meant: a trailing slash, or a whole bucket."""
        return not self.key or self.key.endswith("/")

    @property
    def prefix(self) -> str:
        """What the keys of everything below this location begin with; empty for a bucket."""
        return self.key if self.forces_tree else f"{self.key}/"

    @property
    def name(self) -> str:
        """The last part of the key, which names a downloaded file. May be empty."""
        path = self.key.rstrip("/")
        name = path.rsplit("/", 1)[-1]
        # An encoded slash is no part of a file's name.
        return unquote(name).rsplit("/", 1)[-1] if self.type == "http" else name

    def child(self, path: str) -> Location:
        """Return the location of ``path`` (relative, literal) below this one."""
        url = self.url
        if self.type == "http":
            # All that may be encoded is: some servers read a "+" in a path as a space.
            path = quote(path, safe="/~", errors="surrogateescape")
        key = f"{self.prefix}{path}"
        if self.type == "http" and url is not None:
            url = urlsplit(url)._replace(path=f"/{key}").geturl()
        version = self.version if self.has_revisions else None
        return replace(self, key=key, version=version, digest=None, url=url)

    def __str__(self) -> str:
        """The canonical URI, without anything that may be a credential."""
        if self.scheme == "azurefile" and self.account is not None:
            host = azure_host(self.account, "file", self.domain)
            return f"https://{host}/{self.bucket}/{quote(self.key, safe='/~')}"
        if self.type == "git+http":
            return self._git_uri()
        if self.url is not None:
            return redact(self.url)
        pin = ""
        if self.version is not None:
            pin = _PIN_SIGNS.get(self.scheme, "?versionId=")
            # A slash in the name of a branch would begin the key.
            plain = not self.has_revisions or _HF_SPECIAL_REVISION.fullmatch(self.version)
            pin += self.version if plain else quote(self.version, safe="")
        if self.scheme == "file":
            return f"/{self.key}"
        if self.scheme == "hf":
            kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
            tail = f"/{self.key}" if self.key else ""
            return f"hf://{kind}{self.bucket}{pin}{tail}"
        if self.scheme == "oci":
            return oci_names.shown(self.bucket, self.version, self.key)
        if self.scheme == "modelscope":
            return f"modelscope://{self.bucket}{pin}{f'/{self.key}' if self.key else ''}"
        if self.account is not None:
            host = azure_host(self.account, "dfs", self.domain)
            return f"abfss://{self.bucket}@{host}/{self.key}{pin}"
        return f"{self.scheme}://{self.bucket}/{self.key}{pin}"

    def _git_uri(self) -> str:
        pin = f"@{quote(self.version, safe='')}" if self.version is not None else ""
        tail = f"/{quote(self.key, safe='/~', errors='surrogateescape')}" if self.key else ""
        # Without a revision a repository whose name does not end in ".git" could not be told from
        # the path in it.
        pin = pin or ("" if self.bucket.endswith(".git") or not tail else "@HEAD")
        return f"{self.scheme}://{self.bucket}{pin}{tail}"

    def spec(self) -> dict[str, Any]:
        """Return a plain dict: ``type``, ``scheme``, ``bucket``, ``path``, ``uri`` and more.

        The store's own words are there beside the common ones: ``container`` and ``account``
        (Azure), ``claim`` (pvc), ``host`` (HTTP), ``repo_id``, ``repo_type`` and ``revision``
        (Hub), ``registry``, ``repository`` and ``reference`` (OCI); ``version`` and ``digest``
        where the URI names them.
        """
        spec: dict[str, Any] = {
            "type": self.type,
            "scheme": self.scheme,
            "bucket": self.bucket,
            "path": f"/{self.key}" if self.scheme == "file" else self.key,
            "uri": str(self),
        }
        if self.scheme == "azure":
            spec |= {"container": self.bucket, "account": self.account}
        elif self.scheme == "azurefile":
            spec |= {"share": self.bucket, "account": self.account}
        elif self.type == "git+http":
            spec |= {"repository": self.bucket, "revision": self.version or "HEAD"}
        elif self.scheme == "modelscope":
            spec |= {"repo_id": self.bucket, "revision": self.version or "master"}
        elif self.scheme == "pvc":
            spec["claim"] = self.bucket
        elif self.type == "http":
            spec["host"] = self.bucket
        elif self.scheme == "hf":
            spec |= {
                "repo_id": self.bucket,
                "repo_type": self.repo_type,
                "revision": self.version or "main",
            }
        elif self.scheme == "oci":
            registry, _, repository = self.bucket.partition("/")
            spec |= {
                "registry": registry,
                "repository": repository,
                "reference": self.version or "latest",
            }
        if self.version is not None:
            spec["version"] = self.version
        if self.digest is not None:
            spec["digest"] = self.digest
        return spec


def parse_uri(uri: str | os.PathLike[str]) -> Location:
    """Parse a storage URI or a plain local path.

    Raises:
        InvalidInput: the text is empty, names no bucket, or holds a NUL or half a character.
    """
    text = os.fspath(uri) if isinstance(uri, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text:
        kind = "an empty string" if text == "" else f"a {type(uri).__name__}"
        raise InvalidInput(f"a storage URI or a path is needed, not {kind}")
    if "\0" in text:
        raise InvalidInput(f"{one_line(text)!r} holds a NUL character, which no store can")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidInput(
            f"{one_line(text)!a} holds half a character, which no store can"
        ) from None
    digest = None
    if fragment := _DIGEST.search(text):
        digest = f"{fragment.group(1)}:{fragment.group(2).lower()}"
        text = text[: fragment.start()]
    match = _SCHEME.fullmatch(text)
    if match is None:
        if not text:
            raise InvalidInput("a storage URI or a path is needed before the digest")
        return replace(_parse_path(text), digest=digest)
    scheme = match.group(1).lower()
    scheme = _CANONICAL.get(scheme, scheme)
    parse = _PARSERS.get(scheme, _parse_generic)
    return replace(parse(scheme, match.group(2), text), digest=digest)


def _parse_path(path: str) -> Location:
    absolute = os.path.abspath(path)
    # A trailing slash means "a tree"; abspath drops it.
    if path.endswith("/") and absolute != "/":
        absolute += "/"
    return Location("file", "", absolute.lstrip("/"))


def _parse_file(scheme: str, rest: str, text: str) -> Location:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise InvalidInput(
            f"{one_line(text)!r}: a file URI has three slashes and an absolute path, "
            f"as in {LOCAL_URI_FORMAT}"
        )
    return _parse_path("/" + path)


def _parse_bucket(scheme: str, rest: str, text: str) -> Location:
    version = None
    if (pattern := _PIN.get(scheme)) and (pin := pattern.search(rest)):
        version = pin.group(1)
        rest = rest[: pin.start()]
    bucket, _, key = rest.partition("/")
    _check_bucket(scheme, bucket, text)
    if version is not None and (not key or key.endswith("/")):
        raise InvalidInput(f"{one_line(text)!r}: a version belongs to one object, not to a tree")
    return Location(scheme, bucket, key, version)


def _check_bucket(scheme: str, bucket: str, text: str) -> None:
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        # Shown within the URI only: it may hold a user and a password, or a query.
        found = "what is between '://' and '/' is not a name" if bucket else "there is no name"
        raise InvalidInput(
            f"{one_line(text)!r}: {found} of a bucket, container or claim; "
            f"expected {scheme}://name/path"
        )


def _parse_pvc(scheme: str, rest: str, text: str) -> Location:
    location = _parse_bucket(scheme, rest, text)
    if ".." in location.key.split("/"):
        raise InvalidInput(f"{one_line(text)!r}: '..' may not leave the claim; name the path")
    return location


def _parse_azure(scheme: str, rest: str, text: str) -> Location:
    authority, slash, key = rest.partition("/")
    container, at, host = authority.partition("@")
    if not at:
        return _parse_bucket(scheme, rest, text)
    account = azure_account(host)
    if account is None or account[1] == "file":
        raise InvalidInput(
            f"{one_line(text)!r}: {host!r} is not the host of an Azure storage account; "
            "expected abfss://container@account.dfs.core.windows.net/path"
        )
    location = _parse_bucket(scheme, f"{container}{slash}{key}", text)
    return replace(location, account=account[0], domain=account[2])


def _parse_http(scheme: str, rest: str, text: str) -> Location:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise InvalidInput(f"{one_line(text)!r}: a URL holds no control characters")
    parts = _split(text)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _no_url(text) from None
    if not host:
        raise InvalidInput(f"{one_line(text)!r}: there is no host; as in {HTTP_URI_FORMAT}")
    # Matched on the parsed host alone, never on the text: a look-alike such as
    # https://evil.example/https://a.blob.core.windows.net/ stays what it is, plain HTTP.
    account = azure_account(host)
    if account and scheme == "https" and port in (None, 443) and parts.username is None:
        return _azure_url(parts, account, text)
    host = f"[{host}]" if ":" in host else host
    netloc = f"{host}:{port}" if port else host
    path = parts.path.removeprefix("/")
    # Told by a part of the path alone: raw files of a host of repositories stay what they are.
    if scheme == "https" and not parts.query and (found := git_repository(path)) is not None:
        return _git_location("git+https", parts, netloc, found)
    return Location(scheme, netloc, path, url=text)


def _azure_url(parts: SplitResult, account: tuple[str, str, str], text: str) -> Location:
    name, service, domain = account
    container, _, key = parts.path.lstrip("/").partition("/")
    _check_bucket("azure", container, text)
    if service == "file":
        fields = {"account": name, "domain": domain, "query": parts.query or None}
        return Location("azurefile", container, unquote(key), **fields)
    version, query = _split_version(parts.query)
    if version is not None and (not key or key.endswith("/")):
        raise InvalidInput(f"{one_line(text)!r}: a version belongs to one object, not a tree")
    return Location(
        "azure", container, unquote(key), version, account=name, domain=domain, query=query
    )


def _git_location(
    scheme: str, parts: SplitResult, netloc: str, found: tuple[str, str | None, str]
) -> Location:
    repository, revision, key = found
    user = parts.netloc.rpartition("@")[0]
    url = f"{scheme.removeprefix('git+')}://{user}@{netloc}/{repository}" if user else None
    version = unquote(revision) if revision is not None else None
    key = unquote(key, errors="surrogateescape")
    return Location(scheme, f"{netloc}/{repository}", key, version, url=url)


def _parse_git(scheme: str, rest: str, text: str) -> Location:
    """Parse ``git+https://host/repository[@revision][/path]``."""
    plain = _parse_http(scheme.removeprefix("git+"), rest, text.partition("+")[2])
    parts = _split(text)
    if parts.query or plain.scheme == "azure":
        raise InvalidInput(f"{one_line(text)!r}: the address of a git repository has no query")
    path = parts.path.strip("/") if parts.path.count("@") == 0 else parts.path.removeprefix("/")
    found = git_repository(parts.path.removeprefix("/"))
    if found is None:
        # Some hosts have repositories without that ending: it is all, or all before the "@".
        repository, at, tail = path.partition("@")
        revision, _, key = tail.partition("/")
        found = (repository, revision if at else None, key)
    if not found[0] or (found[1] is None and re.search(r"\.git@(?:/|$)", parts.path)):
        raise InvalidInput(
            f"{one_line(text)!r}: there is no repository, or no revision after its '@'; expected "
            "git+https://host/owner/repository.git@revision/path"
        )
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return _git_location(scheme, parts, f"{host}:{parts.port}" if parts.port else host, found)


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        raise _no_url(text) from None


def _no_url(text: str) -> InvalidInput:
    """Return what is wrong. What Python says of it may hold the user and the password."""
    start, at, end = one_line(text).rpartition("@")
    # A password with a slash in it looks like a port and a path.
    shown = f"{start.partition('://')[0]}://…@{end}" if at else end
    return InvalidInput(f"{shown!r} is not a URL: its host or its port cannot be read")


def _split_version(query: str) -> tuple[str | None, str | None]:
    """Return the version that the query of an Azure URL names, and what else it holds."""
    version = None
    others = []
    for field_text in query.split("&"):
        name, _, value = field_text.partition("=")
        if name.lower() == "versionid" and value:
            version = unquote(value)
        else:
            others.append(field_text)
    return version, "&".join(others) or None


def _parse_hf(scheme: str, rest: str, text: str) -> Location:
    repo_type = "model"
    first, _, tail = rest.partition("/")
    if first in _HF_KINDS:
        repo_type, rest = _HF_KINDS[first], tail
    # The repository ends at its revision, else after "owner/name" ("gpt2" has no owner).
    repo = re.match(r"[^/@:]+(?:/[^/@:]+)?", rest)
    if repo is None or not _HF_REPO.fullmatch(repo.group(0)) or ".." in repo.group(0):
        raise InvalidInput(f"{one_line(text)!r}: there is no repository; as in {HF_URI_FORMAT}")
    rest = rest[repo.end() :]
    revision = None
    if rest[:1] in ("@", ":"):
        special = _HF_SPECIAL_REVISION.match(rest, 1)
        end = special.end() if special else (rest.find("/") if "/" in rest else len(rest))
        revision, rest = unquote(rest[1:end]), rest[end:]
        if not revision:
            raise InvalidInput(f"{one_line(text)!r}: the revision after '@' or ':' is missing")
    return Location("hf", repo.group(0), rest.lstrip("/"), revision, repo_type=repo_type)


def _parse_modelscope(scheme: str, rest: str, text: str) -> Location:
    """Parse ``modelscope://owner/model[:revision|@revision][/path]``."""
    found = re.fullmatch(r"([^/@:]+/[^/@:]+)(?:[:@]([^/]+))?(?:/(.*))?", rest, re.DOTALL)
    if found is None or not _HF_REPO.fullmatch(found[1]) or ".." in found[1]:
        raise InvalidInput(
            f"{one_line(text)!r}: there is no repository; as in modelscope://owner/model:revision"
        )
    revision = unquote(found[2]) if found[2] is not None else None
    return Location("modelscope", found[1], found[3] or "", revision)


def _parse_oci(scheme: str, rest: str, text: str) -> Location:
    found = oci_names.ImageName.parse(rest)
    if found is None:
        raise InvalidInput(
            f"{one_line(text)!r} does not name an image; as in {OCI_URI_FORMAT}, or with "
            "@sha256:<64 hex>, and only behind one of the two a path in it"
        )
    bucket = f"{found.registry}/{found.repository}"
    return Location("oci", bucket, found.path, found.reference)


def _parse_generic(scheme: str, rest: str, text: str) -> Location:
    _split(text)
    authority, _, key = rest.partition("/")
    return Location(scheme, authority.rpartition("@")[2], key, url=text)


_PARSERS = {
    "s3": _parse_bucket,
    "gs": _parse_bucket,
    "memory": _parse_bucket,
    "azure": _parse_azure,
    "pvc": _parse_pvc,
    "file": _parse_file,
    "http": _parse_http,
    "https": _parse_http,
    "hf": _parse_hf,
    "git+http": _parse_git,
    "git+https": _parse_git,
    "modelscope": _parse_modelscope,
    "oci": _parse_oci,
}
_TYPES = {"https": "http", "git+https": "git+http", "azurefile": "azure"}
_PIN_SIGNS = {"gs": "?generation=", "hf": "@", "modelscope": ":"}
