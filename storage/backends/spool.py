"""A body as a seekable file, for objects that cannot be read in parts."""

from __future__ import annotations

import io
import tempfile

from storage.backends.base import Body

__all__ = ["spooled"]


def spooled(body: Body) -> io.BufferedReader:
    """Return all of ``body`` as a file on this machine's disk that vanishes when it is closed."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 -- handed over
    try:
        with body:
            for chunk in body:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[file.write(view) :]
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(file)
