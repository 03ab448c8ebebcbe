"""Keys, and the Ed25519 signatures of containers."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import IntegrityError, InvalidInput
from storage.container import ModelContainer
from storage.container.signatures.signing import (
    entries_hash,
    is_ed25519,
    load_private_key,
    load_public_key,
    read_signature,
    sign_hash,
    verify_container,
    verify_hash,
)
from tests.container.signing_keys import KeyPair, key_pair

ROUNDS = 3000 if os.environ.get("STORAGE_SOAK") else 300


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return key_pair(tmp_path / "keys", "ed25519")


def openssh(key: Any, password: bytes | None = None) -> bytes:
    encryption: serialization.KeySerializationEncryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    data: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, encryption
    )
    return data


def raw(key: Any) -> bytes:
    data: bytes = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data


# -- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "p256", "p384", "p521"])
def test_keys_are_read_from_files_bytes_and_objects(kind: str, tmp_path: Path) -> None:
    keys = key_pair(tmp_path / "keys", kind)
    public = keys.key.public_key()
    ssh = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    for given_key in (
        keys.public,
        str(keys.public),
        keys.public.read_bytes(),
        bytearray(keys.public.read_bytes()),
        ssh + b" me@here\n",
        public,
    ):
        assert raw(load_public_key(given_key)) == raw(public)
    for given_key in (
        keys.private,
        str(keys.private),
        keys.private.read_bytes(),
        openssh(keys.key),
        keys.key,
    ):
        found = load_private_key(given_key)
        assert raw(found.public_key()) == raw(public)
        assert is_ed25519(found) == (kind == "ed25519")


@pytest.mark.parametrize("password", ["pässword", b"p\xc3\xa4ssword"])
def test_encrypted_keys_need_their_password(tmp_path: Path, password: str | bytes) -> None:
    keys = key_pair(tmp_path / "keys", "ed25519", "pässword".encode())
    for key in (keys.private.read_bytes(), openssh(keys.key, "pässword".encode())):
        assert raw(load_private_key(key, password).public_key()) == raw(keys.key.public_key())
        with pytest.raises(InvalidInput, match="is encrypted; its password is needed"):
            load_private_key(key)
        with pytest.raises(InvalidInput, match="damaged, or the password is wrong"):
            load_private_key(key, "another")
    with pytest.raises(InvalidInput, match="is not encrypted"):
        load_private_key(openssh(keys.key), password)


def _rsa() -> Any:
    return rsa.generate_private_key(65537, 2048)


_PEM = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("load", "make", "found"),
    [
        (load_public_key, lambda: _rsa().public_key().public_bytes(*_PEM), "found RSAPublicKey"),
        (load_private_key, lambda: openssh(_rsa()), "found RSAPrivateKey"),
        (
            load_public_key,
            lambda: ec.generate_private_key(ec.SECP256K1()).public_key(),
            "curve secp256k1; expected P-256",
        ),
        (load_public_key, ed25519.Ed25519PrivateKey.generate, "found a private one"),
        (load_public_key, lambda: openssh(ed25519.Ed25519PrivateKey.generate()), "a private one"),
        (
            load_private_key,
            lambda: ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*_PEM),
            "found a public one",
        ),
        (load_private_key, lambda: b"nonsense", "found something else"),
        (load_public_key, lambda: b"nonsense", "found none"),
        (load_public_key, lambda: b"", "found none"),
        (load_public_key, lambda: "/nothing/here", "cannot be read: No such file"),
        (load_public_key, lambda: "/", "cannot be read: Is a directory"),
        (load_public_key, lambda: "a\0b", "cannot be read"),
        (load_public_key, lambda: "/dev/zero", "has more than"),
        (load_public_key, lambda: 7, "not int"),
        (load_private_key, lambda: None, "not NoneType"),
        (load_private_key, lambda: openssh(_rsa()).decode(), "pass it as bytes"),
    ],
)
def test_what_is_no_key_that_signs_is_refused(
    load: Callable[[Any], object], make: Callable[[], Any], found: str
) -> None:
    with pytest.raises(InvalidInput, match=found):
        load(make())


def test_no_error_holds_a_part_of_a_key_or_a_password(tmp_path: Path) -> None:
    keys = key_pair(tmp_path / "keys", "ed25519", b"open sesame")
    texts = [keys.private.read_bytes(), openssh(keys.key, b"open sesame"), openssh(keys.key)]
    for text in texts:
        lines = [line for line in text.decode().splitlines() if "-----" not in line]
        damaged = text.replace(lines[0].encode()[:8], b"AAAAAAAA")
        for load in (
            lambda: load_public_key(text),  # noqa: B023 -- called at once
            lambda: load_private_key(text, "close sesame"),  # noqa: B023
            lambda: load_private_key(damaged, "open sesame"),  # noqa: B023
            lambda: load_private_key(text.decode()),  # noqa: B023
        ):
            with pytest.raises(InvalidInput) as caught:
                load()
            told = "".join(traceback.format_exception_only(caught.value)) + repr(caught.value)
            told += "".join(traceback.format_exception_only(caught.value.__cause__ or caught.value))
            assert "sesame" not in told
            assert not any(line[:12] in told for line in lines)


@settings(max_examples=ROUNDS)
@given(
    st.binary(max_size=300),
    st.sampled_from(
        [
            b"%s",
            b"-----BEGIN PRIVATE KEY-----\n%s\n-----END PRIVATE KEY-----\n",
            b"-----BEGIN OPENSSH PRIVATE KEY-----\n%s\n-----END OPENSSH PRIVATE KEY-----\n",
            b"-----BEGIN PUBLIC KEY-----\n%s\n-----END PUBLIC KEY-----\n",
            b"ssh-ed25519 %s",
            b"ecdsa-sha2-nistp256 %s me",
        ]
    ),
    st.booleans(),
)
def test_no_bytes_bring_another_error(data: bytes, form: bytes, encoded: bool) -> None:
    text = form % (base64.b64encode(data) if encoded else data)
    for load in (load_public_key, load_private_key):
        with pytest.raises(InvalidInput):
            load(text)


# -- signatures of hashes ----------------------------------------------------------------------


def test_a_signature_is_what_the_other_side_stores(keys: KeyPair) -> None:
    digest = hashlib.sha256(b"content").digest()
    for key in (keys.key, keys.private, keys.private.read_bytes()):
        signed = sign_hash(digest, key, "node-a")
        assert set(signed) == {"algorithm", "signature", "signer_id"}
        assert (signed["algorithm"], signed["signer_id"]) == ("ed25519", "node-a")
        keys.key.public_key().verify(base64.b64decode(signed["signature"]), digest)
        for public in (keys.public, keys.key.public_key()):
            assert verify_hash(digest, public, signed["signature"])
            assert verify_hash(digest, public, signed)
    assert set(sign_hash(digest, keys.key)) == {"algorithm", "signature"}


def test_what_is_not_the_signature_is_false_and_no_error(tmp_path: Path, keys: KeyPair) -> None:
    digest = hashlib.sha256(b"content").digest()
    signed = sign_hash(digest, keys.key)
    other = key_pair(tmp_path / "other", "ed25519")
    assert not verify_hash(digest, other.public, signed)
    assert not verify_hash(hashlib.sha256(b"Content").digest(), keys.public, signed)
    for wrong in (
        "",
        "not base64!",
        "ä",
        signed["signature"][:-4],
        base64.b64encode(b"0" * 64).decode(),
        base64.b64encode(b"0").decode(),
        {},
        {"signature": None},
        {"signature": 7},
        signed | {"algorithm": "rsa"},
        signed | {"algorithm": None},
        None,
        7,
    ):
        assert verify_hash(digest, keys.public, wrong) is False  # type: ignore[arg-type]


def test_keys_of_another_kind_are_an_error(tmp_path: Path) -> None:
    curve = key_pair(tmp_path / "p256")
    for call in (
        lambda: sign_hash(b"0" * 32, curve.key),
        lambda: verify_hash(b"0" * 32, curve.public, ""),
    ):
        with pytest.raises(InvalidInput, match=r"signed with Ed25519 keys.*secp256r1"):
            call()


def test_a_signature_is_read_from_what_either_side_writes(keys: KeyPair) -> None:
    signed = sign_hash(b"0" * 32, keys.key) | {"model_id": "m"}
    assert read_signature(json.dumps(signed).encode()) == signed
    assert read_signature(f" {signed['signature']}\n".encode()) == {
        "signature": signed["signature"]
    }
    for nothing in (
        b"",
        b"{}",
        b"[]",
        b'{"signature": 1}',
        b"\xff",
        b"[" * 60_000,
        b" " * 65_536 + json.dumps(signed).encode(),
    ):
        assert read_signature(nothing) is None


# -- containers ----------------------------------------------------------------------------------


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def hash_of(entries: dict[str, bytes]) -> bytes:
    """Return what the format says is signed, said once more."""
    text = b"".join(name.encode() + b"\0" + entries[name] for name in sorted(entries))
    return hashlib.sha256(text).digest()


ENTRIES = {
    "training_model.bin": os.urandom(3_000_000),
    "metadata.json": json.dumps({"version": 2, "größe": "模型"}).encode(),
    "inference_model.bin": b"",
    "files/ünder score.txt": b"text",
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_hash_is_of_the_entries_however_they_are_packed(method: int, tmp_path: Path) -> None:
    from storage.container.entries import read_directory
    from storage.container.stored import LocalSource

    path = tmp_path / "container.zip"
    path.write_bytes(zipped(ENTRIES, method))
    with path.open("rb") as file:
        entries = read_directory(file)
    source = LocalSource.open(str(path))
    try:
        assert entries_hash(source, entries) == hash_of(ENTRIES)
        assert entries_hash(source, {}) == hashlib.sha256().digest()
    finally:
        source.close()


def test_a_container_is_verified_as_a_file(tmp_path: Path, keys: KeyPair) -> None:
    path = tmp_path / "container.zip"
    path.write_bytes(zipped(ENTRIES))
    signature = json.dumps(sign_hash(hash_of(ENTRIES), keys.key)).encode()
    other = key_pair(tmp_path / "other", "ed25519")
    assert verify_container(str(path), [keys.public], signature)
    assert verify_container(str(path), [other.public, keys.public], signature)
    assert not verify_container(str(path), [other.public], signature)
    assert not verify_container(str(path), [], signature)
    assert not verify_container(str(path), [keys.public], b"{}")
    for change in (
        {"training_model.bin": b"x"},
        {"files/more": b""},
        {"metadata.json": b"{}"},
    ):
        path.write_bytes(zipped(ENTRIES | change))
        assert not verify_container(str(path), [keys.public], signature)
    for data in (zipped(ENTRIES | {"more": b""}), b"X" + zipped(ENTRIES)):
        path.write_bytes(data)
        with pytest.raises(InvalidInput):
            verify_container(str(path), [keys.public], signature)
    damaged = bytearray(zipped(ENTRIES, zipfile.ZIP_STORED))
    damaged[1_000_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError):
        verify_container(str(path), [keys.public], signature)
    path.write_bytes(b"no container")
    with pytest.raises(InvalidInput):
        verify_container(str(path), [keys.public], signature)


def test_the_end_of_the_weights_cannot_be_cut_off_into_another_entry(
    tmp_path: Path, keys: KeyPair
) -> None:
    metadata = b'{"version": 2, "model_id": "m"}'
    honest = {"metadata.json": metadata, "training_model.bin": b"first zz\0second"}
    cut = {"metadata.json": metadata, "training_model.bin": b"first ", "zz": b"second"}
    assert hash_of(cut) == hash_of(honest)
    signed = sign_hash(hash_of(honest), keys.key)
    path = tmp_path / "container.zip"
    path.write_bytes(zipped(honest))
    with ModelContainer.from_file(path) as container:
        assert container.verify_signature(keys.public, signed)
    path.write_bytes(zipped(cut))
    with pytest.raises(InvalidInput, match="'zz'"):
        verify_container(str(path), [keys.public], json.dumps(signed).encode())
    with ModelContainer.from_file(path) as container:
        with pytest.raises(InvalidInput, match="'zz'"):
            container.verify_signature(keys.public, signed)
        with pytest.raises(InvalidInput, match="'zz'"):
            container.sign(keys.key)


def test_signed_bytes_cannot_be_cut_into_other_entries(tmp_path: Path, keys: KeyPair) -> None:
    metadata = b'{"version": 2}'
    honest = {"metadata.json": metadata, "training_model.bin": b"a\0b"}
    path = tmp_path / "container.zip"
    signature = json.dumps(sign_hash(hash_of(honest), keys.key)).encode()
    path.write_bytes(zipped(honest))
    assert verify_container(str(path), [keys.public], signature)
    merged = {"metadata.json": metadata + b"training_model.bin\0a\0b"}
    assert hash_of(merged) == hash_of(honest)
    path.write_bytes(zipped(merged))
    assert not verify_container(str(path), [keys.public], signature)
    bare = {"training_model.bin": b"x"}
    signature = json.dumps(sign_hash(hash_of(bare), keys.key)).encode()
    path.write_bytes(zipped(bare))
    assert not verify_container(str(path), [keys.public], signature)
