"""Who asks, and what goes wrong: accounts side by side, and one clear error for each failure."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage import (
    AuthenticationError,
    BucketMissingError,
    ConfigurationError,
    ModelMissingError,
    S3Config,
    Storage,
    StorageClient,
    StorageError,
    UnreachableError,
    UnsupportedScheme,
)
from storage.config import load_settings
from tests.facade.stores import S3Store, Store, needs, s3_config
from tests.servers import CountingProxy, Keys, SeaweedFS, free_port

MakeProxy = Callable[[str], CountingProxy]
DRIVERS = ("obstore", "fsspec")
STRANGER = Keys("AKIDSTRANGER", "secret-of-a-stranger")


def test_two_accounts_in_one_process(
    seaweedfs: SeaweedFS, readable_bucket: str, shared_bucket: str, prefix: str, out: Path
) -> None:
    seaweedfs.put_raw(readable_bucket, "model.bin", b"readable")
    seaweedfs.put_raw(shared_bucket, f"{prefix}/model.bin", b"private")
    before = dict(os.environ)
    barrier = threading.Barrier(4)

    def use(item: tuple[str, str]) -> list[str]:
        who, driver = item
        keys = {"admin": seaweedfs.admin, "reader": seaweedfs.reader}[who]
        config = s3_config(seaweedfs, driver, keys)
        barrier.wait(30)
        said = []
        for number in range(5):
            place = out / f"{who}-{driver}-{number}"
            for bucket, path in (
                (readable_bucket, "model.bin"),
                (shared_bucket, f"{prefix}/model.bin"),
            ):
                try:
                    found = Storage.download(
                        f"s3://{bucket}/{path}", f"{place}-{bucket}", config=config
                    )
                    said.append(Path(found).read_text())
                except AuthenticationError:
                    said.append("denied")
            try:
                Storage.upload(__file__, f"s3://{readable_bucket}/{who}-{driver}", config=config)
                said.append("written")
            except AuthenticationError:
                said.append("not written")
        return said

    with ThreadPoolExecutor(4) as pool:
        who = [(name, driver) for name in ("admin", "reader") for driver in DRIVERS]
        said = dict(zip(who, pool.map(use, who), strict=True))
    for (name, _), words in said.items():
        expected = {
            "admin": ["readable", "private", "written"],
            "reader": ["readable", "denied", "not written"],
        }[name]
        assert words == expected * 5
    assert dict(os.environ) == before


def test_settings_choose_the_account_by_the_longest_prefix(
    seaweedfs: SeaweedFS, readable_bucket: str, out: Path
) -> None:
    seaweedfs.put_raw(readable_bucket, "team/model.bin", b"t")
    seaweedfs.put_raw(readable_bucket, "other/model.bin", b"o")

    def store(prefix: str, keys: Keys) -> dict[str, object]:
        return {
            "prefix": prefix,
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "endpoint_url": seaweedfs.endpoint,
        }

    settings = load_settings(
        stores={
            "all": store(f"s3://{readable_bucket}/", STRANGER),
            "team": store(f"s3://{readable_bucket}/team/", seaweedfs.reader),
        }
    )
    with StorageClient(settings=settings) as client:
        assert client.download(f"s3://{readable_bucket}/team/model.bin", out / "a")
        with pytest.raises(AuthenticationError):
            client.download(f"s3://{readable_bucket}/other/model.bin", out / "b")
        # What the call says goes before.
        config = s3_config(seaweedfs, "obstore")
        assert client.download(f"s3://{readable_bucket}/other/model.bin", out / "b", config=config)


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_ambient_chain_is_used_without_a_config(
    make_store: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    store = make_store(f"seaweedfs-{driver}")
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", b"weights")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.server.secret_key)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.server.endpoint)
    configs: tuple[S3Config | None, ...] = (S3Config(driver=driver), None)  # type: ignore[arg-type]
    for config in configs:
        with StorageClient(config) as client:
            path = client.download(store.uri("model.bin"))
            assert Path(path).read_bytes() == b"weights"


def test_a_dict_serves_as_a_config(make_store: Callable[[str], Store]) -> None:
    store = make_store("seaweedfs-obstore")
    assert isinstance(store, S3Store)
    store.put_raw("model.bin", b"weights")
    fields = {
        "access_key_id": store.server.access_key,
        "secret_access_key": store.server.secret_key,
        "endpoint_url": store.server.endpoint,
    }
    assert Path(Storage.download(store.uri("model.bin"), config=fields)).read_bytes() == b"weights"
    with pytest.raises(ConfigurationError):
        Storage.download(store.uri("model.bin"), config={"acces_key_id": "x"})


# -- one attempt, one error ------------------------------------------------------------------


@needs("S3")
@pytest.mark.parametrize("path", ["model.bin", "tree/"])
def test_wrong_credentials_are_one_attempt(
    store: Store, counting_proxy: MakeProxy, out: Path, path: str
) -> None:
    if store.name.startswith("moto"):
        return  # it checks no signatures; SeaweedFS does
    assert isinstance(store, S3Store)
    store.put_all({"model.bin": b"weights", "tree/f": b"1"})
    proxy = counting_proxy(store.server.endpoint)
    config = s3_config(store.server, store.driver, STRANGER, proxy.endpoint)
    with pytest.raises(AuthenticationError) as caught:
        Storage.download(store.uri(path), out / "a", config=config)
    check_message(caught.value)
    assert proxy.count() == 1
    assert os.listdir(out) == []


@needs("S3")
@pytest.mark.parametrize("path", ["absent.bin", "absent/"])
def test_a_missing_key_is_asked_for_once(
    store: Store, counting_proxy: MakeProxy, out: Path, path: str
) -> None:
    assert isinstance(store, S3Store)
    proxy = counting_proxy(store.server.endpoint)
    with pytest.raises(ModelMissingError) as caught:
        Storage.download(store.uri(path), out / "a", config=store.through(proxy.endpoint))
    check_message(caught.value)
    # As an object, and then as a tree.
    assert proxy.count() == (1 if path.endswith("/") else 2)
    assert len({(request.method, request.path) for request in proxy.requests}) == proxy.count()
    assert os.listdir(out) == []


@needs("S3")
def test_a_missing_bucket_is_asked_for_once(
    store: Store, counting_proxy: MakeProxy, out: Path
) -> None:
    assert isinstance(store, S3Store)
    proxy = counting_proxy(store.server.endpoint)
    with pytest.raises(BucketMissingError) as caught:
        Storage.download("s3://no-such-bucket/m", out / "a", config=store.through(proxy.endpoint))
    check_message(caught.value)
    assert 1 <= proxy.count() <= 2
    assert os.listdir(out) == []


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_unreachable_store_is_its_own_error(out: Path, driver: str) -> None:
    config = S3Config(
        *STRANGER,
        endpoint_url=f"http://127.0.0.1:{free_port()}",
        driver=driver,  # type: ignore[arg-type]
    )
    with StorageClient(config, load_settings(transfer={"attempts": 2})) as client:
        for path in ("model.bin", "tree/"):
            with pytest.raises(UnreachableError) as caught:
                client.download(f"s3://bucket/{path}", out / "a")
            check_message(caught.value)
            assert "2 times" in str(caught.value)
    assert os.listdir(out) == []


def check_message(error: StorageError) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert STRANGER.secret_key not in text
    assert "X-Amz-" not in text
    assert len(text) < 1000


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_store_that_fails_once_is_asked_again(
    make_store: Callable[[str], Store], out: Path, driver: str
) -> None:
    store = make_store(f"seaweedfs-{driver}")
    assert isinstance(store, S3Store)
    store.put_all({f"tree/{number}": b"%d" % number for number in range(5)})
    # Every third answer is a failure of the kind that passes.
    with CountingProxy(
        store.server.endpoint, lambda number, method, path: 503 if number % 3 == 0 else None
    ) as proxy:
        path = Storage.download(store.uri("tree"), out / "t", config=store.through(proxy.endpoint))
        assert any(request.status == 503 for request in proxy.requests)
    assert len(os.listdir(path)) == 5


def test_an_unknown_scheme_is_named(out: Path) -> None:
    with pytest.raises(UnsupportedScheme, match="nosuch"):
        Storage.download("nosuch://bucket/m", out / "a")
    assert os.listdir(out) == []


def test_a_config_for_another_kind_of_store_is_refused(
    make_store: Callable[[str], Store], out: Path
) -> None:
    with pytest.raises(ConfigurationError):
        Storage.download("pvc://claim/m", out / "a", config=S3Config("a", "b"))
    with pytest.raises(ConfigurationError):
        Storage.download(make_store("file").uri("m"), out / "a", config=S3Config("a", "b"))
    assert os.listdir(out) == []
