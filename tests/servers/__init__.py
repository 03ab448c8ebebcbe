"""Real servers on this machine's loopback, for tests and benchmarks.

Each is a context manager that starts the server in a folder of its own on free ports and
stops it by its own process id. ``fixtures.py`` offers them to pytest; nothing else here needs
pytest.
"""

from tests.servers.azurite import Azurite
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.gcs import FakeGCS, GCSShim, OpenSeaweedFS
from tests.servers.hub import Hub
from tests.servers.moto import Moto
from tests.servers.mounts import read_only_view, small_disk
from tests.servers.nginx_http import NginxHTTP
from tests.servers.odd_http import OddHTTP, Reply, Request, StaticFile
from tests.servers.process import Server, ServerError, find_program, free_port, free_ports
from tests.servers.proxy import CountingProxy, Recorded
from tests.servers.rclone import RcloneS3
from tests.servers.s3 import Keys, S3Server
from tests.servers.seaweedfs import SeaweedFS

__all__ = [
    "Azurite",
    "CountingProxy",
    "FakeGCS",
    "ForwardProxy",
    "GCSShim",
    "Hub",
    "Keys",
    "Moto",
    "NginxHTTP",
    "OddHTTP",
    "OpenSeaweedFS",
    "RcloneS3",
    "Recorded",
    "Reply",
    "Request",
    "S3Server",
    "SeaweedFS",
    "Server",
    "ServerError",
    "StaticFile",
    "find_program",
    "free_port",
    "free_ports",
    "read_only_view",
    "small_disk",
]
