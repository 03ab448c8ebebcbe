"""moto's S3: keeps every key literally (``m//x``, ``a/../b``), which SeaweedFS does not."""

from __future__ import annotations

from collections.abc import Sequence

from tests.servers.process import HOST, find_program, free_port
from tests.servers.s3 import S3Server


class Moto(S3Server):
    """``moto_server``. It accepts any signature and any checksum."""

    name = "moto"
    health_path = "/moto-api/"

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        return [find_program("moto_server"), "-H", HOST, "-p", str(self.port)]
