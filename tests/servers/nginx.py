"""nginx with any configuration: static files, a reverse proxy, TLS before another server."""

from __future__ import annotations

import http.client
import os
import shutil
from collections.abc import Sequence
from contextlib import closing

from tests.servers.process import HOST, Server, free_ports
from tests.servers.provision import debian_program

# Debian installs it where only root's PATH looks.
_SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")

_CONFIG = """\
daemon off;
# One process: what is started is what is stopped, and it stays the current user's.
master_process off;
pid nginx.pid;
error_log stderr;
events { worker_connections 1024; }
http {
  access_log off;
  default_type application/octet-stream;
  client_body_temp_path temp/body;
  proxy_temp_path temp/proxy;
  fastcgi_temp_path temp/fastcgi;
  uwsgi_temp_path temp/uwsgi;
  scgi_temp_path temp/scgi;
@BODY@
}
"""


def find_nginx() -> str:
    """Return the path of nginx: the one that is installed, else one unpacked for the tests.

    Raises:
        ServerError: there is none, and Debian's package cannot be had.
    """
    folders = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SYSTEM_FOLDERS))
    return shutil.which("nginx", path=folders) or debian_program("nginx", "usr/sbin/nginx")


class Nginx(Server):
    """One nginx process.

    The configuration given is the body of the ``http`` block: ``server`` blocks, maps, … In it
    ``@PORT@`` (and ``@PORT2@``, ``@PORT3@``, …, for more of ``ports``), ``@HOST@`` and
    ``@FOLDER@`` stand for what is known only at the start. Paths are relative to the folder.
    A server over TLS says ``listen @HOST@:@PORT@ ssl;`` and names its certificate itself.

    Attributes:
        ports: all ports that the configuration may listen on; ``port`` is the first.
    """

    name = "nginx"
    health_path = "/"

    def __init__(
        self,
        config: str,
        parent: str | os.PathLike[str] | None = None,
        *,
        ports: int = 1,
        scheme: str = "http",
    ) -> None:
        """Start nothing yet.

        Args:
            config: body of the ``http`` block.
            parent: where the folder is made (default: temporary).
            ports: how many the configuration listens on.
            scheme: of ``endpoint``; ``https`` if the configuration has TLS on ``@PORT@``.
        """
        super().__init__(parent)
        self._config = config
        self._count = ports
        self._scheme = scheme
        self.ports: list[int] = []

    def command(self) -> Sequence[str]:
        """Write the configuration and return the command line."""
        self.ports = free_ports(self._count)
        self.port = self.ports[0]
        (self.folder / "temp").mkdir()
        text = _CONFIG.replace("@BODY@", self.config())
        text = text.replace("@PORT@", str(self.port)).replace("@HOST@", HOST)
        for number, port in enumerate(self.ports, 1):
            text = text.replace(f"@PORT{number}@", str(port))
        file = self.folder / "nginx.conf"
        file.write_text(text.replace("@FOLDER@", str(self.folder)), encoding="utf-8")
        return [find_nginx(), "-e", "stderr", "-p", str(self.folder), "-c", str(file)]

    def config(self) -> str:
        """Return the body of the ``http`` block; ``folder`` and ``ports`` are known by now."""
        return self._config

    @property
    def endpoint(self) -> str:
        """The server's URL, without a trailing slash."""
        return f"{self._scheme}://{HOST}:{self.port}"

    def is_healthy(self) -> bool:
        """Ask once. Any answer will do; a server over TLS answers a plain request by 400."""
        with closing(http.client.HTTPConnection(HOST, self.port, timeout=5)) as connection:
            try:
                connection.request("GET", self.health_path)
                connection.getresponse()
            except (OSError, http.client.HTTPException):
                return False
        return True
