"""The client: where configs, backends, transfers and the cache meet."""

from storage.client.client import StorageClient

__all__ = ["StorageClient"]
