"""Where the archives of an Arkindex go: an S3, and URLs that are signed for it."""

from __future__ import annotations

from typing import Any

import boto3
from botocore.config import Config

from storage.backends import open_backend
from storage.backends.base import OpenOptions
from storage.config import S3Config
from storage.uri import parse_uri
from tests.servers.s3 import S3Server


class Store:
    """Where the archives of an Arkindex go, below a prefix of a bucket.

    Attributes:
        endpoint: for which URLs are signed.
        urls: those that were signed.
    """

    def __init__(self, server: S3Server, bucket: str, prefix: str) -> None:
        """Nothing is asked yet."""
        self.server, self.bucket, self.prefix = server, bucket, prefix
        self.endpoint = server.endpoint
        self.urls: list[str] = []
        self.signature = "s3v4"
        """With which URLs of parts are signed; ``s3`` is the older one."""

    def key(self, id: str) -> str:
        """Return the key of a version's archive."""
        return f"{self.prefix}/{id}.tar.zst"

    def sign(self, id: str) -> str:
        """Return a URL to put a version's archive to, signed by this library."""
        config = S3Config(
            access_key_id=self.server.access_key,
            secret_access_key=self.server.secret_key,
            endpoint_url=self.endpoint,
        )
        location = parse_uri(f"s3://{self.bucket}/{self.key(id)}")
        backend = open_backend(location, config, OpenOptions())
        self.urls.append(backend.sign(location.key, "PUT", 600))
        return self.urls[-1]

    def begin(self, id: str) -> str:
        """Begin an upload in parts; return its id."""
        made = self.server.raw.create_multipart_upload(Bucket=self.bucket, Key=self.key(id))
        return str(made["UploadId"])

    def sign_part(self, id: str, upload: str, number: int, md5: str | None) -> str:
        """Return a URL to put a part to, signed by boto3."""
        signer = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.server.access_key,
            aws_secret_access_key=self.server.secret_key,
            region_name=self.server.region,
            config=Config(signature_version=self.signature, s3={"addressing_style": "path"}),
        )
        part: dict[str, Any] = {"Bucket": self.bucket, "Key": self.key(id), "UploadId": upload}
        part |= {"PartNumber": number} | ({} if md5 is None else {"ContentMD5": md5})
        self.urls.append(signer.generate_presigned_url("upload_part", part, ExpiresIn=600))
        return self.urls[-1]

    def complete(self, id: str, upload: str, parts: list[dict[str, Any]]) -> None:
        """Put the parts together."""
        self.server.raw.complete_multipart_upload(
            Bucket=self.bucket,
            Key=self.key(id),
            UploadId=upload,
            MultipartUpload={"Parts": parts},
        )

    def abort(self, id: str, upload: str) -> None:
        """Forget the parts."""
        self.server.raw.abort_multipart_upload(
            Bucket=self.bucket, Key=self.key(id), UploadId=upload
        )

    def pending(self) -> list[str]:
        """Return the uploads in parts that were neither completed nor aborted."""
        uploads = self.server.pending_uploads(self.bucket)
        return [upload for key, upload in uploads if key.startswith(self.prefix)]

    def ids(self) -> list[str]:
        """Return the versions that have an archive."""
        keys = self.server.keys_raw(self.bucket, self.prefix)
        return [key.rpartition("/")[2].removesuffix(".tar.zst") for key in keys]

    def get(self, id: str) -> bytes | None:
        """Return a version's archive, if there is one."""
        if id not in self.ids():
            return None
        return self.server.get_raw(self.bucket, self.key(id))
