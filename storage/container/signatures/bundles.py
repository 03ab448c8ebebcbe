"""Signatures of trees and files: OpenSSF model-signing bundles, by key or by certificate.

A bundle is JSON in the form of Sigstore's, made and verified with the package ``model-signing``:
in it, signed as one, is a list of all files with their hashes. Nothing here needs a network. The
signatures without keys that are made through Sigstore's servers are refused.

That package says whom a bundle is by and what was signed. Whether the files are that is looked
at here, and more strictly: a file that the signature does not list is refused, also where the
signer let it be ignored (as ``.gitattributes`` always is), and no link to a folder is followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from storage.container.signatures.bundle_verify import (
    MAX_BUNDLE,
    Trust,
    package,
    read_certificates,
    served,
    verify_bundle,
)
from storage.container.signatures.signed_files import local_files
from storage.container.signatures.signing import (
    KeySource,
    is_ed25519,
    load_private_key,
    load_public_key,
    read_small,
)
from storage.errors import (
    InvalidInput,
    ModelMissingError,
    SignatureError,
    StorageError,
    one_line,
)
from storage.files import shown, translate_os_errors

__all__ = ["SIGNATURE_NAME", "sign_tree", "verify_tree"]

SIGNATURE_NAME = "model.sig"
"""Where in a tree its signature is, by the convention of model-signing."""

# Files of git, which model-signing's verifiers leave out wherever they are not told otherwise.
_GIT = (".git", ".gitattributes", ".github", ".gitignore")
_PathLike = str | os.PathLike[str]


# -- whole trees -----------------------------------------------------------------------------


def sign_tree(
    path: _PathLike,
    signature: _PathLike | None = None,
    *,
    key: KeySource,
    password: str | bytes | None = None,
    certificate: _PathLike | None = None,
    certificate_chain: Sequence[_PathLike] = (),
    ignore: Iterable[str] = (),
    allow_symlinks: bool = False,
) -> str:
    """Sign a folder with all that is in it, or a file, as a model-signing bundle.

    Args:
        path: what to sign.
        signature: where to put the bundle; by default ``model.sig`` in a folder, and beside a
            file its name with ``.sig``. It replaces a bundle and nothing else, and is not signed
            itself.
        key: a private key of P-256, P-384 or P-521: the path of a PEM or OpenSSH file, its
            text as bytes, or a key object.
        password: what the key is encrypted with.
        certificate: PEM file of the certificate that belongs to the key; goes into the bundle.
        certificate_chain: PEM files of those between it and the root, and of the root.
        ignore: paths below a folder that are not signed; verifiers have to ignore them, too.
        allow_symlinks: sign what links to files lead to.

    Returns:
        The path of the bundle.

    Raises:
        InvalidInput: an argument is unusable, or the folder holds what cannot be signed.
        DestinationError: the bundle cannot be written.
        ConfigurationError: the package ``model-signing`` is not installed.
    """
    root = os.path.realpath(path)
    target = _signature_path(path) if signature is None else os.fspath(signature)
    _check_replaceable(target)
    private: Any = load_private_key(key, password)
    if is_ed25519(private):
        raise InvalidInput(
            "trees and files are signed with a key of the curve P-256, P-384 or P-521; this one "
            "is Ed25519, which signs containers"
        )
    if (certificate is None) == bool(certificate_chain):
        raise InvalidInput(
            "certificate and certificate_chain belong together: the signer's, and those that it "
            "leads to"
        )
    left_out = _ignored(root, target, ignore)
    try:
        with _reading(path):
            files = local_files(root, left_out, allow_symlinks=allow_symlinks)
    except SignatureError as exc:
        raise InvalidInput(f"cannot be signed: {exc}") from exc
    git = sorted({name.split("/")[0] for name in files} & set(_GIT))
    if git:
        raise InvalidInput(
            f"{shown(path)} holds {', '.join(git)}, which verifiers of model-signing leave out; "
            "move it away, or pass it as ignore when signing and when verifying"
        )
    model_signing = package()
    from cryptography.hazmat.primitives import serialization

    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with served(pem) as key_path, tempfile.TemporaryDirectory(prefix="modelstorage-") as folder:
        made = os.path.join(folder, SIGNATURE_NAME)
        try:
            config = model_signing.signing.Config()
            if certificate is None:
                config.use_elliptic_key_signer(private_key=key_path)
            else:
                config.use_certificate_signer(
                    private_key=key_path,
                    signing_certificate=os.fspath(certificate),
                    certificate_chain=[os.fspath(each) for each in certificate_chain],
                )
            hashing = model_signing.hashing.Config()
            hashing.use_file_serialization(allow_symlinks=allow_symlinks)
            hashing.set_allow_symlinks(allow_symlinks)
            hashing.set_ignored_paths(paths=sorted(left_out), ignore_git_paths=False)
            config.set_hashing_config(hashing).sign(root, made)
        except Exception as exc:
            raise InvalidInput(f"{shown(path)} cannot be signed: {one_line(exc)}") from exc
        with open(made, "rb") as file:
            _publish(file.read(), target)
    return target


def verify_tree(
    path: _PathLike,
    signature: _PathLike | None = None,
    *,
    key: KeySource | None = None,
    certificate_chain: Sequence[_PathLike | bytes] = (),
    ignore: Iterable[str] = (),
    allow_symlinks: bool = False,
) -> None:
    """Verify that a folder, or a file, is what somebody signed, and all of it.

    Every file is read once. The bundle may come from anybody.

    Args:
        path: the folder or file.
        signature: the bundle; by default where :func:`sign_tree` puts it.
        key: the signer's public key: the path of a PEM or OpenSSH file, its text as bytes, or a
            key object.
        certificate_chain: instead of a key, certificates (PEM files, or their text as bytes)
            that the signer's certificate, which is in the bundle, has to lead to.
        ignore: paths below the folder that need not be signed.
        allow_symlinks: follow links to files; also done if the signature says so.

    Raises:
        SignatureError: there is no signature, it is by somebody else or unusable, or a file is
            not signed, missing or changed.
        InvalidInput: an argument is unusable.
        ModelMissingError: there is nothing at ``path``.
        ConfigurationError: the package ``model-signing`` is not installed.
    """
    trust = _trust(key, certificate_chain)
    root = os.path.realpath(path)
    bundle = _signature_path(path) if signature is None else os.fspath(signature)
    left_out = _ignored(root, bundle, ignore)
    where = shown(path)
    if not os.path.lexists(bundle):
        raise SignatureError(f"{where} is not signed: there is no {shown(bundle)}")
    signed = verify_bundle(read_small(bundle, MAX_BUNDLE, "a signature"), trust, where)
    with _reading(path):
        follow = allow_symlinks or signed.allow_symlinks
        signed.check(local_files(root, left_out, allow_symlinks=follow))


def _trust(key: KeySource | None, certificates: Sequence[_PathLike | bytes]) -> Trust:
    if (key is None) == (not certificates):
        raise InvalidInput("pass the signer's public key, or certificates that are trusted")
    if key is None:
        return Trust(roots=tuple(read_certificates(each) for each in certificates))
    public = load_public_key(key)
    if is_ed25519(public):
        raise InvalidInput(
            "trees and files are signed with keys of the curve P-256, P-384 or P-521; this one "
            "is Ed25519, which signs containers"
        )
    return Trust((public,))


def _signature_path(path: _PathLike) -> str:
    if os.path.isdir(path):
        return os.path.join(os.fspath(path), SIGNATURE_NAME)
    return f"{os.fspath(path)}.sig"


def _ignored(root: str, signature: str, ignore: Iterable[str]) -> frozenset[str]:
    """Return the relative paths below ``root`` that do not count; the signature's is one."""
    inside = os.path.relpath(
        os.path.join(os.path.realpath(os.path.dirname(signature)), os.path.basename(signature)),
        root,
    )
    found = {inside} if inside != "." and not inside.startswith("../") else set()
    for path in [ignore] if isinstance(ignore, str) else ignore:
        plain = os.path.normpath(path)
        if os.path.isabs(plain) or plain.split("/")[0] in ("..", "."):
            raise InvalidInput(f"ignore: {shown(path)} is no path below the folder")
        found.add(plain)
    return frozenset(found)


@contextlib.contextmanager
def _reading(path: _PathLike) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as exc:
        raise ModelMissingError(os.fspath(path)) from exc
    except OSError as exc:
        raise InvalidInput(f"{shown(path)} cannot be read: {one_line(exc)}") from exc


def _check_replaceable(target: str) -> None:
    """Refuse to put a signature where something else is: a model, or a key."""
    if not os.path.isfile(target):
        return
    data = read_small(target, MAX_BUNDLE, "a signature")
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        if "dsseEnvelope" in json.loads(data):
            return
    raise InvalidInput(f"{shown(target)} is there and is no signature; choose another file")


def _publish(data: bytes, target: str) -> None:
    """Put a signature into its place, whole or not at all."""
    beside = f"{target}.{secrets.token_hex(4)}.tmp"
    with translate_os_errors(target):
        try:
            with open(beside, "xb") as file:
                file.write(data)
            os.replace(beside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
