"""As KServe runs it: a user without rights, and nowhere to write but the volume."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cache.processes import open_folder
from tests.integrations.kserve.support import (
    MODEL,
    child_environment,
    put_all,
    tar,
    tree,
    variables_of,
)
from tests.servers import SeaweedFS

NOBODY = 65534
# Imported as root: who else may read the interpreter depends on the machine.
CODE = """
    import os, sys

    from storage.integrations.kserve.initializer import main

    _, user, folder, source, archive = sys.argv
    assert main([source, f"{folder}/warm", archive, f"{folder}/warm-archive"]) == 0
    for name in ("HOME", "TMPDIR"):
        os.environ[name] = f"{folder}/closed"
    if user != "0":
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
        try:
            os.mkdir(f"{folder}/closed/x")
        except PermissionError:
            pass
        else:
            sys.exit("the home can be written")
    sys.exit(main([source, f"{folder}/models", archive, f"{folder}/models/adapter"]))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for every user, with a volume for nobody's models and a home that is closed."""
    with open_folder() as found:
        (found / "closed").mkdir(mode=0o555)
        (found / "closed").chmod(0o555)
        for name in ("models", "warm", "warm-archive"):
            (found / name).mkdir()
        if os.geteuid() == 0:
            os.chown(found / "models", NOBODY, NOBODY)
        yield found
        (found / "closed").chmod(0o755)


@pytest.mark.parametrize("ca_bundle", [False, True])
def test_a_user_without_rights_and_without_a_place_to_write(
    ca_bundle: bool, folder: Path, seaweedfs: SeaweedFS, shared_bucket: str, prefix: str
) -> None:
    source = put_all(seaweedfs, shared_bucket, prefix, MODEL)
    archive = put_all(seaweedfs, shared_bucket, f"{prefix}-a", {"m.tgz": tar(MODEL)})
    variables = variables_of(seaweedfs)
    del variables["AWS_DEFAULT_REGION"]
    if ca_bundle:
        import trustme

        mounted = folder / "bundle"
        mounted.mkdir()
        trustme.CA().cert_pem.write_to_path(str(mounted / "cabundle.crt"))
        variables |= {
            "CA_BUNDLE_CONFIGMAP_NAME": "cas",
            "CA_BUNDLE_VOLUME_MOUNT_POINT": str(mounted),
        }
    environment = child_environment(variables)
    # A cache that cannot be written, and not even made.
    environment["STORAGE_CACHE_DIR"] = str(folder / "closed" / "cache")
    user = NOBODY if os.geteuid() == 0 else 0

    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(CODE),
            *(str(user), str(folder), source, f"{archive}/m.tgz"),
        ],
        env={**environment, "HOME": str(folder / "warm")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    expected = {**MODEL, **{f"adapter/{path}": content for path, content in MODEL.items()}}
    assert tree(folder / "models") == expected
    assert sorted(os.listdir(folder / "models")) == ["adapter", "config.json", "empty", "weights"]
    assert os.listdir(folder / "closed") == []
