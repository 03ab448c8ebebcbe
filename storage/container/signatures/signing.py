"""Ed25519 signatures of containers, and the keys that signatures are made and checked with.

What is signed is the SHA-256 of a container's entries in the order of their names: of each the
name in UTF-8, a zero byte and the content, without lengths. That is what ``scaleoututil`` signs,
so either side verifies what the other signed. How the entries are packed does not count: the
signature stays right when a container is written anew with the same entries.

A signature is kept beside a container, as JSON::

    {"model_id": "…", "algorithm": "ed25519", "signature": "<base64>", "signer_id": "…"}
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from storage.container.metadata import FILES, INFERENCE_MODEL, METADATA, TRAINING_MODEL
from storage.errors import ConfigurationError, InvalidInput, one_line
from storage.files import shown

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

    from storage.container.entries import Entry
    from storage.container.source import Source

    PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
    PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

__all__ = [
    "KeySource",
    "check_names",
    "entries_hash",
    "is_ed25519",
    "load_private_key",
    "load_public_key",
    "need_cryptography",
    "read_signature",
    "read_small",
    "sign_hash",
    "verify_container",
    "verify_hash",
]

AnyKey = TypeVar("AnyKey")
KeySource = str | os.PathLike[str] | bytes | Any
"""A key: the path of a file, the text of one as bytes, or a key object of ``cryptography``."""

_ALGORITHM = "ed25519"
_BLOCK = 1024 * 1024
_MAX_METADATA = 16 * 1024 * 1024
_MAX_SIGNATURE = 64 * 1024
_MAX_KEY_FILE = 1024 * 1024
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


# -- keys ------------------------------------------------------------------------------------


def load_private_key(key: KeySource, password: str | bytes | None = None) -> PrivateKey:
    """Return the private key that ``key`` is or holds.

    Args:
        key: PEM or OpenSSH text as bytes, the path of a file with it, or a key object.
        password: what an encrypted key is encrypted with.

    Raises:
        InvalidInput: there is no such key, the password is wrong, or it is of another kind than
            Ed25519 or a NIST curve (P-256, P-384, P-521). No message holds a part of the key.
        ConfigurationError: the package ``cryptography`` is not installed.
    """
    private, _ = _kinds()
    if isinstance(key, private):
        return _checked(cast("PrivateKey", key), "the key")
    data, name = _read(key)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    if b"PRIVATE KEY-----" not in data:
        found = "a public one" if _is_public(data) else "something else"
        raise InvalidInput(f"{name}: expected a private key (PEM or OpenSSH), found {found}")
    openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    form = "ssh" if openssh else "pem"
    load: Callable[..., PrivateKey] = getattr(serialization, f"load_{form}_private_key")
    secret = password.encode() if isinstance(password, str) else password
    try:
        return _checked(load(data, secret), name)
    except InvalidInput:
        raise
    except UnsupportedAlgorithm as exc:
        raise InvalidInput(f"{name}: the key is of a kind that is not supported here") from exc
    except TypeError as exc:
        # What it says when a password is there and not needed, or the other way round.
        why = "is encrypted; its password is needed" if secret is None else "is not encrypted"
        raise InvalidInput(f"{name}: the private key {why}") from exc
    except ValueError as exc:
        hint = "" if secret is None else ", or the password is wrong"
        raise InvalidInput(f"{name}: the private key cannot be read; it is damaged{hint}") from exc


def load_public_key(key: KeySource) -> PublicKey:
    """Return the public key that ``key`` is or holds.

    Args:
        key: PEM or OpenSSH text as bytes, the path of a file with it, or a key object.

    Raises:
        InvalidInput: there is no such key, it is a private one, or it is of another kind than
            Ed25519 or a NIST curve (P-256, P-384, P-521).
        ConfigurationError: the package ``cryptography`` is not installed.
    """
    private, public = _kinds()
    if isinstance(key, public):
        return _checked(cast("PublicKey", key), "the key")
    if isinstance(key, private):
        raise InvalidInput("expected a public key, found a private one; pass its public_key()")
    data, name = _read(key)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    if b"PRIVATE KEY-----" in data:
        raise InvalidInput(
            f"{name}: expected a public key, found a private one; whoever verifies must not "
            "have it: write the public half to a file of its own"
        )
    openssh = not data.lstrip().startswith(b"-----BEGIN")
    form = "ssh" if openssh else "pem"
    load: Callable[..., PublicKey] = getattr(serialization, f"load_{form}_public_key")
    try:
        return _checked(load(data), name)
    except InvalidInput:
        raise
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise InvalidInput(f"{name}: expected a public key (PEM or OpenSSH), found none") from exc


def is_ed25519(key: object) -> bool:
    """Tell whether a key object is of the kind that signs containers."""
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return isinstance(key, (ed25519.Ed25519PrivateKey, ed25519.Ed25519PublicKey))


def read_small(path: str | os.PathLike[str], limit: int, what: str) -> bytes:
    """Return the content of a file that is no longer than ``limit`` bytes.

    Args:
        path: of the file.
        limit: in bytes.
        what: the file is, for messages.

    Raises:
        InvalidInput: it cannot be read, or is longer.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else None
        raise InvalidInput(f"{shown(path)}: {what} cannot be read: {reason or exc}") from exc
    if len(data) > limit:
        raise InvalidInput(f"{shown(path)} has more than {limit} bytes; {what} is shorter")
    return data


