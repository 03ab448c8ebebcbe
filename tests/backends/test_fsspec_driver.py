"""The generic driver, on real SFTP, FTP and WebDAV servers."""

from __future__ import annotations

import errno
import ftplib
import io
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from storage.backends import open_backend
from storage.backends.base import Backend, ByteRange, OpenOptions, Payload, bytes_payload
from storage.backends.drivers.fsspec import classify, supported_schemes
from storage.config import FsspecConfig
from storage.errors import (
    AuthenticationError,
    ConfigurationError,
    InsufficientSpaceError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
    UnsupportedScheme,
)
from storage.testing.conformance import BackendConformance
from storage.uri import parse_uri
from tests.backends.fsspec_servers import (
    FolderRaw,
    FolderServer,
    FtpServer,
    SftpServer,
    WebdavServer,
)
from tests.servers.process import HOST, free_port

MIB = 1024 * 1024
SERVERS: dict[str, type[FolderServer]] = {
    "sftp": SftpServer,
    "ftp": FtpServer,
    "webdav": WebdavServer,
}


def backend_of(url: str, **options: Any) -> Backend:
    config = FsspecConfig(options) if options else None
    return open_backend(parse_uri(url), config, OpenOptions(connect_timeout=60, stall_timeout=60))


def read(backend: Backend, key: str, *arguments: Any) -> bytes:
    with backend.read(key, *arguments) as body:
        return b"".join(bytes(piece) for piece in body)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def sftp_server() -> Iterator[SftpServer]:
    with SftpServer() as server:
        yield server


class TestSftpConformance(BackendConformance):
    exceptions: ClassVar = {
        "test_key_may_be_the_beginning_of_another": "a name is a file or a directory",
        "test_filesystem_writes_the_same_bucket": "fsspec's SFTP makes no directories by itself",
    }

    @pytest.fixture
    def data(self, sftp_server: SftpServer) -> Iterator[Path]:
        yield sftp_server.data
        emptied(sftp_server.data)

    @pytest.fixture
    def backend(self, sftp_server: SftpServer, data: Path) -> Iterator[Backend]:
        backend = backend_of(sftp_server.url)
        yield backend
        backend.close()

    @pytest.fixture
    def raw(self, data: Path) -> FolderRaw:
        return FolderRaw(data)


# --- all three protocols -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(SERVERS.values()), ids=list(SERVERS))
def any_server(request: pytest.FixtureRequest) -> Iterator[FolderServer]:
    server: FolderServer = request.param()
    with server:
        yield server


@pytest.fixture
def server(any_server: FolderServer) -> Iterator[FolderServer]:
    yield any_server
    emptied(any_server.data)


@pytest.fixture
def backend(server: FolderServer) -> Iterator[Backend]:
    backend = backend_of(server.url)
    yield backend
    backend.close()


KEYS = ["m/a b+c%41#1[2]?x&y;z.bin", "m/é/模型", "m/-rf ", 'm/it\'s "q" {a,b} *~$']


@pytest.mark.parametrize("key", KEYS, ids=["ascii", "unicode", "space", "quotes"])
def test_object_goes_there_and_back_under_its_own_name(
    backend: Backend, server: FolderServer, key: str
) -> None:
    data = os.urandom(3 * MIB + 7)
    info = backend.write(key, bytes_payload(data))
    assert (info.key, info.size) == (key, len(data))
    assert (server.data / key).read_bytes() == data
    assert [path.name for path in (server.data / key).parent.iterdir()] == [key.rpartition("/")[2]]
    assert [(info.key, info.size) for info in backend.list("m/")] == [(key, len(data))]
    assert read(backend, key) == data
    assert read(backend, key, ByteRange(MIB - 1, 2 * MIB + 1)) == data[MIB - 1 : 2 * MIB + 1]
    backend.delete([key, "none", key.rpartition("/")[0]])
    assert not (server.data / key).exists()
    assert (server.data / key).parent.is_dir()
    with pytest.raises(ModelMissingError):
        backend.stat(key)


