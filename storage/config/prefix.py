"""Prefixes of URIs, matched at path boundaries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from storage.errors import ConfigurationError, InvalidInput, one_line
from storage.uri import Location, parse_uri

__all__ = ["Prefix"]

_WHOLE_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PORTS = {"http": ":80", "https": ":443", "git+http": ":80", "git+https": ":443"}


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a URI has to begin with.

    ``s3://team`` is the bucket ``team`` and all in it, never ``team-b``; ``s3://team/m`` is
    ``m`` and all below it, never ``m2``; ``s3://`` is every bucket; ``hf://owner`` is all of
    an owner's models; ``https://account.blob.core.windows.net/`` is a storage account.
    """

    type: str
    """Type of the URIs."""

    scheme: str
    """Scheme of the URIs; a prefix with ``https`` never matches ``http``."""

    parts: tuple[str, ...] = ()
    """Bucket (host, owner, …) and the parts of the key; empty for a whole scheme."""

    account: str | None = None
    """Azure storage account."""

    version: str | None = None
    """Hub revision."""

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Return the prefix that ``text`` means; scheme aliases are the same prefix.

        Raises:
            ConfigurationError: it is not the beginning of a URI, or it holds a credential.
        """
        if registry := _registry_prefix(text):
            return registry
        try:
            if whole := _WHOLE_SCHEME.fullmatch(text):
                location = parse_uri(f"{text}name/path" if whole[1] != "file" else "file:///")
                return cls(location.type, location.scheme)
            location = parse_uri(text)
            if "://" not in text or location.type == "file":
                raise InvalidInput("it is a local path, and there is nothing to configure")
            if location.query or (location.type == "http" and re.search(r"[?#]", text)):
                raise InvalidInput("it ends in a query or a fragment")
            if location.url is not None and "@" in text.split("/", 3)[2]:
                raise InvalidInput("it holds a user; credentials have their own fields")
        except InvalidInput as exc:
            if account := _account_prefix(text):
                return account
            if host := re.fullmatch(r"(git\+https?)://([^/?#@]+)/?", text, re.IGNORECASE):
                # All repositories of a host.
                scheme = host[1].lower()
                return cls("git+http", scheme, (host[2].lower().removesuffix(_PORTS[scheme]),))
            if owner := re.fullmatch(
                r"modelscope://([A-Za-z0-9_-][\w.-]*)/?", text, re.ASCII | re.I
            ):
                return cls("modelscope", "modelscope", (owner[1],))
            raise ConfigurationError(
                f"prefix: {one_line(repr(text), 120)} is not the beginning of a URI, such as "
                f"s3://bucket/path/: {exc}"
            ) from exc
        version = location.version if location.has_revisions else None
        return cls(location.type, location.scheme, _parts(location), location.account, version)

    def match(self, location: Location, account: str | None = None) -> tuple[int, ...] | None:
        """Return how specific the match with ``location`` is, ``None`` where there is none.

        Args:
            location: what is looked for.
            account: the Azure account that the prefix's config has credentials for. They do
                not match a URI that names another.
        """
        if location.scheme != self.scheme:
            return None
        if location.account is not None and account not in (None, location.account):
            return None
        if self.account not in (None, location.account):
            return None
        if self.version not in (None, location.version):
            return None
        parts = _parts(location)
        if self.scheme in _PORTS and any(unquote(part) in (".", "..") for part in parts):
            # Such a path may lead out of the prefix that it begins with.
            parts = parts[:1]
        if parts[: len(self.parts)] != self.parts:
            return None
        return len(self.parts), self.account is not None, self.version is not None


def _parts(location: Location) -> tuple[str, ...]:
    bucket: tuple[str, ...] = (location.bucket,)
    if location.type == "http":
        bucket = (location.bucket.removesuffix(_PORTS[location.scheme]),)
    elif location.scheme == "hf":
        bucket = (location.repo_type or "model", *location.bucket.split("/"))
    elif location.has_revisions:
        host, *path = location.bucket.split("/")
        bucket = (host.removesuffix(_PORTS.get(location.scheme, "")), *path)
    key = location.key.removesuffix("/")
    return (*bucket, *key.split("/")) if key else bucket


def _registry_prefix(text: str) -> Prefix | None:
    """Return the prefix of a registry, or of several repositories of one, if ``text`` is one."""
    match = re.fullmatch(r"oci://([^/@]*[.:\]][^/@]*|localhost)(/[^:@]*/|/)?", text, re.IGNORECASE)
    if match is None:
        return None
    try:
        location = parse_uri(f"{text.rstrip('/')}/name")
    except InvalidInput:
        return None
    return Prefix("oci", "oci", tuple(location.bucket.split("/")[:-1]))


def _account_prefix(text: str) -> Prefix | None:
    """Return the prefix of a whole storage account, if ``text`` is the URL of one."""
    if not re.fullmatch(r"https://[^/?#@]+/?", text, re.IGNORECASE):
        return None
    location = parse_uri(f"{text.rstrip('/')}/container/path")
    if location.scheme not in ("azure", "azurefile"):
        return None
    return Prefix(location.type, location.scheme, (), location.account)
