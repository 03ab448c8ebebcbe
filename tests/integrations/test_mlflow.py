"""The real MLflow keeps its artifacts by this library, on real servers and in folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from tests.facade.stores import (
    S3Store,
    Store,
    tree_bytes,
)
from tests.integrations.mlflow_support import (
    GROUP,
    MLFLOW,
    PROJECT,
    SIDE,
    MlflowServer,
    Surroundings,
    surroundings,
)
from tests.integrations.test_scratch import leave
from tests.peers.environments import Peer, PeerError, running
from tests.servers import SeaweedFS
from tests.servers.process import ServerError

CLASS = "storage.integrations.mlflow.ModelStorageArtifactRepository"
STORES = ["file", "pvc", "s3", "gs", "azure", "hub"]
on_every_store = pytest.mark.parametrize("store", STORES, indirect=True)
# One whose objects have digests beside them, and a folder.
on_two_stores = pytest.mark.parametrize("store", ["file", "s3"], indirect=True)

ENCODED = "a b/100%41+[1].bin"
FOLDER = {
    "a b/ü 模型.txt": b"odd names",
    ENCODED: bytes(range(256)) * 40,
    "deep/er/still/weights.bin": b"w" * 300_000,
    "empty": b"",
}


class Run(NamedTuple):
    """A run that was logged, and where its artifacts are."""

    id: str
    uri: str
    below: str
    """Path of its artifacts in the store."""


@pytest.fixture(scope="session")
def around(
    tmp_path_factory: pytest.TempPathFactory,
    seaweedfs: SeaweedFS,
    store_settings: dict[str, dict[str, str]],
) -> Surroundings:
    """This library as an installed package, and the servers in its settings."""
    try:
        MLFLOW.python()
    except ServerError as exc:
        pytest.fail(f"{MLFLOW.requirement} cannot be installed: {exc}", pytrace=False)
    s3 = {"access_key_id": seaweedfs.access_key, "endpoint_url": seaweedfs.endpoint}
    good = s3 | {"secret_access_key": seaweedfs.secret_key}
    stores = {
        "s3": {"prefix": "s3://shared/", **good},
        "absent": {"prefix": "s3://no-such-bucket/", **good},
        "refused": {"prefix": "s3://shared/refused", "secret_access_key": "not this one", **s3},
    } | store_settings
    return surroundings(tmp_path_factory.mktemp("around"), stores)


@pytest.fixture(scope="session")
def mlflow(around: Surroundings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A process with MLflow."""
    with running(MLFLOW, SIDE, tmp_path_factory.mktemp("mlflow")) as peer:
        version = peer("prepare", path=around.path, environment=around.environment)
        assert f"mlflow-skinny=={version}" == MLFLOW.requirement
        yield peer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with odd names, and an empty folder in it."""
    found = tmp_path / "logged"
    for path, data in FOLDER.items():
        (found / path).parent.mkdir(parents=True, exist_ok=True)
        (found / path).write_bytes(data)
    (found / "nothing").mkdir()
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder, for downloads."""
    found = tmp_path / "out"
    found.mkdir()
    return found


@pytest.fixture
def logged(mlflow: Peer, store: Store, folder: Path, tmp_path: Path) -> Run:
    """A run with parameters, files and a folder."""
    single = tmp_path / "a file.bin"
    single.write_bytes(b"single")
    root = f"modelstorage-{store.base}"
    found = mlflow(
        "run",
        root=root,
        params={"depth": "3"},
        texts={"notes/übersicht.md": "# Notes\n"},
        files={str(single): "", os.fspath(folder / "empty"): "files"},
        folder=folder,
    )
    below = f"{found['run']}/artifacts"
    assert found["uri"].endswith(f"/{below}")
    return Run(found["run"], found["uri"], below)


EXPECTED = {
    "a file.bin": b"single",
    "files/empty": b"",
    "notes/übersicht.md": b"# Notes\n",
    **{f"folder/{path}": data for path, data in FOLDER.items()},
}


