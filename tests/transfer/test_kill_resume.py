"""Killed again and again, a download pays once for what it has.

Each process kills itself when a chosen number of bytes has come. A proxy before the server counts
the bytes that leave it, so that what a process says of itself does not matter.
``STORAGE_SOAK=1`` makes ten times as many rounds.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from storage.testing.fault_proxy import FaultProxy
from tests.facade.stores import HubStore
from tests.servers import Hub, NginxHTTP, OddHTTP, SeaweedFS, small_disk
from tests.servers.nginx_http import put_file
from tests.servers.odd_http import StaticFile
from tests.transfer.nursery import Nursery, Order
from tests.transfer.resuming import MIB, Resuming, ends_of
from tests.transfer.support import KIB, everything_in, files_of

SOAK = 10 if os.environ.get("STORAGE_SOAK") else 1
CONNECTIONS = 4
PART = MIB
STEP = 128 * KIB
LIMITS = {"connections": CONNECTIONS, "part_size": "1MiB"}

_bytes = random.Random(23).randbytes
FILES = {
    "config.json": b"{}",
    "sub/empty": b"",
    "sub/small.bin": _bytes(300 * KIB),
    "weights-1.bin": _bytes(6 * MIB + 11),
    "weights-2.bin": _bytes(5 * MIB),
}
SIZE = sum(map(len, FILES.values()))


@dataclass(frozen=True)
class Remote:
    """A model in a store that counts."""

    uri: str
    """Of the tree; a web server has only its files."""

    config: dict[str, str] | None
    paid: Callable[[], int]
    """Tells how many bytes of files have left the server so far."""

    change: Callable[[str, bytes], object] = lambda *_: None
    """Replaces one file."""

    def one(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def resuming(self, uri: str, dest: Path, **more: Any) -> Resuming:
        settings = {"transfer": LIMITS, "cache_dir": "/nonexistent"}
        return Resuming(uri, str(dest), self.config, settings=settings, step=STEP, **more)


@pytest.fixture
def s3(seaweedfs: SeaweedFS, shared_bucket: str) -> Iterator[Remote]:
    folder = f"resume-{uuid4().hex}"

    def put(name: str, data: bytes) -> None:
        seaweedfs.put_raw(shared_bucket, f"{folder}/{name}", data)

    for name, data in FILES.items():
        put(name, data)
    with FaultProxy(seaweedfs.endpoint) as proxy:
        config = {
            "access_key_id": seaweedfs.access_key,
            "secret_access_key": seaweedfs.secret_key,
            "endpoint_url": proxy.endpoint,
        }
        yield Remote(f"s3://{shared_bucket}/{folder}", config, lambda: bodies(proxy), put)


@pytest.fixture
def web(nginx_http: NginxHTTP) -> Iterator[Remote]:
    folder = f"resume-{uuid4().hex}"
    for name, data in FILES.items():
        put_file(nginx_http.data, f"{folder}/{name}", data)
    with FaultProxy(nginx_http.endpoint) as proxy:
        yield Remote(f"{proxy.endpoint}/{folder}", None, lambda: bodies(proxy))


@pytest.fixture
def model(hub: Hub) -> Remote:
    store = HubStore(hub, "")
    store.put_all(FILES)

    def paid() -> int:
        return sum(each.sent for each in hub.asked("GET", "^/files/|/resolve/"))

    return Remote(store.base, {"token": hub.writer.token, "endpoint": hub.url}, paid)


def bodies(proxy: FaultProxy) -> int:
    """Return the bytes of files that were sent; a listing is none."""
    return sum(
        each.bytes_down
        for each in proxy.exchanges
        if each.method == "GET" and "list-type" not in each.target
    )


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "model"


def kill_at_random(
    download: Resuming, remote: Remote, size: int, seed: object, kills: int = 4
) -> None:
    """Let processes be killed, then one not, and see that hardly a byte was paid for twice."""
    rng = random.Random(str(seed))
    killed = 0
    for _ in range(kills * SOAK):
        killed += download.run(rng.randrange(1, size // kills)) is None
    assert download.run() is not None
    assert killed
    bound = size + killed * CONNECTIONS * PART
    assert remote.paid() <= bound, (remote.paid() - size, killed)


# -- where to ------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
def test_a_tree_is_gone_on_with(s3: Remote, dest: Path, durable: bool) -> None:
    download = s3.resuming(s3.uri, dest, options={"durable": durable})
    kill_at_random(download, s3, SIZE, durable)
    assert files_of(dest) == FILES
    assert os.listdir(dest.parent) == ["model"]


def test_a_file_is_gone_on_with(s3: Remote, dest: Path) -> None:
    kill_at_random(
        s3.resuming(s3.one("weights-1.bin"), dest), s3, len(FILES["weights-1.bin"]), "file"
    )
    assert dest.read_bytes() == FILES["weights-1.bin"]
    assert os.listdir(dest.parent) == ["model"]


def test_a_mount_point_is_gone_on_with(s3: Remote, tmp_path: Path) -> None:
    """As where a pod starts again that had its model half."""
    with small_disk(tmp_path, mebibytes=64) as disk:
        kill_at_random(s3.resuming(s3.uri, disk), s3, SIZE, "mount")
        assert files_of(disk) == FILES
        assert sorted(os.listdir(disk)) == sorted({name.split("/")[0] for name in FILES})


def test_a_file_of_a_web_server_is_gone_on_with(web: Remote, dest: Path) -> None:
    size = len(FILES["weights-1.bin"])
    kill_at_random(web.resuming(web.one("weights-1.bin"), dest), web, size, "web")
    assert dest.read_bytes() == FILES["weights-1.bin"]


def test_a_model_of_the_hub_is_gone_on_with(model: Remote, dest: Path) -> None:
    kill_at_random(model.resuming(model.uri, dest), model, SIZE, "hub")
    assert files_of(dest) == FILES


@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
def test_killed_between_any_two_steps_it_never_believes_what_is_not_there(
    seaweedfs: SeaweedFS, shared_bucket: str, nursery: Nursery, dest: Path, durable: bool
) -> None:
    """Data come before notes, and no note is left when something else takes their place."""
    folder = f"resume-{uuid4().hex}"
    rng = random.Random(37)
    versions = [
        {"config.json": b"%d" % number, "a/b.bin": rng.randbytes(300 * KIB), "c": b""}
        for number in range(2)
    ]
    for number, files in enumerate(versions):
        for name, data in files.items():
            seaweedfs.put_raw(shared_bucket, f"{folder}/{number}/{name}", data)
    config = {
        "access_key_id": seaweedfs.access_key,
        "secret_access_key": seaweedfs.secret_key,
        "endpoint_url": seaweedfs.endpoint,
    }

    def order(number: int, **more: Any) -> Order:
        uri = f"s3://{shared_bucket}/{folder}/{number}"
        return Order(uri, str(dest), config, step=16 * KIB, durable=durable, **more)

    (whole,) = nursery.run(order(0))
    assert whole.error is None
    ticks = len(whole.ticks)
    state, died = 0, 0
    for tick in range(1, ticks, 1 if SOAK > 1 else 6):
        # The old tree is swapped with the new one, so that files of both have the same names.
        wanted = 1 - state
        for at in (tick, rng.randrange(1, ticks)):
            (outcome,) = nursery.run(order(wanted, tick=at))
            assert outcome.error is None, (at, outcome)
            died += outcome.signal is not None
            assert files_of(dest) in versions, at
        (outcome,) = nursery.run(order(wanted))
        assert (outcome.error, outcome.message) == (None, None), tick
        assert files_of(dest) == versions[wanted], tick
        assert os.listdir(dest.parent) == ["model"], tick
        state = wanted
    assert died


# -- what stands in the way ----------------------------------------------------------------


def test_if_nearly_all_had_come_hardly_anything_is_fetched_again(s3: Remote, dest: Path) -> None:
    download = s3.resuming(s3.one("weights-1.bin"), dest)
    size = len(FILES["weights-1.bin"])
    # The last bytes are counted before they are noted, and before anything is published.
    assert download.run(size) is None
    before = s3.paid()
    assert download.run() is not None
    assert dest.read_bytes() == FILES["weights-1.bin"]
    assert s3.paid() - before <= CONNECTIONS * PART


def test_an_object_that_changes_between_kills_begins_again(s3: Remote, dest: Path) -> None:
    rng = random.Random(31)
    download = s3.resuming(s3.uri, dest)
    files = dict(FILES)
    for _ in range(2 * SOAK):
        download.run(rng.randrange(MIB, 8 * MIB))
        # Of the same size: only its version tells.
        files["weights-1.bin"] = rng.randbytes(len(FILES["weights-1.bin"]))
        s3.change("weights-1.bin", files["weights-1.bin"])
        if dest.exists():
            shutil.rmtree(dest)
    download.run()
    assert files_of(dest) == files
    assert os.listdir(dest.parent) == ["model"]


@pytest.mark.parametrize("seed", range(4 * SOAK))
def test_a_damaged_journal_costs_bytes_and_nothing_else(s3: Remote, dest: Path, seed: int) -> None:
    rng = random.Random(seed)
    download = s3.resuming(s3.uri, dest)
    assert download.run(6 * MIB) is None
    (path,) = dest.parent.glob(".model.*.partial/journal")
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if seed % 2:
        del data[at:]
    else:
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    assert download.run() is not None
    assert files_of(dest) == FILES


@pytest.mark.parametrize("durable", [False, True], ids=["", "durable"])
def test_another_boot_believes_only_what_was_forced_to_disk(
    s3: Remote, dest: Path, durable: bool
) -> None:
    download = s3.resuming(s3.uri, dest, options={"durable": durable})
    assert download.run(8 * MIB, boot="the first") is None
    before = s3.paid()
    assert download.run(boot="the second") is not None
    assert files_of(dest) == FILES
    assert (s3.paid() - before < SIZE - MIB) == durable


def test_two_processes_at_once_end_with_one_whole_tree(s3: Remote, dest: Path) -> None:
    download = s3.resuming(s3.uri, dest)
    for number in range(2 * SOAK):
        assert download.run(6 * MIB) is None
        both = [
            download.start(gate=True),
            download.start(6 * MIB if number % 2 else None, gate=True),
        ]
        ends = ends_of(both)
        assert ends[0] == str(dest)
        assert files_of(dest) == FILES
        # What the one that was killed left is of no use to anybody, but to the next download.
        assert download.run() is not None
        assert files_of(dest) == FILES
        assert os.listdir(dest.parent) == ["model"]
        shutil.rmtree(dest)


@pytest.mark.parametrize("etag", [None, 'W/"v1"', '"v1"'])
def test_without_a_strong_etag_it_begins_again(
    odd_http: Callable[..., OddHTTP], dest: Path, etag: str | None
) -> None:
    data = FILES["weights-1.bin"]
    server = odd_http(StaticFile(data, etag=etag))
    remote = Remote(server.url, None, lambda: 0)
    download = remote.resuming(f"{server.url}/weights.bin", dest)
    assert download.run(4 * MIB) is None
    noted = [*dest.parent.glob(".*.partial/journal")]
    assert bool(noted) == (etag == '"v1"')
    assert download.run() is not None
    assert dest.read_bytes() == data
    assert os.listdir(dest.parent) == ["model"]


def test_the_journal_holds_no_secret(s3: Remote, seaweedfs: SeaweedFS, dest: Path) -> None:
    assert s3.resuming(s3.uri, dest).run(6 * MIB) is None
    (staging,) = (path.parent for path in dest.parent.glob(".model.*.partial/journal"))
    text = (staging / "journal").read_bytes() + str(everything_in(staging)).encode()
    assert s3.config is not None
    for secret in s3.config.values():
        assert secret.encode() not in text


def test_a_signed_url_is_gone_on_with_by_another_signature(
    seaweedfs: SeaweedFS, s3: Remote, shared_bucket: str, dest: Path
) -> None:
    key = f"{s3.uri.rpartition('/')[2]}/weights-1.bin"

    def download(expires: int) -> Resuming:
        url = seaweedfs.raw.generate_presigned_url(
            "get_object", Params={"Bucket": shared_bucket, "Key": key}, ExpiresIn=expires
        )
        return replace(s3.resuming(url, dest), config=None)

    assert download(600).run(4 * MIB) is None
    (staging,) = (path.parent for path in dest.parent.glob(".model.*.partial/journal"))
    assert b"ignature" not in (staging / "journal").read_bytes()
    events = download(601)
    assert events.run(4 * MIB) is not None, "it moves less than that, for the rest is here"
    assert dest.read_bytes() == FILES["weights-1.bin"]


# -- as large as life ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(SOAK))
def test_a_gibibyte_killed_ten_times_is_paid_for_once(
    seaweedfs: SeaweedFS, shared_bucket: str, tmp_path: Path, seed: int
) -> None:
    size, kills, connections, part = 1024 * MIB, 10, 16, 32 * MIB
    block = random.Random(seed).randbytes(MIB)
    # No two pieces are the same, so that none can be in another's place.
    data = b"".join(b"%07d" % number + block[7:] for number in range(size // MIB))
    key = f"resume-{uuid4().hex}.bin"
    seaweedfs.put_raw(shared_bucket, key, data)
    dest = tmp_path / "weights.bin"
    rng = random.Random(seed)
    with ExitStack() as stack:
        stack.callback(seaweedfs.raw.delete_object, Bucket=shared_bucket, Key=key)
        proxy = stack.enter_context(FaultProxy(seaweedfs.endpoint))
        config = {
            "access_key_id": seaweedfs.access_key,
            "secret_access_key": seaweedfs.secret_key,
            "endpoint_url": proxy.endpoint,
        }
        settings = {
            "cache_dir": "/nonexistent",
            "transfer": {"connections": connections, "part_size": part},
        }
        download = Resuming(f"s3://{shared_bucket}/{key}", str(dest), config, settings=settings)
        for _ in range(kills):
            assert download.run(rng.randrange(1, size // (kills + 1))) is None
        assert download.run() == str(dest)
        with open(dest, "rb") as file:
            assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(data).digest()
        assert proxy.bytes_down <= size + kills * connections * part
        # In fact it is what came since the last note, and what was under way.
        assert proxy.bytes_down <= size + kills * 96 * MIB
    assert os.listdir(tmp_path) == ["weights.bin"]
