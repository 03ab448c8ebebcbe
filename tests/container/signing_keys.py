"""Throwaway keys and certificates, in files as their owners have them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

__all__ = ["Certificates", "KeyPair", "certificates", "key_pair"]


@dataclass(frozen=True)
class KeyPair:
    """Two files, and what is in them."""

    private: Path
    public: Path
    key: Any


@dataclass(frozen=True)
class Certificates:
    """A root, and a signer's certificate that it vouches for."""

    root: Path
    leaf: Path
    key: Path


def key_pair(folder: Path, kind: str = "p256", password: bytes | None = None) -> KeyPair:
    """Make a key of ``kind`` (``p256``, ``p384``, ``p521``, ``k1`` or ``ed25519``)."""
    curves = {"p256": ec.SECP256R1, "p384": ec.SECP384R1, "p521": ec.SECP521R1, "k1": ec.SECP256K1}
    key: Any = (
        ed25519.Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else ec.generate_private_key(curves[kind]())
    )
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password)
            if password
            else serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return KeyPair(private, public, key)


def certificates(folder: Path) -> Certificates:
    """Make a root of its own and a certificate for signing by it."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), key_pair(folder)
    name = f"root {folder}"[-64:]
    root = _certificate(name, root_key, name, root_key, authority=True)
    leaf = _certificate("signer", leaf_key.key, name, root_key, authority=False)
    for file, certificate in (("root", root), ("leaf", leaf)):
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        (folder / f"{file}.pem").write_bytes(pem)
    return Certificates(folder / "root.pem", folder / "leaf.pem", leaf_key.private)


def _certificate(
    name: str, key: Any, issuer: str, issuer_key: Any, *, authority: bool
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                **usage,
            ),
            critical=True,
        )
        .sign(issuer_key, hashes.SHA256())
    )
