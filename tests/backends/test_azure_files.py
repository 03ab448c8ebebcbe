"""Azure Files, by the unmodified SDK against a server of the tests; see there what it is."""

from __future__ import annotations

import gzip
import os
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from azure.core.credentials import AccessToken

from storage import (
    AuthenticationError,
    AzureConfig,
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    OfflineError,
    StorageClient,
    StorageError,
    UnsupportedOperation,
)
from storage.addresses import azure_account, azure_host
from storage.backends.azure import files
from storage.backends.azure.files import AzureFilesBackend, open_backend
from storage.backends.base import ByteRange, OpenOptions
from storage.config import Settings
from storage.errors import BucketMissingError, ObjectChangedError, TransferError
from storage.uri import parse_uri
from tests.servers.azure_files import ACCOUNT, KEY, TOKEN, AzureFiles
from tests.servers.odd_http import OddHTTP, Reply, Request

LARGE = os.urandom(9_500_000)
DEEP = "/".join(f"level{n}" for n in range(12))
FILES = {
    "config.json": b"{}",
    "empty": b"",
    "large.bin": LARGE,
    f"{DEEP}/deep.bin": b"deeper than five levels",
    "odd/naïve 100% [1] #x+y.txt": b"odd name",
}
URI = f"https://{ACCOUNT}.file.core.windows.net/models/m"


@pytest.fixture
def service(odd_http: Callable[..., OddHTTP]) -> AzureFiles:
    server = AzureFiles(odd_http(lambda request: Reply(500)))
    server.shares["models"] = {f"m/{path}": data for path, data in FILES.items()}
    server.shares["models"]["m-v2/config.json"] = b"of another model"
    return server


@pytest.fixture
def config(service: AzureFiles) -> AzureConfig:
    return AzureConfig(connection_string=service.connection_string)


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=Settings(transfer={"attempts": 2, "retry_wait": 0.01})) as client:
        yield client


def backend(config: AzureConfig, uri: str = URI) -> AzureFilesBackend:
    return open_backend(parse_uri(uri), config, OpenOptions())


def tree(path: str | Path) -> dict[str, bytes]:
    root = Path(path)
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def test_a_folder_is_downloaded_however_deep_it_is(
    client: StorageClient, config: AzureConfig, tmp_path: Path
) -> None:
    client.download(URI, tmp_path / "m", config=config)

    assert tree(tmp_path / "m") == FILES


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("large.bin", LARGE),
        ("empty", b""),
        ("odd/naïve%20100%25%20[1]%20%23x+y.txt", b"odd name"),
    ],
)
def test_a_file_is_downloaded(
    client: StorageClient, config: AzureConfig, path: str, content: bytes
) -> None:
    assert Path(client.download(f"{URI}/{path}", config=config)).read_bytes() == content


def test_a_compressed_file_stays_as_it_is_stored(
    service: AzureFiles, client: StorageClient, config: AzureConfig
) -> None:
    packed = gzip.compress(b"content")
    service.shares["models"]["m/packed.gz"] = packed
    service.encodings["m/packed.gz"] = "gzip"

    found = client.download(f"{URI}/packed.gz", config=config)

    assert Path(found).read_bytes() == packed


def test_a_repeat_fetches_no_file(service: AzureFiles, config: AzureConfig) -> None:
    with StorageClient() as first:
        path = first.download(URI, config=config)
    before = len(service.server.requests)
    with StorageClient() as second:
        assert second.download(URI, config=config) == path
        repeat = service.server.requests[before:]
        assert second.download(URI, config=config, offline=True) == path

    assert all(request.method == "HEAD" or "comp=list" in request.target for request in repeat)
    assert len(service.server.requests) == before + len(repeat)


def test_offline_nothing_is_asked(
    service: AzureFiles, client: StorageClient, config: AzureConfig
) -> None:
    with pytest.raises(OfflineError):
        client.download(URI, config=config, offline=True)

    assert not service.server.requests


def test_a_listing_of_many_pages_is_whole(
    service: AzureFiles, client: StorageClient, config: AzureConfig
) -> None:
    service.page = 2
    service.shares["models"] |= {f"m/many/{n:03}": b"x" for n in range(25)}

    found = client.list_objects(URI, config=config)

    assert found == sorted([*FILES, *(f"many/{n:03}" for n in range(25))])


def test_parts_of_a_file_are_read(client: StorageClient, config: AzureConfig) -> None:
    with client.open(f"{URI}/large.bin", config=config) as file:
        for start, size in ((0, 10), (4_194_300, 10), (9_499_990, 10), (1_000_000, 5_000_000)):
            file.seek(start)
            assert file.read(size) == LARGE[start : start + size]


