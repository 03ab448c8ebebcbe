"""What the tests of KServe's initializer share: variables that lead to a store, files, runs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from storage.config.base import ConfigModel
from storage.integrations.kserve.authorities import Authorities
from storage.integrations.kserve.environment import Environment
from storage.integrations.kserve.placing import Place
from storage.uri import parse_uri
from tests.servers import S3Server

REPOSITORY = Path(__file__).parents[3]
MODEL = {"config.json": b"{}", "weights/part-1.bin": bytes(range(256)) * 40, "empty": b""}
V1 = {"model.bin": b"1", "config.json": b"1", "old/a": b"1", "old/b": b"1"}
V2 = {"model.bin": b"2", "config.json": b"22", "new/a": b"2"}
# What keeps clients from looking for a cloud around them.
_ALWAYS = ("PATH", "TMPDIR", "AWS_EC2_METADATA_DISABLED", "NO_GCE_CHECK", "STORAGE_CACHE_DIR")


class Run(NamedTuple):
    """How a run ended."""

    status: int
    out: str
    err: str


def variables_of(server: S3Server) -> dict[str, str]:
    """Return what KServe's webhook sets for a secret of S3."""
    return {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_DEFAULT_REGION": server.region,
        "S3_ENDPOINT": server.endpoint.partition("://")[2],
        "S3_USE_HTTPS": "0",
    }


def put_all(server: S3Server, bucket: str, prefix: str, files: Mapping[str, bytes]) -> str:
    """Put files below a prefix of a bucket and return the URI of that."""
    for path, content in files.items():
        server.put_raw(bucket, f"{prefix}/{path}", content)
    return f"s3://{bucket}/{prefix}"


def command(*arguments: str) -> list[str]:
    """Return the command line of the initializer."""
    return [sys.executable, "-m", "storage.integrations.kserve", *arguments]


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a child that sees none of a user's."""
    kept = {name: os.environ[name] for name in _ALWAYS if name in os.environ}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", **variables}


def initialize(*arguments: str, variables: Mapping[str, str] | None = None) -> Run:
    """Run the initializer in a process of its own."""
    ended = subprocess.run(
        command(*arguments),
        env=child_environment(variables or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Run(ended.returncode, ended.stdout, ended.stderr)


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, links followed, hidden ones included."""
    found = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            path = Path(root, name)
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def tar(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    """Return a tar archive."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as archive:  # type: ignore[call-overload]
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def configs_for(uri: str, variables: Mapping[str, str]) -> list[ConfigModel | None]:
    """Return the configs that are tried for ``uri``, in their order."""
    environment = Environment(variables)
    with Authorities(environment) as authorities:
        return list(environment.configs(parse_uri(uri), authorities))


def config_for(uri: str, variables: Mapping[str, str]) -> ConfigModel | None:
    """Return the config that is tried first."""
    return configs_for(uri, variables)[0]


def put(
    folder: Path, source: str, files: Mapping[str, bytes], *, beside: tuple[str, ...] = ()
) -> None:
    """Bring files of a source to a folder."""
    with Place(str(folder), source, beside=beside) as place:
        fill(place, files)
        place.publish(f"plan of {sorted(files)}")


def fill(place: Place, files: Mapping[str, bytes]) -> None:
    """Let files have arrived at a place."""
    os.mkdir(place.content)
    for path, content in files.items():
        target = Path(place.content, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def public_key() -> bytes:
    """Return a key in PEM that has signed nothing."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return (
        Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
