"""Real servers on this machine's loopback, for tests and benchmarks.

Each is a context manager that starts the server in a folder of its own on free ports and
stops it by its own process id. ``fixtures.py`` offers them to pytest; nothing else here needs
pytest.
"""

from tests.servers.moto import Moto
from tests.servers.mounts import small_disk
from tests.servers.process import Server, ServerError, find_program, free_port, free_ports
from tests.servers.proxy import CountingProxy, Recorded
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import Keys, S3Server
from tests.servers.seaweedfs import SeaweedFS

__all__ = [
    "CountingProxy",
    "Keys",
    "Moto",
    "RcloneS3",
    "Recorded",
    "S3Server",
    "SeaweedFS",
    "Server",
    "ServerError",
    "find_program",
    "free_port",
    "free_ports",
    "small_disk",
]
