"""A process with ForML, and the stores that it works on."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.facade.stores import (
    Store,
)
from tests.integrations.forml.support import (
    FORML,
    INSIDE,
    SIDE,
    VERSION,
    Start,
    toml,
    write_wheel,
)
from tests.peers.environments import Peer
from tests.servers import SeaweedFS
from tests.servers.process import ServerError


@pytest.fixture(scope="session")
def start(
    tmp_path_factory: pytest.TempPathFactory,
    seaweedfs: SeaweedFS,
    store_settings: dict[str, dict[str, str]],
) -> Iterator[Start]:
    """Starts processes with ForML, which find this library and its settings."""
    try:
        FORML.python()
    except ServerError as exc:
        pytest.fail(f"{FORML.requirement} cannot be installed: {exc}", pytrace=False)
    s3 = {"access_key_id": seaweedfs.access_key, "secret_access_key": seaweedfs.secret_key}
    stores = {"s3": {"prefix": "s3://", **s3}} | store_settings
    with ExitStack() as stack:

        def begin(environment: Mapping[str, str], endpoint: str = seaweedfs.endpoint) -> Peer:
            stores["s3"]["endpoint_url"] = endpoint
            scratch = tmp_path_factory.mktemp("forml")
            file = scratch / "settings.toml"
            file.write_text(toml({f"stores.{name}": fields for name, fields in stores.items()}))
            peer = stack.enter_context(Peer(FORML, str(SIDE), scratch))
            environment = {
                "FORML_HOME": str(scratch),
                "HF_HUB_DISABLE_XET": "1",
                "NO_GCE_CHECK": "true",
                "PIP_FIND_LINKS": str(scratch),
                "PIP_NO_INDEX": "1",
                "STORAGE_CACHE_DIR": str(scratch / "cache"),
                "STORAGE_SETTINGS_FILE": str(file),
                **environment,
            }
            assert f"forml=={peer('prepare', environment=environment)}" == FORML.requirement
            write_wheel(scratch)
            return peer

        yield begin


@pytest.fixture(scope="session")
def forml(start: Start) -> Peer:
    """A process with ForML."""
    return start({})


@pytest.fixture
def package(forml: Peer, tmp_path: Path) -> Path:
    """The package of a project, as a file that no other test has in its cache."""
    source, path = tmp_path / "source", tmp_path / "any name.4ml"
    shutil.copytree(INSIDE / "project", source)
    (source / "demo" / "own.py").write_text(f"OWN = {uuid.uuid4().hex!r}\n")
    forml("create", source=source, target=path, version=VERSION)
    return path


@pytest.fixture
def pushed(forml: Peer, store: Store, package: Path) -> Store:
    """A store with a release of the project."""
    forml("push", uri=store.base, package=package)
    return store
