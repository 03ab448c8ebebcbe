"""Local files: what the operating system refuses, and what is left then."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from storage.backends.base import Payload, bytes_payload
from storage.backends.local.backend import LocalBackend
from storage.errors import (
    AuthenticationError,
    InsufficientSpaceError,
    TransientError,
)
from tests.backends.directories import files_in, read, without


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def backend(root: Path) -> LocalBackend:
    return LocalBackend(str(root))


# --- what the operating system refuses ---------------------------------------------------

_AS_NOBODY = """
import os, sys
from storage.backends.base import bytes_payload
from storage.backends.local.backend import LocalBackend
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
backend = LocalBackend(sys.argv[1])
calls = {
    "stat": lambda: backend.stat("closed/a"),
    "list": lambda: list(backend.list("closed/")),
    "list-above": lambda: list(backend.list()),
    "read": lambda: backend.read("unreadable"),
    "write": lambda: backend.write("fixed/a", bytes_payload(b"1")),
    "write-below": lambda: backend.write("fixed/new/a", bytes_payload(b"1")),
    "create": lambda: backend.write("fixed/a", bytes_payload(b"1"), if_absent=True),
    "swap": lambda: backend.write(
        "fixed/there", bytes_payload(b"1"), if_match=backend.stat("fixed/there")
    ),
    "copy": lambda: backend.copy("fixed/there", "fixed/b"),
    "delete": lambda: backend.delete(["fixed/there"]),
}
try:
    calls[sys.argv[2]]()
except Exception as exc:
    print(type(exc).__name__, exc)
else:
    print("nothing was raised")
"""


@pytest.mark.parametrize(
    "operation",
    [
        "stat",
        "list",
        "list-above",
        "read",
        "write",
        "write-below",
        "create",
        "swap",
        "copy",
        "delete",
    ],
)
def test_permission_denied_is_an_authentication_error(operation: str) -> None:
    # Not in tmp_path, where an account without privileges cannot go.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        _deny(root, operation)


def _deny(root: Path, operation: str) -> None:
    for name in ("closed/a", "fixed/there", "unreadable"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"1")
    (root / "unreadable").chmod(0o000)
    (root / "closed").chmod(0o000)
    (root / "fixed").chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, str(root), operation],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        (root / "closed").chmod(0o755)
        (root / "fixed").chmod(0o755)
    assert done.stdout.startswith("AuthenticationError "), done.stdout + done.stderr
    assert str(root) in done.stdout
    assert files_in(root) == {"closed/a", "fixed/there", "unreadable"}


@pytest.mark.parametrize("call", ["write", "fsync", "utime", "replace"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, InsufficientSpaceError),
        (errno.EDQUOT, InsufficientSpaceError),
        (errno.EROFS, AuthenticationError),
        (errno.EIO, TransientError),
        (errno.ESTALE, TransientError),
    ],
)
def test_failing_system_call_has_an_error_of_its_own_and_leaves_nothing(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    expected: type[Exception],
) -> None:
    backend = LocalBackend(str(root), durable=True)
    (root / "m").mkdir()
    (root / "m/a").write_bytes(b"old")
    with monkeypatch.context() as patch:
        without(patch, os, call, number)
        for key in ("m/a", "m/new/deep/b"):
            with pytest.raises(expected) as caught:
                backend.write(key, bytes_payload(b"new"))
            assert str(root / key) in str(caught.value)
    assert files_in(root) == {"m/a"}
    assert (root / "m/a").read_bytes() == b"old"
    assert not (root / "m/new").exists()


def test_error_of_the_source_is_not_taken_for_one_of_the_store(
    backend: LocalBackend, root: Path
) -> None:
    def missing() -> BinaryIO:
        return open(root / "no-such-source", "rb")

    with pytest.raises(FileNotFoundError) as caught:
        backend.write("a", Payload(missing, 5))
    assert type(caught.value) is FileNotFoundError
    assert not list(root.iterdir())


def test_full_disk_is_insufficient_space_and_keeps_the_old_content(full_disk: Path) -> None:
    backend = LocalBackend(str(full_disk))
    backend.write("m/a", bytes_payload(b"old"))
    size = os.statvfs(full_disk).f_blocks * os.statvfs(full_disk).f_frsize
    for key in ("m/a", "new/b"):
        with pytest.raises(InsufficientSpaceError) as caught:
            backend.write(key, bytes_payload(bytes(size + 1)))
        assert caught.value.errno == errno.ENOSPC
    assert files_in(full_disk) == {"m/a"}
    assert read(backend, "m/a") == b"old"
    assert not (full_disk / "new").exists()


def test_object_on_a_full_disk_can_be_deleted(full_disk: Path) -> None:
    backend = LocalBackend(str(full_disk))
    backend.write("m/a", bytes_payload(b"1"))
    with contextlib.suppress(OSError), open(full_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    backend.delete(["m/a"])
    assert files_in(full_disk) == {"filler"}


def test_read_only_file_system_is_an_authentication_error(read_only_disk: Path) -> None:
    backend = LocalBackend(str(read_only_disk))
    for options in ({}, {"if_absent": True}):
        for key in ("a", "m/a"):
            with pytest.raises(AuthenticationError, match="Read-only"):
                backend.write(key, bytes_payload(b"new"), **cast(Any, options))
    assert list(backend.list()) == []


def test_delete_that_fails_is_not_silent(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a").write_bytes(b"1")
    with monkeypatch.context() as patch:
        without(patch, os, "unlink", errno.EROFS)
        with pytest.raises(AuthenticationError):
            backend.delete(["a"])