def listed(mlflow: Peer, run: Run, path: str | None = None) -> dict[str, tuple[bool, int | None]]:
    """Return all that MLflow lists of a run, at any depth."""
    found = {}
    for name, is_folder, size in mlflow(
        "client", method="list_artifacts", arguments={"run_id": run.id, "path": path}
    ):
        found[name] = (is_folder, size)
        if is_folder:
            found |= listed(mlflow, run, name)
    return found


def keys_of(store: Store) -> list[str]:
    return store.keys()


def download(mlflow: Peer, **arguments: Any) -> Path:
    return Path(mlflow("download", arguments=arguments))


# -- a run -----------------------------------------------------------------------------------


@on_every_store
def test_a_run_is_stored_listed_and_brought_back(
    mlflow: Peer, store: Store, logged: Run, out: Path
) -> None:
    stored = {key: store.get_raw(key) for key in keys_of(store)}
    assert stored == {f"{logged.below}/{path}": data for path, data in EXPECTED.items()}

    found = listed(mlflow, logged)
    files = {path: size for path, (is_folder, size) in found.items() if not is_folder}
    assert files == {path: len(data) for path, data in EXPECTED.items()}
    folders = {path for path, (is_folder, _) in found.items() if is_folder}
    assert folders == {
        path[:index] for path in EXPECTED for index, char in enumerate(path) if char == "/"
    }

    whole = download(mlflow, run_id=logged.id, artifact_path="", dst_path=str(out))
    assert whole.samefile(out)
    assert tree_bytes(out) == EXPECTED
    elsewhere = download(mlflow, artifact_uri=f"runs:/{logged.id}/folder/a b")
    assert tree_bytes(elsewhere) == {
        path.removeprefix("a b/"): data for path, data in FOLDER.items() if path[:4] == "a b/"
    }
    direct = download(mlflow, artifact_uri=f"{logged.uri}/folder/a b/ü 模型.txt")
    assert direct.read_bytes() == FOLDER["a b/ü 模型.txt"]


@on_every_store
def test_what_is_deleted_is_gone_and_nothing_else(mlflow: Peer, store: Store, logged: Run) -> None:
    # Its name begins like the other's.
    mlflow("repository", uri=logged.uri, method="log_artifact", arguments=[__file__, "folder-2"])
    expected = {*EXPECTED, f"folder-2/{Path(__file__).name}"}
    for doomed in ("notes/übersicht.md", "folder/a b", "folder", "never there"):
        mlflow("repository", uri=logged.uri, method="delete_artifacts", arguments=[doomed])
        expected = {
            path for path in expected if path != doomed and not path.startswith(f"{doomed}/")
        }
        assert {key.removeprefix(f"{logged.below}/") for key in keys_of(store)} == expected
    assert {path for path, found in listed(mlflow, logged).items() if not found[0]} == expected
    for _ in range(2):
        mlflow("repository", uri=logged.uri, method="delete_artifacts")
        assert store.keys() == []
        assert listed(mlflow, logged) == {}


@on_every_store
def test_a_model_is_logged_registered_and_loaded(
    mlflow: Peer, store: Store, logged: Run, tmp_path: Path, prefix: str
) -> None:
    offset = tmp_path / "offset.txt"
    offset.write_text("7")
    model = mlflow("log_model", run=logged.id, name=prefix, weight=3, file=offset)
    assert model["artifacts"].startswith("modelstorage-")
    assert any(key.endswith("/MLmodel") for key in keys_of(store))
    for uri in (model["uri"], f"models:/{prefix}/1", f"runs:/{logged.id}/model"):
        assert mlflow("predict", uri=uri, numbers=[1, 2]) == [10, 13]
    fetched = download(mlflow, artifact_uri=f"models:/{prefix}/1")
    assert {"MLmodel", "artifacts/offset.txt"} <= tree_bytes(fetched).keys()


