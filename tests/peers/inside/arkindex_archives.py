"""The side of ``arkindex-base-worker``."""

import hashlib
import logging
import shutil
from pathlib import Path

from json_lines import serve

logging.disable(logging.CRITICAL)

from arkindex_worker.utils import close_delete_file, extract_tar_zst_archive  # noqa: E402
from arkindex_worker.worker.training import create_archive  # noqa: E402


def create(folder, target):
    """Archive a folder; return the hashes and the size that the peer reports."""
    with create_archive(Path(folder)) as (archive, *values):
        shutil.copyfile(archive, target)
    names = {2: ("size", "archive_hash"), 3: ("content_hash", "size", "archive_hash")}
    return dict(zip(names[len(values)], values, strict=True))


def extract(archive, folder):
    """Extract an archive."""
    descriptor, tar = extract_tar_zst_archive(Path(archive), Path(folder))
    close_delete_file(descriptor, tar)


def md5(path):
    """Return the MD5 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


serve({"create": create, "extract": extract, "md5": md5})
