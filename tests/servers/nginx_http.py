"""nginx before a folder: files by GET, PUT and DELETE, over HTTP and TLS, with odd corners."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

from tests.servers.nginx import Nginx
from tests.servers.process import HOST

USER = "user"
# With characters that a URL has to encode.
PASSWORD = "pass@word/ß"

_FILES = """
    root data;
    client_max_body_size 0;
    dav_methods PUT DELETE;
    create_full_put_path on;
"""
_TLS = """
    ssl_certificate server.pem;
    ssl_certificate_key server.pem;
"""
_CONFIG = f"""
  server {{
    listen @HOST@:@PORT1@;
    {_FILES}
    location = /-healthy {{ return 204; }}
  }}
  server {{
    listen @HOST@:@PORT2@ ssl;
    {_TLS}
    {_FILES}
  }}
  server {{
    listen @HOST@:@PORT3@ ssl;
    {_TLS}
    ssl_client_certificate ca.pem;
    ssl_verify_client on;
    {_FILES}
  }}
  server {{
    listen @HOST@:@PORT4@;
    {_FILES}
    location /private/ {{
      auth_basic "models";
      auth_basic_user_file users;
      alias data/;
    }}
    location /compressed/ {{
      gzip_static always;
      alias data/;
    }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
    location /moved-for-good/ {{ return 308 /$request_uri; }}
    location /elsewhere/ {{ return 307 http://localhost:@PORT1@$request_uri; }}
    location /to-plain/ {{ return 302 http://@HOST@:@PORT1@$request_uri; }}
    location /read-only/ {{ limit_except GET {{ deny all; }} alias data/; }}
    location /full/ {{ return 507; }}
  }}
"""


class NginxHTTP(Nginx):
    """Serves ``data`` of its folder to everybody, and knows where to be difficult.

    Attributes:
        ca: the authority (of ``trustme``) that signed its certificate; others may be signed.
    """

    name = "nginx-http"
    health_path = "/-healthy"

    def __init__(self, parent: str | os.PathLike[str] | None = None) -> None:
        """Start nothing yet."""
        super().__init__(_CONFIG, parent, ports=4)
        self.ca: Any = None

    def config(self) -> str:
        """Make the folder, the users and the certificates, and return the configuration."""
        import trustme

        self.data.mkdir()
        (self.folder / "users").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n", encoding="utf-8")
        self.ca = trustme.CA()
        self.ca.cert_pem.write_to_path(str(self.folder / "ca.pem"))
        for name, certificate in (
            ("server.pem", self.ca.issue_cert(HOST, "localhost")),
            ("client.pem", self.ca.issue_cert("client.example")),
            ("stranger.pem", trustme.CA().issue_cert("client.example")),
        ):
            certificate.private_key_and_cert_chain_pem.write_to_path(str(self.folder / name))
        return super().config()

    @property
    def data(self) -> Path:
        """What is served."""
        return self.folder / "data"

    @property
    def ca_file(self) -> str:
        """Path of the authority's certificate."""
        return str(self.folder / "ca.pem")

    @property
    def client_file(self) -> str:
        """Path of a client's certificate and key, which the server accepts."""
        return str(self.folder / "client.pem")

    @property
    def stranger_file(self) -> str:
        """Path of a client's certificate and key that somebody else signed."""
        return str(self.folder / "stranger.pem")

    @property
    def tls(self) -> str:
        """URL of the server over TLS."""
        return f"https://{HOST}:{self.ports[1]}"

    @property
    def mutual_tls(self) -> str:
        """URL of the server that wants a client's certificate."""
        return f"https://{HOST}:{self.ports[2]}"

    @property
    def odd(self) -> str:
        """URL of the server with the odd corners."""
        return f"http://{HOST}:{self.ports[3]}"


# nginx makes its ETags from the second of the modification and the size. Every file gets a
# second of its own, long enough ago for Last-Modified to be a strong validator too.
_seconds = itertools.count(int(time.time()) - 10_000_000)


def unfinished_uploads(folder: Path) -> list[str]:
    """Return what is left of broken uploads to ``folder``.

    The server removes it when it sees that the client is gone, which is waited for.
    """
    temporary = folder.parent / "temp"
    deadline = time.monotonic() + 60
    while True:
        found = [str(path) for path in temporary.rglob("*") if path.is_file()]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def put_file(folder: Path, path: str, data: bytes) -> Path:
    """Store a file below ``folder`` at once, as object stores do, and return its path."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / "temp" / f"put-{next(_seconds)}"
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(data)
    moment = next(_seconds)
    os.utime(partial, (moment, moment))
    os.replace(partial, target)
    return target
