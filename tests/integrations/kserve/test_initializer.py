"""The command ``storage-initializer``: what it is given, what it says, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from storage.errors import IntegrityError, InvalidInput, SignatureError
from storage.integrations.kserve import Storage
from storage.integrations.kserve.batch import bring_all
from storage.integrations.kserve.initializer import main
from storage.integrations.kserve.model import _Source
from storage.transfer.plan import Plan
from tests.integrations.kserve.support import (
    MODEL,
    REPOSITORY,
    child_environment,
    command,
    initialize,
    public_key,
    put_all,
    tar,
    tree,
    variables_of,
)
from tests.servers import NginxHTTP, OddHTTP, Reply, Request, SeaweedFS, small_disk
from tests.servers.git_http import GitHTTP


@pytest.fixture
def model(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The URI of a model on S3, and the variables that lead there."""
    for name, value in variables_of(seaweedfs).items():
        monkeypatch.setenv(name, value)
    return put_all(seaweedfs, shared_bucket, prefix, MODEL)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_arguments_that_are_no_pairs(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x"] * count) == 1

    said = capsys.readouterr()
    assert said.out.startswith("Usage: storage-initializer SRC DEST")
    assert said.err == ""


def test_as_a_module_and_as_a_program(seaweedfs: SeaweedFS, model: str, tmp_path: Path) -> None:
    target = tmp_path / "models"
    ended = initialize(model, str(target), variables=variables_of(seaweedfs))

    assert (ended.status, ended.out) == (0, "")
    assert re.fullmatch(
        rf"storage-initializer: {model} to {target}: 3 files, \d+ bytes in [\d.]+ s\n", ended.err
    )
    assert tree(target) == MODEL
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["storage-initializer"] == f"{main.__module__}:{main.__name__}"


def test_a_model_that_is_to_be_decrypted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.jwe").write_bytes(b"eyJ")
    monkeypatch.setenv("CONFIDENTIAL_ENABLED", "true")

    assert main([str(tmp_path / "model.jwe"), str(tmp_path / "d")]) == 1
    assert "CONFIDENTIAL_ENABLED" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_several_pairs(model: str, tmp_path: Path) -> None:
    one, two = tmp_path / "deep" / "one", tmp_path / "two"

    assert main([model, str(one), f"{model}/config.json", str(two)]) == 0
    assert tree(one) == MODEL
    assert tree(two) == {"config.json": b"{}"}


def test_several_pairs_of_one_destination(model: str, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    (local / "adapter.bin").write_bytes(b"a")
    target = tmp_path / "models"

    for _ in range(2):
        assert main([model, str(target), str(local), str(target)]) == 0
        assert tree(target) == {**MODEL, "adapter.bin": b"a"}


def test_the_first_failure_ends_it(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in "abc"]
    sources = [f"{model}/config.json", f"{model}/nothing", model]

    pairs = [part for pair in zip(sources, map(str, folders), strict=True) for part in pair]
    assert main(pairs) == 1

    # All of them are made first, as KServe's mounts are.
    assert [tree(folder) for folder in folders] == [{"config.json": b"{}"}, {}, {}]
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("storage-initializer: error: ")
    assert f"{model}/nothing" in error


def test_a_failure_is_one_line_without_secrets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with OddHTTP(lambda request: Reply(403, b"no\nyou may not")) as server:
        signed = f"{server.url}/m.bin?X-Amz-Signature=verysecret&sig=hidden"
        assert main([signed, str(tmp_path)]) == 1

    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "verysecret" not in said.err
    assert "hidden" not in said.err
    assert "Traceback" not in said.err


def test_a_destination_that_cannot_be_made(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, "/dev/null/models"]) == 1
    assert "/dev/null" in capsys.readouterr().err
    assert main([model, ""]) == 1
    assert main(["", "/nowhere"]) == 1


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("/mnt/models", 0),
        ("/mnt/models/served", 0),
        ("/mnt/models-typo", 1),
        ("/mnt/modelsx/served", 1),
        ("/mnt/pvc/none", 1),
        ("/mnt/pvc-typo/none", 1),
        ("no such thing", 1),
        ("file:///no/such/thing", 1),
        ("nosuchscheme://", 1),
    ],
)
def test_paths_of_the_pod(
    source: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([source, str(tmp_path)]) == status
    assert os.listdir(tmp_path) == []
    assert status == 0 or source.removeprefix("file://") in capsys.readouterr().err


def test_a_reserved_name_is_refused_before_anything_is_fetched(
    model: str, seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path
) -> None:
    put_all(seaweedfs, shared_bucket, prefix, {"weights/.modelstorage": b"{}"})
    seen: list[object] = []

    with pytest.raises(InvalidInput, match=r"weights/\.modelstorage"):
        bring_all([model], [str(tmp_path)], watch=lambda *_: seen.append)
    assert seen == []
    bring_all([model], [str(tmp_path)], ignore=["*/.modelstorage"])
    assert tree(tmp_path) == MODEL


def _zip() -> bytes:
    written = BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for path, content in MODEL.items():
            archive.writestr(path, content)
    return written.getvalue()


def test_sources_that_their_queries_tell_apart_are_two(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    def answer(request: Request) -> Reply:
        name = request.target.partition("file=")[2]
        return Reply(body=tar({name: b"1"}))

    url = f"{odd_http(answer).url}/model.tar.gz"
    target = tmp_path / "d"

    assert main([f"{url}?file=a", str(target), f"{url}?file=b", str(target)]) == 0
    assert tree(target) == {"a": b"1", "b": b"1"}
    Storage.download(f"{url}?sig=1&file=c", str(target))
    Storage.download(f"{url}?sig=2&file=d", str(target))
    assert tree(target) == {"a": b"1", "b": b"1", "d": b"1"}
    with pytest.raises(InvalidInput, match="credential"):
        Storage.download_files([f"{url}?sig=1&file=a", f"{url}?sig=1&file=b"], [str(target)] * 2)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("m.tar", "w:"),
        ("m.tar.gz", "w:gz"),
        ("m.TGZ", "w:gz"),
        ("m.tar.bz2", "w:bz2"),
        ("m.tar.xz", "w:xz"),
        ("m.zip", ""),
    ],
)
def test_one_archive_is_unpacked(
    name: str,
    mode: str,
    model: str,
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    tmp_path: Path,
) -> None:
    content = tar(MODEL, mode) if mode else _zip()
    source = put_all(seaweedfs, shared_bucket, f"{prefix}-archive", {f"deep/{name}": content})
    (tmp_path / name).write_bytes(content)

    # The archive itself; a tree with nothing else in it; a file of this machine.
    places = (f"{source}/deep/{name}", source, str(tmp_path / name))
    for number, place in enumerate(places):
        target = tmp_path / str(number)
        assert main([place, str(target)]) == 0
        assert tree(target) == MODEL
    assert (tmp_path / name).read_bytes() == content


