"""What every S3 server here offers: raw access by boto3, round the code under test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.servers.process import Server

REGION = "us-east-1"

_ARGUMENT_OF_HEADER = {
    "cache-control": "CacheControl",
    "content-disposition": "ContentDisposition",
    "content-encoding": "ContentEncoding",
    "content-md5": "ContentMD5",
    "content-type": "ContentType",
    "x-amz-checksum-crc32": "ChecksumCRC32",
    "x-amz-checksum-sha1": "ChecksumSHA1",
    "x-amz-checksum-sha256": "ChecksumSHA256",
    "x-amz-storage-class": "StorageClass",
}


class Keys(NamedTuple):
    """What a client signs with."""

    access_key: str
    secret_key: str


class S3Server(Server):
    """A server that speaks S3, with an administrator's access to it."""

    admin = Keys("AKIDEXAMPLE", "SECRETEXAMPLE")
    region = REGION

    @property
    def access_key(self) -> str:
        """The administrator's access key."""
        return self.admin.access_key

    @property
    def secret_key(self) -> str:
        """The administrator's secret key."""
        return self.admin.secret_key

    def client(self, keys: Keys | None = None, endpoint: str | None = None) -> Any:
        """Return a new boto3 client, with other keys or through a proxy's ``endpoint``."""
        import boto3
        from botocore.config import Config

        keys = keys or self.admin
        config = Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 3},
            proxies={},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto3.session.Session(
            aws_access_key_id=keys.access_key,
            aws_secret_access_key=keys.secret_key,
            region_name=self.region,
        ).client("s3", endpoint_url=endpoint or self.endpoint, config=config)

    @property
    def raw(self) -> Any:
        """The administrator's boto3 client, made on first use."""
        client: Any = self.__dict__.get("_raw")
        if client is None:
            client = self.__dict__["_raw"] = self.client()
        return client

    def stop(self) -> None:
        """Stop the server and forget its client."""
        client: Any = self.__dict__.pop("_raw", None)
        if client is not None:
            client.close()
        super().stop()

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        self.raw.create_bucket(Bucket=name)
        return name

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket and all that it holds."""
        self.empty_bucket(name)
        self.raw.delete_bucket(Bucket=name)

    def empty_bucket(self, name: str) -> None:
        """Delete all that a bucket holds: objects, versions, unfinished uploads."""
        for key, upload in self.pending_uploads(name):
            self.raw.abort_multipart_upload(Bucket=name, Key=key, UploadId=upload)
        # Always the first page: moto loses its place when what it named last is deleted.
        while True:
            page = self.raw.list_object_versions(Bucket=name)
            doomed = [
                {"Key": entry["Key"], "VersionId": entry["VersionId"]}
                for entry in (*page.get("Versions", ()), *page.get("DeleteMarkers", ()))
            ]
            if not doomed:
                return
            answer = self.raw.delete_objects(Bucket=name, Delete={"Objects": doomed, "Quiet": True})
            assert not answer.get("Errors"), answer["Errors"][:3]

    @contextlib.contextmanager
    def bucket(self, name: str) -> Iterator[str]:
        """Create a bucket, and delete it with all that it holds at the end."""
        self.create_bucket(name)
        try:
            yield name
        finally:
            self.delete_bucket(name)

    def put_raw(
        self, bucket: str, key: str, data: bytes, headers: Mapping[str, str] | None = None
    ) -> str:
        """Store an object and return its ETag, quotes included.

        ``headers`` are those of the PUT request: ``Content-Type``, ``x-amz-meta-…``, …
        """
        arguments: dict[str, Any] = {}
        for name, value in (headers or {}).items():
            lower = name.lower()
            if lower.startswith("x-amz-meta-"):
                arguments.setdefault("Metadata", {})[lower.removeprefix("x-amz-meta-")] = value
            else:
                arguments[_ARGUMENT_OF_HEADER[lower]] = value
        answer = self.raw.put_object(Bucket=bucket, Key=key, Body=data, **arguments)
        return str(answer["ETag"])

    def get_raw(self, bucket: str, key: str) -> bytes:
        """Return an object's bytes."""
        data = self.raw.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert isinstance(data, bytes)
        return data

    def head_raw(self, bucket: str, key: str) -> dict[str, Any]:
        """Return what boto3 says about an object."""
        return dict(self.raw.head_object(Bucket=bucket, Key=key))

    def delete_raw(self, bucket: str, key: str) -> None:
        """Delete one object."""
        self.raw.delete_object(Bucket=bucket, Key=key)

    def keys_raw(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys that start with ``prefix``, sorted."""
        pages = self.raw.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", ()))

    def pending_uploads(self, bucket: str) -> list[tuple[str, str]]:
        """Return key and id of every multipart upload that was neither completed nor aborted."""
        pages = self.raw.get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
        return [
            (upload["Key"], upload["UploadId"])
            for page in pages
            for upload in page.get("Uploads", ())
        ]
