"""A mirror of 2,000 objects from S3 to Azure by a Dask cluster, also when a worker is killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage import AzureConfig, MirrorError, S3Config, StorageOperations
from storage.client.mirror.batch import Batch
from storage.transfer import progress
from storage.transfer.progress import Progress
from tests.facade.mirror.support import die_midway, wait_midway
from tests.facade.stores import s3_config
from tests.servers import SeaweedFS
from tests.servers.azurite import Azurite

pytestmark = pytest.mark.slow

OBJECTS = 2000
THREADS = 8


@dataclass(frozen=True)
class Origin:
    """The objects in S3, as they were written there by boto3."""

    uri: str
    config: S3Config
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def origin(seaweedfs: SeaweedFS, shared_bucket: str) -> Iterator[Origin]:
    noise = os.urandom(16 * 1024)
    files = {
        f"shard-{number % 10}/{number:04}.bin": noise[number : number + 200 + 37 * number % 8000]
        for number in range(OBJECTS)
    }
    first, *rest = files.items()
    seaweedfs.put_raw(shared_bucket, f"fleet/{first[0]}", first[1])
    with ThreadPoolExecutor(THREADS) as pool:
        list(
            pool.map(
                lambda file: seaweedfs.put_raw(shared_bucket, f"fleet/{file[0]}", file[1]), rest
            )
        )
    config = s3_config(seaweedfs, "obstore")
    uri = f"s3://{shared_bucket}/fleet"
    yield Origin(uri, config, files)
    StorageOperations.delete_object(uri, config=config, recursive=True)


@dataclass
class Target:
    """A container of Azure's, looked at with Azure's own SDK."""

    uri: str
    config: AzureConfig
    client: Any

    def names(self) -> list[str]:
        return list(self.client.list_blob_names())

    def content(self) -> dict[str, bytes]:
        names = self.names()
        with ThreadPoolExecutor(THREADS) as pool:
            bodies = pool.map(lambda name: self.client.download_blob(name).readall(), names)
            return dict(zip(names, bodies, strict=True))


@pytest.fixture
def target(azurite: Azurite, azurite_container: str) -> Iterator[Target]:
    from azure.storage.blob import ContainerClient

    config = AzureConfig(*azurite.main, endpoint_url=azurite.account_url())
    with ContainerClient.from_connection_string(
        azurite.connection_string(), azurite_container
    ) as client:
        yield Target(f"azure://{azurite_container}", config, client)


@pytest.fixture(scope="module")
def cluster(
    _isolated_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    """Two worker processes on this machine, and a client; nothing listens to other machines."""
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set({"distributed.admin.log-format": "%(message)s"}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            worker_dashboard_address=None,
            local_directory=str(tmp_path_factory.mktemp("dask")),
        ) as made,
        Client(made) as client,
    ):
        yield made, client


def mirror(origin: Origin, target: Target, **options: Any) -> Any:
    return StorageOperations.mirror(
        options.pop("src_uri", origin.uri),
        target.uri,
        config=origin.config,
        dest_config=target.config,
        **options,
    )


def test_two_workers_mirror_2000_objects(
    origin: Origin, target: Target, cluster: tuple[Any, Any]
) -> None:
    _, client = cluster
    told: list[Progress] = []
    with client.get_executor() as executor:
        result = mirror(origin, target, executor=executor, progress=told.append)
    total = sum(map(len, origin.files.values()))
    assert (result.copied, result.skipped, result.failed) == (OBJECTS, 0, 0)
    assert result.bytes == total
    assert (told[-1].finished, told[-1].objects_done, told[-1].bytes_done) == (True, OBJECTS, total)
    assert target.content() == origin.files


def doing(executor: Any, instead: Callable[[Batch], Any]) -> Any:
    """Have an executor do something else with each batch."""
    submit = executor.submit
    executor.submit = lambda _, batch: submit(instead, batch)
    return executor


def death(folder: Path) -> tuple[int, int]:
    """Return which process died, and how many batches were done by then."""
    pid, done = (folder / "died").read_text().split()
    return int(pid), int(done)


def alive(pid: int) -> bool:
    try:
        return b" Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False


def test_a_worker_that_is_killed_midway_costs_nothing_but_time(
    origin: Origin, target: Target, cluster: tuple[Any, Any], tmp_path: Path
) -> None:
    _, client = cluster
    client.wait_for_workers(2, timeout=120)
    told: list[Progress] = []
    with client.get_executor() as executor:
        doing(executor, partial(die_midway, str(tmp_path), OBJECTS // 100))
        result = mirror(
            origin, target, executor=executor, batch_size=25, in_flight=8, progress=told.append
        )
    victim, done = death(tmp_path)
    assert not alive(victim)
    assert OBJECTS // 100 <= done < OBJECTS // 50
    assert (result.copied + result.skipped, result.failed) == (OBJECTS, 0)
    total = sum(map(len, origin.files.values()))
    last = told[-1]
    assert (last.finished, last.objects_done, last.bytes_done) == (True, OBJECTS, total)
    assert target.content() == origin.files


def test_what_dask_gives_up_after_a_death_is_given_out_again(
    origin: Origin,
    target: Target,
    cluster: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Its scheduler gives a task up (``KilledWorker``) that was there at too many deaths."""
    made, client = cluster
    monkeypatch.setattr(made.scheduler, "allowed_failures", 0)
    client.wait_for_workers(2, timeout=120)
    with client.get_executor(pure=False) as executor:
        doing(executor, partial(die_midway, str(tmp_path), 2))
        result = mirror(
            origin,
            target,
            src_uri=f"{origin.uri}/shard-3",
            executor=executor,
            batch_size=20,
        )
    assert death(tmp_path)[1] >= 2
    files = {
        path.removeprefix("shard-3/"): data
        for path, data in origin.files.items()
        if path.startswith("shard-3/")
    }
    assert result.resubmitted >= 1
    assert (result.copied + result.skipped, result.failed) == (len(files), 0)
    assert target.content() == files


@pytest.mark.parametrize("again", [False, True])
def test_a_client_that_is_closed_midway_leaves_nobody_waiting(
    origin: Origin,
    target: Target,
    cluster: tuple[Any, Any],
    again: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dask never ends some of its futures then."""
    from distributed import Client

    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    closed, noted = tmp_path / "closed", tmp_path / "noted"
    noted.mkdir()
    made, _ = cluster
    clients: list[Any] = []

    def connect() -> Any:
        clients.append(Client(made, set_as_default=False))
        # Dask does them in any order; all but the first are to be done when the client is closed.
        executor = clients[-1].get_executor(pure=False)
        return doing(executor, partial(wait_midway, str(noted), 2, str(closed)))

    def close(told: Progress) -> None:
        if not closed.exists() and told.objects_done >= 20:
            clients[0].close()
            closed.touch()

    options = {"src_uri": f"{origin.uri}/shard-4", "batch_size": 10, "progress": close}
    if again:
        assert mirror(origin, target, executor=connect, **options).failed == 0
        assert len(target.names()) == OBJECTS // 10
    else:
        with pytest.raises(MirrorError, match="pass a function") as caught:
            mirror(origin, target, executor=connect(), **options)
        result = caught.value.result
        assert 20 <= result.copied + result.skipped < OBJECTS // 10  # type: ignore[attr-defined]
    for client in clients:
        client.close()