@on_two_stores
def test_many_threads_log_at_once(mlflow: Peer, store: Store, tmp_path: Path) -> None:
    names = [f"{number}.bin" for number in range(40)]
    for name in names:
        (tmp_path / name).write_text(name * 100)
    files = [(str(tmp_path / name), f"folder {index % 3}") for index, name in enumerate(names)]
    uri = f"modelstorage-{store.base}"
    mlflow("log_in_threads", uri=uri, files=files)
    stored = {key: store.get_raw(key).decode() for key in keys_of(store)}
    assert stored == {f"{place}/{Path(file).name}": Path(file).name * 100 for file, place in files}


@on_two_stores
def test_a_trace_is_kept(mlflow: Peer, store: Store) -> None:
    uri = f"modelstorage-{store.base}/trace"
    with pytest.raises(PeerError, match=r"^MlflowTraceDataNotFound: NOT_FOUND"):
        mlflow("repository", uri=uri, method="download_trace_data")
    mlflow("repository", uri=uri, method="upload_trace_data", arguments=['{"spans": []}'])
    assert mlflow("repository", uri=uri, method="download_trace_data") == {"spans": []}


def test_artifacts_in_memory_are_those_of_the_process(
    mlflow: Peer, folder: Path, out: Path, prefix: str
) -> None:
    uri = f"modelstorage-memory://name/{prefix}"
    mlflow("repository", uri=uri, method="log_artifacts", arguments=[str(folder), "logged"])
    assert mlflow("repository", uri=uri, method="list_artifacts") == [["logged", True, None]]
    mlflow("repository", uri=uri, method="download_artifacts", arguments=["", str(out)])
    assert tree_bytes(out / "logged") == FOLDER


# -- downloads -------------------------------------------------------------------------------


@on_two_stores
def test_other_files_of_the_destination_stay(
    mlflow: Peer, store: Store, logged: Run, out: Path
) -> None:
    mine = {"mine": b"1", "folder/mine": b"2", "folder/a b/mine": b"3"}
    for path, data in (mine | {"folder/empty": b"older"}).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(data)
    # Other than what a killed download left.
    leave(out)
    for path in ("folder", "a file.bin", ""):
        download(mlflow, run_id=logged.id, artifact_path=path, dst_path=str(out))
    assert tree_bytes(out) == EXPECTED | mine


@on_two_stores
def test_a_download_is_the_callers_own(mlflow: Peer, store: Store, logged: Run, out: Path) -> None:
    first = download(mlflow, artifact_uri=f"runs:/{logged.id}/folder")
    (first / "empty").write_bytes(b"changed")
    second = download(mlflow, artifact_uri=f"runs:/{logged.id}/folder")
    assert tree_bytes(second) == FOLDER
    assert store.get_raw(f"{logged.below}/folder/empty") == b""


@pytest.mark.parametrize("store", ["s3"], indirect=True)
@pytest.mark.parametrize("path", ["folder", "folder/empty", ""])
def test_what_is_not_what_was_stored_is_not_handed_over(
    mlflow: Peer, store: Store, logged: Run, out: Path, path: str
) -> None:
    store.put_described(f"{logged.below}/folder/empty", b"tampered", {"sha256": "0" * 64})
    with pytest.raises(PeerError, match=r"^MlflowException: DATA_LOSS: "):
        mlflow(
            "repository",
            uri=logged.uri,
            method="download_artifacts",
            arguments=[path, str(out)],
        )
    assert tree_bytes(out) == {}


# -- errors ----------------------------------------------------------------------------------


