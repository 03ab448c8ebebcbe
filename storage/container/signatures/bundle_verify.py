"""Whom a model-signing bundle is by, and what it says; the bundle may come from anybody."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from storage.container.signatures.signed_files import SignedFiles, SignedPart
from storage.container.signatures.signing import need_cryptography, read_small
from storage.errors import (
    ConfigurationError,
    InvalidInput,
    SignatureError,
    UnsupportedOperation,
    one_line,
)
from storage.files import shown

if TYPE_CHECKING:
    from storage.container.signatures.signing import PublicKey

__all__ = [
    "MAX_BUNDLE",
    "Trust",
    "package",
    "pem_of",
    "read_certificates",
    "served",
    "verify_bundle",
]

MAX_BUNDLE = 8 * 1024 * 1024
"""Bytes of the largest bundle that is looked at; enough for the names of 30,000 files."""

# Brackets, commas and colons: a bundle has some dozens, and each value takes memory.
_MAX_TOKENS = 10_000
_PLAIN = bytes(range(0x20, 0x7F)) + b"\n"


@dataclass(frozen=True, slots=True)
class Trust:
    """Whose signatures count."""

    keys: tuple[PublicKey, ...] = ()
    """Public elliptic-curve keys; a bundle has to be by one of them."""

    roots: tuple[bytes, ...] = ()
    """Certificates in PEM that a signer's certificate has to lead to."""


def read_certificates(source: str | os.PathLike[str] | bytes) -> bytes:
    """Return the text of certificates in PEM.

    Raises:
        InvalidInput: they cannot be read, or there are none.
    """
    if isinstance(source, bytes):
        data, name = source, "the certificates"
    else:
        data, name = read_small(source, MAX_BUNDLE, "a certificate"), shown(source)
    need_cryptography()
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as exc:
        raise InvalidInput(f"{name}: expected certificates in PEM, found none") from exc
    return data


def verify_bundle(data: bytes, trust: Trust, where: str) -> SignedFiles:
    """Return what a bundle says, after verifying who signed it.

    Args:
        data: the bundle, which may be by anybody.
        trust: whose signatures count.
        where: what is said to be signed, for messages.

    Raises:
        SignatureError: it is no bundle, is signed by nobody who counts, or was changed.
        ConfigurationError: the package ``model-signing`` is not installed.
    """
    bundle = _read_bundle(data, where)
    if trust.keys and "publicKey" not in bundle["verificationMaterial"] and not trust.roots:
        raise SignatureError(
            f"{where}: the signature is by a certificate, and a key was expected to have signed"
        )
    attempts: list[Callable[[], Any]] = []
    if "publicKey" in bundle["verificationMaterial"]:
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        for key in trust.keys:
            pem = pem_of(key)
            mine = hashlib.sha256(pem).hexdigest()
            if hint in (None, mine):
                attempts.append(partial(_verify_with_key, _with_hint(bundle, mine), pem))
    elif trust.roots:
        attempts.append(partial(_verify_with_roots, bundle, b"\n".join(trust.roots)))
    if not attempts:
        raise SignatureError(f"{where}: the signature is by another key than the expected")
    for attempt in attempts:
        try:
            return _signed_files(attempt(), where)
        except (ConfigurationError, UnsupportedOperation):
            raise
        except Exception as exc:  # noqa: BLE001 -- of whatever a stranger's bytes bring about
            error = exc
    # What is wrong with a signature itself has no words.
    reason = one_line(error) or "it was made with another key, or what was signed was changed"
    raise SignatureError(f"{where}: the signature does not verify: {reason}") from error


def _verify_with_key(bundle: dict[str, Any], pem: bytes) -> Any:
    with served(pem) as path:
        config = package().verifying.Config()
        config.use_elliptic_key_verifier(public_key=path)
        return _signed_manifest(config, bundle)


def _verify_with_roots(bundle: dict[str, Any], pem: bytes) -> Any:
    with served(pem) as path:
        config = package().verifying.Config().use_certificate_verifier(certificate_chain=[path])
        return _signed_manifest(config, bundle)


class _Taker:
    """Takes from a verifier what was signed: it stands where the hashes of files would.

    A verifier checks the signature, has the files hashed by its hashing configuration, and
    compares the result with what was signed. This is that configuration and that result.
    """

    signed: Any = None

    def add_ignored_paths(self, *, model_path: object, paths: object) -> None:
        """Ignore what the signer lets be ignored: all files have to be signed."""

    def hash(self, model_path: object, *, files_to_hash: object = None) -> _Taker:
        return self

    def __eq__(self, other: object) -> bool:
        self.signed = other
        return True

    __hash__ = None  # type: ignore[assignment]


