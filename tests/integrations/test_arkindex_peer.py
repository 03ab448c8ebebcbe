"""The training helper of ``arkindex-base-worker`` and ours ask Arkindex for the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from storage.errors import InvalidInput, ObjectExistsError
from storage.integrations.arkindex import ModelVersionPublisher
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Request
from tests.integrations.arkindex_server import (
    MODEL,
    OTHER_MODEL,
    TOKEN,
    Arkindex,
    PlainClient,
)
from tests.integrations.arkindex_store import Store
from tests.peers.environments import Peer, PeerError, Release, running
from tests.servers.process import ServerError
from tests.servers.seaweedfs import SeaweedFS

HELPER = Release(
    "arkindex-base-worker==0.5.1.post1",
    # Of all that it needs, what publishing imports.
    needs=("arkindex-client==1.3.0", "zstandard"),
)
"""The last release that sends archives to a signed URL."""

Steps = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    try:
        HELPER.python()
    except ServerError as exc:
        pytest.fail(f"{HELPER.requirement} cannot be installed: {exc}", pytrace=False)
    with running(HELPER, "arkindex_training.py", tmp_path_factory.mktemp("peer")) as peer:
        yield peer


@dataclass
class Side:
    """An Arkindex, and what came to it and to its store."""

    arkindex: Arkindex
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of each ``PUT``."""

    def requests(self) -> list[tuple[str, str, Any]]:
        """Return operations, ids and bodies; what no two sides share is told by its order."""
        return [
            (one.operation, self._plain(one.id), self._plain(one.body))
            for one in self.arkindex.asked
        ]

    def _plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            # No two programs make the same archive. This server looks whether they tell the truth.
            return {
                name: "…" if name in ("size", "archive_hash") else self._plain(item)
                for name, item in value.items()
            }
        made = self.arkindex.made
        return f"version {made.index(value)}" if value in made else value

    def versions(self) -> list[dict[str, Any]]:
        """Return all versions, in the same way."""
        return [self._plain(version) for version in self.arkindex.versions.values()]


@pytest.fixture
def side(seaweedfs: SeaweedFS, shared_bucket: str, prefix: str) -> Iterator[Callable[[str], Side]]:
    """Call it with a name to get an Arkindex with a store of its own."""
    with ExitStack() as stack:

        def start(name: str) -> Side:
            headers: list[dict[str, str]] = []

            def note(request: Request) -> None:
                headers.append(dict(request.headers))

            proxy = stack.enter_context(FaultProxy(seaweedfs.endpoint, note, store="s3"))
            store = Store(seaweedfs, shared_bucket, f"{prefix}/{name}")
            store.endpoint = proxy.endpoint
            return Side(stack.enter_context(Arkindex(store.sign, store.get)), headers)

        yield start


def ours(server: Side, steps: Steps, **options: Any) -> ModelVersionPublisher:
    """Do what the script of the other side does, with our publisher."""
    publisher = ModelVersionPublisher(PlainClient(server.arkindex), **options)
    for name, arguments in steps:
        getattr(publisher, name)(**arguments)
    return publisher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    (made / "b").mkdir(parents=True)
    (made / "b" / "weights.bin").write_bytes(bytes(range(256)) * 4096)
    (made / "a.json").write_text("{}", encoding="utf-8")
    return made


ATTRIBUTES = {"tag": "v1", "description": "A model", "configuration": {"a": {"b": [1, None]}}}


def life(name: str, folder: Path) -> Steps:
    """Return steps, each group by one worker."""
    publish: dict[str, Any] = {"model_path": folder, "model_id": MODEL}
    create: dict[str, Any] = {"model_id": MODEL}
    return {
        "bare": [("publish_model_version", publish)],
        "all": [("publish_model_version", publish | ATTRIBUTES)],
        "made before": [
            ("create_model_version", create | {"tag": "v0"}),
            ("publish_model_version", publish),
        ],
        "made and changed before": [
            ("create_model_version", create | {"configuration": {"a": 0}}),
            ("update_model_version", {"description": "at work"}),
            ("publish_model_version", publish | ATTRIBUTES),
        ],
    }[name]


