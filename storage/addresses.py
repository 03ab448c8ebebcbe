"""What the addresses of services say: whose host it is, which part of a path is a repository."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

__all__ = ["azure_account", "azure_host", "endpoint_fault", "git_repository"]

# An account has one host for each service, in the domain of its cloud or in a DNS zone.
_AZURE_HOST = re.compile(
    r"(?P<account>[a-z0-9]{3,24})\."
    r"(?:(?P<service>blob|dfs|file)\.core\."
    r"(?P<domain>windows\.net|usgovcloudapi\.net|chinacloudapi\.cn)"
    r"|(?P<zone>z[0-9]{1,2})\.(?P<zoned>blob|dfs|file)\.storage\.azure\.net)"
)
_AZURE_ZONE = ".storage.azure.net"


def azure_account(host: str) -> tuple[str, str, str] | None:
    """Return the account, the service and the domain that the host of a storage account names.

    The service is ``blob``, ``dfs`` or ``file``; the domain is as in :class:`Location`. Any
    other host, look-alikes included, gives ``None``.
    """
    found = _AZURE_HOST.fullmatch(host.lower())
    if found is None:
        return None
    if found["zone"] is not None:
        return found["account"], found["zoned"], f"{found['zone']}{_AZURE_ZONE}"
    return found["account"], found["service"], found["domain"]


def azure_host(account: str, service: str, domain: str | None = None) -> str:
    """Return the host of a service of a storage account; the reverse of :func:`azure_account`."""
    if domain is not None and domain.endswith(_AZURE_ZONE):
        return f"{account}.{domain.removesuffix(_AZURE_ZONE)}.{service}{_AZURE_ZONE}"
    return f"{account}.{service}.core.{domain or 'windows.net'}"


def git_repository(path: str) -> tuple[str, str | None, str] | None:
    """Return repository, revision and path in it, if a part of a URL's path ends in ``.git``."""
    segments = path.split("/")
    for index, segment in enumerate(segments):
        name, _, revision = segment.partition("@")
        if not name.endswith(".git"):
            continue
        rest = segments[index + 1 :]
        if name == ".git" and (index == 0 or any(rest)):
            continue
        return "/".join([*segments[:index], name]), revision or None, "/".join(rest)
    return None


def endpoint_fault(url: str) -> str | None:
    """Return what the URL of a service lacks, or has and may not have; ``None`` if it is right."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    # Some clients take white space for the end of the program.
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        return "a URL is needed, such as https://store.example:9000"
    if parts.username is not None or parts.password is not None:
        return "a URL without user and password is needed; they have their own fields"
    if parts.query or parts.fragment:
        return "a URL without a query and a fragment is needed"
    return None
