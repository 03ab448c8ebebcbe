"""Move one object or tree with a Python client and note how long its parts took.

``python transfer.py CLIENT ACTION URI PATH [--digest DIGEST] [--timings FILE]``; the
endpoint and the credentials come from the ``AWS_*`` variables. Each client is imported and
used the way its own documentation shows, with its own defaults. ``transfer`` is the time from
the end of the import to the end of the transfer, construction of the client included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

Job = argparse.Namespace
Work = Callable[[], object]


def use_boto3(job: Job) -> Work:
    """Return the transfer by ``boto3``, the Python SDK."""
    import boto3  # type: ignore[import-untyped, unused-ignore]

    def download_object() -> None:
        boto3.client("s3").download_file(job.bucket, job.key, job.path)

    def download_tree() -> None:
        # The SDK has no recursive download. One transfer manager for all objects, with the
        # default settings, is the fastest loop to be had: twice as fast as download_file in
        # a pool of threads, which makes a manager for each object.
        from boto3.s3.transfer import TransferConfig, create_transfer_manager

        client = boto3.client("s3")
        prefix = job.key + "/"
        with create_transfer_manager(client, TransferConfig()) as manager:
            pending = []
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=job.bucket, Prefix=prefix
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    path = os.path.join(job.path, entry["Key"][len(prefix) :])
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    pending.append(manager.download(job.bucket, entry["Key"], path))
            for future in pending:
                future.result()

    def upload_object() -> None:
        boto3.client("s3").upload_file(job.path, job.bucket, job.key)

    return {
        "download-object": download_object,
        "download-tree": download_tree,
        "upload-object": upload_object,
    }[job.action]


def use_s3fs(job: Job) -> Work:
    """Return the transfer by ``s3fs``, the fsspec driver."""
    import s3fs  # type: ignore[import-untyped, unused-ignore]

    remote = f"{job.bucket}/{job.key}"

    def filesystem() -> s3fs.S3FileSystem:
        return s3fs.S3FileSystem(
            key=os.environ["AWS_ACCESS_KEY_ID"],
            secret=os.environ["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        )

    return {
        "download-object": lambda: filesystem().get(remote, job.path),
        "download-tree": lambda: filesystem().get(remote + "/", job.path + "/", recursive=True),
        "upload-object": lambda: filesystem().put(job.path, remote),
    }[job.action]


def use_kserve_storage(job: Job) -> Work:
    """Return the transfer by KServe's storage initializer; its destination is a directory."""
    from kserve_storage import Storage  # type: ignore[import-not-found, unused-ignore]

    directory = job.path if job.action == "download-tree" else os.path.dirname(job.path)
    return lambda: Storage.download(job.uri, directory)


def use_storage(job: Job) -> Work:
    """Return the transfer by this library's facade."""
    from storage import S3Config, Storage

    if job.action == "download-url":
        return lambda: Storage.download(job.uri, job.path, digest=job.digest)
    config = S3Config(
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
    )
    if job.action == "upload-object":
        return lambda: Storage.upload(job.path, job.uri, config=config)
    return lambda: Storage.download(job.uri, job.path, config=config, digest=job.digest)


CLIENTS: dict[str, Callable[[Job], Work]] = {
    "boto3": use_boto3,
    "s3fs": use_s3fs,
    "kserve-storage": use_kserve_storage,
    "storage": use_storage,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("client", choices=sorted(CLIENTS))
    actions = ["download-object", "download-tree", "upload-object", "download-url"]
    parser.add_argument("action", choices=actions)
    parser.add_argument("uri")
    parser.add_argument("path")
    parser.add_argument("--digest")
    parser.add_argument("--timings", required=True)
    job = parser.parse_args()
    job.bucket, _, job.key = job.uri.partition("://")[2].partition("/")

    begin = time.perf_counter()
    work = CLIENTS[job.client](job)
    imported = time.perf_counter()
    work()
    done = time.perf_counter()
    with open(job.timings, "w") as stream:
        json.dump({"import": imported - begin, "transfer": done - imported}, stream)


if __name__ == "__main__":
    main()