@pytest.mark.parametrize("name", ["bare", "all", "made before", "made and changed before"])
def test_both_ask_for_the_same_in_the_same_order(
    helper: Peer, side: Callable[[str], Side], folder: Path, name: str
) -> None:
    theirs, mine = side("theirs"), side("mine")
    steps = life(name, folder)
    told = helper("publish", url=theirs.arkindex.url, token=TOKEN, steps=steps)
    publisher = ours(mine, steps)
    assert mine.requests() == theirs.requests()
    assert mine.versions() == theirs.versions()
    assert publisher.model_version is not None
    assert publisher.model_version.keys() == told.keys()
    for one in (theirs, mine):
        (headers,) = one.headers
        (version,) = one.arkindex.versions.values()
        assert headers["content-type"] == "application/zstd"
        assert headers["content-length"] == str(version["size"])
        assert "transfer-encoding" not in headers


def test_both_use_the_existing_version(
    helper: Peer, side: Callable[[str], Side], folder: Path
) -> None:
    theirs, mine = side("theirs"), side("mine")
    again = ATTRIBUTES | {"description": "The same again", "parent": None}
    both: list[Steps] = [
        life("all", folder),
        [("publish_model_version", {"model_path": folder, "model_id": MODEL} | again)],
    ]
    del both[1][0][1]["tag"]
    for steps in both:
        helper("publish", url=theirs.arkindex.url, token=TOKEN, steps=steps)
        ours(mine, steps)
    expected = theirs.requests()
    names = [operation for operation, *_ in expected]
    first = names.index("DestroyModelVersion")
    assert names[first + 1] == "RetrieveModelVersion"
    # Ours removes the pending version when it has the other one.
    expected[first : first + 2] = reversed(expected[first : first + 2])
    assert mine.requests() == expected
    assert mine.versions() == theirs.versions()
    assert len(mine.versions()) == 1


def test_what_is_not_given_is_emptied_by_the_helper_and_stays_with_ours(
    helper: Peer, side: Callable[[str], Side], folder: Path
) -> None:
    theirs, mine = side("theirs"), side("mine")
    steps: Steps = [
        ("create_model_version", {"model_id": MODEL, "configuration": {"epochs": 40}}),
        ("publish_model_version", {"model_path": folder, "model_id": MODEL, "tag": "v1"}),
    ]
    helper("publish", url=theirs.arkindex.url, token=TOKEN, steps=steps)
    ours(mine, steps)
    assert theirs.arkindex.bodies("UpdateModelVersion") == [{"tag": "v1", "configuration": {}}]
    assert mine.arkindex.bodies("UpdateModelVersion") == [{"tag": "v1"}]
    assert [version["configuration"] for version in mine.versions()] == [{"epochs": 40}]


def test_read_only_asks_for_nothing_on_either_side(
    helper: Peer, side: Callable[[str], Side], folder: Path
) -> None:
    theirs, mine = side("theirs"), side("mine")
    for name in ("all", "made and changed before"):
        steps = life(name, folder)
        told = helper(
            "publish", url=theirs.arkindex.url, token=TOKEN, steps=steps, is_read_only=True
        )
        assert told is ours(mine, steps, read_only=True).model_version is None
    assert mine.requests() == theirs.requests() == []


MISUSES: dict[str, tuple[type[Exception], Callable[[Path], Steps]]] = {
    "changed before it is made": (
        InvalidInput,
        lambda _: [("update_model_version", {"tag": "v1"})],
    ),
    "validated before it is made": (
        InvalidInput,
        lambda _: [("validate_model_version", {"hash": "", "size": 1, "archive_hash": ""})],
    ),
    "made twice": (InvalidInput, lambda _: [("create_model_version", {"model_id": MODEL})] * 2),
    "of another model": (
        InvalidInput,
        lambda folder: [
            ("create_model_version", {"model_id": MODEL}),
            (
                "publish_model_version",
                {"model_path": folder, "model_id": OTHER_MODEL, "description": "x"},
            ),
        ],
    ),
    "published twice": (ObjectExistsError, lambda folder: life("bare", folder) * 2),
}


@pytest.mark.parametrize("name", MISUSES)
def test_an_assertion_there_is_a_typed_error_here(
    helper: Peer, side: Callable[[str], Side], folder: Path, name: str
) -> None:
    theirs, mine = side("theirs"), side("mine")
    error, steps = MISUSES[name]
    with pytest.raises(PeerError, match="AssertionError"):
        helper("publish", url=theirs.arkindex.url, token=TOKEN, steps=steps(folder))
    with pytest.raises(error):
        ours(mine, steps(folder))
    assert mine.requests() == theirs.requests()
