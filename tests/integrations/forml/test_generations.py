"""States and generations of ForML: closed once, with all that they name."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.facade.stores import S3Store, Store, tree_bytes
from tests.integrations.forml.support import (
    NAME,
    VERSION,
    content_of,
    installed,
    keys_of,
    on_two_stores,
)
from tests.peers.environments import Peer, PeerError


@on_two_stores
def test_a_state_never_changes_and_is_verified(forml: Peer, pushed: Store) -> None:
    where = {"uri": pushed.base, "project": NAME, "version": VERSION}
    sid = str(uuid.uuid4())
    for _ in range(2):
        forml("write", **where, sid=sid, state="first")
    with pytest.raises(PeerError, match=r"Level.Invalid: .*another state with the id"):
        forml("write", **where, sid=sid, state="other")
    # A generation may have any number.
    forml("close", **where, generation=5, sids=[sid])
    assert forml("read", **where, generation=5, sid=sid) == "first"
    assert forml("read", **where, generation=5, sid=str(uuid.uuid4())) == ""
    other = str(uuid.uuid4())
    forml("write", **where, sid=other, state="other")
    forml("close", **where, generation=6, sids=[other])
    (key,) = keys_of(pushed, f"states/{NAME}/1.2/{other}/")
    pushed.put_raw(key, b"Other")
    with pytest.raises(PeerError, match=r"IntegrityError: .*expect.* blake3:"):
        forml("read", **where, generation=6, sid=other)
    pushed.delete_raw(key)
    with pytest.raises(PeerError, match="ModelMissingError"):
        forml("read", **where, generation=6, sid=other)


@on_two_stores
def test_a_generation_is_closed_once_and_with_all_of_its_states(forml: Peer, pushed: Store) -> None:
    where = {"uri": pushed.base, "project": NAME, "version": VERSION}
    sids = [str(uuid.uuid4()) for _ in range(3)]
    for sid in sids[:2]:
        forml("write", **where, sid=sid, state=f"state of {sid}")
    with pytest.raises(
        PeerError, match=f"Level.Invalid: .*expected the state {sids[2]}, found none"
    ):
        forml("close", **where, generation=1, sids=sids)
    with pytest.raises(PeerError, match=r"Level.Invalid: .*cannot read the tag"):
        forml("close", **where, generation=1, broken=True)
    assert forml("levels", uri=pushed.base) == {NAME: {"1.2": []}}
    forml("close", **where, generation=1, sids=sids[:1])
    # Who did not hear that it was done may say it again.
    forml("close", **where, generation=1, sids=sids[:1])
    for others in (sids[:2], sids[1:2], []):
        with pytest.raises(PeerError, match=r"Level.Invalid: .*closed by somebody else"):
            forml("close", **where, generation=1, sids=others)
    # Without states nothing tells one closer from another.
    forml("close", **where, generation=2)
    with pytest.raises(PeerError, match=r"Level.Invalid: .*closed by somebody else"):
        forml("close", **where, generation=2)
    assert forml("open_", **where, generation=1) == sids[:1]
    assert forml("levels", uri=pushed.base) == {NAME: {"1.2": [1, 2]}}


@on_two_stores
def test_processes_that_close_at_once_share_no_number(forml: Peer, pushed: Store) -> None:
    # Whoever loses a race to create an object on SeaweedFS waits for seconds.
    processes, count = (3, 2) if isinstance(pushed, S3Store) else (6, 5)
    answer = forml(
        "close_at_once",
        uri=pushed.base,
        project=NAME,
        version=VERSION,
        processes=processes,
        count=count,
    )
    closed = answer["closed"]
    numbers = list(range(1, processes * count + 1))
    assert sorted(number for number, _, _ in closed) == numbers
    assert all(same for _, _, same in closed)
    assert forml("levels", uri=pushed.base) == {NAME: {"1.2": numbers}}
    for number, text, _ in closed:
        found = forml("states", uri=pushed.base, project=NAME, version=VERSION, generation=number)
        assert found["states"] == [text, f"{text} too"]


CREATE = "storage.registry.objects:ObjectStore.create"


@on_two_stores
def test_what_a_killed_writer_left_is_not_seen(
    forml: Peer, store: Store, package: Path, tmp_path: Path
) -> None:
    where = {"uri": store.base, "project": NAME, "version": VERSION}

    def kill(task: str, before: str, **arguments: Any) -> None:
        died = forml("killed", task=task, before=before, arguments=arguments)
        assert died == -signal.SIGKILL

    kill("push", "storage.integrations.forml:upload", uri=store.base, package=str(package))
    kill("push", "storage.integrations.forml:Meter.finish", uri=store.base, package=str(package))
    assert keys_of(store, "packages/")
    assert forml("levels", uri=store.base) == {}
    forml("push", uri=store.base, package=package)
    sid = str(uuid.uuid4())
    kill("write", "storage.integrations.forml.place:send_item", **where, sid=sid, state="state")
    with pytest.raises(PeerError, match="found none"):
        forml("close", **where, generation=1, sids=[sid])
    forml("write", **where, sid=sid, state="state")
    kill("close", CREATE, **where, generation=1, sids=[sid])
    assert forml("levels", uri=store.base) == {NAME: {"1.2": []}}
    forml("close", **where, generation=1, sids=[sid])
    assert forml("read", **where, generation=1, sid=sid) == "state"
    staging = tmp_path / "staging"
    kill("mount", "pathlib:Path.rename", **where, staging=str(staging))
    (left,) = {path.split("/")[3] for path in tree_bytes(staging)}
    mounted = forml("mount", **where, staging=staging)
    assert installed(mounted) == content_of(package)
    assert left not in {path.split("/")[3] for path in tree_bytes(staging)}