def test_an_sas_in_the_config_or_in_the_uri_is_used(
    service: AzureFiles, client: StorageClient
) -> None:
    from azure.storage.fileshare import ShareSasPermissions, generate_share_sas

    token = generate_share_sas(
        ACCOUNT,
        "models",
        KEY,
        permission=ShareSasPermissions(read=True, list=True),
        expiry=datetime.now(UTC) + timedelta(hours=1),
    )
    config = AzureConfig(ACCOUNT, sas_token=token, endpoint_url=service.url)
    bare = AzureConfig(ACCOUNT, endpoint_url=service.url)

    assert client.list_objects(URI, config=config) == sorted(FILES)
    assert client.list_objects(f"{URI}?{token}", config=bare) == sorted(FILES)
    assert "sig=" not in str(parse_uri(f"{URI}?{token}"))
    unsigned = token[: token.index("sig=")]
    for signature in ("A" * 43 + "%3D", "not%AAA%3D"):
        with pytest.raises(AuthenticationError) as caught:
            client.list_objects(f"{URI}?{unsigned}sig={signature}", config=bare)
        assert "sig=" not in str(caught.value)


def test_a_connection_string_of_the_environment_counts_for_its_account(
    service: AzureFiles, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", service.connection_string)

    assert client.list_objects(URI) == sorted(FILES)
    other = parse_uri("https://otheraccount.file.core.windows.net/models")
    assert files._endpoint(other, None, "otheraccount") == (
        "https://otheraccount.file.core.windows.net"
    )


def test_a_token_goes_over_tls_only(service: AzureFiles, client: StorageClient) -> None:
    config = AzureConfig(ACCOUNT, token=TOKEN, endpoint_url=service.url)

    with pytest.raises(ConfigurationError, match="over https only"):
        client.list_objects(URI, config=config)
    assert not service.server.requests


def test_a_token_that_is_refused_is_renewed_once(
    odd_http: Callable[..., OddHTTP],
    client: StorageClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    service = AzureFiles(odd_http(lambda request: Reply(500), "127.0.0.1", tls))
    service.shares["models"]["m/config.json"] = b"{}"
    config = AzureConfig(
        ACCOUNT,
        managed_identity=True,
        endpoint_url=service.url,
        ca_bundle=tmp_path / "ca.pem",
    )
    given = iter(["expired", TOKEN])
    later = datetime.now(UTC) + timedelta(hours=1)

    class Identity:
        current = "expired"

        def get_token(self, *scopes: str) -> AccessToken:
            return AccessToken(next(given), int(later.timestamp()))

    # The identity's own service is tested with blobs; here it counts who is asked again.
    kept = [Identity()]
    monkeypatch.setattr("storage.backends.azure.tokens._credential", lambda *parts: kept[0])

    assert client.list_objects(URI, config=config) == ["config.json"]
    assert [one.headers["Authorization"] for one in service.server.requests][:2] == [
        "Bearer expired",
        f"Bearer {TOKEN}",
    ]


def test_wrong_credentials_fail_after_one_request(
    service: AzureFiles, client: StorageClient, tmp_path: Path
) -> None:
    wrong = AzureConfig(ACCOUNT, KEY[:-8] + "AAAAAAA=", endpoint_url=service.url)

    with pytest.raises(AuthenticationError, match="AuthenticationFailed"):
        client.download(URI, tmp_path / "m", config=wrong)

    assert len(service.server.requests) == 1
    assert not (tmp_path / "m").exists()


def test_nobody_is_logged_in_where_the_service_leads(
    service: AzureFiles,
    client: StorageClient,
    config: AzureConfig,
    odd_http: Callable[..., OddHTTP],
) -> None:
    other = odd_http(lambda request: Reply(500))
    service.before = lambda request: Reply(302, headers={"Location": f"{other.url}/x"})

    with pytest.raises(StorageError):
        client.list_objects(URI, config=config)
    assert not other.requests


def test_the_key_of_one_account_goes_to_no_other(
    service: AzureFiles, client: StorageClient, config: AzureConfig
) -> None:
    with pytest.raises(ConfigurationError, match="no credential is sent to another account"):
        client.list_objects("https://otheraccount.file.core.windows.net/models", config=config)
    assert not service.server.requests


def test_what_is_not_there_is_said(client: StorageClient, config: AzureConfig) -> None:
    root = URI.rpartition("/")[0]
    with pytest.raises(BucketMissingError):
        client.download(f"{root.rpartition('/')[0]}/other/m", config=config)
    for path in ("mm", "m/nothing", "m/no/folder/x", "m/config.json/x"):
        with pytest.raises(ModelMissingError):
            client.download(f"{root}/{path}", config=config)


def test_a_file_that_changes_is_noticed(service: AzureFiles, config: AzureConfig) -> None:
    share = backend(config)
    info = share.stat("m/large.bin")
    with share.read("m/large.bin", ByteRange(0, 9_000_000), info) as body:
        chunks = iter(body)
        assert bytes(next(chunks)) == LARGE[: 4 * 1024 * 1024]
        service.shares["models"]["m/large.bin"] = bytes(len(LARGE))
        with pytest.raises(ObjectChangedError):
            list(chunks)
    with pytest.raises(ObjectChangedError):
        share.read("m/large.bin", ByteRange(0, 10), info)
    share.close()


def test_bytes_that_were_damaged_on_their_way_are_refused(
    service: AzureFiles, client: StorageClient, config: AzureConfig, tmp_path: Path
) -> None:
    def damage(request: Request) -> Reply | None:
        if "large.bin" not in request.target or request.method != "GET":
            return None
        service.before = lambda request: None
        reply = service.answer(request)
        service.before = damage
        return Reply(reply.status, b"\0" + reply.body[1:], reply.headers)

    service.before = damage
    with pytest.raises(TransferError):
        client.download(URI, tmp_path / "m", config=config)
    assert not (tmp_path / "m").exists()


def test_a_busy_service_is_asked_again(
    service: AzureFiles, client: StorageClient, config: AzureConfig
) -> None:
    busy = iter([Reply(503, b"", {"x-ms-error-code": "ServerBusy"})])
    service.before = lambda request: next(busy, None)

    assert client.list_objects(URI, config=config) == sorted(FILES)


def test_nothing_is_written(client: StorageClient, config: AzureConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UnsupportedOperation):
        client.upload(tmp_path / "file", f"{URI}/file", config=config)
    with pytest.raises(UnsupportedOperation):
        client.delete_object(f"{URI}/config.json", config=config)


def test_keys_that_a_share_would_change_are_refused(config: AzureConfig) -> None:
    for key in ("m/../x", "m//x", "m/a\\b"):
        with pytest.raises(InvalidInput):
            backend(config).stat(key)


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("acct.file.core.windows.net", ("acct", "file", "windows.net")),
        ("acct.file.core.chinacloudapi.cn", ("acct", "file", "chinacloudapi.cn")),
        ("acct.z12.file.storage.azure.net", ("acct", "file", "z12.storage.azure.net")),
        ("acct.z1.blob.storage.azure.net", ("acct", "blob", "z1.storage.azure.net")),
    ],
)
def test_hosts_of_accounts_are_known(host: str, found: tuple[str, str, str]) -> None:
    assert azure_account(host) == found
    assert azure_host(found[0], found[1], found[2]) == host
    location = parse_uri(f"https://{host}/share/path")
    assert (location.account, location.domain, location.key) == (found[0], found[2], "path")
    assert parse_uri(str(location)) == location


