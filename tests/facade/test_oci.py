"""``oci://`` through the facade and the command: into a folder, the cache, and offline."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import IntegrityError, InvalidInput, ModelMissingError, OCIConfig, StorageClient
from storage.config import load_settings
from storage.testing.fault_link import Link
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import SeededScript
from tests.backends.oci_support import TITLE, Entry, Pusher
from tests.cli.conftest import Command, command, read_tree
from tests.facade.stores import noted_bytes
from tests.servers.registry import Gate, Registry

__all__ = ["command"]

LAYERS = [
    [("etc/hosts", b"1"), ("models/config.json", b"{}"), ("models/old.bin", b"old")],
    [("models/weights/a.bin", b"a" * 100_000), ("models/.wh.old.bin", b"")],
]
TREE = {"config.json": b"{}", "weights/a.bin": b"a" * 100_000}
MIB = 1024 * 1024


@pytest.fixture
def push(oci_registry: Registry, prefix: str) -> Pusher:
    """A repository of its own."""
    return Pusher.of(oci_registry, prefix)


@pytest.fixture
def gate(oci_registry: Registry) -> Iterator[Gate]:
    """What counts the bytes of layers that come from the registry."""
    with Gate(oci_registry) as found:
        yield found


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient() as found:
        yield found


def _artifact(push: Pusher, files: dict[str, bytes], tag: str = "v1") -> None:
    kind = "application/vnd.cncf.model.weight.v1.raw"
    push.artifact(
        tag,
        [
            push.blob(data, kind, **{"org.cncf.model.filepath": name})
            for name, data in files.items()
        ],
        "application/vnd.cncf.model.manifest.v1+json",
    )


@pytest.mark.parametrize("coding", ["", "gzip", "zstd"])
def test_an_image_becomes_a_folder(
    push: Pusher, client: StorageClient, tmp_path: Path, coding: str
) -> None:
    push.image("v1", LAYERS, coding)
    assert client.download(push.uri(":v1"), str(tmp_path / "out")) == str(tmp_path / "out")
    assert read_tree(tmp_path / "out") == TREE


def test_a_folder_or_a_file_in_an_image_can_be_named(
    push: Pusher, client: StorageClient, tmp_path: Path
) -> None:
    push.image("v1", LAYERS)
    client.download(push.uri(":v1/weights"), str(tmp_path / "out"))
    assert read_tree(tmp_path / "out") == {"a.bin": b"a" * 100_000}
    file = client.download(push.uri(":v1/config.json"), str(tmp_path / "file"))
    assert Path(file).read_bytes() == b"{}"
    with pytest.raises(ModelMissingError):
        client.download(push.uri(":v1/weight"), str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["image", "artifact"])
def test_a_second_download_costs_one_head_and_no_body(
    push: Pusher, gate: Gate, kind: str, tmp_path: Path
) -> None:
    if kind == "image":
        push.image("v1", LAYERS)
    else:
        _artifact(push, TREE)
    uri = push.uri(":v1", gate.host)
    with StorageClient() as client:
        path = client.download(uri)
        assert read_tree(Path(path)) == TREE
    gate.clear()
    # Another process has nothing but the cache.
    with StorageClient() as client:
        assert client.download(uri) == path
        assert [one.method for one in gate.asked] == ["HEAD"]
        client.download(uri, str(tmp_path / "out"))
        assert read_tree(tmp_path / "out") == TREE
        assert [one.method for one in gate.asked] == ["HEAD", "HEAD"]


def test_a_tag_that_moved_is_fetched_anew_and_known_files_are_not(
    push: Pusher, gate: Gate, client: StorageClient
) -> None:
    uri = push.uri(":v1", gate.host)
    _artifact(push, TREE)
    client.download(uri)
    _artifact(push, {**TREE, "config.json": b"[]"})
    gate.clear()
    assert read_tree(Path(client.download(uri))) == {**TREE, "config.json": b"[]"}
    assert gate.body_bytes == 2


def test_many_processes_fetch_an_image_once_and_so_a_new_one(push: Pusher, gate: Gate) -> None:
    uri = push.uri(":v1/iris", gate.host)
    code = "import sys; from storage import Storage; print(Storage.download(sys.argv[1]))"
    for version in (6, 7):
        data = random.Random(version).randbytes(2 * MIB)
        push.image("v1", [[("models/iris/m", data)]], "")
        gate.clear()
        children = [
            subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        paths = {child.communicate(timeout=120)[0] for child in children}
        assert [child.returncode for child in children] == [0] * 4
        assert len(paths) == 1
        assert gate.body_bytes < 2 * len(data)


def test_an_image_is_there_offline(push: Pusher, gate: Gate, client: StorageClient) -> None:
    push.image("v1", LAYERS)
    uri = push.uri(":v1", gate.host)
    path = client.download(uri)
    gate.clear()
    assert client.download(uri, offline=True) == path
    assert gate.asked == []


def test_the_models_of_two_folders_are_kept_apart(push: Pusher) -> None:
    push.image("v1", [[("models/a", b"1"), ("other/b", b"2")]])
    found = {}
    for folder in ("/models", "/other"):
        with StorageClient() as client:
            config = OCIConfig(model_folder=folder)
            client.download(push.uri(":v1"), config=config)
            found[folder] = client.download(push.uri(":v1"), config=config, offline=True)
    assert read_tree(Path(found["/models"])) == {"a": b"1"}
    assert read_tree(Path(found["/other"])) == {"b": b"2"}


def test_patterns_choose_files_and_fetch_no_other_blobs(
    push: Pusher, gate: Gate, client: StorageClient, tmp_path: Path
) -> None:
    _artifact(push, TREE)
    client.download(push.uri(":v1", gate.host), str(tmp_path / "out"), allow_patterns="*.json")
    assert read_tree(tmp_path / "out") == {"config.json": b"{}"}
    assert gate.body_bytes == 2


@pytest.mark.parametrize("kind", ["image", "artifact"])
def test_damage_publishes_nothing(
    oci_registry: Registry, push: Pusher, client: StorageClient, tmp_path: Path, kind: str
) -> None:
    def alter(path: str, body: bytes) -> bytes:
        return body.replace(b"aaaa", b"aaab") if "/blobs/" in path else body

    if kind == "image":
        push.image("v1", LAYERS, "")
    else:
        _artifact(push, TREE)
    before = set(os.listdir(tempfile.gettempdir()))
    with Gate(oci_registry, alter=alter) as gate:
        for dest in (str(tmp_path / "out"), None):
            with pytest.raises(IntegrityError):
                client.download(push.uri(":v1", gate.host), dest)
    assert not (tmp_path / "out").exists()
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("modelstorage-oci-")]


def test_what_leads_elsewhere_publishes_nothing(
    push: Pusher, client: StorageClient, tmp_path: Path
) -> None:
    push.image("v1", [[Entry("models/x", link="/etc/passwd")]])
    with pytest.raises(InvalidInput, match="leads out"):
        client.download(push.uri(":v1"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    _artifact(push, {"../escape": b"1"}, "v2")
    with pytest.raises(InvalidInput, match=r"\.\."):
        client.download(push.uri(":v2"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_two_layers_of_one_name_are_refused(
    push: Pusher, client: StorageClient, tmp_path: Path
) -> None:
    layers = [push.blob(data, "text/plain", **{TITLE: "a"}) for data in (b"1", b"2")]
    push.artifact("v1", layers)
    with pytest.raises(InvalidInput, match="same file"):
        client.download(push.uri(":v1"), str(tmp_path / "out"))


def test_a_network_that_breaks_is_not_noticed(
    oci_registry: Registry, push: Pusher, tmp_path: Path
) -> None:
    data = random.Random(3).randbytes(3 * MIB)
    _artifact(push, {"m": data})
    push.image("v2", [[("models/m", data)]], "")
    script = SeededScript(seed=5, kinds=("reset", "status", "truncate"), probability=0.25)
    settings = load_settings(transfer={"part_size": "256KiB", "retry_wait": 0.01, "attempts": 12})
    with FaultProxy(oci_registry.endpoint, script) as proxy:
        host = proxy.endpoint.partition("://")[2]
        for tag in (":v1", ":v2"):
            with StorageClient(settings=settings) as client:
                client.download(push.uri(tag, host), str(tmp_path / tag[1:]))
            assert read_tree(tmp_path / tag[1:]) == {"m": data}
    assert script.happened


def test_a_download_of_an_artifact_that_was_killed_is_gone_on_with(
    tmp_path: Path,
) -> None:
    with Registry(on_disk=True) as registry:
        _kill_and_go_on(registry, Pusher.of(registry, "large"), tmp_path)


def _kill_and_go_on(registry: Registry, push: Pusher, tmp_path: Path) -> None:
    data = random.Random(4).randbytes(24 * MIB)
    _artifact(push, {"m": data})
    code = "import sys; from storage import Storage; Storage.download(sys.argv[1], sys.argv[2])"
    out = tmp_path / "out"
    # As slow as it takes for a kill to come in between.
    with FaultProxy(registry.endpoint, link=Link(shared_rate=8 * MIB)) as proxy:
        uri = push.uri(":v1", proxy.endpoint.partition("://")[2])
        child = subprocess.Popen(
            [sys.executable, "-c", code, uri, str(out)],
            env={**os.environ, "STORAGE_TRANSFER__PART_SIZE": "1MiB"},
        )
        deadline = time.monotonic() + 60
        while noted_bytes(tmp_path) < 12 * MIB:
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not out.exists()
        kept = noted_bytes(tmp_path)
        before = proxy.bytes_down
        with StorageClient(settings=load_settings(transfer={"part_size": "1MiB"})) as client:
            client.download(uri, str(out))
        # What was on its way, and not yet in the journal, comes again; the proxy may have counted
        # a block more of each connection since.
        assert proxy.bytes_down - before < len(data) - kept + 5 * MIB
    assert read_tree(out) == {"m": data}


def test_memory_does_not_grow_with_the_layers(push: Pusher, tmp_path: Path) -> None:
    # What compresses so well is quick to push.
    push.image("v1", [[("models/m", bytes(192 * MIB))]], "zstd")
    code = (
        "import re, sys; from storage import Storage; Storage.download(sys.argv[1], sys.argv[2])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, push.uri(":v1"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert (tmp_path / "out" / "m").stat().st_size == 192 * MIB
    assert int(done.stdout) < 120 * 1024


def test_a_config_of_the_settings_is_found_by_the_registry(
    oci_private_registry: Registry, prefix: str, tmp_path: Path
) -> None:
    from tests.servers.registry import PASSWORD, USER

    config = OCIConfig(USER, PASSWORD)
    basic = "Basic cmVhZGVyOlNFQ1JFVEVYQU1QTEU="
    push = Pusher.of(oci_private_registry, prefix, Authorization=basic)
    push.image("v1", LAYERS)
    for where in (f"oci://{push.host}/", f"oci://{push.host}/{push.repository}"):
        entry = {"prefix": where, "username": config.username, "password": PASSWORD}
        with StorageClient(settings=load_settings(stores={"mine": entry})) as client:
            client.download(push.uri(":v1"), str(tmp_path / "out"), overwrite=True)
        assert read_tree(tmp_path / "out") == TREE


def test_the_command_lists_and_downloads(push: Pusher, command: Command, tmp_path: Path) -> None:
    push.image("v1", LAYERS)
    listed = command("ls", push.uri(":v1"))
    assert (listed.status, listed.lines) == (0, sorted(TREE))
    result = command("download", push.uri(":v1"), tmp_path / "out")
    assert (result.status, result.lines) == (0, [str(tmp_path / "out")])
    assert read_tree(tmp_path / "out") == TREE
    failed = command("download", push.uri(":none"), tmp_path / "none")
    assert failed.status == 1
    assert "no such tag" in failed.error
    refused = command("upload", tmp_path / "out", push.uri(":v2"))
    assert refused.status == 1


def test_objects_are_described_and_opened(push: Pusher, client: StorageClient) -> None:
    _artifact(push, TREE)
    assert client.list_objects(push.uri(":v1")) == sorted(TREE)
    facts = client.get_object_metadata(push.uri(":v1/weights/a.bin"))
    assert facts["size"] == 100_000
    with client.open(push.uri(":v1/weights/a.bin")) as file:
        file.seek(99_990)
        assert file.read() == b"a" * 10
