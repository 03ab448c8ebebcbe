"""Signatures that are required: nothing is handed over before it was verified."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

from storage.client.download import Download, DownloadOptions
from storage.container.signatures.bundle_verify import (
    MAX_BUNDLE,
    Trust,
    pem_of,
    read_certificates,
    verify_bundle,
)
from storage.container.signatures.bundles import SIGNATURE_NAME
from storage.container.signatures.signed_files import SINGLE, LocalFile, SignedFiles, local_files
from storage.container.signatures.signing import (
    KeySource,
    is_ed25519,
    load_public_key,
    read_signature,
    read_small,
    verify_container,
)
from storage.errors import (
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    OfflineError,
    SignatureError,
    StorageError,
    one_line,
)
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.container.signatures.signing import PublicKey
    from storage.transfer.plan import Plan

__all__ = ["RequireSignature", "SignaturePolicy", "Verification"]

_BESIDE = ".sig"


@dataclass(frozen=True, slots=True)
class SignaturePolicy:
    """Who has to have signed a model, and where the signature is.

    Made by :meth:`key`, :meth:`certificate` or :meth:`read`. By default the signature of a tree
    is the file ``model.sig`` in it, else, as that of an object, what is at the URI with ``.sig``
    at its end. A tree or an object is signed by a bundle of OpenSSF model-signing; an object
    that is a container, also by its Ed25519 signature.
    """

    keys: tuple[bytes, ...] = ()
    """Public keys in PEM; one of them has to have signed."""

    roots: tuple[bytes, ...] = ()
    """Certificates in PEM; that of the signer has to lead to one of them."""

    signature: str | None = None
    """URI or path of the signature, if it is elsewhere."""

    @classmethod
    def key(cls, *keys: KeySource, signature: str | os.PathLike[str] | None = None) -> Self:
        """Require a signature by the owner of one of ``keys``.

        Args:
            keys: public keys: the path of a PEM or OpenSSH file, its text as bytes, or a key
                object. One of P-256, P-384 or P-521 is for model-signing bundles, an Ed25519
                one for containers.
            signature: where the signature is, if it is not where it is by default.

        Raises:
            InvalidInput: there is no key, or one cannot be used.
        """
        if not keys:
            raise InvalidInput("a policy needs at least one public key")
        pems = tuple(pem_of(load_public_key(key)) for key in keys)
        return cls(pems, (), _place(signature))

    @classmethod
    def certificate(
        cls,
        *certificates: str | os.PathLike[str] | bytes,
        signature: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Require a signature with a certificate that leads to one of ``certificates``.

        Whoever has such a certificate for signing may have signed, whatever name is in it, and
        whether or not it has expired since; so trust a root that is for models alone.

        Args:
            certificates: PEM files, or their text as bytes. None means none: what the system
                trusts for web sites does not count.
            signature: where the signature is, if it is not where it is by default.

        Raises:
            InvalidInput: there is no certificate, or one cannot be read.
        """
        if not certificates:
            raise InvalidInput("a policy needs at least one certificate")
        return cls((), tuple(map(read_certificates, certificates)), _place(signature))

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Self:
        """Return the policy for the public key, or the certificates, that a file holds.

        Raises:
            InvalidInput: it holds neither.
        """
        data = read_small(file, MAX_BUNDLE, "a public key or certificates")
        if b"-----BEGIN CERTIFICATE-----" in data and b"PRIVATE KEY-----" not in data:
            return cls.certificate(file)
        return cls.key(file)


RequireSignature = SignaturePolicy | Literal[False] | None
"""What a call says about signatures: ``None`` leaves it to the client, ``False`` needs none."""


def _place(signature: str | os.PathLike[str] | None) -> str | None:
    return None if signature is None else os.fspath(signature)


