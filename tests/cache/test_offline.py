"""Without a network: what is cached is served, and what is not is refused, at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage import OfflineError, StorageClient
from tests.cache.conftest import MakeClient
from tests.cache.support import (
    Source,
    blob_files,
    blocked_sockets,
    flip_byte,
    no_network_process,
    tree_bytes,
)

MODEL = {"model.bin": b"weights" * 1000, "config/a.json": b"{}"}


@pytest.mark.kinds("memory", "s3", "hub")
def test_what_is_cached_loads_without_a_socket(
    make_client: MakeClient, source: Source, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    first = make_client().download(uri, config=source.config)
    with blocked_sockets():
        client = make_client(offline=True)
        assert client.download(uri, config=source.config) == first
        assert client.download(uri, config=source.config, freshness="cache-first") == first
        out = client.download(uri, tmp_path / "out", config=source.config)
        assert tree_bytes(first) == tree_bytes(out) == MODEL
        client = make_client()
        assert client.download(uri, config=source.config, freshness="cache-first") == first


@pytest.mark.kinds("memory", "s3", "hub")
def test_the_three_messages(make_client: MakeClient, source: Source, cache: Path) -> None:
    uri = source.put_model(MODEL)
    client = make_client()
    with blocked_sockets(), pytest.raises(OfflineError, match="was never cached"):
        client.download(uri, config=source.config, offline=True)
    client.download(uri, config=source.config)
    large = next(path for path in blob_files(cache) if path.stat().st_size > 2)
    flip_byte(large)
    # It stays damaged after it went to quarantine.
    for _ in range(2):
        with blocked_sockets(), pytest.raises(OfflineError, match=r"damaged: 'model\.bin'"):
            client.download(uri, config=source.config, offline=True)
    assert tree_bytes(client.download(uri, config=source.config)) == MODEL
    next(path for path in blob_files(cache) if path.stat().st_size == 2).unlink()
    with blocked_sockets(), pytest.raises(OfflineError, match=r"1 of 2 files.*a\.json"):
        client.download(uri, config=source.config, offline=True)


@pytest.mark.kinds("memory")
def test_a_download_that_did_not_end_is_cached_in_part(
    client: StorageClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.cache.manifests import Manifests

    uri = source.put_model(MODEL)

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifests, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            client.download(uri)
    with pytest.raises(OfflineError, match="only in part: 2 of 2 files"):
        client.download(uri, offline=True)
    source.forget()
    assert tree_bytes(client.download(uri)) == MODEL
    assert source.bodies == []


@pytest.mark.kinds("s3")
def test_a_process_without_any_network_finds_its_model(
    make_client: MakeClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    path = make_client().download(uri, config=source.config)
    environ = {**os.environ, "STORAGE_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "storage.cli", "download", "--offline", "--quiet"]
    done = no_network_process([*command, uri], env=environ)
    assert (done.stdout, done.stderr, done.returncode) == (f"{path}\n", "", 0)
    done = no_network_process([*command, f"{uri}-never"], env=environ)
    assert done.returncode == 1
    assert "was never cached" in done.stderr


@pytest.mark.kinds("s3")
def test_offline_imports_no_sdk(make_client: MakeClient, source: Source, cache: Path) -> None:
    uri = source.put_model(MODEL)
    path = make_client().download(uri, config=source.config)
    program = (
        "import sys, storage\n"
        f"assert storage.Storage.download({uri!r}, offline=True) == {path!r}\n"
        "heavy = {'obstore', 's3fs', 'fsspec', 'botocore', 'requests', 'huggingface_hub',\n"
        "         'pydantic', 'filelock', 'asyncio', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    environ = {**os.environ, "STORAGE_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.kinds("hub")
def test_the_switch_of_the_hub_means_the_hub(
    client: StorageClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = source.put_model(MODEL)
    path = client.download(uri, config=source.config)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with blocked_sockets():
        assert client.download(uri, config=source.config) == path
