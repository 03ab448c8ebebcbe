"""The way to a store, read from a config and the environment the same way for every client."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from storage.backends.base import OpenOptions
from storage.errors import ConfigurationError

if TYPE_CHECKING:
    from storage.config.base import NetworkConfig

__all__ = ["Network", "hide_queries", "with_timeouts"]

_BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True, slots=True)
class Network:
    """How a store is reached."""

    proxy: str | None = field(default=None, repr=False)
    """URL of the proxy; may hold a password. If none, that of the environment."""

    bundle: str | None = None
    """Path of a PEM file with the authorities to trust."""

    verify: bool = True
    """Whether certificates are checked."""

    @classmethod
    def of(cls, config: NetworkConfig | None, *variables: str) -> Self:
        """Return what ``config`` says; else the environment.

        Args:
            config: of the store.
            variables: that name a CA bundle in the store's own world; they go first.
        """
        proxy = config.proxy if config is not None else None
        bundle = config.ca_bundle if config is not None else None
        if bundle is None:
            given = (os.environ.get(name) for name in (*variables, *_BUNDLES))
            bundle = next((path for path in given if path), None)
        return cls(
            proxy.get_secret_value() if proxy is not None else None,
            bundle,
            getattr(config, "verify_ssl", True),
        )

    def read_bundle(self) -> bytes | None:
        """Return the content of the bundle.

        Raises:
            ConfigurationError: it cannot be read.
        """
        if self.bundle is None:
            return None
        try:
            with open(self.bundle, "rb") as file:
                return file.read()
        except OSError as exc:
            raise ConfigurationError(
                f"the CA bundle {self.bundle} cannot be read: {exc.strerror or exc}"
            ) from exc

    def obstore_arguments(self, options: OpenOptions, *, allow_http: bool) -> Mapping[str, Any]:
        """Return ``client_options`` and ``retry_config`` of any store of ``obstore``."""
        client: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=options.connect_timeout),
            # The engine notices stalls; a time limit on the whole body would cut slow links.
            "timeout": timedelta(days=1),
            "read_timeout": timedelta(seconds=options.stall_timeout),
            "pool_max_idle_per_host": str(options.connections),
            "allow_http": allow_http,
        }
        if self.proxy is not None:
            client["proxy_url"] = self.proxy
        if not self.verify:
            client["allow_invalid_certificates"] = True
        elif (bundle := self.read_bundle()) is not None:
            client["root_certificate"] = bundle
        # One call is one attempt; the transfer layer repeats.
        return {"client_options": client, "retry_config": {"max_retries": 0}}


def with_timeouts(options: OpenOptions, config: NetworkConfig | None) -> OpenOptions:
    """Return ``options`` with the time-outs that ``config`` has of its own."""
    if config is None:
        return options
    return OpenOptions(
        options.connections,
        config.connect_timeout or options.connect_timeout,
        config.read_timeout or options.stall_timeout,
        options.memory,
    )


def hide_queries() -> None:
    """Keep the queries of URLs out of what urllib3 logs; those of signed ones are credentials."""
    for name in ("urllib3.connectionpool", "urllib3.util.retry"):
        logging.getLogger(name).addFilter(_without_queries)


def _without_queries(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(
            re.sub(r"\?.*", "?…", one) if isinstance(one, str) else one for one in record.args
        )
    return True
