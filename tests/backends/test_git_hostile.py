"""Git repositories and servers that are made to do harm: names, bombs, objects, answers."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from storage import (
    AuthenticationError,
    ModelMissingError,
    StorageClient,
    StorageError,
    UnsupportedOperation,
)
from storage.backends.base import ObjectInfo, OpenOptions
from storage.backends.drivers.web import WebSession
from storage.backends.git import backend as git_backend
from storage.backends.git import pack as packs
from storage.backends.git import remote
from storage.backends.git.backend import GitBackend
from storage.backends.git.lfs import LargeFiles, Pointer
from storage.backends.git.pack import Incoming, Pack
from storage.config import Settings
from storage.errors import ConfigurationError, TransientError
from storage.uri import parse_uri
from tests.servers.git_http import GitHTTP
from tests.servers.odd_http import OddHTTP, Reply

KINDS = {"commit": 1, "tree": 2, "blob": 3, "tag": 4}
IDENTITY = b"a <a@example.org> 0 +0000"


@pytest.fixture
def client() -> Iterator[StorageClient]:
    with StorageClient(settings=Settings(transfer={"attempts": 1})) as client:
        yield client


class Objects:
    """Makes objects as git has them, whether git would or not."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bytes]] = []

    def add(self, kind: str, data: bytes) -> bytes:
        self.made.append((kind, data))
        return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).digest()

    def tree(self, *entries: tuple[str, str, bytes]) -> bytes:
        return self.add("tree", b"".join(f"{m} {n}\0".encode() + o for m, n, o in entries))

    def commit(self, tree: bytes) -> bytes:
        head = b"tree %s\nauthor %s\ncommitter %s\n\n" % (tree.hex().encode(), IDENTITY, IDENTITY)
        return self.add("commit", head + b"m\n")

    def push(self, server: GitHTTP, commit: bytes) -> str:
        """Put them into a repository past all checks, and return its URI."""
        bare = server.create_bare("m")
        for kind, data in self.made:
            text = b"%s %d\0" % (kind.encode(), len(data)) + data
            name = hashlib.sha1(text).hexdigest()
            path = bare / "objects" / name[:2] / name[2:]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(zlib.compress(text))
        (bare / "refs" / "heads" / "main").write_text(commit.hex() + "\n")
        return server.uri("m")

    def pack(self) -> Pack:
        return packed([(KINDS[kind], b"", data) for kind, data in self.made])


def packed(entries: Sequence[tuple[int, bytes, bytes]]) -> Pack:
    """Return a pack of types, what stands before the content, and contents."""
    incoming = Incoming("git")
    raw = b"PACK" + (2).to_bytes(4, "big") + len(entries).to_bytes(4, "big")
    for kind, base, data in entries:
        size, byte = len(data) >> 4, kind << 4 | len(data) & 15
        while size:
            raw += bytes([byte | 128])
            size, byte = size >> 7, size & 127
        raw += bytes([byte]) + base + zlib.compress(data)
    incoming.write(raw + hashlib.sha1(raw).digest())
    return incoming.finish()


@pytest.fixture
def served(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Objects, bytes], GitBackend]]:
    """Opens a repository whose server gave away objects that git itself would not send."""
    opened = []

    def serve(objects: Objects, commit: bytes) -> GitBackend:
        location = parse_uri(f"git+http://127.0.0.1:9/m.git@{commit.hex()}/")
        backend = git_backend.open_backend(location, None, OpenOptions())
        opened.append(backend)
        monkeypatch.setattr(backend._remote, "fetch", lambda commit: objects.pack())
        return backend

    yield serve
    for backend in opened:
        backend.close()


@pytest.mark.parametrize("name", ["..", "../../evil", "/evil", ".", "a//b"])
def test_names_that_lead_elsewhere_are_not_followed(
    git_server: GitHTTP, client: StorageClient, tmp_path: Path, name: str
) -> None:
    objects = Objects()
    file = objects.add("blob", b"x")
    folder = objects.tree(("100644", "evil", file))
    odd = ("40000", name, folder) if name in (".", "..") else ("100644", name, file)
    uri = objects.push(git_server, objects.commit(objects.tree(odd, ("100644", "z", file))))

    with pytest.raises(StorageError):
        client.download(uri, tmp_path / "a" / "b" / "m")
    assert not list(tmp_path.rglob("evil"))


def test_a_bomb_of_folders_is_refused(
    git_server: GitHTTP, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_backend, "_MAX_ENTRIES", 5000)
    objects = Objects()
    node, mode = objects.add("blob", b"x"), "100644"
    for _ in range(8):  # 100 million files
        node, mode = objects.tree(*((mode, f"{n}", node) for n in range(10))), "40000"

    with pytest.raises(UnsupportedOperation, match="more than 5000"):
        client.list_objects(objects.push(git_server, objects.commit(node)))


def test_a_bomb_of_links_to_empty_folders_is_refused(
    git_server: GitHTTP, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_backend, "_MAX_ENTRIES", 5000)
    objects = Objects()
    entries = [("40000", "f30", objects.tree())]
    for n in range(30):
        link = objects.add("blob", f"../f{n + 1:02}".encode())
        entries.append(("40000", f"f{n:02}", objects.tree(*[("120000", a, link) for a in "ab"])))
    root = objects.tree(*sorted(entries, key=lambda entry: entry[1]))

    with pytest.raises(UnsupportedOperation, match="more than 5000"):
        client.list_objects(objects.push(git_server, objects.commit(root)))


def test_folders_without_end_are_refused(git_server: GitHTTP, client: StorageClient) -> None:
    objects = Objects()
    node, mode = objects.add("blob", b"x"), "100644"
    for _ in range(1500):
        node, mode = objects.tree((mode, "a", node)), "40000"

    with pytest.raises(UnsupportedOperation, match="more than 128 folders"):
        client.list_objects(objects.push(git_server, objects.commit(node)))


