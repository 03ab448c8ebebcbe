"""ForML's life cycle, by its command and by its interfaces; and what it does with providers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.facade.stores import Store
from tests.integrations.forml.support import (
    INSIDE,
    NAME,
    VERSION,
    Start,
    content_of,
    installed,
    on_every_store,
    on_s3,
    on_two_stores,
    toml,
)
from tests.peers.environments import Peer, PeerError
from tests.servers import NginxHTTP, RcloneS3, SeaweedFS
from tests.servers.proxy import CountingProxy


@pytest.mark.slow
@on_two_stores
def test_a_project_lives_its_life_by_the_command_of_forml(
    forml: Peer, store: Store, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        toml(
            {
                "REGISTRY": {"default": "tested"},
                "REGISTRY.tested": {
                    "provider": "storage.integrations.forml:Registry",
                    "uri": store.base,
                    "staging": str(tmp_path / "staging"),
                },
                "INVENTORY": {"default": "tested"},
                "INVENTORY.tested": {
                    "provider": "storage.integrations.forml:Inventory",
                    "uri": store.base,
                },
                "FEED": {"default": "demo"},
                "FEED.demo": {"provider": "forml_demo_data:Feed"},
                "RUNNER": {"default": "processes"},
                "RUNNER.processes": {"provider": "dask", "scheduler": "processes"},
                "RUNNER.threads": {"provider": "dask", "scheduler": "threads"},
            }
        )
    )
    source = tmp_path / "project"
    shutil.copytree(INSIDE / "project", source)

    def command(*arguments: str) -> list[str]:
        printed: str = forml("command", config=config, arguments=arguments)
        return printed.split()

    command("project", "--path", str(source), "release")
    assert command("model", "list") == [NAME]
    assert command("model", "list", NAME) == ["1.2"]
    assert command("model", "list", NAME, VERSION) == []
    command("model", "train", NAME)
    command("model", "--runner", "threads", "train", NAME)
    assert command("model", "list", NAME, VERSION) == ["1", "2"]
    # Means of 3 and 25, a dependency's 100, and how often it was trained. What a process of the
    # other runner prints is lost.
    apply = ("model", "--runner", "threads", "apply", NAME)
    assert "".join(command(*apply)) == _rows(2)
    assert "".join(command(*apply, VERSION, "1")) == _rows(1)
    with pytest.raises(PeerError, match="not an increment"):
        command("project", "--path", str(source), "release")
    command("application", "put", str(INSIDE / "application.py"))
    assert command("application", "list") == ["demo-application"]


def _rows(times: int) -> str:
    return json.dumps([[x + 122.0, times] for x in (1, 2, 3, 6)]).replace(" ", "")


@on_every_store
def test_what_is_pushed_and_trained_is_mounted_opened_and_listed(
    forml: Peer, store: Store, package: Path, tmp_path: Path
) -> None:
    assert forml("levels", uri=store.base) == {}
    assert forml("put", uri=store.base, name=NAME, package=package) == "1.2.0"
    assert forml("levels", uri=store.base) == {NAME: {"1.2": []}}
    staging = tmp_path / "staging"
    mounted = forml("mount", uri=store.base, project=NAME, version=VERSION, staging=staging)
    assert mounted["package"] == "demo"
    assert Path(mounted["path"]).is_relative_to(staging)
    for number in (1, 2):
        states = [f"state {number}", "", "ü" * 100_000]
        assert (
            forml("train", uri=store.base, project=NAME, version=VERSION, states=states) == number
        )
        found = forml("states", uri=store.base, project=NAME, version=VERSION, generation=number)
        assert found == {"states": states, "same": True}
    # As a provider, by another spelling of the version.
    assert forml("listed", uri=store.base, project=NAME, version="1.2") == {
        "projects": [NAME],
        "releases": ["1.2"],
        "generations": [1, 2],
    }
    assert forml("levels", uri=store.base) == {NAME: {"1.2": [1, 2]}}


# -- what ForML does with providers ----------------------------------------------------------


@on_two_stores
def test_a_registry_works_in_another_process(forml: Peer, pushed: Store, tmp_path: Path) -> None:
    forml("train", uri=pushed.base, project=NAME, version=VERSION, states=["one", "two"])
    stagings = (None, str(tmp_path / "staging"))
    where = {"uri": pushed.base, "project": NAME, "version": VERSION}
    answers = forml("pickled", **where, generation=1, stagings=stagings)
    for answer in answers:
        assert answer.pop("size") < 1000
        assert answer == {
            "elsewhere": True,
            "states": ["one", "two"],
            "equal": True,
            "inventory": True,
        }
    assert len(answers) == len(stagings)


def test_registries_are_equal_if_their_places_are(forml: Peer, tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    compared = [
        ([one], [one], True, True),
        ([one], [f"file://{one}/"], True, True),
        ([one], [other], False, False),
        ([one, "/staging"], [one, "/staging"], True, True),
        # ForML keeps what it read by the registry: these must not pass for one another.
        ([one, "/staging"], [other, "/staging"], False, False),
        ([one, "/staging"], [one, "/elsewhere"], False, True),
        ([one, "/staging"], [one], False, True),
    ]
    for left, right, registries, inventories in compared:
        found = forml("compare", one=left, other=right)
        assert found == [registries, inventories, f"Registry({one!r})"]


@pytest.mark.slow
@on_s3
def test_a_model_is_served_offline(
    forml: Peer,
    start: Start,
    seaweedfs: SeaweedFS,
    pushed: Store,
    package: Path,
    tmp_path: Path,
) -> None:
    forml("put_application", uri=pushed.base, path=INSIDE / "application.py")
    forml("train", uri=pushed.base, project=NAME, version=VERSION, states=["one", "two"])
    forml("train", uri=pushed.base, project=NAME, version=VERSION, states=["never read"])
    where = {"uri": pushed.base, "project": NAME, "version": VERSION}
    cache = {"STORAGE_CACHE_DIR": str(tmp_path / "cache"), "STORAGE_TRANSFER__ATTEMPTS": "1"}

    def serve(peer: Peer, staging: Path) -> None:
        mounted = peer("mount", **where, staging=staging)
        assert installed(mounted) == content_of(package)
        assert peer("states", **where, generation=1)["states"] == ["one", "two"]
        assert peer("application", uri=pushed.base, name="demo-application")[1] == NAME

    with CountingProxy(seaweedfs.endpoint) as proxy:
        serve(start(cache, proxy.endpoint), tmp_path / "online")
        assert proxy.count()
        proxy.clear()
        offline = start({**cache, "STORAGE_OFFLINE": "1"}, proxy.endpoint)
        serve(offline, tmp_path / "offline")
        assert offline("levels", uri=pushed.base) == {NAME: {"1.2": [1]}}
        assert offline("applications", uri=pushed.base) == ["demo-application"]
        with pytest.raises(PeerError, match=r"OfflineError: .*never cached"):
            offline("open_", **where, generation=2)
        assert not proxy.count()
        # Neither has a connection yet when nobody answers any more.
        auto = start({**cache, "STORAGE_OFFLINE": "auto"}, proxy.endpoint)
        online = start(cache, proxy.endpoint)
    with pytest.raises(PeerError, match="UnreachableError"):
        online("levels", uri=pushed.base)
    assert auto("levels", uri=pushed.base) == {NAME: {"1.2": [1]}}
    serve(auto, tmp_path / "auto")


def test_a_store_without_conditional_writes_is_refused(
    forml: Peer, nginx_http: NginxHTTP, package: Path
) -> None:
    with pytest.raises(PeerError, match=r"UnsupportedOperation: .*overwrite each other"):
        forml("push", uri=f"{nginx_http.endpoint}/put/forml", package=package)


def test_a_store_that_overwrites_what_is_to_be_created_is_refused(
    start: Start, rclone_s3: RcloneS3, rclone_bucket: str, package: Path
) -> None:
    peer = start({}, rclone_s3.endpoint)
    with pytest.raises(PeerError, match="keep the registry on another store"):
        peer("push", uri=f"s3://{rclone_bucket}/forml", package=package)
    assert rclone_s3.keys_raw(rclone_bucket) == []


# -- applications ----------------------------------------------------------------------------


@on_every_store
def test_applications_are_listed_replaced_and_found(
    forml: Peer, store: Store, tmp_path: Path
) -> None:
    assert forml("applications", uri=store.base) == []
    with pytest.raises(PeerError, match=r"MissingError: .*has no application demo-application"):
        forml("application", uri=store.base, name="demo-application")
    forml("put_application", uri=store.base, path=INSIDE / "application.py")
    found = forml("application", uri=store.base, name="demo-application")
    assert found == ["demo-application", NAME]
    text = (INSIDE / "application.py").read_text()
    newer = tmp_path / "newer.py"
    newer.write_text(text.replace(NAME, "other-project"))
    odd = tmp_path / "odd.py"
    odd.write_text(text.replace("demo-application", "an odd/name ü."))
    for path in (newer, odd):
        forml("put_application", uri=store.base, path=path)
    assert forml("applications", uri=store.base) == ["an odd/name ü.", "demo-application"]
    for name, project in (("an odd/name ü.", NAME), ("demo-application", "other-project")):
        assert forml("application", uri=store.base, name=name) == [name, project]