def test_tree_is_listed_without_its_siblings(backend: Backend, server: FolderServer) -> None:
    for key in ("m/iris/a", "m/iris/b/c/d", "m/iris-v2/a", "m/iri", "m/iris/empty/.keep"):
        (server.data / key).parent.mkdir(parents=True, exist_ok=True)
        (server.data / key).write_bytes(b"" if key.endswith("a") else b"1")
    (server.data / "m/iris/nothing").mkdir()
    found = {info.key: info.size for info in backend.list("m/iris/")}
    assert found == {"m/iris/a": 0, "m/iris/b/c/d": 1, "m/iris/empty/.keep": 1}
    assert len(list(backend.list())) == 5
    assert list(backend.list("none/")) == []
    assert list(backend.list("m/iri/")) == []


def test_object_in_the_making_is_not_listed(backend: Backend, server: FolderServer) -> None:
    (server.data / ".a.0123456789abcdef.partial").write_bytes(b"1")
    (server.data / "a").write_bytes(b"1")
    assert [info.key for info in backend.list()] == ["a"]


def test_failed_write_changes_nothing(backend: Backend, server: FolderServer) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 2 * MIB:
                raise RuntimeError("the source broke")
            return super().read(size)

    (server.data / "a").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the source broke"):
        backend.write("a", Payload(lambda: Broken(bytes(3 * MIB)), 3 * MIB))
    assert [path.name for path in server.data.iterdir()] == ["a"]
    assert (server.data / "a").read_bytes() == b"old"


def test_replaced_object_is_noticed(backend: Backend, server: FolderServer) -> None:
    (server.data / "a").write_bytes(b"12345")
    info = backend.stat("a")
    (server.data / "a").write_bytes(b"123456")
    os.utime(server.data / "a", (1, 1))
    with pytest.raises(ObjectChangedError):
        read(backend, "a", None, info)
    with pytest.raises(ObjectChangedError):
        read(backend, "a", ByteRange(5, 9))


def test_object_replaced_while_it_is_read_is_noticed(
    backend: Backend, server: FolderServer
) -> None:
    (server.data / "a").write_bytes(bytes(24 * MIB))
    with backend.read("a") as body:
        pieces = iter(body)
        next(pieces)
        (server.data / "b").write_bytes(b"1" * 24 * MIB)
        os.utime(server.data / "b", (1, 1))
        os.replace(server.data / "b", server.data / "a")
        with pytest.raises((ObjectChangedError, TransientError)):
            list(pieces)


@pytest.mark.parametrize("key", ["a//b", "/a", "a/../b", "../a", "./a", "a/.", "a\0b"])
def test_key_that_is_no_path_is_refused(backend: Backend, server: FolderServer, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: backend.stat(key),
        lambda: backend.read(key),
        lambda: backend.write(key, bytes_payload(b"1")),
        lambda: backend.delete([key]),
    ]
    for call in calls:
        with pytest.raises(InvalidInput):
            call()
    assert list(server.data.iterdir()) == []


def test_conditions_and_urls_are_refused(backend: Backend) -> None:
    with pytest.raises(UnsupportedOperation):
        backend.write("a", bytes_payload(b"1"), if_absent=True)
    with pytest.raises(UnsupportedOperation):
        backend.sign("a", "GET", 60)


def test_wrong_password_is_told_without_it(server: FolderServer) -> None:
    backend = backend_of(server.url.replace("pass%40word", "wr0ng"))
    for call in (lambda: backend.stat("a"), lambda: list(backend.list())):
        with pytest.raises(AuthenticationError) as caught:
            call()
        assert "wr0ng" not in str(caught.value)
    backend.close()


def test_options_of_the_config_win_over_the_url(server: FolderServer) -> None:
    (server.data / "a").write_bytes(b"1")
    wrong = server.url.replace("pass%40word", "wrong")
    right: dict[str, Any] = {"password": "pass@word"}
    if server.protocol == "webdav":
        right = {"auth": ("user", "pass@word")}
    backend = backend_of(wrong, **right)
    assert backend.stat("a").size == 1
    backend.close()


def test_server_that_goes_away_and_comes_back(server: FolderServer) -> None:
    with type(server)() as other:
        backend = backend_of(other.url)
        (other.data / "a").write_bytes(b"1")
        assert backend.stat("a").size == 1
    with pytest.raises(TransientError):
        backend.stat("a")
    with pytest.raises(UnreachableError):
        backend.stat("a")
    backend.close()


