"""Certificates of a private authority, and TLS before any of the servers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import trustme

from tests.servers.nginx import Nginx
from tests.servers.process import HOST

_CONFIG = """\
server {{
  listen @HOST@:@PORT@ ssl;
  ssl_certificate server.pem;
  ssl_certificate_key server.key;
  client_max_body_size 0;
  location / {{
    proxy_pass {target};
    proxy_http_version 1.1;
    proxy_set_header Host $http_host;
    proxy_set_header Connection "";
    proxy_request_buffering off;
    proxy_max_temp_file_size 0;
  }}
}}
"""


class TlsFront(Nginx):
    """A server over TLS that forwards to ``target``; ``Host`` passes, so signatures stay valid.

    Attributes:
        authority: who signed its certificate; nobody trusts it but who is told to.
    """

    name = "tls"

    def __init__(
        self,
        target: str,
        parent: str | os.PathLike[str] | None = None,
        *,
        hosts: Sequence[str] = (HOST, "localhost"),
    ) -> None:
        """Start nothing yet.

        Args:
            target: a URL without a trailing slash.
            parent: where the folder is made (default: temporary).
            hosts: whose certificate it shows.
        """
        super().__init__(_CONFIG.format(target=target), parent, scheme="https")
        self.authority = trustme.CA()
        self._hosts = hosts

    @property
    def ca_file(self) -> Path:
        """The authority's certificate, to be trusted."""
        return self.folder / "ca.pem"

    def config(self) -> str:
        """Write the certificates, then return the configuration."""
        self.authority.cert_pem.write_to_path(self.ca_file)
        certificate = self.authority.issue_cert(*self._hosts)
        certificate.private_key_pem.write_to_path(self.folder / "server.key")
        chain = self.folder / "server.pem"
        for number, blob in enumerate(certificate.cert_chain_pems):
            blob.write_to_path(chain, append=number > 0)
        return super().config()
