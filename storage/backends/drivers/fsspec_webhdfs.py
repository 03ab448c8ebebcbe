"""HDFS over HTTP, through fsspec's ``webhdfs``: what a gateway and a secured cluster need besides.

Two options are more than fsspec has: ``headers`` go with requests to the name node's own host, and
``keytab`` is a Kerberos key for the ``principal`` of ``kerb_kwargs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from storage.backends.base import ObjectInfo
from storage.backends.drivers.fsspec import FsspecBackend
from storage.backends.drivers.fsspec_parts import moment
from storage.errors import ConfigurationError, StorageError, one_line

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

__all__ = ["WebHdfsBackend"]


class WebHdfsBackend(FsspecBackend):
    """Files of HDFS. Redirections to data nodes carry no headers of the user's."""

    def _defaults(self) -> dict[str, Any]:
        return {"timeout": (self._options.connect_timeout, self._options.stall_timeout)}

    def _implementation(self) -> type[Any]:
        plain: Any = super()._implementation()
        careful: type[Any] = _careful(plain)
        return careful

    def _describe(self, key: str, raw: Mapping[str, Any]) -> ObjectInfo:
        info = super()._describe(key, raw)
        moved, number = raw.get("modificationTime"), raw.get("fileId")
        if not moved:
            return info
        # A file of HDFS is written once or appended to, and one that replaces it has a number of
        # its own. Gateways to other stores number nothing.
        identity = f'"{number}-{moved}-{info.size}"' if number else f'W/"{moved}-{info.size}"'
        return replace(info, etag=identity, modified=moment(int(moved) / 1000))

    def _disconnect(self, fs: Any) -> None:
        fs.session.close()


@cache
def _careful(cls: Any) -> Any:
    import requests

    class Session(requests.Session):
        def __init__(self, fs: Any) -> None:
            super().__init__()
            self._timeout, self._verify, self._own = fs.timeout, fs.session_verify, fs.headers
            self._origin, self._kerberos = _origin(fs.url), bool(fs.kerb)
            # It would mix passwords of ~/.netrc, and authorities of the environment, with these.
            self.trust_env = False
            self.cert, self.auth = fs.session.cert, fs.session.auth
            self.proxies = requests.utils.get_environ_proxies(fs.url)

        def _check(self, url: str) -> None:
            if self._origin[0] == "https" and not url.lower().startswith("https:"):
                raise StorageError(
                    f"the name node led from https to {one_line(url)}, which anybody on the way "
                    "could read and change; let the data nodes serve https"
                )

        def get_redirect_target(self, resp: Response) -> str | None:
            target = super().get_redirect_target(resp)
            if target is not None:
                with suppress(ValueError):  # what is no address is refused where it is sent to
                    self._check(urljoin(resp.url, target))
            return target

        def request(self, method: Any, url: Any, **options: Any) -> Response:  # type: ignore[override]
            self._check(str(url))
            if _origin(url) == self._origin:
                options["headers"] = {**self._own, **(options.get("headers") or {})}
            elif not self._kerberos:
                # The name node said who asks; a data node is not told the password.
                options["auth"] = _unchanged
            options.setdefault("timeout", self._timeout)
            response = super().request(method, url, verify=self._verify, **options)
            if _origin(url) != self._origin:
                # fsspec takes whatever a data node answers for the content of a file.
                response.raise_for_status()
            return response

        def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
            super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
            if _origin(prepared_request.url or "") != self._origin:
                for name in self._own:
                    prepared_request.headers.pop(name, None)

    class WebHdfs(cls):  # type: ignore[misc]  # a class that is known only now
        def __init__(
            self,
            *args: Any,
            headers: Mapping[str, str] | None = None,
            keytab: str | None = None,
            timeout: Any = None,
            **options: Any,
        ) -> None:
            self.headers, self.timeout = dict(headers or {}), timeout
            if keytab is not None:
                options["kerb_kwargs"] = _with_keytab(options.get("kerb_kwargs") or {}, keytab)
            super().__init__(*args, **options)

        def _connect(self) -> None:
            super()._connect()
            plain: Any = self.session
            self.session: Any = Session(self)
            plain.close()

    return WebHdfs


def _unchanged(request: PreparedRequest) -> PreparedRequest:
    return request


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.netloc.lower()


def _with_keytab(arguments: Mapping[str, Any], keytab: str) -> dict[str, Any]:
    try:
        import spnego  # type: ignore[import-not-found,unused-ignore]
    except ImportError as exc:
        raise ConfigurationError(
            f"a Kerberos key needs the packages requests-kerberos and gssapi ({one_line(exc)}); "
            "run: pip install requests-kerberos gssapi"
        ) from exc
    credential = spnego.KerberosKeytab(keytab=keytab, principal=arguments.get("principal"))
    return {**arguments, "principal": credential}
