"""A Hub for tests: the endpoints of huggingface.co that its own client calls, on loopback.

``server.py`` runs it, ``routes.py`` and ``uploads.py`` answer the requests, ``state.py`` holds
the repositories, ``files.py`` the bytes, and ``wire.py`` speaks HTTP.
"""

from tests.servers.hub.server import Hub
from tests.servers.hub.state import Account, Repo
from tests.servers.hub.wire import Answer, Request

__all__ = ["Account", "Answer", "Hub", "Repo", "Request"]
