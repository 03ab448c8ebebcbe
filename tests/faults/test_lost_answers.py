"""A change that is made, and whose answer is lost on its way back, is made once and succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import ObjectExistsError
from storage.testing.fault_script import Fault, Request
from tests.facade.stores import Store
from tests.faults.stores import SITES, make_site
from tests.transfer.support import KIB, MIB

SMALL = bytes(range(256)) * 400
LARGE = bytes(9 * MIB)
STATUSES = [500, None]
"""What comes in place of the answer; ``None``: a reset."""

# Requests that only read, whatever their method is.
_READS = ("/preupload/", "/info/lfs/objects/batch", "/paths-info/", "/token")


class Losing:
    """Loses the first answer to each request that changes something."""

    def __init__(self, status: int | None) -> None:
        self._status = status
        self._seen: set[str] = set()
        self.active = True
        self.lost: list[str] = []

    def __call__(self, request: Request) -> Fault | None:
        what = f"{request.method} {request.target}"
        changes = request.method in ("PUT", "POST", "DELETE", "PATCH")
        if not self.active or not changes or any(part in request.target for part in _READS):
            return None
        if what in self._seen or len(self.lost) >= 2:
            return None
        self._seen.add(what)
        self.lost.append(what)
        return Fault("lost_answer", status=self._status)


@pytest.fixture
def client() -> Iterator[StorageClient]:
    limits = {"retry_wait": 0.01, "throttle_wait": 0.01, "stall_timeout": 10, "connections": 2}
    with StorageClient(settings=load_settings(transfer=limits)) as found:
        yield found


def only_key(place: Store) -> str:
    [key] = place.keys()
    return key


# A plain HTTP server cannot be told to create only.
CREATING = [name for name in SITES if name != "http"]


# Where obstore cannot send a large one conditionally the second driver does, by an API that the
# shim for obstore's uploads does not have.
SIZES = [
    (name, size)
    for name in CREATING
    for size in ("small", "large")
    if (name, size) != ("gcs-obstore", "large")
]


@pytest.mark.parametrize("status", STATUSES, ids=["500", "reset"])
@pytest.mark.parametrize(("name", "size"), SIZES)
def test_an_upload_that_must_be_new_is_its_own(
    request: pytest.FixtureRequest,
    client: StorageClient,
    tmp_path: Path,
    name: str,
    status: int | None,
    size: str,
) -> None:
    script = Losing(status)
    data = SMALL if size == "small" else LARGE
    (tmp_path / "m.safetensors").write_bytes(data)
    with make_site(request, name, "up").place(script) as place:
        uri = place.uri("m.safetensors")
        client.upload(tmp_path / "m.safetensors", uri, config=place.config, overwrite=False)
        assert script.lost
        assert place.get_raw(only_key(place)) == data
        if (name, size) == ("gcs-fsspec", "large"):
            return  # fake-gcs-server ignores the condition of a resumable upload
        script.active = False
        with pytest.raises(ObjectExistsError):
            client.upload(tmp_path / "m.safetensors", uri, config=place.config, overwrite=False)


@pytest.mark.parametrize("name", CREATING)
def test_a_file_that_must_be_new_is_its_own(
    request: pytest.FixtureRequest, client: StorageClient, name: str
) -> None:
    script = Losing(500)
    with make_site(request, name, "up").place(script) as place:
        uri = place.uri("m.txt")
        with client.open(uri, "xb", config=place.config) as file:
            file.write(SMALL)
        assert script.lost
        assert place.get_raw(only_key(place)) == SMALL
        script.active = False
        again = client.open(uri, "xb", config=place.config)
        again.write(SMALL)
        with pytest.raises(ObjectExistsError):
            again.close()


@pytest.mark.parametrize("status", STATUSES, ids=["500", "reset"])
@pytest.mark.parametrize("name", SITES)
def test_a_deletion_is_done(
    request: pytest.FixtureRequest, client: StorageClient, name: str, status: int | None
) -> None:
    script = Losing(status)
    with make_site(request, name, "down").place(script) as place:
        place.put_all({"a.txt": SMALL, "b.txt": b"kept"})
        client.delete_object(place.uri("a.txt"), config=place.config)
        assert script.lost
        assert place.keys() == ["b.txt"]


@pytest.mark.parametrize("status", STATUSES, ids=["500", "reset"])
@pytest.mark.parametrize("name", CREATING)
def test_a_copy_by_the_store_is_done(
    request: pytest.FixtureRequest, client: StorageClient, name: str, status: int | None
) -> None:
    script = Losing(status)
    # The shim copies as Google's XML API does, and obstore asks for that.
    direction = "up" if name == "gcs-obstore" else "down"
    with make_site(request, name, direction).place(script) as place:
        place.put_raw("a.txt", SMALL[: 10 * KIB])
        client.copy_object(place.uri("a.txt"), place.uri("b.txt"), config=place.config)
        assert script.lost
        assert place.keys() == ["a.txt", "b.txt"]
        assert place.get_raw("b.txt") == SMALL[: 10 * KIB]