class Verification:
    """What one download does because a signature is required."""

    def __init__(self, job: Download, policy: SignaturePolicy) -> None:
        """Prepare; nothing is asked of a store yet."""
        self._job = job
        self._where = str(job.location)
        self._place = policy.signature
        keys = [load_public_key(pem) for pem in policy.keys]
        self._container_keys: list[PublicKey] = [key for key in keys if is_ed25519(key)]
        self._trust = Trust(tuple(key for key in keys if not is_ed25519(key)), policy.roots)
        self._found: dict[bool, bytes | SignedFiles] = {}
        self.is_archive = job.unpack
        """Whether it is going to be unpacked, so that all of its bytes have to be signed."""

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The hashes that are worth computing while bytes arrive."""
        return ("sha256",) if self._trusts_bundles else ()

    @property
    def _trusts_bundles(self) -> bool:
        return bool(self._trust.keys or self._trust.roots)

    def forget(self) -> None:
        """Let the signature be looked for again."""
        self._found.clear()

    def expect(self, plan: Plan) -> None:
        """Refuse before the first byte what cannot be verified, as far as that can be told.

        Raises:
            SignatureError: there is no signature, or it is by somebody else.
        """
        if plan.is_tree and not self._trusts_bundles:
            raise SignatureError(
                f"{self._where} is a tree, and an Ed25519 key signs containers only; a tree "
                "needs a signature by a key of P-256, P-384 or P-521, or by a certificate"
            )
        named = plan.is_tree and any(file.path == SIGNATURE_NAME for file in plan.files)
        if self._place is not None or not named:
            self._obtain(plan.is_tree)

    def check(self, is_tree: bool, files: Mapping[str, LocalFile]) -> None:
        """Verify what is here, whole.

        Args:
            is_tree: whether it is a tree.
            files: all of its files by their paths, or the one file by whatever name.

        Raises:
            SignatureError: it is not what somebody who counts signed, or nobody did.
        """
        with self._reading():
            signed: bytes | SignedFiles
            if not is_tree:
                (file,) = files.values()
                signed = self._obtain(False)
                if isinstance(signed, bytes):
                    self._check_container(file.path, signed)
                    return
                signed.check({SINGLE: file})
                return
            inside = files.get(SIGNATURE_NAME) if self._place is None else None
            if inside is not None:
                data = read_small(inside.path, MAX_BUNDLE, "a signature")
                signed = verify_bundle(data, self._trust, self._where)
                files = {path: file for path, file in files.items() if file is not inside}
            else:
                signed = self._obtain(True)
            assert isinstance(signed, SignedFiles)
            patterns = self._job.patterns
            signed.check(files, patterns.wants if patterns.active else None)

    def check_in_place(self, path: str) -> None:
        """Verify what is on this machine already, with everything in its folder."""
        is_tree = os.path.isdir(path)
        with self._reading():
            files = local_files(path, allow_symlinks=True)
        self.check(is_tree, files)

    def _check_container(self, path: str, signature: bytes) -> None:
        try:
            if verify_container(path, self._container_keys, signature):
                return
        except (InvalidInput, IntegrityError) as exc:
            raise SignatureError(
                f"{self._where}: the signature is of a container, and this is none, or a damaged "
                f"one: {one_line(exc)}"
            ) from exc
        raise SignatureError(
            f"{self._where}: the signature of the container does not verify: it was made with "
            "another key, or what was signed was changed"
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (SignatureError, ModelMissingError):
            raise
        except InvalidInput as exc:
            raise SignatureError(f"{self._where}: {one_line(exc)}") from exc
        except StorageError:
            raise
        except OSError as exc:
            raise SignatureError(f"{self._where} cannot be verified: {one_line(exc)}") from exc

    # -- the signature -----------------------------------------------------------------------

    def _obtain(self, is_tree: bool) -> bytes | SignedFiles:
        """Return the signature that is kept beside: of a container as it is, else verified."""
        if is_tree not in self._found:
            data = self._fetch(is_tree)
            if not is_tree and read_signature(data) is not None:
                if not self._container_keys:
                    raise SignatureError(
                        f"{self._where}: the signature is that of a container, by an Ed25519 key, "
                        "and nobody with such a key is expected to have signed"
                    )
                if self.is_archive:
                    raise SignatureError(
                        f"{self._where}: the signature is that of a container, which is not of "
                        "all that may be unpacked; sign the archive by a bundle"
                    )
                self._found[is_tree] = data
            else:
                self._found[is_tree] = verify_bundle(data, self._trust, self._where)
        return self._found[is_tree]

    def _fetch(self, is_tree: bool) -> bytes:
        places = self._places(is_tree)
        for location in places:
            try:
                return self._download(location)
            except ModelMissingError:
                continue
            except OfflineError as exc:
                if location is places[-1]:
                    raise SignatureError(
                        f"{self._where} cannot be verified: its signature is not cached, and "
                        "offline nothing is fetched; download it once with a required signature "
                        "while the store can be reached"
                    ) from exc
        inside = [SIGNATURE_NAME] if is_tree and self._place is None else []
        looked = " nor ".join([*inside, *map(str, places)])
        raise SignatureError(f"{self._where} is not signed: there is no {looked or 'signature'}")

    def _places(self, is_tree: bool) -> list[Location]:
        if self._place is not None:
            return [parse_uri(self._place)]
        location = self._job.location
        found = [_near(location, _BESIDE)] if location.key.rstrip("/") else []
        if is_tree and self._job.patterns.active:
            # The patterns may have left it out of what was fetched.
            found.insert(0, _near(location, f"/{SIGNATURE_NAME}"))
        return found

    def _download(self, location: Location) -> bytes:
        job = self._job
        options = DownloadOptions(
            config=job.config if location.type == job.location.type else None,
            offline=job.offline,
            freshness=job.freshness,
            cache=job.keeps,
            durable=job.durable,
            require_signature=False,
        )
        with tempfile.TemporaryDirectory(prefix="modelstorage-") as folder:
            target = os.path.join(folder, "signature")
            path = _SignatureDownload(job.client, location, options).run(target)
            if os.path.isdir(path):
                raise ModelMissingError(str(location))
            return read_small(path, MAX_BUNDLE, "a signature")


class _SignatureDownload(Download):
    """A download of what is a small object, or nothing."""

    def make_plan(self, location: Location | None = None) -> Plan:
        plan = super().make_plan(location)
        if plan.is_tree:
            raise ModelMissingError(plan.uri)
        if (plan.size or 0) > MAX_BUNDLE:
            raise SignatureError(
                f"{plan.uri} has {plan.size} bytes; a signature has at most {MAX_BUNDLE}; refused"
            )
        return plan


def _near(location: Location, ending: str) -> Location:
    """Return the location whose key is that of ``location`` with ``ending``."""
    if location.url is not None and not location.has_revisions:
        parts = urlsplit(location.url)
        # Only of HTTP is a query none of the name.
        if location.type != "http":
            return parse_uri(location.url.rstrip("/") + ending)
        return parse_uri(parts._replace(path=parts.path.rstrip("/") + ending).geturl())
    key = (location.key.rstrip("/") + ending).lstrip("/")
    version = location.version if location.has_revisions else None
    return replace(location, key=key, version=version, digest=None)
