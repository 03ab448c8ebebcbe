"""Keys, SAS tokens and no credentials at all, by both drivers against Azurite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, OpenOptions, bytes_payload
from storage.config import AzureConfig
from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    ModelMissingError,
    UnsupportedOperation,
)
from storage.uri import parse_uri
from tests.backends.azure_support import check_use, read
from tests.servers.azurite import Azurite

Driver = Literal["obstore", "fsspec"]
Opener = Callable[..., Backend]


@pytest.fixture(params=["obstore", "fsspec"])
def driver(request: pytest.FixtureRequest) -> Driver:
    found: Driver = request.param
    return found


@pytest.fixture
def opened(driver: Driver) -> Iterator[Opener]:
    """Open backends of the driver under test, closed after the test."""
    backends: list[Backend] = []

    def opener(uri: str, *arguments: Any, **fields: Any) -> Backend:
        config = AzureConfig(*arguments, driver=driver, **fields)
        backends.append(open_backend(parse_uri(uri), config, OpenOptions()))
        return backends[-1]

    yield opener
    for backend in backends:
        backend.close()


# --- keys, SAS tokens and none ---------------------------------------------------------------


def test_account_key(azurite: Azurite, azurite_container: str, opened: Opener) -> None:
    check_use(
        opened(f"azure://{azurite_container}", *azurite.main, endpoint_url=azurite.account_url())
    )


def test_connection_string(azurite: Azurite, azurite_container: str, opened: Opener) -> None:
    text = azurite.connection_string()
    check_use(opened(f"azure://{azurite_container}", connection_string=text))


def test_connection_string_with_a_sas(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    text = f"BlobEndpoint={azurite.account_url()};SharedAccessSignature={azurite.sas()}"
    check_use(opened(f"azure://{azurite_container}", connection_string=text))


def test_sas_token(azurite: Azurite, azurite_container: str, opened: Opener) -> None:
    check_use(
        opened(
            f"azure://{azurite_container}",
            sas_token=azurite.sas(),
            endpoint_url=azurite.account_url(),
        )
    )


def test_sas_in_the_url(azurite: Azurite, azurite_container: str, opened: Opener) -> None:
    uri = f"https://{azurite.main.name}.blob.core.windows.net/{azurite_container}/m?{azurite.sas()}"
    # A key that would be refused: what the URL brings along goes first.
    check_use(opened(uri, account_key="d3Jvbmc=", endpoint_url=azurite.account_url()))


def test_sas_for_one_blob_is_enough_to_read_it(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    from azure.storage.blob import generate_blob_sas

    azurite.put_raw(azurite_container, "m/a", b"12345")
    azurite.put_raw(azurite_container, "m/ab", b"secret")
    sas = generate_blob_sas(
        azurite.main.name,
        azurite_container,
        "m/a",
        account_key=azurite.main.key,
        permission="r",
        expiry=datetime.now(UTC) + timedelta(hours=1),
    )
    uri = f"https://{azurite.main.name}.blob.core.windows.net/{azurite_container}/m/a?{sas}"
    backend = opened(uri, endpoint_url=azurite.account_url())
    assert backend.stat("m/a").size == 5
    assert read(backend, "m/a") == b"12345"
    for refused in (
        lambda: backend.stat("m/ab"),
        lambda: list(backend.list("m/")),
        lambda: backend.write("m/a", bytes_payload(b"x")),
        lambda: backend.delete(["m/a"]),
    ):
        with pytest.raises(AuthenticationError) as caught:
            refused()
        assert "sig=" not in str(caught.value)


def test_public_container_without_credentials(azurite: Azurite, opened: Opener) -> None:
    with azurite.container("public-models", public=True) as container:
        azurite.put_raw(container, "m/a", b"12345")
        backend = opened(f"azure://{container}", anonymous=True, endpoint_url=azurite.account_url())
        assert [info.key for info in backend.list()] == ["m/a"]
        assert backend.stat("m/a").size == 5
        assert read(backend, "m/a") == b"12345"
        files, path = backend.filesystem()
        assert files.cat_file(f"{path}/m/a") == b"12345"
        with pytest.raises((AuthenticationError, ModelMissingError)):
            backend.write("m/b", bytes_payload(b"x"))
        assert backend.capabilities.sign is False
        with pytest.raises(UnsupportedOperation):
            backend.sign("m/a", "GET", 60)


def test_private_container_says_nothing_to_strangers(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    azurite.put_raw(azurite_container, "a", b"1")
    backend = opened(
        f"azure://{azurite_container}", anonymous=True, endpoint_url=azurite.account_url()
    )
    # Azure says "not there" to those who may not know.
    for refused in (lambda: backend.stat("a"), lambda: read(backend, "a")):
        with pytest.raises((AuthenticationError, ModelMissingError)):
            refused()


@pytest.mark.parametrize("operation", ["stat", "read", "list", "write", "copy", "delete"])
def test_wrong_key_is_refused(
    azurite: Azurite, azurite_container: str, opened: Opener, operation: str
) -> None:
    azurite.put_raw(azurite_container, "a", b"1")
    backend = opened(
        f"azure://{azurite_container}",
        azurite.main.name,
        azurite.other.key,
        endpoint_url=azurite.account_url(),
    )
    calls: dict[str, Callable[[], object]] = {
        "stat": lambda: backend.stat("a"),
        "read": lambda: read(backend, "a"),
        "list": lambda: list(backend.list()),
        "write": lambda: backend.write("b", bytes_payload(b"1")),
        "copy": lambda: backend.copy("a", "b"),
        "delete": lambda: backend.delete(["a"]),
    }
    with pytest.raises(AuthenticationError) as caught:
        calls[operation]()
    assert len(str(caught.value).splitlines()) == 1
    assert azurite.keys_raw(azurite_container) == ["a"]


def test_key_that_is_no_key_is_refused(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    backend = opened(
        f"azure://{azurite_container}",
        azurite.main.name,
        "not base64!",
        endpoint_url=azurite.account_url(),
    )
    with pytest.raises(Exception, match="azure") as caught:
        backend.stat("a")
    assert type(caught.value).__module__ == "storage.errors"
    assert "not base64!" not in str(caught.value)


def test_expired_sas_is_refused(azurite: Azurite, azurite_container: str, opened: Opener) -> None:
    sas = azurite.sas(
        start=datetime.now(UTC) - timedelta(hours=2), expiry=datetime.now(UTC) - timedelta(hours=1)
    )
    azurite.put_raw(azurite_container, "a", b"1")
    backend = opened(
        f"azure://{azurite_container}", sas_token=sas, endpoint_url=azurite.account_url()
    )
    for refused in (
        lambda: backend.stat("a"),
        lambda: read(backend, "a"),
        lambda: list(backend.list()),
    ):
        with pytest.raises(AuthenticationError) as caught:
            refused()
        assert "sig=" not in str(caught.value)


def test_two_accounts_in_one_process(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    with azurite.container(azurite_container, account=azurite.other):
        mine = opened(
            f"azure://{azurite_container}", *azurite.main, endpoint_url=azurite.account_url()
        )
        theirs = opened(
            f"azure://{azurite_container}",
            *azurite.other,
            endpoint_url=azurite.account_url(azurite.other),
        )
        mine.write("a", bytes_payload(b"mine"))
        theirs.write("a", bytes_payload(b"theirs"))
        assert (read(mine, "a"), read(theirs, "a")) == (b"mine", b"theirs")
        assert azurite.get_raw(azurite_container, "a") == b"mine"
        assert azurite.get_raw(azurite_container, "a", azurite.other) == b"theirs"


# --- the rest --------------------------------------------------------------------------------


def test_missing_container_is_told_from_a_missing_blob(azurite: Azurite, opened: Opener) -> None:
    backend = opened("azure://nowhere", *azurite.main, endpoint_url=azurite.account_url())
    with pytest.raises(BucketMissingError):
        list(backend.list())
    with pytest.raises(ModelMissingError):
        backend.stat("a")


def test_pandas_and_pyarrow_read_by_the_file_system(
    azurite: Azurite, azurite_container: str, opened: Opener
) -> None:
    import pandas
    import pyarrow.fs

    azurite.put_raw(azurite_container, "data/t.csv", b"a,b\n1,2\n3,4\n")
    backend = opened(
        f"azure://{azurite_container}", *azurite.main, endpoint_url=azurite.account_url()
    )
    files, path = backend.filesystem()
    with closing(files.open(f"{path}/data/t.csv")) as file:
        assert pandas.read_csv(file)["b"].tolist() == [2, 4]
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files))
    with arrow.open_input_file(f"{path}/data/t.csv") as file:
        file.seek(4)
        assert file.read(3) == b"1,2"
    backend.close()
    assert files.exists(f"{path}/data/t.csv"), "it outlives the backend"