def _read(key: KeySource) -> tuple[bytes, str]:
    """Return the text of a key, and what it is called in messages."""
    if isinstance(key, (bytes, bytearray)):
        return bytes(key), "the key"
    if isinstance(key, (str, os.PathLike)):
        path = os.fspath(key)
        if isinstance(path, str) and "-----BEGIN" in path:
            # Not shown: it may be a private one.
            raise InvalidInput("a key was given as text; pass it as bytes, or the path of a file")
        return read_small(path, _MAX_KEY_FILE, "a key"), shown(path)
    raise InvalidInput(
        f"a key is the path of a file, bytes, or an Ed25519 or elliptic-curve key, "
        f"not {type(key).__name__}"
    )


def _is_public(data: bytes) -> bool:
    return b"PUBLIC KEY-----" in data or data.startswith((b"ssh-", b"ecdsa-"))


def need_cryptography() -> None:
    """Raise ``ConfigurationError`` if the package ``cryptography`` is not installed."""
    try:
        import cryptography.x509  # noqa: F401
    except ImportError as exc:
        raise ConfigurationError(
            "signatures need the package cryptography, which is not installed "
            f'({one_line(exc)}); run: pip install "modelstorage[container]"'
        ) from exc


def _kinds() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Return the types of private and of public keys."""
    need_cryptography()
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    return (
        (ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey),
        (ed25519.Ed25519PublicKey, ec.EllipticCurvePublicKey),
    )


def _checked(key: AnyKey, name: str) -> AnyKey:
    private, public = _kinds()
    if not isinstance(key, (*private, *public)):
        raise InvalidInput(
            f"{name}: expected an Ed25519 key or one of the curve P-256, P-384 or P-521, "
            f"found {type(key).__name__.lstrip('_')}"
        )
    curve = getattr(key, "curve", None)
    if curve is not None and curve.name not in _CURVES:
        raise InvalidInput(
            f"{name}: the key is of the curve {curve.name}; expected P-256, P-384 or P-521"
        )
    return key


# -- containers ------------------------------------------------------------------------------


def entries_hash(source: Source, entries: Mapping[str, Entry]) -> bytes:
    """Return the SHA-256 that a container's signature is of.

    Args:
        source: the bytes of the container.
        entries: all its entries, by name.

    Raises:
        IntegrityError: an entry is damaged.
        StorageError: ``source`` cannot be read.
    """
    from storage.container.entries import open_entry

    hasher = hashlib.sha256()
    for name in sorted(entries):
        hasher.update(name.encode() + b"\0")
        with open_entry(source, entries[name]) as stream:
            while block := stream.read(_BLOCK):
                hasher.update(block)
    return hasher.digest()


def check_names(container: str, entries: Iterable[str]) -> None:
    """Refuse a container that has entries of other names than the format knows.

    No lengths are signed. The training model is the last of the entries that are; what was cut
    from its end could be signed bytes of an entry that nobody looks at.

    Args:
        container: what it is called in messages.
        entries: their names.

    Raises:
        InvalidInput: there is another one.
    """
    known = (METADATA, TRAINING_MODEL, INFERENCE_MODEL)
    for name in entries:
        if name not in known and not name.startswith(FILES):
            raise InvalidInput(
                f"{container} holds {one_line(repr(name), 80)}, which is no entry of a container; "
                "a signature cannot vouch for it: build the container without it, or sign the "
                "file by a bundle"
            )


def sign_hash(
    digest: bytes, private_key: KeySource, signer_id: str | None = None
) -> dict[str, str]:
    """Return the signature of what :func:`entries_hash` gave.

    Args:
        digest: the hash.
        private_key: an Ed25519 key, as :func:`load_private_key` takes it.
        signer_id: any text that says who signed. It is not signed itself.

    Returns:
        ``algorithm``, ``signature`` (base64) and, if given, ``signer_id``.

    Raises:
        InvalidInput: it is no private Ed25519 key.
    """
    key: Any = load_private_key(private_key)
    _demand_ed25519(key)
    signed = {
        "algorithm": _ALGORITHM,
        "signature": base64.b64encode(key.sign(digest)).decode("ascii"),
    }
    return signed if signer_id is None else signed | {"signer_id": signer_id}


def read_signature(data: bytes) -> dict[str, object] | None:
    """Return the signature of a container that a file holds; ``None`` if it holds none.

    Args:
        data: the file's content, by whomever: what :func:`sign_hash` gave as JSON, or its base64
            alone.
    """
    if len(data) > _MAX_SIGNATURE:
        return None
    if re.fullmatch(rb"\s*[A-Za-z0-9+/]{86}==\s*", data):
        return {"signature": data.decode("ascii").strip()}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("signature"), str) else None


def verify_hash(
    digest: bytes, public_key: KeySource, signature: str | Mapping[str, object]
) -> bool:
    """Tell whether a signature is of what :func:`entries_hash` gave, by the owner of a key.

    Args:
        digest: the hash.
        public_key: an Ed25519 key, as :func:`load_public_key` takes it.
        signature: in base64; or the whole of what :func:`sign_hash` gave. What cannot be read,
            or is of another algorithm, is not right.

    Raises:
        InvalidInput: it is no public Ed25519 key.
    """
    from cryptography.exceptions import InvalidSignature

    key: Any = load_public_key(public_key)
    _demand_ed25519(key)
    text: object = signature
    if isinstance(signature, Mapping):
        if signature.get("algorithm", _ALGORITHM) != _ALGORITHM:
            return False
        text = signature.get("signature")
    if not isinstance(text, (str, bytes)):
        return False
    try:
        key.verify(base64.b64decode(text), digest)
    except (InvalidSignature, ValueError):
        return False
    return True


def verify_container(path: str, public_keys: Iterable[KeySource], signature: bytes) -> bool:
    """Tell whether a file is a container that one of ``public_keys`` signed.

    Args:
        path: of the file.
        public_keys: Ed25519 keys.
        signature: the content of its signature's file, by whomever.

    Raises:
        InvalidInput: the file is no container, or one that no signature can vouch for.
        IntegrityError: it is damaged.
    """
    from storage.container.entries import open_entry, read_directory
    from storage.container.stored import LocalSource

    found = read_signature(signature)
    if found is None:
        return False
    with contextlib.closing(LocalSource.open(path)) as source:
        entries = read_directory(source)
        if entries and min(entry.header_offset for entry in entries.values()):
            # Programs that go by the beginning of a file would take it for something else.
            raise InvalidInput(f"{source.name} has something in front of the container; refused")
        check_names(source.name, entries)
        # No lengths are signed: only together with what one of them has to hold can nobody cut
        # the signed bytes into other entries.
        if METADATA not in entries or entries[METADATA].size > _MAX_METADATA:
            return False
        with open_entry(source, entries[METADATA]) as stream:
            try:
                if not isinstance(json.loads(stream.read()), dict):
                    return False
            except (ValueError, RecursionError):
                return False
        digest = entries_hash(source, entries)
    return any(verify_hash(digest, key, found) for key in public_keys)


def _demand_ed25519(key: Any) -> None:
    if not is_ed25519(key):
        raise InvalidInput(
            f"containers are signed with Ed25519 keys; this one is of the curve {key.curve.name}, "
            "which signs trees and files (sign_tree, verify_tree)"
        )
