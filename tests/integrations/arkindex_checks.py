"""What must hold of a version that was published to an Arkindex, however that was done."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from storage.container import extract_archive
from tests.integrations.arkindex_server import Arkindex
from tests.integrations.arkindex_store import Store
from tests.peers import trees

__all__ = ["available"]


def available(arkindex: Arkindex, store: Store, version: Any, folder: Path, scratch: Path) -> None:
    """Check that a version is available and that its archive is the folder, byte for byte."""
    assert version == arkindex.versions[version["id"]] | {"s3_put_url": None}
    data = store.get(version["id"])
    assert data is not None
    assert version["state"] == "available"
    assert version["size"] == len(data)
    assert version["archive_hash"] == hashlib.md5(data).hexdigest()
    (scratch / "seen.tar.zst").write_bytes(data)
    extract_archive(scratch / "seen.tar.zst", scratch / "seen")
    assert trees.seen(scratch / "seen") == trees.seen(folder)
