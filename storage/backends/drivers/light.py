"""Small requests to an object store, for what obstore cannot ask.

They go by ``requests``, which is there anyway; the second drivers take up to a second to import.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from storage.backends.base import OpenOptions
from storage.backends.drivers.fsspec_errors import causes, classify
from storage.backends.network import Network, hide_queries
from storage.errors import StorageError, TransientError, UnreachableError

__all__ = ["LightSession"]

_UNREACHABLE = frozenset(
    ("ConnectTimeout", "NameResolutionError", "NewConnectionError", "ProxyError")
)


class LightSession:
    """Sends each request once and follows no redirection. Safe for threads and forks."""

    def __init__(self, network: Network, options: OpenOptions) -> None:
        """Open nothing yet.

        Args:
            network: proxy and certificates.
            options: time-outs and the number of connections.
        """
        self._verify = (network.bundle or True) if network.verify else False
        proxy = network.proxy
        self._proxies = {"http": proxy, "https": proxy} if proxy is not None else {}
        self._timeouts = (options.connect_timeout, options.stall_timeout)
        self._connections = options.connections
        self._lock = threading.Lock()
        self._opened: tuple[int, Any] | None = None

    def request(
        self,
        where: str,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        params: Mapping[str, str] | None = None,
        auth: Callable[[Any], Any] = lambda request: request,
    ) -> Any:
        """Return the answer of ``requests``, whatever its status, with all of its body.

        Args:
            where: the object's URI, for messages.
            method: of HTTP.
            url: who is asked.
            headers: what goes along.
            params: the query, where ``url`` has none.
            auth: changes the prepared request before it is sent.

        Raises:
            StorageError: there is no answer.
        """
        try:
            # Settings of the session would give way to the variables of the environment, and
            # without an "auth" a password of a netrc would take the place of ours.
            return self._session().request(
                method,
                url,
                params=params,
                headers=headers,
                auth=auth,
                timeout=self._timeouts,
                allow_redirects=False,
                proxies=self._proxies,
                verify=self._verify,
            )
        except StorageError:
            raise
        except Exception as exc:
            found = classify(exc, where)
            lost = any(type(cause).__name__ in _UNREACHABLE for cause in causes(exc))
            if lost and type(found) is TransientError:
                raise UnreachableError(str(found)) from exc
            raise found from exc

    def close(self) -> None:
        """Free the connections. It may be used again."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def _session(self) -> Any:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.exceptions import InsecureRequestWarning

        with self._lock:
            opened = self._opened
            if opened is None or opened[0] != os.getpid():
                hide_queries()
                session = requests.Session()
                for scheme in ("http://", "https://"):
                    session.mount(scheme, HTTPAdapter(pool_maxsize=2 * self._connections))
                if not self._verify:
                    # Who switched the check off need not be told of it by every request.
                    warnings.filterwarnings("ignore", category=InsecureRequestWarning)
                opened = self._opened = (os.getpid(), session)
            return opened[1]
