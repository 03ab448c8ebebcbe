"""What was wrong once with looking after a cache, and must not be again."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from storage import ConfigurationError, InvalidInput, StorageClient
from storage.cache.verify import verify
from storage.cli import main
from storage.client.lockfile import LockFile
from storage.uri import parse_uri
from tests.cache.conftest import MakeClient
from tests.cache.processes import dead_owner
from tests.cache.support import Source, blob_files, flip_byte

pytestmark = pytest.mark.kinds("memory")

DATA = bytes(range(256)) * 64
LARGE = DATA * 256


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model at a store that the command reaches as well."""
    folder = tmp_path / "store" / "iris"
    folder.mkdir(parents=True)
    (folder / "w.bin").write_bytes(DATA)
    return f"local://{folder}"


# -- export --------------------------------------------------------------------------------


def test_an_export_into_a_pipe_leaves_it_a_pipe(model: str, tmp_path: Path) -> None:
    assert main(["download", model, "--quiet"]) == 0
    pipe, arrived = tmp_path / "pipe", tmp_path / "arrived.tar"
    os.mkfifo(pipe)

    def read() -> None:
        with pipe.open("rb") as source, arrived.open("wb") as target:
            shutil.copyfileobj(source, target)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status = main(["cache", "export", str(pipe)])
    if not stat.S_ISFIFO(os.lstat(pipe).st_mode):
        pytest.fail("a file took the place of the pipe")
    reader.join(30)
    assert status == 0
    assert main(["cache", "import", str(arrived)]) == 0


def test_an_export_to_a_link_replaces_what_it_leads_to(model: str, tmp_path: Path) -> None:
    assert main(["download", model, "--quiet"]) == 0
    link, target = tmp_path / "link.tar", tmp_path / "target.tar"
    target.write_bytes(b"old")
    link.symlink_to(target.name)
    assert main(["cache", "export", str(link)]) == 0
    assert link.is_symlink()
    assert main(["cache", "import", str(target)]) == 0


def test_an_export_that_lacks_its_file_does_not_ask_for_a_uri(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["cache", "export"]) == 2
    assert "required: FILE;" in capsys.readouterr().err


# -- verify and gc -------------------------------------------------------------------------


def test_a_doubtful_blob_of_two_models_is_hashed_once(
    source: Source, make_client: MakeClient
) -> None:
    client = make_client()
    for name, more in (("one", b"1"), ("two", b"2")):
        uri = source.put_model({"shared.bin": LARGE, "more": more}, name)
        client.download(uri, config=source.config)
    shared = max(blob_files(client.cache.upper.path), key=lambda path: path.stat().st_size)
    flip_byte(shared)
    report = verify(client.cache)
    assert [problem.kind for problem in report.problems] == ["blob"]
    assert len(report.problems[0].uris) == 2
    assert report.bytes == len(LARGE)


@pytest.mark.parametrize("command", [["gc"], ["gc", "--dry-run"], ["du"], ["ls"]])
def test_a_file_in_the_place_of_the_cache_is_no_surprise(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    monkeypatch.setenv("STORAGE_CACHE_DIR", str(file))
    assert main(["cache", *command]) == 0
    assert "unexpected" not in capsys.readouterr().err
    assert file.read_bytes() == b"mine"


def test_a_dry_run_counts_what_a_killed_download_left_and_what_is_in_quarantine(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", model, "--quiet"]) == 0
    with StorageClient() as client:
        layout = client.cache.upper.layout
        dead = Path(layout.partial, f"{dead_owner().token}-00000001")
        flip_byte(blob_files(layout.root)[0])
        verify(client.cache)
    dead.mkdir()
    (dead / "part").write_bytes(LARGE)
    capsys.readouterr()
    found = []
    for options in (["--dry-run"], []):
        assert main(["cache", "gc", "--grace", "0", "--json", *options]) == 0
        found.append(json.loads(capsys.readouterr().out)["bytes"])
    assert found == [len(LARGE) + len(DATA)] * 2
    assert list(dead.parent.iterdir()) == []


def test_rm_says_where_a_model_of_a_lower_cache_is(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["download", model, "--quiet"]) == 0
    lower = os.environ["STORAGE_CACHE_DIR"]
    monkeypatch.setenv("STORAGE_CACHE_LOWER", lower)
    monkeypatch.setenv("STORAGE_CACHE_DIR", str(tmp_path / "upper"))
    assert main(["cache", "rm", model]) == 1
    assert f"only in {lower} below it" in capsys.readouterr().err


# -- files that people wrote ---------------------------------------------------------------


def test_a_comment_behind_a_source_is_not_taken_for_sources(model: str, tmp_path: Path) -> None:
    file = tmp_path / "models.txt"
    file.write_text(f"# all\n{model} # the best\n", encoding="utf-8")
    with StorageClient() as client, pytest.raises(ConfigurationError, match="line 2: a comment"):
        client.prefetch(file)


def test_a_byte_order_mark_is_no_part_of_the_first_line(model: str, tmp_path: Path) -> None:
    file = tmp_path / "models.txt"
    with StorageClient() as client:
        file.write_text(f"{model}\r\n", encoding="utf-8-sig")
        (found,) = client.prefetch(file)
        assert (found.uri, found.error) == (model, None)
        lock = client.lock([model])
        file.write_text(lock.dumps(), encoding="utf-8-sig")
        assert LockFile.read(file) == lock
        (found,) = client.prefetch(file)
        assert (found.uri, found.error) == (model, None)


# -- secrets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri", ["s3://user:SECRET@bucket/x", "gs://user:SECRET@b/x", "s3://bucket?sig=SECRET"]
)
def test_a_uri_with_a_password_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(InvalidInput, match="is not a name") as caught:
        parse_uri(uri)
    assert "SECRET" not in str(caught.value)
