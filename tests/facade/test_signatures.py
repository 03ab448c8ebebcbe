"""``require_signature=``: nothing is handed over before its signature was verified."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage import (
    ConfigurationError,
    InvalidInput,
    ModelMissingError,
    OfflineError,
    SignatureError,
    SignaturePolicy,
    Storage,
    StorageClient,
    StorageOperations,
    TransferError,
    UnsupportedOperation,
)
from storage.cli import main
from storage.config import load_settings
from storage.container.signatures.bundle_verify import MAX_BUNDLE
from storage.container.signatures.bundles import sign_tree
from storage.container.signatures.signing import sign_hash
from tests.container.signing_keys import KeyPair, certificates, key_pair
from tests.facade.stores import MemoryStore, Store, tree_bytes
from tests.servers.mounts import small_disk

FILES = {
    "config.json": b'{"a": 1}',
    "sub/weights.bin": bytes(range(256)) * 2000,
    "empty": b"",
    "größe.txt": b"\xff",
}
ONE = b"all of it" * 5000


class Signer:
    """Somebody with a key."""

    def __init__(self, folder: Path) -> None:
        self.keys: KeyPair = key_pair(folder / "keys")
        self.policy = SignaturePolicy.key(self.keys.public)
        self._folder = folder
        self._count = 0

    def _place(self) -> Path:
        self._count += 1
        place = self._folder / str(self._count)
        place.mkdir()
        return place

    def tree(self, files: dict[str, bytes], **options: Any) -> dict[str, bytes]:
        """Return the files with their signature."""
        place = self._place()
        for name, data in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        sign_tree(place, key=self.keys.private, **options)
        return tree_bytes(place)

    def file(self, data: bytes) -> bytes:
        """Return the signature of one file."""
        path = self._place() / "file"
        path.write_bytes(data)
        return Path(sign_tree(path, key=self.keys.private)).read_bytes()


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="session")
def signed(signer: Signer) -> dict[str, bytes]:
    return signer.tree(FILES)


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


def test_a_signed_tree_arrives_by_every_way(
    store: Store, signer: Signer, signed: dict[str, bytes], out: Path
) -> None:
    store.put_all({f"m/{path}": data for path, data in signed.items()})
    options: dict[str, Any] = {"config": store.config, "require_signature": signer.policy}
    dest = out / "m"
    assert Storage.download(store.uri("m"), dest, **options) == str(dest)
    assert tree_bytes(dest) == signed
    cached = Storage.download(store.uri("m"), **options)
    assert tree_bytes(cached) == signed
    assert Storage.download(store.uri("m"), offline=True, **options) == cached
    assert Storage.download(store.uri("m"), out / "n", link="symlink", **options)
    assert tree_bytes(out / "n") == signed


def test_a_signed_object_arrives_by_every_way(store: Store, signer: Signer, out: Path) -> None:
    store.put_all({"one.bin": ONE, "one.bin.sig": signer.file(ONE)})
    options: dict[str, Any] = {"config": store.config, "require_signature": signer.policy}
    dest = Path(Storage.download(store.uri("one.bin"), out / "one.bin", **options))
    assert dest.read_bytes() == ONE
    cached = Storage.download(store.uri("one.bin"), **options)
    assert Path(cached).read_bytes() == ONE
    if not Storage.is_local(store.base):
        assert Storage.download(store.uri("one.bin"), offline=True, **options) == cached


FAULTS: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "no signature": (lambda files: files.pop("model.sig"), "is not signed|is not cached"),
    "a changed file": (
        lambda files: files.update({"sub/weights.bin": FILES["sub/weights.bin"][:-1] + b"!"}),
        r"not what was signed: sub/weights\.bin",
    ),
    "a cut file": (
        lambda files: files.update({"sub/weights.bin": b""}),
        r"not what was signed: sub/weights\.bin",
    ),
    "one file more": (lambda files: files.update({"more.py": b""}), r"not signed: more\.py"),
    "one of git": (
        lambda files: files.update({".gitattributes": b""}),
        r"not signed: \.gitattributes",
    ),
    "one file less": (lambda files: files.pop("empty"), "signed, but not there: empty"),
    "no bundle": (lambda files: files.update({"model.sig": b"{}"}), "no model-signing bundle"),
    "a huge one": (
        lambda files: files.update({"model.sig": b" " * (MAX_BUNDLE + 1)}),
        "more than 8388608 bytes",
    ),
}


@pytest.mark.parametrize("kind", ["memory", "file", "seaweedfs-obstore"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_signed_whole_is_not_handed_over(
    make_store: Callable[[str], Store],
    kind: str,
    fault: str,
    signer: Signer,
    signed: dict[str, bytes],
    out: Path,
) -> None:
    store = make_store(kind)
    change, found = FAULTS[fault]
    files = dict(signed)
    change(files)
    store.put_all({f"m/{path}": data for path, data in files.items()})
    options: dict[str, Any] = {"config": store.config, "require_signature": signer.policy}
    before = Storage.download(store.uri("m"), config=store.config)
    for dest in (None, out / "m", out / "deeper" / "m"):
        for more in ({}, {"cache": True}, {"offline": True}, {"freshness": "cache-first"}):
            with pytest.raises(SignatureError, match=found):
                Storage.download(store.uri("m"), dest, **options, **more)
            assert list(out.iterdir()) == []
    assert tree_bytes(before) == files  # asked for without a signature, it is there as it was


def test_a_foreign_signature_is_refused(
    memory: MemoryStore, stranger: Signer, signer: Signer, tmp_path: Path, out: Path
) -> None:
    memory.put_all({f"m/{path}": data for path, data in stranger.tree(FILES).items()})
    memory.put_all({"one": ONE, "one.sig": stranger.file(ONE)})
    root = certificates(tmp_path / "c").root
    for policy in (signer.policy, SignaturePolicy.certificate(root)):
        for name in ("m", "one"):
            with pytest.raises(SignatureError):
                Storage.download(memory.uri(name), out / "m", require_signature=policy)
    both = SignaturePolicy.key(signer.keys.public, stranger.keys.key.public_key())
    for name in ("m", "one"):
        Storage.download(memory.uri(name), out / name, require_signature=both)


def test_what_is_there_stays_when_its_successor_is_not_signed(
    memory: MemoryStore, signer: Signer, signed: dict[str, bytes], out: Path
) -> None:
    memory.put_all({f"m/{path}": data for path, data in signed.items()})
    Storage.download(memory.uri("m"), out / "m", require_signature=signer.policy)
    memory.put_raw("m/more", b"")
    with pytest.raises(SignatureError):
        Storage.download(memory.uri("m"), out / "m", require_signature=signer.policy)
    assert tree_bytes(out / "m") == signed
    assert [path.name for path in out.iterdir()] == ["m"]


def test_into_a_mount_point_goes_only_what_was_verified(
    memory: MemoryStore, signer: Signer, signed: dict[str, bytes]
) -> None:
    memory.put_all({f"m/{path}": data for path, data in signed.items()})
    with small_disk() as point:
        Storage.download(memory.uri("m"), point, require_signature=signer.policy)
        assert tree_bytes(point) == signed
        memory.put_raw("m/config.json", b"{}")
        with pytest.raises(SignatureError):
            Storage.download(memory.uri("m"), point, require_signature=signer.policy)
        assert tree_bytes(point) == signed


def test_certificates_are_enough(memory: MemoryStore, tmp_path: Path, out: Path) -> None:
    made = certificates(tmp_path / "c")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"1")
    sign_tree(
        tmp_path / "model", key=made.key, certificate=made.leaf, certificate_chain=[made.root]
    )
    memory.put_all({f"m/{name}": data for name, data in tree_bytes(tmp_path / "model").items()})
    policy = SignaturePolicy.certificate(made.root)
    assert policy == SignaturePolicy.read(made.root)
    Storage.download(memory.uri("m"), out / "m", require_signature=policy)
    memory.put_raw("m/a", b"2")
    with pytest.raises(SignatureError, match="not what was signed: a"):
        Storage.download(memory.uri("m"), out / "m", require_signature=policy)


# -- where the signature is ------------------------------------------------------------------


def test_a_tree_may_be_signed_beside_and_a_signature_may_be_anywhere(
    memory: MemoryStore, signer: Signer, signed: dict[str, bytes], tmp_path: Path, out: Path
) -> None:
    memory.put_all({f"m/{path}": data for path, data in FILES.items()})
    elsewhere = tmp_path / "elsewhere.sig"
    elsewhere.write_bytes(signed["model.sig"])
    for place in (str(elsewhere), memory.uri("other/place")):
        policy = replace(signer.policy, signature=place)
        if "://" in place:
            with pytest.raises(SignatureError, match="is not signed: there is no memory"):
                Storage.download(memory.uri("m"), out / "a", require_signature=policy)
            memory.put_raw("other/place", signed["model.sig"])
        Storage.download(memory.uri("m"), out / "a", require_signature=policy)
    with pytest.raises(SignatureError, match=r"no model\.sig nor memory:.*/m\.sig"):
        Storage.download(memory.uri("m"), out / "b", require_signature=signer.policy)
    memory.put_raw("m.sig", signed["model.sig"])
    for uri in (memory.uri("m"), memory.uri("m/")):
        Storage.download(uri, out / "b", require_signature=signer.policy)
    assert tree_bytes(out / "b") == FILES
    Storage.download(memory.uri("m"), require_signature=signer.policy)
    Storage.download(memory.uri("m"), require_signature=signer.policy, offline=True)


def test_offline_the_signature_has_to_be_cached_with_the_model(
    memory: MemoryStore, signer: Signer
) -> None:
    memory.put_all({"one": ONE, "one.sig": signer.file(ONE)})
    Storage.download(memory.uri("one"))
    with pytest.raises(SignatureError, match="its signature is not cached"):
        Storage.download(memory.uri("one"), require_signature=signer.policy, offline=True)
    path = Storage.download(memory.uri("one"), require_signature=signer.policy)
    memory.delete_raw("one")
    memory.delete_raw("one.sig")
    again = Storage.download(memory.uri("one"), require_signature=signer.policy, offline=True)
    assert again == path
    with pytest.raises(OfflineError):
        Storage.download(memory.uri("two"), require_signature=signer.policy, offline=True)
    with pytest.raises(ModelMissingError):
        Storage.download(memory.uri("two"), require_signature=signer.policy)


def test_a_huge_signature_is_refused_before_it_is_fetched(
    memory: MemoryStore, signer: Signer, out: Path
) -> None:
    memory.put_all({"one": ONE, "one.sig": b" " * (MAX_BUNDLE + 1)})
    with pytest.raises(SignatureError, match="8388609 bytes; a signature has at most"):
        Storage.download(memory.uri("one"), out / "one", require_signature=signer.policy)


def test_a_folder_where_the_signature_should_be_is_none(
    memory: MemoryStore, signer: Signer, out: Path
) -> None:
    memory.put_all({"one": ONE, "one.sig/a": b""})
    with pytest.raises(SignatureError, match="is not signed"):
        Storage.download(memory.uri("one"), out / "one", require_signature=signer.policy)


def test_a_cached_signature_that_is_older_than_the_model_is_asked_for_again(
    memory: MemoryStore, signer: Signer
) -> None:
    first, second = ONE, ONE[::-1]
    memory.put_all({"one": first, "one.sig": signer.file(first)})
    options: dict[str, Any] = {"require_signature": signer.policy, "freshness": "max-age=3600"}
    Storage.download(memory.uri("one"), **options)
    memory.put_all({"one": second, "one.sig": signer.file(second)})
    Storage.download(memory.uri("one"))  # the model alone is new now
    assert Path(Storage.download(memory.uri("one"), **options)).read_bytes() == second
    memory.put_all({"one": first})
    with pytest.raises(SignatureError):
        Storage.download(memory.uri("one"), require_signature=signer.policy)


# -- a part of a tree ------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", [{"allow_patterns": "*.json"}, {"ignore_patterns": ["sub/"]}])
def test_a_part_of_a_tree_is_verified_as_a_part(
    memory: MemoryStore,
    signer: Signer,
    signed: dict[str, bytes],
    patterns: dict[str, Any],
    out: Path,
) -> None:
    memory.put_all({f"m/{path}": data for path, data in signed.items()})
    memory.put_raw("m/sub/weights.bin", b"another, which is left out")
    options: dict[str, Any] = {"require_signature": signer.policy, **patterns}
    Storage.download(memory.uri("m"), out / "a", **options)
    assert (out / "a" / "config.json").read_bytes() == FILES["config.json"]
    Storage.download(memory.uri("m"), **options)
    Storage.download(memory.uri("m"), **options, offline=True)
    memory.put_raw("m/more.json", b"")
    with pytest.raises(SignatureError, match=r"not signed: more\.json"):
        Storage.download(memory.uri("m"), out / "b", **options)
    memory.delete_raw("m/more.json")
    memory.put_raw("m/other", b"")
    memory.delete_raw("m/config.json")
    with pytest.raises((SignatureError, ModelMissingError), match=r"config\.json|pattern"):
        Storage.download(memory.uri("m"), out / "b", **options)
    assert [path.name for path in out.iterdir()] == ["a"]


def test_what_the_signer_did_not_sign_can_be_left_out(
    memory: MemoryStore, signer: Signer, signed: dict[str, bytes], out: Path
) -> None:
    memory.put_all({f"m/{path}": data for path, data in signed.items()})
    memory.put_raw("m/.gitattributes", b"*.bin lfs")
    options: dict[str, Any] = {"require_signature": signer.policy}
    with pytest.raises(SignatureError, match=r"not signed: \.gitattributes"):
        Storage.download(memory.uri("m"), out / "m", **options)
    Storage.download(memory.uri("m"), out / "m", ignore_patterns=".gitattributes", **options)
    assert tree_bytes(out / "m") == signed


# -- archives ----------------------------------------------------------------------------------


def archive(files: dict[str, bytes], *, compress: bool = True) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if compress else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["memory", "file", "seaweedfs-obstore"])
def test_of_an_archive_that_is_unpacked_the_archive_is_what_was_signed(
    make_store: Callable[[str], Store], kind: str, signer: Signer, out: Path
) -> None:
    store = make_store(kind)
    good, bad = archive(FILES), archive(FILES | {"more": b""})
    store.put_all({"m.tar.gz": good, "m.tar.gz.sig": signer.file(good)})
    options: dict[str, Any] = {"config": store.config, "unpack": True}
    required = options | {"require_signature": signer.policy}
    uri = store.uri("m.tar.gz")
    Storage.download(uri, out / "a", **required)
    assert tree_bytes(out / "a") == FILES
    cached = Storage.download(uri, **required)
    assert tree_bytes(cached) == FILES
    for more in ({"freshness": "cache-first"}, {"cache": True}, {"digest": None}):
        Storage.download(uri, out / "a", **required, **more)
    if kind != "file":
        assert Storage.download(uri, **required, offline=True) == cached
    store.put_raw("m.tar.gz", bad)
    with pytest.raises(SignatureError, match="not what was signed: the file"):
        Storage.download(uri, out / "b", **required)
    Storage.download(uri, **options)  # now the cache has what is in it, unverified
    for more in ({}, {"freshness": "cache-first"}):
        for dest in (None, out / "b"):
            with pytest.raises(SignatureError):
                Storage.download(uri, dest, **required, **more)
    if kind != "file":
        with pytest.raises((SignatureError, OfflineError)):
            Storage.download(uri, **required, offline=True)
    assert [path.name for path in out.iterdir()] == ["a"]


def test_nothing_of_an_archive_is_unpacked_before_it_is_verified(
    memory: MemoryStore, signer: Signer, out: Path
) -> None:
    memory.put_all({"m.zip": b"PK\x03\x04 damaged", "m.zip.sig": signer.file(b"another")})
    for dest in (None, out / "m"):
        with pytest.raises(SignatureError):
            Storage.download(
                memory.uri("m.zip"), dest, unpack=True, require_signature=signer.policy
            )


# -- on this machine ---------------------------------------------------------------------------


def test_what_is_here_already_is_verified_where_it_is(
    tmp_path: Path, signer: Signer, signed: dict[str, bytes]
) -> None:
    model = tmp_path / "model"
    for name, data in signed.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(data)
    single = tmp_path / "one"
    single.write_bytes(ONE)
    for path in (model, single):
        for offline in (False, True):
            if path == single and not offline:
                with pytest.raises(SignatureError, match="is not signed"):
                    Storage.download(path, require_signature=signer.policy, offline=offline)
                (tmp_path / "one.sig").write_bytes(signer.file(ONE))
            assert Storage.download(path, require_signature=signer.policy, offline=offline) == str(
                path
            )
    (model / "sub" / "hidden").symlink_to("/etc/hostname")
    with pytest.raises(SignatureError, match="not signed: sub/hidden"):
        Storage.download(model, require_signature=signer.policy)
    (model / "sub" / "hidden").unlink()
    (model / "sub" / "folder").symlink_to("/etc")
    with pytest.raises(SignatureError, match="folder is a link to a folder"):
        Storage.download(model, require_signature=signer.policy)


# -- the other calls -----------------------------------------------------------------------------


def test_every_call_that_downloads_verifies(
    memory: MemoryStore, signer: Signer, signed: dict[str, bytes], tmp_path: Path, out: Path
) -> None:
    memory.put_all({f"m/{path}": data for path, data in signed.items()})
    memory.put_all({"one": ONE, "one.sig": signer.file(ONE), "bad": ONE, "bad.sig": b"{}"})
    policy = signer.policy
    good, bad = [memory.uri("m"), memory.uri("one")], memory.uri("bad")
    assert len(Storage.download_many(good, require_signature=policy)) == 2
    with pytest.raises(SignatureError):
        Storage.download_many([*good, bad], require_signature=policy)
    path = Storage.download([bad, memory.uri("one")], out / "one", require_signature=policy)
    assert Path(path).read_bytes() == ONE
    memory.put_raw("no", b"")
    with pytest.raises(SignatureError, match="none of the 2 sources"):
        Storage.download([bad, memory.uri("no")], out / "no", require_signature=policy)
    lock = Storage.lock([*good, bad])
    Storage.download_locked(lock, memory.uri("m"), out / "m", require_signature=policy)
    with pytest.raises(SignatureError):
        Storage.download_locked(lock, bad, out / "bad", require_signature=policy)
    names = tmp_path / "names"
    names.write_text("\n".join([*good, bad]))
    (tmp_path / "lock.json").write_text(lock.dumps())
    with StorageClient() as client:
        for file in (names, tmp_path / "lock.json"):
            results = client.prefetch(file, require_signature=policy)
            assert [result.error is None for result in results] == [True, True, False]
            assert isinstance(results[2].error, SignatureError)
    assert sorted(path.name for path in out.iterdir()) == ["m", "one"]


def test_a_client_with_a_policy_gives_nothing_that_it_did_not_verify(
    memory: MemoryStore, signer: Signer, out: Path
) -> None:
    memory.put_all({"one": ONE, "one.sig": signer.file(ONE), "bad": ONE})
    good, bad = memory.uri("one"), memory.uri("bad")
    with StorageClient(require_signature=signer.policy) as client:
        assert Path(client.download(good)).read_bytes() == ONE
        with pytest.raises(SignatureError):
            client.download(bad)
        with client.open(good) as stream:
            stream.seek(9)
            assert stream.read() == ONE[9:]
        with pytest.raises(SignatureError):
            client.open(bad)
        with pytest.raises(InvalidInput):
            client.open(memory.uri("one.sig/"))
        with pytest.raises(UnsupportedOperation, match="requires"):
            client.filesystem(good)
        with pytest.raises(UnsupportedOperation, match="requires"):
            client.copy_object(good, out / "copy")
        with pytest.raises(UnsupportedOperation, match="requires"):
            client.copy_object(good, f"local://{out}/copy")
        with pytest.raises(SignatureError):
            client.lock([bad])
        with client.open(memory.uri("new"), "wb") as stream:
            stream.write(b"more")
        client.copy_object(good, memory.uri("copied"))
        assert memory.get_raw("copied") == ONE
        assert Path(client.download(bad, require_signature=False)).read_bytes() == ONE
        assert client.get_object_metadata(bad)["size"] == len(ONE)
    assert list(out.iterdir()) == []


def test_the_settings_can_require_signatures_of_everything(
    memory: MemoryStore,
    signer: Signer,
    monkeypatch: pytest.MonkeyPatch,
    fresh_default_client: None,
    tmp_path: Path,
) -> None:
    memory.put_all({"one": ONE, "one.sig": signer.file(ONE), "bad": ONE})
    monkeypatch.setenv("STORAGE_REQUIRE_SIGNATURE", str(signer.keys.public))
    assert Path(Storage.download(memory.uri("one"))).read_bytes() == ONE
    for refused in (
        lambda: Storage.download(memory.uri("bad")),
        lambda: Storage.open(memory.uri("bad")),
        lambda: Storage.filesystem(memory.uri("bad")),
        lambda: StorageOperations.copy_object(memory.uri("bad"), str(tmp_path / "bad")),
    ):
        with pytest.raises((SignatureError, UnsupportedOperation)):
            refused()
    settings = load_settings(require_signature=tmp_path / "nothing")
    with (
        StorageClient(settings=settings) as client,
        pytest.raises(ConfigurationError, match=r"require_signature: .*nothing: a public key"),
    ):
        client.download(memory.uri("one"))


def test_the_command_takes_the_file_of_a_key(
    signer: Signer, signed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in signed.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(data)
    arguments = ["download", str(tmp_path / "m"), str(tmp_path / "out"), "--require-signature"]
    assert main([*arguments, str(signer.keys.public)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert tree_bytes(tmp_path / "out") == signed
    (tmp_path / "m" / "empty").write_bytes(b"no more")
    assert main([*arguments, str(signer.keys.public)]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert "not what was signed: empty" in told.err
    assert tree_bytes(tmp_path / "out") == signed
    assert main([*arguments, str(signer.keys.private)]) == 1
    assert "found a private one" in capsys.readouterr().err


def test_a_failed_transfer_stays_a_failed_transfer(
    memory: MemoryStore, signer: Signer, out: Path
) -> None:
    policy = replace(signer.policy, signature="http://127.0.0.1:9/nobody.sig")
    memory.put_raw("one", ONE)
    settings = load_settings(transfer={"attempts": 1, "connect_timeout": 2})
    with StorageClient(settings=settings) as client, pytest.raises(TransferError):
        client.download(memory.uri("one"), out / "one", require_signature=policy)
    assert list(out.iterdir()) == []


# -- policies --------------------------------------------------------------------------------


def test_policies_are_values_and_refuse_what_cannot_be_one(
    signer: Signer, stranger: Signer, tmp_path: Path
) -> None:
    pem = signer.keys.public.read_bytes()
    same = SignaturePolicy.key(pem)
    assert signer.policy == same == SignaturePolicy.read(signer.keys.public)
    assert hash(signer.policy) == hash(same)
    assert signer.policy != stranger.policy
    for make in (
        SignaturePolicy.key,
        SignaturePolicy.certificate,
        lambda: SignaturePolicy.key(signer.keys.private),
        lambda: SignaturePolicy.read(signer.keys.private),
        lambda: SignaturePolicy.key(tmp_path / "nothing"),
        lambda: SignaturePolicy.key(pem.decode()),
        lambda: SignaturePolicy.key(b"nonsense"),
        lambda: SignaturePolicy.certificate(signer.keys.public),
    ):
        with pytest.raises(InvalidInput) as caught:
            make()
        assert "PRIVATE" not in str(caught.value)
    with pytest.raises(InvalidInput, match="require_signature is a SignaturePolicy"):
        Storage.download("memory://b/x", require_signature=True)  # type: ignore[arg-type]


# -- containers --------------------------------------------------------------------------------


@pytest.fixture
def container(tmp_path: Path) -> tuple[bytes, bytes, KeyPair]:
    """A container, its signature, and who signed it."""
    keys = key_pair(tmp_path / "ed", "ed25519")
    entries = {
        "inference_model.bin": os.urandom(2000),
        "metadata.json": json.dumps({"version": 2, "größe": 1}).encode(),
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    text = b"".join(name.encode() + b"\0" + data for name, data in sorted(entries.items()))
    signature = sign_hash(hashlib.sha256(text).digest(), keys.key, "me")
    return stream.getvalue(), json.dumps(signature).encode(), keys


@pytest.mark.parametrize("kind", ["memory", "file", "seaweedfs-obstore"])
def test_a_container_may_be_signed_in_its_own_way(
    make_store: Callable[[str], Store],
    kind: str,
    container: tuple[bytes, bytes, KeyPair],
    signer: Signer,
    tmp_path: Path,
    out: Path,
) -> None:
    store = make_store(kind)
    data, signature, keys = container
    store.put_all({"c.zip": data, "c.zip.sig": signature})
    policy = SignaturePolicy.key(keys.public)
    options: dict[str, Any] = {"config": store.config, "require_signature": policy}
    uri = store.uri("c.zip")
    for dest in (None, out / "c.zip"):
        assert Path(Storage.download(uri, dest, **options)).read_bytes() == data
    if kind != "file":
        Storage.download(uri, offline=True, **options)
    other = key_pair(tmp_path / "other", "ed25519")
    for refused in (SignaturePolicy.key(other.public), signer.policy):
        with pytest.raises(SignatureError):
            Storage.download(uri, out / "x", config=store.config, require_signature=refused)
    both = SignaturePolicy.key(other.public, signer.keys.public, keys.public)
    Storage.download(uri, out / "y.zip", config=store.config, require_signature=both)
    for damaged in (
        data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
        data[:-100],
        b"",
        b"PK\x03\x04",
        ONE,
    ):
        store.put_raw("c.zip", damaged)
        with pytest.raises(SignatureError):
            Storage.download(uri, out / "z", **options)
    store.put_all({"m/c.zip": data, "m.sig": signature})
    with pytest.raises(SignatureError, match="an Ed25519 key signs containers only"):
        Storage.download(store.uri("m"), out / "m", **options)
    assert sorted(path.name for path in out.iterdir()) == ["c.zip", "y.zip"]


def test_a_container_with_something_in_front_is_refused(
    memory: MemoryStore, container: tuple[bytes, bytes, KeyPair], out: Path
) -> None:
    data, signature, keys = container
    policy = SignaturePolicy.key(keys.public)
    tar = archive({"foreign.py": b"run"}, compress=False)[:1024]
    for front in (b"X", tar):
        memory.put_all({"c.zip": front + data, "c.zip.sig": signature})
        for unpack in (False, True):
            with pytest.raises(SignatureError):
                Storage.download(
                    memory.uri("c.zip"), out / "c", unpack=unpack, require_signature=policy
                )
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_is_unpacked_is_not_verified_by_the_signature_of_a_container(
    make_store: Callable[[str], Store],
    kind: str,
    container: tuple[bytes, bytes, KeyPair],
    signer: Signer,
    out: Path,
) -> None:
    store = make_store(kind)
    data, signature, keys = container
    store.put_all({"c.zip": data, "c.zip.sig": signature})
    both = SignaturePolicy.key(keys.public, signer.keys.public)
    options: dict[str, Any] = {"config": store.config, "unpack": True, "require_signature": both}
    uri = store.uri("c.zip")
    # Also if the cache has it, verified as the container that it is.
    Storage.download(uri, config=store.config, require_signature=both)
    for dest in (None, out / "c"):
        with pytest.raises(SignatureError, match="by a bundle"):
            Storage.download(uri, dest, **options)
    assert list(out.iterdir()) == []
    store.put_raw("c.zip.sig", signer.file(data))
    for dest in (None, out / "c"):
        assert (Path(Storage.download(uri, dest, **options)) / "metadata.json").exists()


def test_a_client_with_a_policy_opens_no_tree_and_fetches_none(
    memory: MemoryStore, signer: Signer
) -> None:
    memory.put_all({f"m/{name}": data for name, data in signer.tree(FILES).items()})
    with StorageClient(require_signature=signer.policy) as client:
        with pytest.raises(InvalidInput, match="is a tree"):
            client.open(memory.uri("m"))
        blobs = Path(client.cache.upper.layout.blobs)
        assert not [path for path in blobs.rglob("*") if path.is_file()]
