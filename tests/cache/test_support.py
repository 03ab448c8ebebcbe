"""The tools of these tests see what they are to see."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import StorageClient
from storage.config import load_settings
from tests.cache.support import (
    SOURCES,
    blocked_sockets,
    flip_byte,
    make_source,
    no_network_process,
    tree_bytes,
)
from tests.servers import ServerError, free_port, read_only_view

MODEL = {"model.bin": bytes(range(256)) * 12000, "sub/config.json": b"{}"}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_counts_what_was_fetched(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    source = make_source(request, kind)
    files = {"model.bin": MODEL["model.bin"]} if kind == "web" else MODEL
    uri = source.put_model(files)
    source.forget()
    settings = load_settings(transfer={"part_size": "1MiB"}, cache_dir=tmp_path / "cache")
    with StorageClient(settings=settings) as client:
        found = client.download(uri, tmp_path / "out", config=source.fields or None)
    assert source.fetched == source.sizes()
    assert source.bodies.count("model/model.bin") == 3
    assert source.requests >= len(source.bodies)
    assert Path(found).is_file() or tree_bytes(found) == files
    source.forget()
    assert (source.requests, source.bodies, source.fetched) == (0, [], {})


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "web"])
def test_a_model_that_is_put_again_loses_its_old_files(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    source = make_source(request, kind)
    source.put_model(MODEL)
    uri = source.put_model({"model.bin": b"new", "other": b"1"})
    with StorageClient(settings=load_settings(cache_dir=tmp_path / "cache")) as client:
        out = client.download(uri, tmp_path / "out", config=source.config)
    assert tree_bytes(out) == {"model.bin": b"new", "other": b"1"}


@pytest.mark.parametrize(
    "use",
    [
        lambda port: socket.socket(),
        lambda port: socket.create_connection(("127.0.0.1", port)),
        lambda port: socket.getaddrinfo("localhost", port),
        lambda port: urllib.request.urlopen(f"http://127.0.0.1:{port}"),
    ],
    ids=["socket", "connection", "name", "request"],
)
def test_use_of_the_network_is_refused(use: Callable[[int], object]) -> None:
    with pytest.raises(AssertionError), blocked_sockets():
        use(free_port())
    socket.socket().close()


def test_a_refusal_that_is_swallowed_is_told_in_the_end() -> None:
    def swallow() -> None:
        with blocked_sockets(), contextlib.suppress(AssertionError):
            socket.socket()

    with pytest.raises(AssertionError, match="socket"):
        swallow()


def test_an_open_connection_is_blocked_as_well_and_a_pair_of_this_process_is_not() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        pytest.raises(AssertionError),
        blocked_sockets(),
    ):
        one.sendall(b"x")
    with blocked_sockets():
        left, right = socket.socketpair()
        with left, right:
            left.sendall(b"x")
            assert right.recv(1) == b"x"


def test_a_process_without_network_has_none() -> None:
    code = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname())"
    )
    done = no_network_process([sys.executable, "-c", code])
    assert "unreachable" in done.stderr
    assert no_network_process([sys.executable, "-c", "print(1)"]).stdout == "1\n"


@pytest.mark.parametrize("keep_times", [True, False])
@pytest.mark.parametrize("offset", [0, 2, -1])
def test_one_byte_is_flipped(tmp_path: Path, offset: int, keep_times: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, (1000, 1000))
    path.chmod(0o444)
    flip_byte(path, offset, keep_times=keep_times)
    changed = [old != new for old, new in zip(b"abc", path.read_bytes(), strict=True)]
    assert sum(changed) == 1
    assert changed[offset]
    assert path.stat().st_mode & 0o777 == 0o444
    assert (path.stat().st_mtime == 1000) is keep_times


def test_nobody_writes_to_a_read_only_view(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    try:
        with read_only_view(tmp_path) as view:
            assert (view / "file").read_bytes() == b"1"
            with pytest.raises(OSError, match="Read-only"):
                (view / "file").write_bytes(b"2")
            (tmp_path / "file").write_bytes(b"3")
            assert (view / "file").read_bytes() == b"3"
    except ServerError as exc:
        pytest.fail(str(exc), pytrace=False)
    assert not view.exists()
