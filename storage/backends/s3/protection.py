"""What goes with the bytes of an upload through s3fs, so that damage on the way is noticed.

botocore would compute checksums as well, but over TLS sends them behind the body in an encoding
of AWS's own, which other stores may not know.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.backends.s3.answers import damaged, encrypted
from storage.digest import available, new_hasher

__all__ = ["Protection", "Sent"]


@dataclass(frozen=True, slots=True)
class Sent:
    """One body on its way."""

    headers: Mapping[str, str]
    """Arguments of botocore that go with it."""

    etag: str | None
    """What the store should make of it; ``None`` if that is not compared."""

    def check(self, where: str, answer: Mapping[str, Any]) -> None:
        """Raise ``TransientError`` if the store's ``answer`` is about other bytes."""
        found = str(answer.get("ETag", "")).strip('"')
        if self.etag in (None, found) or len(found) != len(self.etag or "") or encrypted(answer):
            return
        raise damaged(where, str(self.etag), found)


class Protection:
    """One of the ways of ``S3Config.upload_checksum``."""

    def __init__(self, way: str) -> None:
        """Protect uploads in this ``way``, which is not ``auto``."""
        self._way = way

    def announced(self) -> dict[str, str]:
        """Return the arguments that begin an upload in parts."""
        algorithm = self._algorithm()
        return {} if algorithm is None else {"ChecksumAlgorithm": algorithm.upper()}

    def of(self, data: bytes, *, whole: bool = False) -> Sent:
        """Return what goes with ``data``, one part or the ``whole`` object."""
        algorithm = self._algorithm()
        headers = {}
        if algorithm is not None:
            hasher = new_hasher(algorithm)
            hasher.update(data)
            value = base64.b64encode(bytes.fromhex(hasher.hexdigest())).decode()
            headers[f"Checksum{algorithm.upper()}"] = value
        compared = self._way == "md5" or (whole and self._way != "off")
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest() if compared else None
        return Sent(headers, etag)

    def _algorithm(self) -> str | None:
        if self._way == "crc64nvme" and not available(self._way):
            return "sha256"
        return self._way if self._way in ("sha256", "crc64nvme") else None