def test_names_of_branches_without_end_are_refused(
    git_server: GitHTTP, client: StorageClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = Objects()
    commit = objects.commit(objects.tree(("100644", "a", objects.add("blob", b"x"))))
    uri = objects.push(git_server, commit)
    heads = git_server.folder / "m.git" / "refs" / "heads"
    for n in range(100):
        (heads / f"branch-{n}").write_text(commit.hex() + "\n")
    git_server.newest = 0
    assert client.list_objects(uri) == ["a"]
    monkeypatch.setattr(remote, "_MAX_NAMES", 2000)

    with pytest.raises(UnsupportedOperation, match="more than 2000 bytes"):
        client.list_objects(uri)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda objects: objects.add("tree", b"100644 no end"), "damaged"),
        (lambda objects: objects.add("tree", b"10x644 a\0" + bytes(20)), "damaged"),
        (lambda objects: objects.add("blob", b"x"), "is no tree"),
        (lambda objects: objects.tree(("100644", "a", objects.tree())), "is no blob"),
        (lambda objects: objects.tree(("40000", "a", objects.add("blob", b"x"))), "is no tree"),
    ],
)
def test_a_damaged_object_is_said(
    served: Callable[[Objects, bytes], GitBackend],
    make: Callable[[Objects], bytes],
    message: str,
) -> None:
    objects = Objects()
    backend = served(objects, objects.commit(make(objects)))

    with pytest.raises(StorageError, match=message):
        list(backend.list())


@pytest.mark.parametrize(
    ("kind", "data"),
    [("commit", b"nothing"), ("commit", b"tree zz\n\n"), ("tag", b"object 12\n"), ("tag", b"")],
)
def test_a_damaged_commit_is_said(
    served: Callable[[Objects, bytes], GitBackend], kind: str, data: bytes
) -> None:
    objects = Objects()
    backend = served(objects, objects.add(kind, data))

    with pytest.raises(StorageError, match=r"damaged|no commit"):
        list(backend.list())


def test_contents_that_others_are_made_of_are_not_all_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packs, "_HELD", 1000)
    base = bytes(range(250)) * 4
    contents = [base]
    entries = [(3, b"", base)]
    for n in range(40):  # each from the one before; every second one from the first
        before = contents[-1] if n % 2 else base
        added = f"{n:04}".encode()
        delta = _varint(len(before)) + _varint(len(before) + 4)
        delta += b"\xb0" + len(before).to_bytes(2, "little") + b"\x04" + added
        entries.append((7, hashlib.sha1(b"blob %d\0" % len(before) + before).digest(), delta))
        contents.append(before + added)

    pack = packed(entries)

    for content in contents:
        name = hashlib.sha1(b"blob %d\0" % len(content) + content).digest()
        assert pack.content(name) == content


def test_a_difference_with_a_size_without_end_is_damage() -> None:
    base = b"base"
    name = hashlib.sha1(b"blob 4\0base").digest()

    with pytest.raises(StorageError, match=r"damaged|bytes are the limit"):
        packed([(3, b"", base), (7, name, b"\xff" * 4_000_000)])


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


# -- large file storage ---------------------------------------------------------------------------


OID = "0" * 64


def ask_large(server: OddHTTP, answer: bytes) -> None:
    """Ask for a large file, of which the host answers so."""
    server.handler = lambda request: Reply(200, answer)
    session = WebSession(
        None,
        OpenOptions(),
        store="the git server",
        address="the URI",
        home=lambda: server.url,
        credentials=dict,
    )
    try:
        files = LargeFiles(f"{server.url}/m", session)
        files.read(Pointer(OID, 2000), ObjectInfo("large", 2000), None, "git")
    finally:
        session.close()


def told(**fields: Any) -> bytes:
    return json.dumps({"objects": [{"oid": OID, **fields}]}).encode()


@pytest.fixture
def server(odd_http: Callable[..., OddHTTP]) -> OddHTTP:
    return odd_http(lambda request: Reply(500))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (404, ModelMissingError),
        (403, AuthenticationError),
        (429, TransientError),
        (503, TransientError),
    ],
)
def test_why_a_host_has_no_large_file_is_told_by_kind(
    server: OddHTTP, code: int, kind: type[StorageError]
) -> None:
    with pytest.raises(kind, match=f"large file.*{code}: no"):
        ask_large(server, told(error={"code": code, "message": "no"}))


@pytest.mark.parametrize(
    "href", ["http://[bad/x", "http://h.example:99999/x", "file:///etc/passwd", "http://u:p@h/x"]
)
def test_an_address_of_a_large_file_that_is_none_is_refused(server: OddHTTP, href: str) -> None:
    with pytest.raises(ConfigurationError, match="not a plain URL"):
        ask_large(server, told(actions={"download": {"href": href}}))


@pytest.mark.parametrize("target", ["http://[bad/x", "http://h.example:99999/x", "//u:p@h/x"])
def test_a_redirection_to_what_is_no_address_is_refused(server: OddHTTP, target: str) -> None:
    def leading(request: Any) -> Reply:
        return Reply(302, headers={"Location": target})

    session = WebSession(
        None, OpenOptions(), store="s", address="a", home=lambda: server.url, credentials=dict
    )
    server.handler = leading
    with pytest.raises(ConfigurationError, match="not a plain URL"):
        session.request("GET", f"{server.url}/x", "git")
    session.close()


def test_an_answer_nested_without_end_is_damage(server: OddHTTP) -> None:
    with pytest.raises(TransientError, match="damaged"):
        ask_large(server, b"[" * 900_000)
