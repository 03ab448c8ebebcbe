"""A process that has used a store forks, as model servers do: parent and child go on using it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.config import reveal
from tests.facade.stores import Store

FORK = """
import os, signal, sys, warnings
from storage import Storage, StorageOperations
warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads
uri, out = sys.argv[1:]
Storage.download(f"{uri}/tree", f"{out}/parent")
child = os.fork()
if child == 0:
    signal.alarm(120)  # a child that hangs is killed
    try:
        Storage.download(f"{uri}/tree", f"{out}/child")
        Storage.upload(f"{out}/child", f"{uri}/made")
        assert StorageOperations.list_objects(f"{uri}/made") == ["a", "b/c"]
    except BaseException as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
Storage.download(f"{uri}/made", f"{out}/parent-again")
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "seaweedfs-obstore",
        "seaweedfs-fsspec",
        "gcs-fsspec",
        "azurite-obstore",
        "azurite-fsspec",
        "hub",
    ],
)
def test_a_forked_child_uses_what_its_parent_used(
    make_store: Callable[[str], Store], name: str, out: Path
) -> None:
    store = make_store(name)
    files = {"tree/a": os.urandom(9_000_000), "tree/b/c": b"small"}
    store.put_all(files)
    fields = {
        field: reveal(value)
        for field, value in store.config
        if field in store.config.model_fields_set and value is not None
    }
    config = {"type": store.base.partition("://")[0], **fields}
    done = subprocess.run(
        [sys.executable, "-c", FORK, store.base, str(out)],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[2]), "STORAGE_CONFIG": json.dumps(config)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder in ("parent", "child", "parent-again"):
        assert (out / folder / "a").read_bytes() == files["tree/a"]
        assert (out / folder / "b" / "c").read_bytes() == b"small"
    assert store.get_raw("made/b/c") == b"small"