@on_every_store
def test_what_is_missing_is_said_to_be(mlflow: Peer, store: Store, logged: Run, out: Path) -> None:
    for path in ("nothing", "fold", "folder/a b/nothing"):
        with pytest.raises(PeerError, match=r"^MlflowException: RESOURCE_DOES_NOT_EXIST: "):
            download(mlflow, run_id=logged.id, artifact_path=path, dst_path=str(out))
        assert listed(mlflow, logged, path) == {}
    assert tree_bytes(out) == {}
    assert listed(mlflow, logged, "a file.bin") == {}


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("modelstorage-s3://no-such-bucket/a", "RESOURCE_DOES_NOT_EXIST"),
        ("modelstorage-s3://shared/refused/a", "PERMISSION_DENIED"),
    ],
)
def test_a_store_that_refuses_is_an_error(
    mlflow: Peer, shared_bucket: str, seaweedfs: SeaweedFS, uri: str, code: str
) -> None:
    for method, arguments in {
        "list_artifacts": [],
        "delete_artifacts": [],
        "download_artifacts": ["a"],
        "log_artifact": [__file__],
    }.items():
        with pytest.raises(PeerError, match=rf"^MlflowException: {code}: ") as caught:
            mlflow("repository", uri=uri, method=method, arguments=arguments)
        assert "not this one" not in str(caught.value)


@on_two_stores
@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc", ".."])
def test_no_path_leaves_the_root(
    mlflow: Peer, store: Store, out: Path, path: str, folder: Path
) -> None:
    store.put_raw("secret", b"mine")
    uri = f"modelstorage-{store.base}/root"
    for method, arguments in (
        ("list_artifacts", [path]),
        ("download_artifacts", [path, str(out)]),
        ("_download_file", [path, str(out / "x")]),
        ("delete_artifacts", [path]),
        ("log_artifact", [__file__, path]),
        ("log_artifacts", [str(folder), path]),
    ):
        with pytest.raises(PeerError, match=r"^MlflowException: (INVALID_PARAMETER|.*[Ii]nvalid)"):
            mlflow("repository", uri=uri, method=method, arguments=arguments)
    assert store.keys() == ["secret"]
    assert store.get_raw("secret") == b"mine"
    assert tree_bytes(out) == {}


@pytest.mark.parametrize(
    "uri",
    [
        "modelstorage-s3://bucket/a?b=c",
        "modelstorage-s3://bucket/a#b",
        "modelstorage-s3:///a",
        "modelstorage-pvc://claim/../other",
    ],
)
def test_a_root_that_mlflow_would_spoil_is_refused(mlflow: Peer, uri: str) -> None:
    with pytest.raises(PeerError, match=r"^MlflowException: INVALID_PARAMETER_VALUE: "):
        mlflow("class_for", uri=uri)


