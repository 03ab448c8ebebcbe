"""Signatures: what either side signs the other verifies, and neither takes what was tampered with.

Of containers those of ``scaleoututil``, of trees and files those of ``model-signing``.
"""

from __future__ import annotations

import base64
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import InvalidInput, SignatureError, StorageError
from storage.container import ModelContainer, sign_tree, verify_tree
from tests.container.signing_keys import Certificates, KeyPair, certificates, key_pair
from tests.peers import trees
from tests.peers.environments import Peer, PeerError
from tests.peers.models import GIB, KINDS, Inputs
from tests.peers.test_containers import Ours

# What neither signs: links without being told to follow them, and names that JSON cannot hold.
REFUSED = {"links", "a name that is no unicode"}
METHODS = ("key", "certificate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def ed25519(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return key_pair(tmp_path_factory.mktemp("ed25519"), "ed25519")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return key_pair(tmp_path_factory.mktemp("p256"))


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


# -- containers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("maker", ["theirs", "ours"])
def test_both_sign_a_container_alike(
    scaleout: Peer, inputs: Inputs, ed25519: KeyPair, tmp_path: Path, maker: str, name: str
) -> None:
    path = tmp_path / "model.zip"
    steps = [*KINDS[name].steps(inputs), ["build"], ["reopen", str(path)]]
    (scaleout if maker == "theirs" else Ours())("make", steps_=steps)
    private, public = ed25519.private.read_text(), ed25519.public.read_text()
    theirs = scaleout("sign", path=path, key=private, signer_id="node ü")
    with ModelContainer.from_file(path) as model:
        # Ed25519 is deterministic, so they are equal and not merely both right.
        assert model.sign(ed25519.key, signer_id="node ü") == theirs
        assert model.sign(ed25519.key) == {k: v for k, v in theirs.items() if k != "signer_id"}
        assert model.verify_signature(ed25519.key.public_key(), theirs["signature"]) is True
    assert scaleout("verify", path=path, key=public, signature=theirs["signature"]) is True


def _retag(path: Path, signature: str) -> str:
    with ModelContainer.from_file(path) as model:
        tagged = model.to_builder().set_metadata("tag", 2).set_model_id(str(model.model_id))
        with tagged.build() as changed:
            changed.save_to_file(path)
    return signature


def _add_entry(path: Path, signature: str) -> str:
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr("files/extra", b"")
    return signature


def _pack_anew(path: Path, signature: str) -> str:
    with zipfile.ZipFile(path) as zipped:
        entries = {name: zipped.read(name) for name in reversed(zipped.namelist())}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as zipped:
        for name, content in entries.items():
            zipped.writestr(name, content)
    return signature


def _flip(path: Path, signature: str) -> str:
    raw = bytearray(base64.b64decode(signature))
    raw[10] ^= 1
    return base64.b64encode(raw).decode()


CHANGES: dict[str, tuple[Callable[[Path, str], str], bool]] = {
    "nothing": (lambda path, signature: signature, True),
    "packed anew": (_pack_anew, True),
    "new metadata": (_retag, False),
    "one more entry": (_add_entry, False),
    "a bit of the signature": (_flip, False),
    "a cut signature": (lambda path, signature: signature[:40], False),
    "no signature": (lambda path, signature: "", False),
    "no base64": (lambda path, signature: "%%%%", False),
    "a new line after it": (lambda path, signature: signature + "\n", True),
    "bad padding": (lambda path, signature: signature.rstrip("=") + "A", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_both_judge_a_changed_container_alike(
    scaleout: Peer, inputs: Inputs, ed25519: KeyPair, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "model.zip"
    steps = [*KINDS["weights and inference model"].steps(inputs), ["build"], ["reopen", str(path)]]
    Ours().make(steps)
    with ModelContainer.from_file(path) as model:
        signature = model.sign(ed25519.key)["signature"]
    apply, right = CHANGES[change]
    signature = apply(path, signature)
    with ModelContainer.from_file(path) as model:
        assert model.verify_signature(ed25519.key.public_key(), signature) is right
    public = ed25519.public.read_text()
    assert scaleout("verify", path=path, key=public, signature=signature) is right


def test_neither_takes_the_signature_of_another_key(
    scaleout: Peer, inputs: Inputs, ed25519: KeyPair, tmp_path: Path
) -> None:
    other = key_pair(tmp_path / "other", "ed25519")
    path = tmp_path / "model.zip"
    Ours().make([*KINDS["weights alone"].steps(inputs), ["build"], ["reopen", str(path)]])
    theirs = scaleout("sign", path=path, key=other.private.read_text())["signature"]
    public = ed25519.public.read_text()
    with ModelContainer.from_file(path) as model:
        assert not model.verify_signature(ed25519.key.public_key(), theirs)
        assert model.verify_signature(other.key.public_key(), theirs)
    assert not scaleout("verify", path=path, key=public, signature=theirs)


# -- trees and files -------------------------------------------------------------------------


class Signers:
    """Both sides of a bundle, by one method, with the arguments that it takes."""

    def __init__(self, peer: Peer, method: str, keys: KeyPair, issued: Certificates) -> None:
        self.peer = peer
        self._keys, self._issued = keys, issued
        self._by_key = method == "key"

    def sign_here(self, tree: Path, signature: Path) -> None:
        if self._by_key:
            sign_tree(tree, signature, key=self._keys.private)
        else:
            sign_tree(
                tree,
                signature,
                key=self._issued.key,
                certificate=self._issued.leaf,
                certificate_chain=[self._issued.root],
            )

    def sign_there(self, tree: Path, signature: Path) -> None:
        named: dict[str, Any] = {"key": self._keys.private}
        if not self._by_key:
            named = {
                "key": self._issued.key,
                "certificate": self._issued.leaf,
                "chain": [self._issued.root],
            }
        self.peer("sign", tree=tree, signature=signature, **named)

    def verify_here(self, tree: Path, signature: Path) -> None:
        if self._by_key:
            verify_tree(tree, signature, key=self._keys.public)
        else:
            verify_tree(tree, signature, certificate_chain=[self._issued.root])

    def verify_there(self, tree: Path, signature: Path) -> None:
        by = {"key": self._keys.public} if self._by_key else {"chain": [self._issued.root]}
        self.peer("verify", tree=tree, signature=signature, **by)

    def command(self, action: str, tree: Path, signature: Path) -> tuple[int, str]:
        """Do the same by model-signing's own command."""
        keys, issued = self._keys, self._issued
        options = {
            ("sign", True): ["key", "--private_key", keys.private],
            ("verify", True): ["key", "--public_key", keys.public],
            ("sign", False): [
                "certificate", "--private_key", issued.key, "--signing_certificate", issued.leaf,
                "--certificate_chain", issued.root,
            ],
            ("verify", False): ["certificate", "--certificate_chain", issued.root],
        }[action, self._by_key]  # fmt: skip
        arguments = [action, *options, "--signature", signature, tree]
        status, printed = self.peer("command", arguments=[str(each) for each in arguments])
        return status, printed


@pytest.fixture(params=METHODS)
def signers(
    request: pytest.FixtureRequest, model_signing: Peer, keys: KeyPair, issued: Certificates
) -> Signers:
    return Signers(model_signing, request.param, keys, issued)


@pytest.mark.parametrize("name", [*trees.TREES, "one file", "one empty file"])
def test_what_either_signs_both_verify(signers: Signers, tmp_path: Path, name: str) -> None:
    if name.endswith("file") and name.startswith("one"):
        tree = tmp_path / "model.onnx"
        tree.write_bytes(b"" if "empty" in name else b"\x08\x07" * 1000)
    else:
        tree = trees.make(name, tmp_path)
    ours, theirs = tmp_path / "ours.sig", tmp_path / "theirs.sig"
    refusals: dict[str, str] = {}
    for who, sign, signature in (
        ("here", signers.sign_here, ours),
        ("there", signers.sign_there, theirs),
    ):
        try:
            sign(tree, signature)
        except (InvalidInput, PeerError) as exc:
            refusals[who] = str(exc)
    assert len(refusals) == (2 if name in REFUSED else 0), refusals
    for signature in () if refusals else (ours, theirs):
        signers.verify_here(tree, signature)
        signers.verify_there(tree, signature)


def _append(tree: Path) -> None:
    with (tree / "weights.bin").open("ab") as file:
        file.write(b"\0")


def _change(tree: Path) -> None:
    with (tree / "weights.bin").open("r+b") as file:
        file.seek(50_000)
        file.write(b"changed")


def _swap(tree: Path) -> None:
    (tree / "config.json").rename(tree / "x")
    (tree / "sub" / "vocab").rename(tree / "config.json")
    (tree / "x").rename(tree / "sub" / "vocab")


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "a byte more": _append,
    "other bytes": _change,
    "cut": lambda tree: (tree / "weights.bin").write_bytes(b""),
    "a file more": lambda tree: (tree / "sub" / "more.py").write_bytes(b""),
    "a file less": lambda tree: (tree / "sub" / "vocab").unlink(),
    "an empty file less": lambda tree: (tree / "empty").unlink(),
    "renamed": lambda tree: (tree / "config.json").rename(tree / "Config.json"),
    "swapped": _swap,
    "moved": lambda tree: (tree / "sub" / "vocab").rename(tree / "vocab"),
    "a file is a link": lambda tree: (
        (tree / "empty").unlink(),
        (tree / "empty").symlink_to("config.json"),
    ),
    "nothing left": lambda tree: [path.unlink() for path in tree.rglob("*") if path.is_file()],
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "weights.bin").write_bytes(bytes(range(256)) * 400)
    (root / "config.json").write_bytes(b"{}")
    (root / "sub" / "vocab").write_bytes(b"a\nb\n")
    (root / "empty").write_bytes(b"")
    return root


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_neither_takes_a_tree_that_was_tampered_with(
    signers: Signers, tree: Path, tmp_path: Path, tampering: str
) -> None:
    ours, theirs = tmp_path / "ours.sig", tmp_path / "theirs.sig"
    signers.sign_here(tree, ours)
    signers.sign_there(tree, theirs)
    TAMPERINGS[tampering](tree)
    for signature in (ours, theirs):
        with pytest.raises(SignatureError):
            signers.verify_here(tree, signature)
        with pytest.raises(PeerError):
            signers.verify_there(tree, signature)


def _bit(data: bytes) -> bytes:
    at = data.index(b'"sig"') + 20
    return data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]


def _payload(data: bytes) -> bytes:
    at = data.index(b'"payload"') + 60
    return data[:at] + (b"A" if data[at : at + 1] != b"A" else b"B") + data[at + 1 :]


@pytest.mark.parametrize(
    "change",
    [_bit, _payload, lambda data: data[:-30], lambda data: b"", lambda data: b"{}"],
    ids=["signature", "payload", "cut", "empty", "no bundle"],
)
def test_neither_takes_a_bundle_that_was_tampered_with(
    signers: Signers, tree: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    for sign in (signers.sign_here, signers.sign_there):
        signature = tmp_path / "model.sig"
        sign(tree, signature)
        signature.write_bytes(change(signature.read_bytes()))
        with pytest.raises(SignatureError):
            signers.verify_here(tree, signature)
        with pytest.raises(PeerError):
            signers.verify_there(tree, signature)


def test_neither_takes_the_bundle_of_another_signer(
    signers: Signers, model_signing: Peer, tree: Path, tmp_path: Path, request: Any
) -> None:
    method = request.node.callspec.params["signers"]
    other = Signers(
        model_signing, method, key_pair(tmp_path / "key"), certificates(tmp_path / "other")
    )
    for sign in (other.sign_here, other.sign_there):
        signature = tmp_path / "model.sig"
        sign(tree, signature)
        other.verify_here(tree, signature)
        other.verify_there(tree, signature)
        with pytest.raises(SignatureError):
            signers.verify_here(tree, signature)
        with pytest.raises(PeerError):
            signers.verify_there(tree, signature)


@pytest.mark.parametrize("curve", ["p384", "p521"])
def test_other_curves_pass_both_ways(
    model_signing: Peer, issued: Certificates, tree: Path, tmp_path: Path, curve: str
) -> None:
    signers = Signers(model_signing, "key", key_pair(tmp_path / curve, curve), issued)
    for sign in (signers.sign_here, signers.sign_there):
        sign(tree, tmp_path / "model.sig")
        signers.verify_here(tree, tmp_path / "model.sig")
        signers.verify_there(tree, tmp_path / "model.sig")


def test_the_command_verifies_ours_and_signs_for_us(
    signers: Signers, tree: Path, tmp_path: Path
) -> None:
    ours, theirs = tree / "model.sig", tmp_path / "theirs.sig"
    signers.sign_here(tree, ours)
    status, printed = signers.command("verify", tree, ours)
    assert status == 0, printed
    ours.unlink()
    status, printed = signers.command("sign", tree, theirs)
    assert status == 0, printed
    signers.verify_here(tree, theirs)
    shutil.copy(theirs, ours)
    _change(tree)
    assert signers.command("verify", tree, ours)[0] == 1
    with pytest.raises(SignatureError):
        signers.verify_here(tree, ours)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of which a machine that does nothing else needs 30
def test_5_gib_of_zeros_are_signed_and_verified_both_ways(
    model_signing: Peer, keys: KeyPair, issued: Certificates, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "weights.bin").open("wb") as file:
        file.truncate(5 * GIB)
    signers = Signers(model_signing, "key", keys, issued)
    signers.sign_here(tree, tmp_path / "ours.sig")
    signers.verify_there(tree, tmp_path / "ours.sig")
    signers.sign_there(tree, tmp_path / "theirs.sig")
    signers.verify_here(tree, tmp_path / "theirs.sig")
    with (tree / "weights.bin").open("r+b") as file:
        file.seek(4 * GIB)
        file.write(b"\x01")
    with pytest.raises(StorageError):
        signers.verify_here(tree, tmp_path / "theirs.sig")