@pytest.mark.parametrize("protocol", SERVERS)
def test_nobody_answers(protocol: str) -> None:
    with pytest.raises(UnreachableError) as caught:
        backend_of(f"{protocol}://user:s3cret@{HOST}:{free_port()}/").stat("a")
    assert "s3cret" not in str(caught.value)


# --- one protocol each ---------------------------------------------------------------------------


def test_webdav_copies_within_the_store() -> None:
    with WebdavServer() as server:
        backend = backend_of(server.url)
        (server.data / "a b#").write_bytes(b"new")
        (server.data / "b").write_bytes(b"old and longer")
        backend.copy("a b#", "b")
        backend.copy("b", "deep/er/c%41")
        assert (server.data / "b").read_bytes() == b"new"
        assert (server.data / "deep/er/c%41").read_bytes() == b"new"
        with pytest.raises(ModelMissingError):
            backend.copy("none", "b")
        backend.close()


def test_symbolic_links_are_followed(sftp_server: SftpServer) -> None:
    data = sftp_server.data
    (data / "shared").mkdir()
    (data / "shared/weights").write_bytes(b"12345")
    (data / "m").mkdir()
    (data / "m/folder").symlink_to("../shared")
    (data / "m/file").symlink_to("../shared/weights")
    backend = backend_of(sftp_server.url)
    found = {info.key: info.size for info in backend.list("m/")}
    assert found == {"m/folder/weights": 5, "m/file": 5}
    assert read(backend, "m/folder/weights") == read(backend, "m/file") == b"12345"
    (data / "m/nowhere").symlink_to("none")
    with pytest.raises(StorageError, match="m/nowhere"):
        list(backend.list("m/"))
    (data / "m/nowhere").unlink()
    (data / "m/round").symlink_to(".")
    with pytest.raises(StorageError):
        list(backend.list("m/"))
    backend.close()
    emptied(data)