@pytest.mark.parametrize(
    ("root", "name"),
    [
        ("hf://gpt2", "model.bin"),
        ("s3://shared/x", "model?versionId=1"),
        ("s3://shared/x", "model#sha256=" + "0" * 64),
    ],
)
def test_a_name_that_means_something_else_is_refused(
    mlflow: Peer, tmp_path: Path, root: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for method, argument in (
        ("log_artifact", str(tmp_path / name)),
        ("download_artifacts", name),
        ("delete_artifacts", name),
    ):
        with pytest.raises(PeerError, match=r"^MlflowException: INVALID_PARAMETER_VALUE: .*below"):
            mlflow("repository", uri=f"modelstorage-{root}", method=method, arguments=[argument])


def test_a_password_of_a_uri_is_in_no_message(mlflow: Peer) -> None:
    uri = "modelstorage-sftp://user:a-secret-word@host/place"
    assert "@host/place" in mlflow("repository", uri=uri, method="__repr__")
    assert "a-secret-word" not in mlflow("repository", uri=uri, method="__repr__")
    for wrong in (f"{uri}?a", f"{uri}/../a", f"{uri}#a"):
        with pytest.raises(PeerError, match="INVALID_PARAMETER_VALUE") as caught:
            mlflow("class_for", uri=wrong)
        assert "a-secret-word" not in str(caught.value)


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_an_artifact_that_is_logged_onto_itself_stays(
    mlflow: Peer, store: Store, logged: Run, tmp_path: Path
) -> None:
    root = tmp_path / "the store" / logged.below
    for method, arguments in (
        ("log_artifact", [str(root / "folder" / "empty"), "folder"]),
        ("log_artifact", [str(root / "a file.bin")]),
        ("log_artifacts", [str(root / "folder"), "folder"]),
        ("log_artifacts", [str(root)]),
    ):
        mlflow("repository", uri=logged.uri, method=method, arguments=arguments)
        assert tree_bytes(root) == EXPECTED


@pytest.mark.parametrize("store", ["file"], indirect=True)
def test_destinations_are_those_of_mlflow(
    mlflow: Peer, store: Store, logged: Run, tmp_path: Path
) -> None:
    for path, code in ((tmp_path / "none", "RESOURCE_DOES_NOT_EXIST"), (__file__, "INVALID_PARA")):
        with pytest.raises(PeerError, match=rf"^MlflowException: {code}"):
            mlflow(
                "repository",
                uri=logged.uri,
                method="download_artifacts",
                arguments=["folder", str(path)],
            )


@on_two_stores
def test_a_folder_without_a_file_stores_nothing(mlflow: Peer, store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty" / "er").mkdir(parents=True)
    uri = f"modelstorage-{store.base}"
    arguments: Callable[[str], list[str]] = lambda name: [str(tmp_path / name), "x"]  # noqa: E731
    mlflow("repository", uri=uri, method="log_artifacts", arguments=arguments("empty"))
    assert store.keys() == []
    with pytest.raises(PeerError, match=r"^MlflowException: INVALID_PARAMETER_VALUE: "):
        mlflow("repository", uri=uri, method="log_artifacts", arguments=arguments("missing"))


# -- MLflow's own command --------------------------------------------------------------------


@on_two_stores
def test_the_command_of_mlflow_works(
    mlflow: Peer, around: Surroundings, store: Store, logged: Run, out: Path
) -> None:
    # It imports what the server is made of.
    mlflow("command", arguments=["artifacts", "download", "-r", logged.id, "-d", str(out)])
    assert tree_bytes(out) == EXPECTED
    mlflow("command", arguments=["artifacts", "log-artifact", "-r", logged.id, "-l", __file__])
    assert f"{logged.below}/{Path(__file__).name}" in keys_of(store)
    mlflow("client", method="delete_run", arguments={"run_id": logged.id})
    database = around.environment["MLFLOW_TRACKING_URI"]
    gc = ["gc", "--backend-store-uri", database, "--run-ids", logged.id]
    mlflow("command", arguments=gc)
    assert store.keys() == []


def test_the_application_of_a_server_is_known_without_its_command(mlflow: Peer) -> None:
    with pytest.raises(PeerError, match=r"INVALID_PARAMETER_VALUE: .*only below its own"):
        mlflow("in_application", uri="modelstorage-file:///etc")
    assert "s3://bucket/a" in mlflow("in_application", uri="modelstorage-s3://bucket/a")


# -- entry points ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECT["entry-points"][GROUP])
def test_mlflow_finds_the_repository_of_each_scheme(mlflow: Peer, name: str) -> None:
    place = {"file": "/tmp/x", "hf": "owner/name"}.get(name.partition("-")[2], "place/x")
    assert mlflow("class_for", uri=f"{name}://{place}") == CLASS


# -- a server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(
    around: Surroundings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """A tracking server that keeps what it is sent in a bucket, and is at home in a folder."""
    home = tmp_path_factory.mktemp("home of the server")
    with MlflowServer(around, f"modelstorage-s3://shared/{uuid4().hex}", home) as started:
        yield started


@pytest.fixture
def served(mlflow: Peer, around: Surroundings, server: MlflowServer) -> Iterator[MlflowServer]:
    """The server, with ``mlflow`` as its client."""
    mlflow("track", uri=server.endpoint)
    yield server
    mlflow("track", uri=around.environment["MLFLOW_TRACKING_URI"])


@pytest.fixture
def kept(server: MlflowServer, seaweedfs: SeaweedFS, shared_bucket: str) -> Store:
    """What the server keeps."""
    prefix = server.destination.rpartition("/")[2]
    return S3Store("s3", seaweedfs, "", shared_bucket, prefix, None)


@pytest.mark.slow
def test_a_server_keeps_what_its_clients_log(
    mlflow: Peer, served: MlflowServer, kept: Store, folder: Path, tmp_path: Path, prefix: str
) -> None:
    (folder / ENCODED).unlink()  # the server of MLflow decodes what it is asked for
    found = mlflow(
        "run",
        root="mlflow-artifacts:/proxied",
        params={"depth": "3"},
        texts={"notes/übersicht.md": "# Notes\n"},
        files={},
        folder=folder,
    )
    run = Run(found["run"], found["uri"], f"proxied/{found['run']}/artifacts")
    expected = {
        path: data
        for path, data in EXPECTED.items()
        if path.startswith(("folder/", "notes/")) and not path.endswith(ENCODED)
    }
    stored = {key: kept.get_raw(key) for key in keys_of(kept)}
    assert stored == {f"{run.below}/{path}": data for path, data in expected.items()}
    files = {path: size for path, (is_folder, size) in listed(mlflow, run).items() if not is_folder}
    # The server does not tell a size of nothing.
    assert files == {path: len(data) or None for path, data in expected.items()}
    assert tree_bytes(download(mlflow, run_id=run.id, artifact_path="")) == expected

    offset = tmp_path / "offset.txt"
    offset.write_text("7")
    model = mlflow("log_model", run=run.id, name=prefix, weight=3, file=offset)
    for uri in (model["uri"], f"models:/{prefix}/1"):
        assert mlflow("predict", uri=uri, numbers=[1, 2]) == [10, 13]
    with pytest.raises(PeerError, match=r"^MlflowException: RESOURCE_DOES_NOT_EXIST: "):
        download(mlflow, run_id=run.id, artifact_path="nothing")
    mlflow("repository", uri=run.uri, method="delete_artifacts", arguments=["folder"])
    assert set(listed(mlflow, run)) == {"notes", "notes/übersicht.md"}


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_clients_of_a_server_reach_the_store_themselves(
    mlflow: Peer, served: MlflowServer, store: Store, logged: Run, tmp_path: Path, prefix: str
) -> None:
    assert {f"{logged.below}/{path}" for path in EXPECTED} == set(store.keys())
    offset = tmp_path / "offset.txt"
    offset.write_text("7")
    # The server judges the URI of the model before it registers it.
    mlflow("log_model", run=logged.id, name=prefix, weight=3, file=offset)
    assert mlflow("predict", uri=f"models:/{prefix}/1", numbers=[1, 2]) == [10, 13]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("file://{home}/root", True),
        ("file://{home}/root/sub", True),
        ("s3://shared/{elsewhere}", True),
        ("file://{home}", False),
        ("file://{home}/roo", False),
        ("file:///etc", False),
        ("pvc://claim/sub", False),
        ("memory://name/sub", False),
        ("sftp://{host}/sub", False),
        ("webdav://{host}/sub", False),
    ],
)
def test_clients_cannot_reach_through_a_server_what_is_its_own(
    mlflow: Peer,
    served: MlflowServer,
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    place: str,
    allowed: bool,
    prefix: str,
) -> None:
    (served.home / "root" / "sub").mkdir(parents=True, exist_ok=True)
    for folder in (served.home, served.home / "root", served.home / "root" / "sub"):
        (folder / "file").write_text("content")
    seaweedfs.put_raw(shared_bucket, f"{prefix}/file", b"content")
    names = {"home": served.home, "elsewhere": prefix, "host": f"127.0.0.1:{served.port}"}
    status, text = mlflow(
        "read_model_file",
        server=served.endpoint,
        name=prefix,
        source=f"modelstorage-{place.format(**names)}",
        path="file",
    )
    if allowed:
        assert (status, text) == (200, "content")
    else:
        assert status == 400
        assert "only below its own" in text
