"""Downloads over HTTP by the public client, from servers good and odd."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from storage.backends.http.backend import HTTPBackend
from storage.client import StorageClient
from storage.config import HTTPConfig
from storage.errors import (
    IntegrityError,
    ObjectChangedError,
    TransferError,
)
from storage.testing.conformance_support import content
from tests.backends.http_support import empty, fast_client
from tests.servers import CountingProxy
from tests.servers.nginx_http import NginxHTTP, put_file
from tests.servers.odd_http import Handler, OddHTTP, Reply, Request, StaticFile

PART = 64 * 1024
SIZE = 10 * PART + 7
DATA = content(SIZE)
OLD = formatdate(1_700_000_000, usegmt=True)


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with fast_client() as client:
        yield client


@pytest.fixture
def nginx(nginx_http: NginxHTTP) -> Iterator[NginxHTTP]:
    yield nginx_http
    empty(nginx_http.data)


def fetched(client: StorageClient, url: str, out: Path) -> bytes:
    return Path(client.download(url, out / "file")).read_bytes()


def test_large_file_comes_in_parallel_ranges(
    nginx: NginxHTTP,
    client: StorageClient,
    tmp_path: Path,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    put_file(nginx.data, "m/model.bin", DATA)
    proxy = counting_proxy(nginx.endpoint)
    assert fetched(client, f"{proxy.endpoint}/m/model.bin", tmp_path) == DATA
    assert [one.status for one in proxy.requests] == [200] + [206] * 11
    assert proxy.count("HEAD") == 1


def test_ranges_overlap_in_time(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    file = StaticFile(DATA)
    together = threading.Barrier(4, timeout=60)
    first = iter(range(4))

    def handler(request: Request) -> Reply:
        # The first four ranges are answered only when four are being asked for.
        if request.span is not None and next(first, None) is not None:
            together.wait()
        return file(request)

    assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) == DATA


def test_every_range_is_pinned_to_the_etag(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    assert {one.headers["If-Match"] for one in server.asked("GET")} == {'"v1"'}


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_old_time_of_modification_pins_as_well(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, etag: str | None
) -> None:
    server = odd_http(StaticFile(DATA, etag=etag, modified=OLD, conditions=False))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    assert len(server.asked("GET")) == 11
    assert {one.headers["If-Unmodified-Since"] for one in server.asked("GET")} == {OLD}


@pytest.mark.parametrize(
    "file",
    [
        lambda: StaticFile(DATA, ranges=False),
        lambda: StaticFile(DATA, etag=None),
        lambda: StaticFile(DATA, etag='W/"v1"'),
        # Made when the test runs: an older one is a strong validator.
        lambda: StaticFile(DATA, etag=None, modified=formatdate(usegmt=True)),
    ],
    ids=["no-ranges", "no-validator", "weak-etag", "changed-just-now"],
)
def test_without_ranges_or_a_strong_validator_it_is_one_stream(
    odd_http: Callable[..., OddHTTP],
    client: StorageClient,
    tmp_path: Path,
    file: Callable[[], StaticFile],
) -> None:
    server = odd_http(file())
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    assert [one.headers.get("Range") for one in server.asked("GET")] == [None]


def test_stream_that_breaks_goes_on_where_it_stopped(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA, cuts=[100_000, 200_000, 0, 0]))
    with fast_client(part_size=1024 * 1024) as client:
        assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    ranges = [one.headers.get("Range") for one in server.asked("GET")]
    assert ranges[:2] == [None, f"bytes=100000-{SIZE - 1}"]
    assert ranges[2] == f"bytes=300000-{SIZE - 1}"
    assert len(ranges) == 5


def test_broken_ranges_go_on_where_they_stopped(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA, cuts=[1000, 2000, 3000, 4000]))
    with fast_client(connections=1) as client:
        assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    starts = [one.span[0] for one in server.asked("GET") if one.span is not None]
    assert starts == [0, 1000, 3000, 6000, 10_000, *range(PART, SIZE, PART)]


def test_stream_that_stalls_goes_on_elsewhere(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    file = StaticFile(DATA)
    done = threading.Event()

    def handler(request: Request) -> Reply:
        reply = file(request)
        # All that begin: one may be given up before a byte of it has come.
        if request.method == "GET" and request.span is None:
            reply.cut, reply.stall = 300_000, done
        return reply

    server = odd_http(handler)
    try:
        config = HTTPConfig(read_timeout=0.3)
        with fast_client(config, part_size=1024 * 1024, attempts=20) as client:
            assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    finally:
        done.set()
    starts = [one.span[0] for one in server.asked("GET") if one.span is not None]
    assert 0 < starts[0] <= 300_000


@pytest.mark.parametrize(
    "file",
    [StaticFile(DATA, ranges=False), StaticFile(DATA, etag=None)],
    ids=["no-ranges", "no-validator"],
)
def test_stream_that_cannot_go_on_begins_again(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, file: StaticFile
) -> None:
    file.cuts = [100_000, 50_000]
    server = odd_http(file)
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    assert [one.headers.get("Range") for one in server.asked("GET")] == [None] * 3


@pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
def test_refused_head_is_replaced_by_a_get_of_one_byte(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, status: int
) -> None:
    server = odd_http(StaticFile(DATA, head=status))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    spans = [one.span for one in server.asked("GET")]
    assert spans[0] == (0, 0)
    assert len(spans) == 12


def test_head_without_a_length_is_replaced_too(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA, head_length=False))
    assert client.get_object_metadata(f"{server.url}/m.bin")["size"] == SIZE
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA


def test_head_that_says_zero_is_not_believed(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    file = StaticFile(DATA)

    def handler(request: Request) -> Reply:
        return Reply(headers={"ETag": '"v1"'}) if request.method == "HEAD" else file(request)

    assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) == DATA


@pytest.mark.parametrize("ranges", [True, False])
def test_empty_file_is_a_file(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, ranges: bool
) -> None:
    server = odd_http(StaticFile(b"", ranges=ranges))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == b""


def test_unannounced_ranges_of_a_large_file_are_found(
    odd_http: Callable[..., OddHTTP], tmp_path: Path
) -> None:
    data = content(5 * 1024 * 1024)
    server = odd_http(StaticFile(data, announce=False))
    with fast_client(part_size=1024 * 1024) as client:
        assert fetched(client, f"{server.url}/m.bin", tmp_path) == data
    assert server.asked("GET")[0].span == (0, 0)
    assert len(server.asked("GET")) == 6


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until-the-connection-ends"])
def test_body_of_unknown_length_arrives_whole(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path, chunked: bool
) -> None:
    server = odd_http(lambda request: Reply(200, DATA, chunked=chunked, length=-1))
    assert client.get_object_metadata(f"{server.url}/m.bin")["size"] is None
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA


def test_chunked_body_that_is_cut_is_no_file(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(lambda request: Reply(200, DATA, chunked=True, cut=100_000))
    with pytest.raises(TransferError, match="connection broke"):
        client.download(f"{server.url}/m.bin", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_body_shorter_than_its_length_is_no_file(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(lambda request: Reply(200, DATA, length=SIZE + 10))
    with pytest.raises(TransferError):
        client.download(f"{server.url}/m.bin", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_file_replaced_midway_is_fetched_anew(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    new = content(SIZE, 1)
    file = StaticFile(DATA)
    seen = iter(range(1000))

    def handler(request: Request) -> Reply:
        if request.method == "GET" and next(seen) == 5:
            file.data, file.etag = new, '"v2"'
        return file(request)

    assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) == new


def test_file_replaced_midway_is_noticed_where_conditions_are_ignored(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    new = content(SIZE, 1)
    file = StaticFile(DATA, conditions=False)
    seen = iter(range(1000))

    def handler(request: Request) -> Reply:
        if request.method == "GET" and next(seen) == 5:
            file.data, file.etag = new, '"v2"'
        return file(request)

    assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) == new


def test_parts_without_an_identity_are_not_put_together(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    file = StaticFile(DATA)

    def handler(request: Request) -> Reply:
        file.etag = '"v1"' if request.method == "HEAD" or request.span is None else None
        file.conditions = False
        return file(request)

    server = odd_http(handler)
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    assert server.asked("GET")[-1].span is None


@pytest.mark.parametrize("part_size", [PART, 2 * SIZE], ids=["parts", "stream"])
def test_whole_body_without_an_identity_is_not_put_after_a_part(
    odd_http: Callable[..., OddHTTP], tmp_path: Path, part_size: int
) -> None:
    new = content(SIZE, 1)
    file = StaticFile(DATA, cuts=[PART])
    other = StaticFile(new, etag=None, ranges=False, conditions=False)
    cut = threading.Event()

    def handler(request: Request) -> Reply:
        # Another machine behind the same address: it has a newer file, and no ETag, no ranges.
        if request.method == "GET" and cut.is_set():
            return other(request)
        if request.method == "GET":
            cut.set()
        return file(request)

    with fast_client(part_size=part_size) as client:
        assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) == new


def test_opened_file_is_not_read_on_in_a_body_without_an_identity(
    odd_http: Callable[..., OddHTTP], client: StorageClient
) -> None:
    file = StaticFile(DATA, ranges=False)
    server = odd_http(file)
    with client.open(f"{server.url}/m.bin") as opened:
        opened.seek(SIZE // 2)
        assert opened.read(7) == DATA[SIZE // 2 :][:7]
        server.handler = StaticFile(content(SIZE, 1), etag=None, ranges=False, conditions=False)
        opened.seek(0)
        with pytest.raises(ObjectChangedError):
            opened.read()


def test_identity_that_only_head_tells_is_none(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    silent = StaticFile(DATA, etag=None, conditions=False)
    told = StaticFile(DATA)
    server = odd_http(lambda one: told(one) if one.method == "HEAD" else silent(one))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    last = server.asked("GET")[-1]
    assert (last.span, last.headers["If-Match"]) == (None, None)


def test_range_that_is_not_there_any_more_means_another_file(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    new = DATA[:PART]
    file = StaticFile(DATA)
    seen = iter(range(1000))

    def handler(request: Request) -> Reply:
        if request.method == "GET" and next(seen) == 3:
            file.data, file.conditions, file.etag = new, False, None
        reply = file(request)
        return Reply(416) if reply.status == 416 else reply

    assert fetched(client, f"{odd_http(handler).url}/m.bin", tmp_path) == new


@pytest.mark.parametrize("size", [SIZE, 20 * 1024 * 1024], ids=["small", "large"])
def test_announced_ranges_that_are_not_served_become_one_stream(
    odd_http: Callable[..., OddHTTP], tmp_path: Path, size: int
) -> None:
    data = content(size)
    file = StaticFile(data, ranges=False, headers={"Accept-Ranges": "bytes"})
    server = odd_http(file)
    with fast_client(part_size=2 * 1024 * 1024, connections=1) as client:
        assert fetched(client, f"{server.url}/m.bin", tmp_path) == data


def test_digest_of_the_server_is_checked(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    right, wrong = hashlib.sha256(DATA).hexdigest(), hashlib.sha256(b"other").hexdigest()
    server = odd_http(StaticFile(DATA, headers={"X-Checksum-Sha256": right}))
    assert fetched(client, f"{server.url}/m.bin", tmp_path) == DATA
    assert client.get_object_metadata(f"{server.url}/m.bin")["digests"] == {"sha256": right}
    server = odd_http(StaticFile(DATA, headers={"X-Checksum-Sha256": wrong}))
    with pytest.raises(IntegrityError, match="the store says sha256:"):
        client.download(f"{server.url}/m.bin", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_expected_digest_in_the_url_is_checked_and_never_sent(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA))
    digest = hashlib.sha256(DATA).hexdigest()
    assert fetched(client, f"{server.url}/m.bin?a=1#sha256={digest}", tmp_path) == DATA
    assert {one.target for one in server.requests} == {"/m.bin?a=1"}
    with pytest.raises(IntegrityError):
        client.download(f"{server.url}/m.bin?a=1#sha256={'0' * 64}", tmp_path / "wrong")


def test_opened_file_is_read_by_ranges(
    nginx: NginxHTTP,
    client: StorageClient,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    data = content(8 * 1024 * 1024)
    put_file(nginx.data, "m.bin", data)
    proxy = counting_proxy(nginx.endpoint)
    with client.open(f"{proxy.endpoint}/m.bin") as file:
        file.seek(-100, 2)
        assert file.read() == data[-100:]
        file.seek(5)
        assert file.read(10) == data[5:15]
    assert [one.status for one in proxy.requests] == [200, 206, 206]


@pytest.mark.parametrize(
    "handler",
    [
        StaticFile(DATA, ranges=False),
        lambda request: Reply(200, DATA, chunked=True),
        StaticFile(gzip.compress(DATA), headers={"Content-Encoding": "gzip"}),
    ],
    ids=["no-ranges", "no-length", "coded"],
)
def test_opened_file_can_seek_even_where_there_are_no_ranges(
    odd_http: Callable[..., OddHTTP], client: StorageClient, handler: Handler
) -> None:
    with client.open(f"{odd_http(handler).url}/m") as file:
        file.seek(-100, 2)
        assert file.read() == DATA[-100:]
        file.seek(5)
        assert file.read(10) == DATA[5:15]


def test_second_download_into_the_cache_fetches_no_body(
    odd_http: Callable[..., OddHTTP], client: StorageClient
) -> None:
    server = odd_http(StaticFile(DATA))
    first = client.download(f"{server.url}/m.bin")
    server.clear()
    assert client.download(f"{server.url}/m.bin") == first
    assert [one.method for one in server.requests] == ["HEAD"]


def test_urls_of_one_host_share_a_backend(
    odd_http: Callable[..., OddHTTP], client: StorageClient
) -> None:
    from storage.uri import parse_uri

    url = odd_http(StaticFile(DATA)).url
    one, other, signed = (
        client.backend(parse_uri(f"{url}/{path}")) for path in ("a", "b/c", "a?sig=1")
    )
    assert isinstance(one, HTTPBackend)
    assert one is other
    assert one is not signed


def test_requests_share_their_connections(
    odd_http: Callable[..., OddHTTP], client: StorageClient, tmp_path: Path
) -> None:
    server = odd_http(StaticFile(DATA))
    for number in range(5):
        client.download(f"{server.url}/m.bin", tmp_path / str(number))
    assert len(server.requests) == 5 * 12
    assert server.connections <= 4


def test_answer_that_is_not_read_on_frees_its_connection(
    odd_http: Callable[..., OddHTTP], client: StorageClient
) -> None:
    server = odd_http(StaticFile(content(8 * 1024 * 1024), head=403, ranges=False))
    for _ in range(5):
        assert client.get_object_metadata(f"{server.url}/m.bin")["size"] == 8 * 1024 * 1024
    # The whole file was on its way each time; the connection was given up instead.
    assert server.connections == 5
