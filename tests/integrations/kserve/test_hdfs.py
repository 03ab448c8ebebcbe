"""HDFS by KServe's secret, at a server that speaks WebHDFS's read operations.

There is no HDFS to be had on one machine without Java; the protocol is in Hadoop's documentation,
"WebHDFS REST API". Kerberos is not tested.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from storage.config import FsspecConfig, reveal
from storage.errors import ConfigurationError, InvalidInput, ModelMissingError, StorageError
from storage.integrations.kserve import Storage
from storage.integrations.kserve.environment import Environment
from storage.integrations.kserve.hdfs import hdfs_source
from tests.integrations.kserve.support import MODEL, tar, tree
from tests.servers import OddHTTP, Reply, Request, free_port


class NameNode:
    """Answers for a tree of files; ``OPEN`` redirects to a data node, as HDFS does."""

    def __init__(self, files: Mapping[str, bytes], data_node: str) -> None:
        self._files = files
        self._data_node = data_node

    def __call__(self, request: Request) -> Reply:
        parts = urlsplit(request.target)
        path = unquote(parts.path).removeprefix("/webhdfs/v1").rstrip("/")
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        below = [name for name in self._files if name.startswith(f"{path}/")]
        if path not in self._files and not below:
            return self._problem(404, "FileNotFoundException", f"File does not exist: {path}")
        if asked["op"] == "GETFILESTATUS":
            return self._json({"FileStatus": self._status(path, "")})
        if asked["op"] == "LISTSTATUS":
            names = {name.removeprefix(f"{path}/").partition("/")[0] for name in below}
            listed = [self._status(f"{path}/{name}", name) for name in sorted(names)]
            return self._json({"FileStatuses": {"FileStatus": listed}})
        assert asked["op"] == "OPEN", asked
        start = int(asked.get("offset", "0"))
        end = start + int(asked["length"]) if "length" in asked else len(self._files[path])
        location = f"{self._data_node}{parts.path}?from={start}&to={end}"
        return Reply(307, b"", {"Location": location})

    def read(self, request: Request) -> Reply:
        """Answer as the data node."""
        parts = urlsplit(request.target)
        path = unquote(parts.path).removeprefix("/webhdfs/v1")
        asked = parse_qs(parts.query)
        start, end = int(asked["from"][0]), int(asked["to"][0])
        kind = {"Content-Type": "application/octet-stream"}
        return Reply(200, self._files[path][start:end], kind)

    def _status(self, path: str, suffix: str) -> dict[str, Any]:
        content = self._files.get(path)
        return {
            "pathSuffix": suffix,
            "type": "DIRECTORY" if content is None else "FILE",
            "length": len(content or b""),
            "modificationTime": 1_700_000_000_000,
            "owner": "models",
            "group": "models",
            "permission": "755",
        }

    def _json(self, document: object, status: int = 200) -> Reply:
        headers = {"Content-Type": "application/json"}
        return Reply(status, json.dumps(document).encode(), headers)

    def _problem(self, status: int, kind: str, message: str) -> Reply:
        return self._json({"RemoteException": {"exception": kind, "message": message}}, status)


@pytest.fixture
def cluster() -> Iterator[tuple[OddHTTP, OddHTTP]]:
    """A name node and a data node."""
    files = {f"/user/me/model/{path}": content for path, content in MODEL.items()}
    files["/user/me/archive/m.tar.gz"] = tar(MODEL)
    with OddHTTP(lambda request: Reply(500), "localhost") as data:
        node = NameNode(files, data.url)
        data.handler = node.read
        with OddHTTP(node) as name:
            yield name, data


@pytest.fixture
def secret(
    cluster: tuple[OddHTTP, OddHTTP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of KServe's secret."""
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "HDFS_NAMENODE").write_text(f"{cluster[0].url}\n")
    monkeypatch.setenv("HDFS_SECRET_DIR", str(folder))
    return folder


@pytest.mark.usefixtures("secret")
@pytest.mark.parametrize("scheme", ["hdfs", "webhdfs"])
def test_a_tree_and_a_file(scheme: str, tmp_path: Path) -> None:
    Storage.download(f"{scheme}://user/me/model", str(tmp_path / "a"))
    Storage.download(f"{scheme}://user/me/model/config.json", str(tmp_path / "b"))
    Storage.download(f"{scheme}://user/me/archive/m.tar.gz", str(tmp_path / "c"))

    assert tree(tmp_path / "a") == tree(tmp_path / "c") == MODEL
    assert tree(tmp_path / "b") == {"config.json": b"{}"}


@pytest.mark.usefixtures("secret")
def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match="nothing"):
        Storage.download("hdfs://user/me/nothing", str(tmp_path / "a"))
    assert tree(tmp_path / "a") == {}


