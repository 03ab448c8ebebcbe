"""What will not pass is asked once.

Counted is, at the proxy, the operation that is refused: the request for the bytes of an object
(``GET``), or the one that brings them (``PUT``). What comes before, such as the look at the
object and the plan, and what is tidied up afterwards is not that operation. A second count is
of what comes first in a download, the look itself: there it is the whole conversation.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import (
    AuthenticationError,
    ModelMissingError,
    StorageError,
    TransientError,
)
from storage.testing.fault_script import Fault, Request
from tests.faults.stores import SITES, Site, make_site
from tests.transfer.support import KIB, assert_clear, everything_in

STATUSES = (400, 401, 403, 404, 405, 410, 501)

DATA = b"x" * (300 * KIB)

# While the look says that a generation is there and the read says that it is not, the object
# was replaced in between; it is looked at again, as often as an object may be replaced.
REPLACED = {("gcs-obstore", 404), ("gcs-fsspec", 404)}


class Refusing:
    """Answers everything of one kind with a status, and counts it."""

    def __init__(self, status: int, only: str, site: Site) -> None:
        self.status = status
        self._only = only
        self._site = site
        self.refused: list[str] = []
        self.active = True

    def __call__(self, request: Request) -> Fault | None:
        if not self.active or not self._concerns(request):
            return None
        self.refused.append(f"{request.method} {request.target}")
        return Fault("status", status=self.status)

    def _concerns(self, request: Request) -> bool:
        if self._only == "everything":
            return True
        if self._only == "read":
            return self._site.reads_object(request)
        # Google's JSON API takes an object by POST.
        return self._site.sends_object(request) or "/upload/storage/" in request.target


def client() -> StorageClient:
    limits = {"retry_wait": 0.01, "throttle_wait": 0.01, "connections": 2}
    return StorageClient(settings=load_settings(transfer=limits))


def check(error: StorageError, status: int, *, read: bool = True) -> None:
    assert_clear(error)
    assert not isinstance(error, TransientError), error
    if status in (401, 403):
        assert isinstance(error, AuthenticationError), error
    if status == 404 and read:
        assert isinstance(error, ModelMissingError), error
    assert "tried" not in str(error)


CASES = [(name, status) for name in SITES for status in STATUSES]


@pytest.mark.parametrize(("name", "status"), [one for one in CASES if one not in REPLACED])
def test_a_refused_read_is_one_request(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, status: int
) -> None:
    site = make_site(request, name, "down")
    script = Refusing(status, "read", site)
    with site.place(script) as place, client() as downloader:
        place.put_raw("m.safetensors", DATA)
        with pytest.raises(StorageError) as caught:
            downloader.download(
                place.uri("m.safetensors"), tmp_path / "m.safetensors", config=place.config
            )
    check(caught.value, status)
    assert len(script.refused) == 1, script.refused
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize(("name", "status"), CASES)
def test_a_refused_write_is_one_request(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, status: int
) -> None:
    site = make_site(request, name, "up")
    script = Refusing(status, "write", site)
    (tmp_path / "m.safetensors").write_bytes(DATA)
    with site.place(script) as place, client() as uploader:
        with pytest.raises(StorageError) as caught:
            uploader.upload(
                tmp_path / "m.safetensors", place.uri("m.safetensors"), config=place.config
            )
        assert place.keys() == []
    check(caught.value, status, read=False)
    assert len(script.refused) == 1, script.refused


# HEAD has no body that says why; who is asked does not always know the method.
LOOKS = {"http": "a server may refuse HEAD only, so it is asked for one byte"}


@pytest.mark.parametrize("name", SITES)
def test_a_refused_look_is_one_request(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    site = make_site(request, name, "down")
    script = Refusing(403, "everything", site)
    with site.place(script) as place, client() as downloader:
        place.put_raw("m.safetensors", DATA)
        with pytest.raises(StorageError) as caught:
            downloader.download(
                place.uri("m.safetensors"), tmp_path / "m.safetensors", config=place.config
            )
    check(caught.value, 403)
    assert len(script.refused) == (2 if name in LOOKS else 1), script.refused
    assert everything_in(tmp_path) == []