def _signed_manifest(config: Any, bundle: dict[str, Any]) -> Any:
    taker = _Taker()
    with served(json.dumps(bundle).encode()) as path:
        config.set_hashing_config(taker).verify(os.curdir, path)
    if taker.signed is None:
        raise UnsupportedOperation(
            "this release of model-signing verifies in a way that is not known here; "
            'run: pip install "modelstorage[signing]"'
        )
    return taker.signed


def _signed_files(manifest: Any, where: str) -> SignedFiles:
    """Read the manifest of model-signing, which is to be believed: it was signed."""
    described = manifest.serialization_type
    sharded = described["method"] == "shards"
    parts: dict[str, list[SignedPart]] = {}
    for each in manifest.resource_descriptors():
        name, start, end = each.identifier, 0, None
        if sharded:
            name, first, last = name.rsplit(":", 2)
            start, end = int(first), int(last)
        algorithm = each.digest.algorithm.partition("-")[0]
        if algorithm not in ("sha256", "blake2b", "blake3"):
            raise ValueError(f"{algorithm} is no hash that is known here")
        parts.setdefault(name, []).append(
            SignedPart(start, end, algorithm, each.digest.digest_value)
        )
    return SignedFiles(where, parts, described.get("allow_symlinks") is True)


def _read_bundle(data: bytes, where: str) -> dict[str, Any]:
    """Return a bundle with what is looked at and nothing else.

    Whoever reads it later can so find nothing else in it than was found here.
    """
    if len(data) > MAX_BUNDLE:
        raise SignatureError(f"{where}: the signature has more than {MAX_BUNDLE} bytes; refused")
    if sum(map(data.count, (b"[", b"{", b",", b":"))) > _MAX_TOKENS:
        raise SignatureError(f"{where}: the signature is no model-signing bundle; refused")
    try:
        given = json.loads(data)
        material, envelope = given["verificationMaterial"], given["dsseEnvelope"]
        if "certificate" in material or material.get("tlogEntries"):
            raise SignatureError(
                f"{where}: the signature was made through Sigstore's servers, without a key; "
                "only signatures by a key or a certificate chain are supported"
            )
        read: dict[str, Any] = {"tlogEntries": []}
        if "x509CertificateChain" in material:
            chain = material["x509CertificateChain"]["certificates"]
            read["x509CertificateChain"] = {
                "certificates": [{"rawBytes": _base64(each["rawBytes"])} for each in chain]
            }
        else:
            hint = material["publicKey"].get("hint")
            read["publicKey"] = {"hint": hint if isinstance(hint, str) and hint else None}
        _check_text(base64.b64decode(envelope["payload"]))
        return {
            "mediaType": _text(given["mediaType"]),
            "verificationMaterial": read,
            "dsseEnvelope": {
                "payload": _base64(envelope["payload"]),
                "payloadType": _text(envelope["payloadType"]),
                "signatures": [{"sig": _base64(envelope["signatures"][0]["sig"]), "keyid": ""}],
            },
        }
    except SignatureError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as exc:
        raise SignatureError(
            f"{where}: the signature is no model-signing bundle, or is damaged"
        ) from exc


def _check_text(payload: bytes) -> None:
    """Refuse what would take four times its size to be written as a literal of Python.

    That is how model-signing looks for signatures of its first releases.
    """
    if len(payload) + 3 * len(payload.translate(None, _PLAIN)) > MAX_BUNDLE:
        raise ValueError


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _base64(value: object) -> str:
    try:
        base64.b64decode(_text(value), validate=True)
    except binascii.Error as exc:
        raise ValueError from exc
    return _text(value)


def _with_hint(bundle: dict[str, Any], hint: str) -> dict[str, Any]:
    # Without one, model-signing prints a warning to standard output.
    material = bundle["verificationMaterial"] | {"publicKey": {"hint": hint}}
    return bundle | {"verificationMaterial": material}


def pem_of(key: PublicKey) -> bytes:
    """Return a public key as text, the same for the same key."""
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def package() -> Any:
    """Return the package ``model_signing``; it takes most of a second to import."""
    try:
        import model_signing
    except ImportError as exc:
        raise ConfigurationError(
            "signatures of trees and files need the package model-signing, which is not installed "
            f'({one_line(exc)}); run: pip install "modelstorage[signing]"'
        ) from exc
    return model_signing


@contextlib.contextmanager
def served(data: bytes) -> Iterator[str]:
    """Give a path with ``data`` for a package that only takes paths; in memory, if possible."""
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("modelstorage")
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
        return
    # Nobody else may read it, and it is gone at the end.
    with tempfile.NamedTemporaryFile(prefix="modelstorage-") as file:
        file.write(data)
        file.flush()
        yield file.name