@pytest.fixture
def odd() -> Iterator[OddHTTP]:
    """An HTTP server that answers with one body for every path."""
    content = tar(MODEL)

    def answer(request: Request) -> Reply:
        kind = "application/octet-stream"
        return Reply(200, content, {"Content-Type": kind, "ETag": '"1"'})

    with OddHTTP(answer) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "unpacked"),
    [
        ("m.tar.gz", True),
        ("m.tar.gz?signature=x.bin", True),
        ("get?file=m.tgz", True),
        ("m.pkl.gz", False),
        ("m.joblib", False),
        ("m.joblib?of=x.zip", False),
    ],
)
def test_archives_over_http_are_told_by_their_names(
    path: str, unpacked: bool, odd: OddHTTP, tmp_path: Path
) -> None:
    assert main([f"{odd.url}/{path}", str(tmp_path)]) == 0

    found = tree(tmp_path)
    if unpacked:
        assert found == MODEL
    else:
        assert list(found) == [path.partition("?")[0]]
        assert found.popitem()[1][:2] == b"\x1f\x8b"


def test_the_configured_headers_go_to_their_host(
    nginx_http: NginxHTTP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def answer(request: Request) -> Reply:
        seen.append(request.headers.get("X-Key"))
        return Reply(200, b"1", {"Content-Type": "application/octet-stream"})

    monkeypatch.setenv("127.0.0.1-headers", '{"X-Key": "secret"}')
    with OddHTTP(answer) as ours, OddHTTP(answer, "localhost") as others:
        assert main([f"{ours.url}/m.bin", str(tmp_path / "a")]) == 0
        assert set(seen) == {"secret"}
        seen.clear()
        assert main([f"{others.url}/m.bin", str(tmp_path / "b")]) == 0
        assert set(seen) == {None}


def test_a_restarted_container_fetches_nothing_again(
    model: str, seaweedfs: SeaweedFS, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model, str(tmp_path)]) == 0
    times = {path: path.stat().st_ctime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert main([model, str(tmp_path)]) == 0
    assert {path: path.stat().st_ctime_ns for path in times} == times
    # The log says it both times.
    assert len(capsys.readouterr().err.splitlines()) == 2
    (tmp_path / "config.json").write_bytes(b"broken")
    assert main([model, str(tmp_path)]) == 0
    assert tree(tmp_path) == MODEL


def test_what_is_there_already_has_to_have_what_is_demanded_now(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = f"{model}/config.json"
    folders = [str(tmp_path / name) for name in ("one", "tree")]
    Storage.download_files([config, model], folders)

    with pytest.raises(IntegrityError):
        Storage.download(f"{config}#sha256={'0' * 64}", folders[0])
    (tmp_path / "public.pem").write_bytes(public_key())
    monkeypatch.setenv("STORAGE_REQUIRE_SIGNATURE", str(tmp_path / "public.pem"))
    for source, folder in zip((config, model), folders, strict=True):
        with pytest.raises(SignatureError):
            Storage.download(source, folder)


def test_a_source_that_changed_on_its_way_is_not_taken_for_what_it_was(
    model: str,
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = _Source._plan

    def overtaken(self: _Source) -> Plan | None:
        plan = planned(self)
        put_all(seaweedfs, shared_bucket, prefix, {"config.json": b"[]"})
        return plan

    with monkeypatch.context() as patch:
        patch.setattr(_Source, "_plan", overtaken)
        assert main([model, str(tmp_path)]) == 0
    assert tree(tmp_path) == {**MODEL, "config.json": b"[]"}

    put_all(seaweedfs, shared_bucket, prefix, MODEL)
    assert main([model, str(tmp_path)]) == 0
    assert tree(tmp_path) == MODEL


def test_files_of_an_older_version_are_gone_on_a_mount_point(
    model: str, seaweedfs: SeaweedFS, shared_bucket: str, prefix: str
) -> None:
    with small_disk() as disk:
        assert main([model, str(disk)]) == 0
        seaweedfs.raw.delete_object(Bucket=shared_bucket, Key=f"{prefix}/weights/part-1.bin")
        seaweedfs.put_raw(shared_bucket, f"{prefix}/config.json", b"two")
        assert main([model, str(disk)]) == 0
        found = {path: data for path, data in tree(disk).items() if not path.startswith(".")}
        assert found == {"config.json": b"two", "empty": b""}
        assert not (disk / "weights").exists()


def test_a_full_disk_is_said_and_left_empty(
    model: str, seaweedfs: SeaweedFS, shared_bucket: str, prefix: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seaweedfs.put_raw(shared_bucket, f"{prefix}/large.bin", bytes(3 * 1024 * 1024))
    with small_disk(mebibytes=2) as disk:
        assert main([model, str(disk)]) == 1
        assert os.listdir(disk) == []
    assert "bytes" in capsys.readouterr().err


def test_a_signal_ends_it_quickly_and_leaves_nothing(
    seaweedfs: SeaweedFS, shared_bucket: str, prefix: str, tmp_path: Path
) -> None:
    from storage.testing.fault_link import Link
    from storage.testing.fault_proxy import FaultProxy

    seaweedfs.put_raw(shared_bucket, f"{prefix}/large.bin", os.urandom(4 * 1024 * 1024))
    target = tmp_path / "models"
    # All of it would take 80 seconds.
    with FaultProxy(seaweedfs.endpoint, link=Link(rate=50_000)) as proxy:
        variables = {**variables_of(seaweedfs), "S3_ENDPOINT": proxy.endpoint}
        child = subprocess.Popen(
            command(f"s3://{shared_bucket}/{prefix}", str(target)),
            env=child_environment(variables),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not any(target.glob(".modelstorage.*/.model.*/content/*")):
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            began = time.monotonic()
            child.terminate()
            _, err = child.communicate(timeout=60)
            assert time.monotonic() - began < 25
        finally:
            child.kill()
            child.wait()

    assert child.returncode == 128 + signal.SIGTERM
    assert len(err.splitlines()) == 1
    assert os.listdir(target) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_store_that_says_nothing_does_not_hold_up_a_signal(
    number: signal.Signals, tmp_path: Path
) -> None:
    asked = threading.Event()
    over = threading.Event()

    def silent(request: Request) -> Reply:
        if request.method == "GET":
            asked.set()
            over.wait(60)
        return Reply(200, bytes(1000), {"Content-Type": "application/octet-stream"})

    with OddHTTP(silent) as server:
        child = subprocess.Popen(
            command(f"{server.url}/m.bin", str(tmp_path)),
            env=child_environment({}),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert asked.wait(60)
            time.sleep(0.2)
            began = time.monotonic()
            child.send_signal(number)
            _, err = child.communicate(timeout=60)
            assert time.monotonic() - began < 25
        finally:
            over.set()
            child.kill()
            child.wait()

    assert child.returncode == 128 + number
    assert err == "storage-initializer: terminated\n"
    assert os.listdir(tmp_path) == []


_NO_PATIENCE = """
import sys, time
from storage.integrations.kserve import initializer
say = initializer._say
initializer._say = lambda text: (say(text), time.sleep(0.5))
initializer._PATIENCE = 0.0
sys.exit(initializer.main(sys.argv[1:]))
"""


def test_an_end_that_comes_with_the_end_of_patience_is_said_once(tmp_path: Path) -> None:
    asked, over = threading.Event(), threading.Event()

    def slow(request: Request) -> Reply:
        if request.method == "GET":
            asked.set()
            return Reply(200, bytes(1000), cut=100, stall=over)
        return Reply(200, bytes(1000), {"Content-Type": "application/octet-stream"})

    with OddHTTP(slow) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", _NO_PATIENCE, f"{server.url}/m.bin", str(tmp_path)],
            env=child_environment({}),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert asked.wait(60)
            child.terminate()
            # The transfer ends, too.
            over.set()
            _, err = child.communicate(timeout=60)
        finally:
            over.set()
            child.kill()
            child.wait()

    assert child.returncode == 128 + signal.SIGTERM
    assert err == "storage-initializer: terminated\n"


def test_where_only_the_volume_can_be_written_temporary_files_are_there(
    git_server: GitHTTP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git_server.create("m")
    git_server.commit("m", MODEL)
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])

    assert main([git_server.uri("m"), str(tmp_path / "d")]) == 0
    assert tree(tmp_path / "d") == MODEL
    assert sorted(os.listdir(tmp_path / "d")) == ["config.json", "empty", "weights"]
    assert tempfile.tempdir is None


def test_two_at_once_agree(model: str, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(Storage.download(model, str(tmp_path))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [str(tmp_path)] * 4
    assert tree(tmp_path) == MODEL
    assert sorted(os.listdir(tmp_path)) == ["config.json", "empty", "weights"]
