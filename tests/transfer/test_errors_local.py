"""Destinations that cannot be written, and what the command says of any failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import storage
from storage.client import StorageClient
from storage.errors import (
    DestinationError,
    InsufficientSpaceError,
    ObjectExistsError,
)
from storage.transfer.progress import Progress
from tests.servers import CountingProxy, SeaweedFS, free_port
from tests.transfer.failing import (
    ACCESS,
    CANARIES,
    DRIVERS,
    QUERY,
    SECRET,
    TOKEN,
    fails,
    good,
)
from tests.transfer.nursery import Nursery, Order
from tests.transfer.support import MIB, assert_clear, everything_in, write_tree

# -- what the destination says -------------------------------------------------------------


def test_a_file_where_a_tree_is_to_go(
    client: StorageClient, seaweedfs: SeaweedFS, stored: str, dest: Path
) -> None:
    dest.write_bytes(b"mine")
    config = good(seaweedfs, "obstore")
    fails(client, ObjectExistsError, stored, dest, config=config)
    fails(client, ObjectExistsError, stored, dest, config=config, overwrite=True)
    fails(client, DestinationError, stored, dest / "below", config=config)
    assert dest.read_bytes() == b"mine"


def test_files_of_somebody_else_where_a_tree_is_to_go(
    client: StorageClient, seaweedfs: SeaweedFS, stored: str, dest: Path
) -> None:
    write_tree(dest, {"mine": b"precious"})
    fails(client, ObjectExistsError, stored, dest, config=good(seaweedfs, "obstore"))


@pytest.mark.parametrize("key", ["", "/a.bin", "/large.bin"])
@pytest.mark.parametrize("below", ["", "m", "made/m"])
def test_a_read_only_file_system(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    stored: str,
    read_only_disk: Path,
    key: str,
    below: str,
) -> None:
    error = fails(
        client,
        DestinationError,
        stored + key,
        read_only_disk / below,
        config=good(seaweedfs, "obstore"),
    )
    assert isinstance(error, OSError)
    assert "Read-only file system" in str(error)


def test_a_full_disk_is_noticed_before_the_first_byte(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    proxy: CountingProxy,
    stored: str,
    full_disk: Path,
) -> None:
    (full_disk / "filler").write_bytes(bytes(4 * MIB))
    config = good(seaweedfs, "obstore", proxy.endpoint)
    for target in (full_disk / "made" / "m", full_disk / "m"):
        proxy.clear()
        error = fails(client, InsufficientSpaceError, stored, target, config=config)
        assert isinstance(error, OSError)
        assert str(6 * MIB + 105) in str(error)
        assert "nothing was transferred" in str(error)
        assert [request.method for request in proxy.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("key", ["", "/large.bin"])
def test_a_disk_that_fills_up_midway(
    client: StorageClient,
    seaweedfs: SeaweedFS,
    stored: str,
    full_disk: Path,
    driver: str,
    key: str,
) -> None:
    filler = full_disk / "filler"

    def fill(_: Progress) -> None:
        # After the check, with the first bytes: somebody else takes the rest.
        if not filler.exists():
            with open(filler, "wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(64 * 1024))
                    except OSError:
                        break

    with pytest.raises(InsufficientSpaceError, match="is full") as caught:
        client.download(
            stored + key,
            full_disk / "made" / "m",
            config=good(seaweedfs, driver),
            progress=fill,
        )
    assert_clear(caught.value, seaweedfs.secret_key)
    assert everything_in(full_disk) == ["filler"]


NOBODY = 65534


@dataclass
class Locked:
    """A folder tree of which another user may write only some."""

    path: Path
    source: str = field(init=False)

    def __post_init__(self) -> None:
        self.source = str(write_tree(self.path / "source", {"a": b"1", "sub/b": b"2"}))
        (self.path / "closed").mkdir()
        self.own(self.path / "closed" / "model")
        self.own(self.path / "open")

    def own(self, folder: Path) -> None:
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)

    def order(self, uri: str, dest: str, **more: Any) -> Order:
        user = NOBODY if os.geteuid() == 0 else None
        return Order(uri, str(self.path / dest), user=user, **more)


@pytest.fixture
def locked(open_path: Path) -> Iterator[Locked]:
    found = Locked(open_path)
    os.chmod(found.path / "closed", 0o555)
    yield found
    os.chmod(found.path / "closed", 0o755)


@pytest.mark.parametrize("dest", ["closed/new", "closed/made/new", "closed/file"])
def test_a_folder_that_this_user_may_not_write(nursery: Nursery, locked: Locked, dest: str) -> None:
    uri = locked.source + ("/a" if dest.endswith("file") else "")
    before = everything_in(locked.path)
    outcome = nursery.run(locked.order(uri, dest))[0]
    assert outcome.error == "DestinationError"
    assert "Permission denied" in str(outcome.message)
    assert everything_in(locked.path) == before


def test_a_folder_of_ours_in_one_that_this_user_may_not_write_is_filled(
    nursery: Nursery, locked: Locked
) -> None:
    before = everything_in(locked.path)
    for _ in range(2):
        outcome = nursery.run(locked.order(locked.source, "closed/model"))[0]
        assert (outcome.error, outcome.message) == (None, None)
        found = sorted(set(everything_in(locked.path)) - set(before))
        assert found == [f"closed/model/{name}" for name in ("a", "sub", "sub/b")]


def test_leftovers_of_another_user_are_no_obstacle(nursery: Nursery, locked: Locked) -> None:
    theirs = locked.path / "open" / ".model.0123456789abcdef.partial"
    theirs.mkdir(mode=0o700)
    outcome = nursery.run(locked.order(locked.source, "open/model"))[0]
    assert (outcome.error, outcome.message) == (None, None)
    assert sorted(os.listdir(locked.path / "open")) == [theirs.name, "model"]


def test_read_only_folders_in_an_old_tree_are_removed_with_it(
    nursery: Nursery, locked: Locked
) -> None:
    assert nursery.run(locked.order(locked.source, "open/model"))[0].error is None
    os.chmod(locked.path / "open" / "model" / "sub", 0o555)
    assert nursery.run(locked.order(locked.source, "open/model"))[0].error is None
    assert everything_in(locked.path / "open") == ["model", "model/a", "model/sub", "model/sub/b"]


# -- the command ---------------------------------------------------------------------------


def run_command(*args: str | Path, environment: dict[str, str]) -> tuple[int, str, str]:
    root = str(Path(storage.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "storage.cli", *map(str, args)],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "case",
    [
        "credentials",
        "key",
        "bucket",
        "host",
        "unknown scheme",
        "planned scheme",
        "read-only",
        "full",
        "digest",
        "file",
    ],
)
def test_the_command_fails_with_one_line(
    seaweedfs: SeaweedFS,
    stored: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    case: str,
) -> None:
    uri = {
        "key": f"{stored}/nope",
        "bucket": "s3://no-such-bucket-here/key",
        "unknown scheme": f"nosuchscheme://user:{SECRET}@host/key?sig={QUERY}",
        "planned scheme": "gs://bucket/key",
    }.get(case, stored)
    place = tmp_path / "place"
    place.mkdir()
    more: list[str] = []
    if case == "read-only":
        place = request.getfixturevalue("read_only_disk")
    elif case == "full":
        place = request.getfixturevalue("full_disk")
        (place / "filler").write_bytes(bytes(4 * MIB))
    elif case == "digest":
        more = ["--digest", "sha256:" + "0" * 64]
    dest = place / "made" / "m"
    if case == "file":
        dest = place / "m"
        dest.write_bytes(b"mine")
    bad = case == "credentials"
    before = everything_in(place)
    status, out, err = run_command(
        "download",
        uri,
        dest,
        *more,
        environment={
            "AWS_ACCESS_KEY_ID": ACCESS if bad else seaweedfs.access_key,
            "AWS_SECRET_ACCESS_KEY": SECRET if bad else seaweedfs.secret_key,
            **({"AWS_SESSION_TOKEN": TOKEN} if bad else {}),
            "AWS_REGION": seaweedfs.region,
            "AWS_ENDPOINT_URL": (
                f"http://127.0.0.1:{free_port()}" if case == "host" else seaweedfs.endpoint
            ),
            "STORAGE_TRANSFER__ATTEMPTS": "2",
        },
    )
    assert (status, out) == (1, ""), err
    assert err.startswith("storage: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for secret in (*CANARIES, seaweedfs.secret_key):
        assert secret not in err
    assert everything_in(place) == before