def test_the_name_node_that_answers_is_asked(
    secret: Path, cluster: tuple[OddHTTP, OddHTTP], tmp_path: Path
) -> None:
    def standby(request: Request) -> Reply:
        problem = {"exception": "StandbyException", "message": "not supported in state standby"}
        return Reply(403, json.dumps({"RemoteException": problem}).encode())

    with OddHTTP(standby) as other:
        gone = f"http://127.0.0.1:{free_port()}"
        (secret / "HDFS_NAMENODE").write_text(f"{other.url};{cluster[0].url};{gone}")
        Storage.download("hdfs://user/me/model", str(tmp_path / "a"))
        assert tree(tmp_path / "a") == MODEL
        (secret / "HDFS_NAMENODE").write_text(other.url)
        with pytest.raises(StorageError, match="standby"):
            Storage.download("hdfs://user/me/model", str(tmp_path / "b"))


def test_user_and_headers_go_to_the_name_node_alone(
    secret: Path, cluster: tuple[OddHTTP, OddHTTP], tmp_path: Path
) -> None:
    (secret / "USER_PROXY").write_text("somebody\n")
    (secret / "HDFS_ROOTPATH").write_text("/user/me\n")
    (secret / "HEADERS").write_text('{"X-Gateway": "secret-of-the-gateway"}')

    Storage.download("hdfs://model", str(tmp_path / "a"))

    name, data = cluster
    assert tree(tmp_path / "a") == MODEL
    assert {request.headers.get("X-Gateway") for request in name.requests} == {
        "secret-of-the-gateway"
    }
    assert all("doas=somebody" in request.target for request in name.requests)
    assert data.requests
    assert {request.headers.get("X-Gateway") for request in data.requests} == {None}


def _source(uri: str, variables: Mapping[str, str], held: ExitStack) -> tuple[str, dict[str, Any]]:
    found = hdfs_source(uri, Environment(variables), held)
    assert found is not None
    first = found[1][0]
    assert isinstance(first, FsspecConfig)
    return found[0], reveal(first.options)


def test_the_options_of_a_secured_cluster(tmp_path: Path) -> None:
    texts = {
        "HDFS_NAMENODE": "https://one.example:9999;https://two.example:9999",
        "HDFS_ROOTPATH": "/models/",
        "KERBEROS_PRINCIPAL": "me@EXAMPLE",
        "TLS_SKIP_VERIFY": "false",
    }
    for name, text in {**texts, "TLS_CERT": "c", "TLS_KEY": "k", "TLS_CA": "a"}.items():
        (tmp_path / name).write_text(text)
    with ExitStack() as held:
        uri, options = _source("hdfs://iris/v1", {"HDFS_SECRET_DIR": str(tmp_path)}, held)

    assert uri == "webhdfs://one.example:9999/models/iris/v1"
    assert options == {
        "host": "one.example",
        "port": 9999,
        "use_https": True,
        "session_cert": (str(tmp_path / "TLS_CERT"), str(tmp_path / "TLS_KEY")),
        "session_verify": str(tmp_path / "TLS_CA"),
        "kerberos": True,
        "kerb_kwargs": {"principal": "me@EXAMPLE"},
    }
    (tmp_path / "TLS_SKIP_VERIFY").write_text("True\n")
    with ExitStack() as held:
        _, options = _source("hdfs://iris/v1", {"HDFS_SECRET_DIR": str(tmp_path)}, held)
    assert options["session_verify"] is False


def test_keys_of_storage_config_are_in_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    stored = {
        "type": "webhdfs",
        "HDFS_NAMENODE": "https://one.example",
        "TLS_CERT": base64.b64encode(b"a certificate").decode(),
    }
    with ExitStack() as held:
        uri, options = _source("hdfs://iris", {"STORAGE_CONFIG": json.dumps(stored)}, held)
        assert uri == "webhdfs://one.example:9871/iris"
        assert Path(options["session_cert"]).read_bytes() == b"a certificate"
    # Other threads may have taken its number.
    left = os.path.islink(options["session_cert"]) and os.readlink(options["session_cert"])
    assert "tls_cert" not in str(left), "the file in memory is left"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("HDFS_NAMENODE", "", "there is no secret|HDFS_NAMENODE"),
        ("HDFS_NAMENODE", "ftp://one", "HDFS_NAMENODE"),
        ("HEADERS", "X: hidden-value", "HEADERS"),
        ("HEADERS", '["hidden-value"]', "HEADERS"),
    ],
)
def test_a_secret_that_is_unusable_is_said_without_its_values(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "HDFS_NAMENODE").write_text("http://one.example")
    (tmp_path / name).write_text(text)
    with (
        ExitStack() as held,
        pytest.raises(ConfigurationError, match=said) as caught,
    ):
        _source("hdfs://iris", {"HDFS_SECRET_DIR": str(tmp_path)}, held)
    assert "hidden-value" not in str(caught.value)


def test_no_secret_and_no_path(tmp_path: Path) -> None:
    variables = {"HDFS_SECRET_DIR": str(tmp_path)}
    with ExitStack() as held:
        with pytest.raises(ConfigurationError, match="no secret"):
            _source("hdfs://iris", variables, held)
        (tmp_path / "HDFS_NAMENODE").write_text("http://one.example")
        with pytest.raises(InvalidInput, match="path"):
            _source("hdfs://", variables, held)
        assert hdfs_source("s3://bucket/x", Environment(variables), held) is None
