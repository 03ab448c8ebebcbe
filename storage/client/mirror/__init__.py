"""Mirrors of many objects, done by any executor; see :mod:`storage.client.mirror.run`."""

from storage.client.mirror.options import MirrorFailure, MirrorOptions, MirrorResult
from storage.client.mirror.run import mirror

__all__ = ["MirrorFailure", "MirrorOptions", "MirrorResult", "mirror"]