@pytest.mark.parametrize(
    "uri",
    [
        "https://acct.file.core.windows.net.evil.example/share/m",
        "https://evil.example/https://acct.file.core.windows.net/share/m",
        "https://acct.file.core.windows.net@evil.example/share/m",
        "https://evil.example/acct.file.core.windows.net/share/m",
        "https://acctxfile.core.windows.net/share/m",
        "https://acct.z123.file.storage.azure.net/share/m",
        "http://acct.file.core.windows.net/share/m",
        "https://acct.file.core.windows.net:8443/share/m",
    ],
)
def test_a_host_that_looks_like_an_account_is_plain_http(uri: str) -> None:
    assert parse_uri(uri).type == "http"


def test_a_zone_s_blobs_are_asked_for_at_the_zone() -> None:
    from storage.backends.azure.credentials import find_access
    from storage.backends.network import Network

    location = parse_uri("https://acct.z12.blob.storage.azure.net/container/m")
    access = find_access(location, AzureConfig("acct", KEY), Network(), {})

    assert access.endpoint == "https://acct.z12.blob.storage.azure.net"


def test_an_error_s_message_is_one_line(
    service: AzureFiles, client: StorageClient, config: AzureConfig
) -> None:
    service.before = lambda request: Reply(400, b"a\nb\nc", {"x-ms-error-code": "InvalidUri"})

    with pytest.raises(StorageError) as caught:
        client.list_objects(URI, config=config)
    assert "\n" not in str(caught.value)