def test_host_that_shows_another_key_than_the_known_one_is_refused(
    sftp_server: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paramiko

    backend = backend_of(sftp_server.url)
    backend.close()
    monkeypatch.setenv("HOME", str(tmp_path))
    known = tmp_path / ".ssh/known_hosts"
    known.parent.mkdir()
    key: Any = paramiko.ECDSAKey.generate()
    name = f"[{HOST}]:{sftp_server.port}"
    known.write_text(f"{name} {key.get_name()} {key.get_base64()}\n", encoding="ascii")
    with pytest.raises(AuthenticationError):
        backend_of(sftp_server.url).stat("a")
    known.unlink()
    with pytest.raises(StorageError):
        backend_of(sftp_server.url, host_key_policy="reject").stat("a")


# --- opening -------------------------------------------------------------------------------------


def test_construction_imports_no_sdk() -> None:
    script = (
        "import sys\n"
        "from storage.backends import open_backend\n"
        "from storage.backends.base import OpenOptions\n"
        "from storage.uri import parse_uri\n"
        "open_backend(parse_uri('sftp://nobody@127.0.0.1:1/a'), None, OpenOptions()).name\n"
        "sys.exit('paramiko' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_unknown_scheme_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedScheme, match=r"nonsense://.*\bftp\b.*\bs3\b.*\bsftp\b"):
        backend_of("nonsense://host/a")


def test_schemes_with_a_backend_of_their_own_are_not_the_generic_drivers() -> None:
    assert not {"memory", "s3", "gs", "gcs", "az", "abfs", "hf", "file", "http"} & set(
        supported_schemes()
    )
    assert {"sftp", "ftp", "webdav", "webdavs", "github", "smb"} <= set(supported_schemes())


def test_missing_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "paramiko"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(ConfigurationError, match="pip install paramiko"):
        backend_of("sftp://host/a").stat("a")


def test_argument_that_the_file_system_does_not_know() -> None:
    with pytest.raises(ConfigurationError, match="nonsense") as caught:
        backend_of(f"sftp://u:s3cret@{HOST}:{free_port()}/", nonsense=1).stat("a")
    assert "s3cret" not in str(caught.value)


def test_local_files_by_fsspec(tmp_path: Path) -> None:
    backend = backend_of(f"local://{tmp_path}/a")
    key = f"{tmp_path}/m/a.bin".lstrip("/")
    backend.write(key, bytes_payload(b"12345"))
    assert (tmp_path / "m/a.bin").read_bytes() == b"12345"
    assert [info.key for info in backend.list(key.rpartition("/")[0] + "/")] == [key]
    assert read(backend, key, ByteRange(1, 3)) == b"23"
    backend.copy(key, key + "2")
    assert read(backend, key + "2") == b"12345"
    backend.close()


# --- errors --------------------------------------------------------------------------------------


def _paramiko(name: str, *arguments: Any) -> Exception:
    import paramiko

    error = getattr(paramiko.ssh_exception, name)(*arguments)
    assert isinstance(error, Exception)
    return error


class _Response:
    status_code = 503
    headers: ClassVar = {"Retry-After": "5"}


class _Answered(Exception):
    response = _Response()


_RAISED: dict[str, tuple[BaseException, type[StorageError]]] = {
    "missing": (FileNotFoundError("x"), ModelMissingError),
    "missing-below-a-file": (NotADirectoryError("x"), ModelMissingError),
    "exists": (FileExistsError("x"), ObjectExistsError),
    "forbidden": (PermissionError("x"), AuthenticationError),
    "read-only": (OSError(errno.EROFS, "x"), AuthenticationError),
    "full": (OSError(errno.ENOSPC, "x"), InsufficientSpaceError),
    "quota": (OSError(errno.EDQUOT, "x"), InsufficientSpaceError),
    "refused": (ConnectionRefusedError("x"), UnreachableError),
    "no-route": (OSError(errno.EHOSTUNREACH, "x"), UnreachableError),
    "no-such-host": (socket.gaierror(-2, "x"), UnreachableError),
    "reset": (ConnectionResetError("x"), TransientError),
    "timeout": (TimeoutError(), TransientError),
    "end": (EOFError(), TransientError),
    "broken-tls": (ssl.SSLError(1, "x"), TransientError),
    "certificate": (ssl.SSLCertVerificationError(1, "x"), ConfigurationError),
    "not-implemented": (NotImplementedError(), UnsupportedOperation),
    "name-too-long": (OSError(errno.ENAMETOOLONG, "x"), InvalidInput),
    "other-errno": (OSError(errno.EXDEV, "x"), StorageError),
    "word-in-the-message": (OSError("minio.authors.svc: auth failed 403"), StorageError),
    "ftp-login": (ftplib.error_perm("530 Login incorrect"), AuthenticationError),
    "ftp-missing": (ftplib.error_perm("550 No such file"), ModelMissingError),
    "ftp-full": (ftplib.error_perm("552 Quota"), InsufficientSpaceError),
    "ftp-busy": (ftplib.error_temp("421 Too many users"), TransientError),
    "ftp-other": (ftplib.error_perm("500 What?"), StorageError),
    "ssh-login": (_paramiko("AuthenticationException", "x"), AuthenticationError),
    "ssh-nobody": (
        _paramiko("NoValidConnectionsError", {("h", 1): OSError("x")}),
        UnreachableError,
    ),
    "ssh-other": (_paramiko("SSHException", "x"), TransientError),
    "http": (_Answered("x"), TransientError),
    "unknown": (RuntimeError("x"), StorageError),
}


@pytest.mark.parametrize(("raised", "expected"), _RAISED.values(), ids=_RAISED)
def test_exception_is_classified_by_its_kind(
    raised: BaseException, expected: type[StorageError]
) -> None:
    assert type(classify(raised, "sftp://host/a")) is expected


def test_cause_counts_where_the_wrapper_says_nothing() -> None:
    wrapper = RuntimeError("wrapped")
    wrapper.__cause__ = ConnectionRefusedError("x")
    assert type(classify(wrapper, "sftp://host/a")) is UnreachableError


def test_seconds_to_wait_are_kept() -> None:
    error = classify(_Answered("x"), "sftp://host/a")
    assert isinstance(error, TransientError)
    assert error.retry_after == 5


def test_message_holds_no_password() -> None:
    error = classify(RuntimeError("sftp://u:s3cret@h/ and\nhttps://h/?sig=s3cret"), "sftp://h/a")
    assert "s3cret" not in str(error)
    assert len(str(error).splitlines()) == 1
