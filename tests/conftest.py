"""What holds for every test: the real servers as fixtures, and nothing of the user's around."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that stands still makes no example wrong. Each run tries the same ones; a soak others.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=os.environ.get("STORAGE_SOAK") != "1",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

pytest_plugins = ["tests.servers.fixtures"]

# What configures a store, a client or a way to the network.
_FOREIGN = re.compile(
    r"(?:AWS|AZURE|BOTO|CLOUDSDK|FSSPEC|GCE|GCS|GCSFS|GOOGLE|HF|HUGGING_?FACE|MODELSCOPE|RCLONE"
    r"|S3FS|STORAGE)_.*"
    r"|BOTO_CONFIG|CURL_CA_BUNDLE|DOCKER_CONFIG|REGISTRY_AUTH_FILE|REQUESTS_CA_BUNDLE"
    r"|SSL_CERT_(?:FILE|DIR)|XDG_.*"
    r"|(?:all|ftp|http|https|no)_proxy",
    re.IGNORECASE,
)


def _isolate(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in list(os.environ):
        if _FOREIGN.fullmatch(name):
            patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.setenv("STORAGE_CACHE_DIR", str(home / "cache"))
    # Without it the SDKs ask the metadata server of a cloud machine, and wait.
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("NO_GCE_CHECK", "true")


@pytest.fixture(scope="session", autouse=True)
def _isolated_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what serves the whole session, and all programs, away from what is the user's."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell starts what goes on in the background; each program passes that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        _isolate(patch, tmp_path_factory.mktemp("session-home"))
        yield


@pytest.fixture(autouse=True)
def _isolated_test(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Give every test a home and a cache of its own, and no credentials, settings or proxies."""
    _isolate(monkeypatch, tmp_path_factory.mktemp("home"))
    yield
    # Each is a file that stays open as long as the process lives.
    from storage.cache.leases import release_all

    release_all()
