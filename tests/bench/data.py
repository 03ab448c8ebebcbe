"""What is moved, where it lies, and whether it arrived: seeded data, the store, checks."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Server", "Source", "Store", "check_file", "check_tree", "make_file", "make_tree"]

_BLOCK = 1024 * 1024


class Server(Protocol):
    """What the harness needs of a running S3 server."""

    endpoint: str
    access_key: str
    secret_key: str


@dataclass(frozen=True, slots=True)
class Source:
    """Local files and what they hold."""

    path: Path
    """The file, or the root of the tree."""

    digests: Mapping[str, str]
    """SHA-256 by path relative to the tree; a single file has the key ``""``."""

    size: int
    """Bytes in all files."""

    blake3: str = ""
    """BLAKE3 of a single file."""


def make_file(path: Path, size: int, seed: int) -> Source:
    """Write ``size`` random bytes, the same for the same ``seed``."""
    blake3: Any = importlib.import_module("blake3")
    sha256, other = hashlib.sha256(), blake3.blake3()
    with open(path, "wb") as stream:
        for block in _random_blocks(size, seed):
            stream.write(block)
            sha256.update(block)
            other.update(block)
    return Source(path, {"": sha256.hexdigest()}, size, other.hexdigest())


def make_tree(root: Path, count: int, size: int, seed: int) -> Source:
    """Write ``count`` files of ``size`` random bytes each, a hundred to a folder."""
    digests: dict[str, str] = {}
    for number, block in enumerate(_random_blocks(count * size, seed, size)):
        name = f"part-{number // 100:03}/weights-{number:05}.bin"
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(block)
        digests[name] = hashlib.sha256(block).hexdigest()
    return Source(root, digests, count * size)


def _random_blocks(total: int, seed: int, block: int = _BLOCK) -> Iterator[bytes]:
    generator = random.Random(seed)
    while total > 0:
        yield generator.randbytes(min(block, total))
        total -= block


def check_file(path: Path, source: Source) -> str | None:
    """Say what is wrong with a delivered file; ``None`` if it is the source's."""
    if not path.is_file():
        return "nothing delivered"
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == source.digests[""]:
        return None
    return f"wrong bytes ({path.stat().st_size} instead of {source.size})"


def check_tree(root: Path, source: Source) -> str | None:
    """Say what is wrong with a delivered tree; ``None`` if it is the source's, file by file."""
    found = {
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
    }
    missing, surplus = source.digests.keys() - found, found - source.digests.keys()
    wrong = sum(
        hashlib.sha256((root / name).read_bytes()).hexdigest() != source.digests[name]
        for name in source.digests.keys() & found
    )
    if missing or surplus or wrong:
        return f"{len(missing)} files missing, {len(surplus)} surplus, {wrong} with wrong bytes"
    return None


class Store:
    """The server as the harness itself uses it: to seed, to check, to clean up."""

    def __init__(self, server: Server) -> None:
        """Connect to ``server``."""
        boto3: Any = importlib.import_module("boto3")
        self.server = server
        self._client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            region_name="us-east-1",
        )

    def make_bucket(self, bucket: str) -> None:
        """Create a bucket that has already grown its volumes.

        The server makes the volumes of a bucket when the first object arrives, which takes
        about a second; that object is ours.
        """
        self._client.create_bucket(Bucket=bucket)
        self._client.put_object(Bucket=bucket, Key="first", Body=bytes(_BLOCK))

    def remove_bucket(self, bucket: str) -> None:
        """Delete a bucket with all that is in it, so that the server frees the disk."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        for page in pages:
            for entry in page.get("Contents", ()):
                self._client.delete_object(Bucket=bucket, Key=entry["Key"])
        self._client.delete_bucket(Bucket=bucket)

    def put(self, source: Source, bucket: str, key: str) -> None:
        """Upload a file under ``key``, or a tree below it."""
        if "" in source.digests:
            self._client.upload_file(os.fspath(source.path), bucket, key)
            return
        # Thousands of objects: the SDK for Python would take longer than all who are measured.
        stores: Any = importlib.import_module("obstore.store")
        target = stores.S3Store(
            bucket,
            endpoint=self.server.endpoint,
            access_key_id=self.server.access_key,
            secret_access_key=self.server.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
        )

        def put(name: str) -> None:
            target.put(f"{key}/{name}", (source.path / name).read_bytes())

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, source.digests))

    def check_object(self, bucket: str, key: str, source: Source) -> str | None:
        """Say what is wrong with an uploaded object; ``None`` if it is the source's."""
        errors: Any = importlib.import_module("botocore.exceptions")
        try:
            body = self._client.get_object(Bucket=bucket, Key=key)["Body"]
        except errors.ClientError as exc:
            return f"not uploaded: {exc}"
        found, size = hashlib.sha256(), 0
        for block in body.iter_chunks(_BLOCK):
            found.update(block)
            size += len(block)
        if found.hexdigest() == source.digests[""]:
            return None
        return f"wrong bytes ({size} instead of {source.size})"
