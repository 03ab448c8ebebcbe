"""Bundles of OpenSSF model-signing: ours are read by that package, and its are read here."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_signing
import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage import InvalidInput, ModelMissingError, SignatureError
from storage.container.signatures.bundle_verify import MAX_BUNDLE, Trust, verify_bundle
from storage.container.signatures.bundles import sign_tree, verify_tree
from storage.container.signatures.signed_files import SINGLE, LocalFile, SignedFiles, SignedPart
from tests.container.signing_keys import KeyPair, certificates, key_pair

ROUNDS = 2000 if os.environ.get("STORAGE_SOAK") else 200


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return key_pair(tmp_path / "keys")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "model")


def make_tree(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "weights.bin").write_bytes(os.urandom(300_000))
    (folder / "empty").write_bytes(b"")
    (folder / "größe 模型.txt").write_bytes(b"\xff\x00")
    return folder


def sign_as_peer(
    path: Path, signature: Path, key: Path, hashing: Any = None, ignore: tuple[str, ...] = ()
) -> None:
    """Sign with the package itself, as its command does."""
    hashing = hashing or model_signing.hashing.Config()
    hashing.set_ignored_paths(paths=[signature, *(path / each for each in ignore)])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
    config.set_hashing_config(hashing).sign(path, signature)


def verify_as_peer(path: Path, signature: Path, key: Path) -> None:
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
    config.verify(path, signature)


TREES: dict[str, Callable[[Path], Path]] = {
    "a tree": make_tree,
    "an empty tree": lambda path: path.mkdir(parents=True) or path,
    "one empty file": lambda path: (path.write_bytes(b"") and path) or path,
    "one byte": lambda path: (path.write_bytes(b"x") and path) or path,
    "a sparse file": lambda path: sparse(path, 64 * 1024 * 1024),
    "many files": lambda path: many(path, 300),
    "a colon": lambda path: many(path, 1, "a:1:2"),
    "a new line": lambda path: many(path, 1, "a\nb"),
    "deep folders": lambda path: many(path, 1, "/".join("abcdefghij")),
    "an empty folder": lambda path: (make_tree(path) / "nothing").mkdir() or path,
}


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def many(path: Path, count: int, name: str = "file") -> Path:
    for number in range(count):
        place = path / f"{name}{number}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(str(number).encode())
    return path


@pytest.mark.parametrize("kind", TREES)
def test_what_either_side_signs_the_other_verifies(
    kind: str, tmp_path: Path, keys: KeyPair
) -> None:
    model = TREES[kind](tmp_path / "model")
    ours, theirs = tmp_path / "ours.sig", tmp_path / "theirs.sig"
    sign_tree(model, ours, key=keys.private)
    verify_as_peer(model, ours, keys.public)
    sign_as_peer(model, theirs, keys.private)
    verify_tree(model, theirs, key=keys.public)
    verify_tree(model, ours, key=keys.public)
    victim = model if model.is_file() else model / "new"
    with victim.open("ab") as file:
        file.write(b"more")
    for signature in (ours, theirs):
        with pytest.raises(SignatureError):
            verify_tree(model, signature, key=keys.public)


@pytest.mark.parametrize("curve", ["p256", "p384", "p521"])
def test_every_curve_of_that_package_works_both_ways(
    curve: str, tmp_path: Path, tree: Path
) -> None:
    keys = key_pair(tmp_path / curve, curve)
    verify_as_peer(tree, Path(sign_tree(tree, key=keys.private)), keys.public)
    sign_as_peer(tree, tree / "model.sig", keys.private)
    verify_tree(tree, key=keys.public)


@pytest.mark.parametrize(
    "hashing",
    [
        pytest.param(lambda: {"hashing_algorithm": "blake3"}, id="blake3"),
        pytest.param(lambda: {"hashing_algorithm": "blake2"}, id="blake2"),
    ],
)
def test_other_hashes_are_verified(
    hashing: Callable[[], dict[str, str]], tree: Path, keys: KeyPair
) -> None:
    config = model_signing.hashing.Config().use_file_serialization(**hashing())
    sign_as_peer(tree, tree / "model.sig", keys.private, config)
    verify_tree(tree, key=keys.public)
    (tree / "config.json").write_bytes(b"[]")
    with pytest.raises(SignatureError, match=r"not what was signed: config\.json"):
        verify_tree(tree, key=keys.public)


@pytest.mark.parametrize("algorithm", ["sha256", "blake2"])
def test_shards_are_verified_whole(
    algorithm: str, tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    (tree / "empty").unlink()
    config = model_signing.hashing.Config().use_shard_serialization(
        hashing_algorithm=algorithm, shard_size=100_000
    )
    sign_as_peer(tree, tmp_path / "model.sig", keys.private, config)
    weights = tree / "sub" / "weights.bin"
    content = weights.read_bytes()
    verify_tree(tree, tmp_path / "model.sig", key=keys.public)
    for changed in (content + b"x", content[:-1], content[:200_000], b"", content[100_000:]):
        weights.write_bytes(changed)
        with pytest.raises(SignatureError, match=r"not what was signed: sub/weights\.bin"):
            verify_tree(tree, tmp_path / "model.sig", key=keys.public)


def test_shards_that_leave_a_stretch_out_do_not_sign_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def part(start: int, end: int, data: bytes) -> SignedPart:
        return SignedPart(start, end, "sha256", hashlib.sha256(data).digest())

    def check(content: bytes, *parts: SignedPart) -> None:
        path.write_bytes(content)
        signed = SignedFiles("it", {SINGLE: parts}, allow_symlinks=False)
        signed.check({SINGLE: LocalFile(str(path))})

    first, second = part(0, 3, b"abc"), part(3, 6, b"def")
    check(b"abcdef", second, first)
    for parts in ((first,), (second,), (part(1, 4, b"abc"), part(4, 7, b"def")), ()):
        with pytest.raises(SignatureError, match="not what was signed: the file"):
            check(b"abcdef", *parts)
    with pytest.raises(SignatureError):
        check(b"abcdef", first, part(4, 7, b"def"))


def test_an_empty_file_that_shards_cannot_name_is_refused(
    tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    config = model_signing.hashing.Config().use_shard_serialization()
    sign_as_peer(tree, tmp_path / "model.sig", keys.private, config)
    with pytest.raises(SignatureError, match="not signed: empty"):
        verify_tree(tree, tmp_path / "model.sig", key=keys.public)
    verify_tree(tree, tmp_path / "model.sig", key=keys.public, ignore=["empty"])


def test_certificates_work_both_ways(tmp_path: Path, tree: Path) -> None:
    mine, other = certificates(tmp_path / "mine"), certificates(tmp_path / "other")
    signature = sign_tree(tree, key=mine.key, certificate=mine.leaf, certificate_chain=[mine.root])
    config = model_signing.verifying.Config()
    config.use_certificate_verifier(certificate_chain=[mine.root]).verify(tree, Path(signature))
    verify_tree(tree, certificate_chain=[mine.root])
    verify_tree(tree, certificate_chain=[other.root, mine.root.read_bytes()])
    with pytest.raises(SignatureError, match="does not verify"):
        verify_tree(tree, certificate_chain=[other.root])
    signer = model_signing.signing.Config().use_certificate_signer(
        private_key=mine.key, signing_certificate=mine.leaf, certificate_chain=[mine.root]
    )
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig"])
    signer.set_hashing_config(hashing).sign(tree, Path(signature))
    verify_tree(tree, certificate_chain=[mine.root])
    (tree / "empty").write_bytes(b"x")
    with pytest.raises(SignatureError, match="not what was signed: empty"):
        verify_tree(tree, certificate_chain=[mine.root])


def test_a_key_does_not_stand_for_a_certificate_nor_the_other_way(
    tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    made = certificates(tmp_path / "c")
    sign_tree(tree, key=made.key, certificate=made.leaf, certificate_chain=[made.root])
    with pytest.raises(SignatureError, match="by a certificate"):
        verify_tree(tree, key=made.key.with_name("public.pem"))
    sign_tree(tree, key=keys.private)
    with pytest.raises(SignatureError, match="another key"):
        verify_tree(tree, certificate_chain=[made.root])


def test_every_change_of_a_tree_is_found(tree: Path, tmp_path: Path, keys: KeyPair) -> None:
    sign_tree(tree, key=keys.private)
    verify_tree(tree, key=keys.public)
    for change, found in (
        (lambda: (tree / "more").write_bytes(b""), "not signed: more"),
        (lambda: (tree / ".gitattributes").write_bytes(b""), r"not signed: \.gitattributes"),
        (lambda: many(tree / ".git", 1), r"not signed: \.git/file0"),
        (lambda: (tree / "empty").unlink(), "signed, but not there: empty"),
        (lambda: (tree / "sub" / "weights.bin").write_bytes(b"x"), "not what was signed: sub/"),
        (lambda: (tree / "empty").rename(tree / "void"), "not signed: void; signed, but not"),
        (lambda: (tree / "link").symlink_to("empty"), "link is a link"),
        (lambda: (tree / "folder").symlink_to("sub"), "folder is a link to a folder"),
        (lambda: os.mkfifo(tree / "pipe"), "pipe is no file"),
    ):
        copy = tmp_path / "copy"
        subprocess.run(["cp", "-a", tree, copy], check=True)
        change()
        with pytest.raises(SignatureError, match=found):
            verify_tree(tree, key=keys.public)
        subprocess.run(["rm", "-r", tree], check=True)
        copy.rename(tree)
    verify_tree(tree, key=keys.public)


def test_a_file_and_a_tree_are_not_taken_for_one_another(tmp_path: Path, keys: KeyPair) -> None:
    single = tmp_path / "single"
    single.write_bytes(b"x")
    folder = many(tmp_path / "folder", 1)
    for signed, other, found in (
        (single, folder, "is of one file, and this is a tree"),
        (folder, single, "is of a tree, and this is one file"),
    ):
        sign_tree(signed, tmp_path / "sig", key=keys.private)
        with pytest.raises(SignatureError, match=found):
            verify_tree(other, tmp_path / "sig", key=keys.public)


def test_what_is_ignored_is_said_on_both_sides(tree: Path, keys: KeyPair) -> None:
    many(tree / ".git", 3)
    with pytest.raises(InvalidInput, match=r"\.git, which verifiers"):
        sign_tree(tree, key=keys.private)
    sign_tree(tree, key=keys.private, ignore=[".git", "sub/"])
    with pytest.raises(SignatureError, match="not signed"):
        verify_tree(tree, key=keys.public)
    verify_tree(tree, key=keys.public, ignore=[".git", "sub"])
    for outside in ("../model", "/etc", "."):
        with pytest.raises(InvalidInput, match="no path below"):
            verify_tree(tree, key=keys.public, ignore=[outside])


def test_links_to_files_are_signed_only_when_asked_for(
    tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tree / "linked").symlink_to(tmp_path / "blob")
    with pytest.raises(InvalidInput, match="is a link; refused"):
        sign_tree(tree, key=keys.private)
    sign_tree(tree, key=keys.private, allow_symlinks=True)
    # Left to itself, that package refuses the links that it signed.
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig"])
    config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.set_hashing_config(hashing.set_allow_symlinks(True)).verify(tree, tree / "model.sig")
    verify_tree(tree, key=keys.public)
    (tmp_path / "blob").write_bytes(b"Content")
    with pytest.raises(SignatureError, match="not what was signed: linked"):
        verify_tree(tree, key=keys.public)


def test_signing_again_replaces_the_signature_and_leaves_nothing_else(
    tree: Path, keys: KeyPair
) -> None:
    before = {path.name for path in tree.iterdir()}
    assert sign_tree(tree, key=keys.private) == str(tree / "model.sig")
    first = (tree / "model.sig").read_bytes()
    sign_tree(tree, key=keys.private)
    assert (tree / "model.sig").read_bytes() != first  # such signatures are never the same twice
    assert {path.name for path in tree.iterdir()} == before | {"model.sig"}
    verify_tree(tree, key=keys.public)


def test_a_signature_replaces_nothing_but_a_signature(
    tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    config = tree / "config.json"
    config.write_text("{}")
    model = tmp_path / "model.onnx"
    model.write_bytes(b"[1]")
    for path, signature in (
        (tree, config),
        (tree, keys.private),
        (model, model),
        (tree, model),
    ):
        before = Path(signature).read_bytes()
        with pytest.raises(InvalidInput, match="is no signature"):
            sign_tree(path, signature, key=keys.private)
        assert Path(signature).read_bytes() == before


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, tree: Path, keys: KeyPair) -> None:
    edwards = key_pair(tmp_path / "ed", "ed25519")
    koblitz = key_pair(tmp_path / "k1", "k1")
    for call, found in (
        (lambda: sign_tree(tree, key=edwards.private), "Ed25519, which signs containers"),
        (lambda: verify_tree(tree, key=edwards.public), "Ed25519, which signs containers"),
        (lambda: sign_tree(tree, key=koblitz.private), "secp256k1; expected P-256"),
        (lambda: sign_tree(tree, key=keys.public), "expected a private key.*found a public one"),
        (lambda: verify_tree(tree, key=keys.private), "expected a public key, found a private"),
        (lambda: verify_tree(tree), "pass the signer's public key"),
        (
            lambda: verify_tree(tree, key=keys.public, certificate_chain=[keys.public]),
            "pass the signer's public key",
        ),
        (lambda: verify_tree(tree, certificate_chain=[keys.public]), "found none"),
        (lambda: sign_tree(tree, key=keys.private, certificate=keys.public), "belong together"),
        (
            lambda: sign_tree(
                tree,
                key=keys.private,
                certificate=certificates(tmp_path / "c").leaf,
                certificate_chain=[tmp_path / "c" / "root.pem"],
            ),
            "cannot be signed: .*does not match",
        ),
    ):
        with pytest.raises(InvalidInput, match=found):
            call()
    with pytest.raises(ModelMissingError):
        sign_tree(tmp_path / "nothing", key=keys.private)
    with pytest.raises(SignatureError, match=r"is not signed: there is no .*model\.sig"):
        verify_tree(tree, key=keys.public)


def test_an_encrypted_key_signs_also_with_a_certificate(tmp_path: Path, tree: Path) -> None:
    locked = key_pair(tmp_path / "locked", password=b"open sesame")
    sign_tree(tree, key=locked.private, password="open sesame")
    verify_as_peer(tree, tree / "model.sig", locked.public)
    made = certificates(tmp_path / "c")
    key = serialization.load_pem_private_key(made.key.read_bytes(), None)
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open sesame"),
        )
    )
    sign_tree(
        tree,
        key=made.key,
        password=b"open sesame",
        certificate=made.leaf,
        certificate_chain=[made.root],
    )
    verify_tree(tree, certificate_chain=[made.root])


# -- bundles of strangers ----------------------------------------------------------------------


def bundle_of(tree: Path, keys: KeyPair) -> dict[str, Any]:
    bundle: dict[str, Any] = json.loads(Path(sign_tree(tree, key=keys.private)).read_bytes())
    return bundle


def test_a_changed_payload_is_refused(tree: Path, keys: KeyPair) -> None:
    bundle = bundle_of(tree, keys)
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"].pop()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (tree / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(SignatureError, match="another key, or what was signed was changed"):
        verify_tree(tree, key=keys.public)


def test_a_foreign_key_is_refused_whatever_the_bundle_says_of_it(
    tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    other = key_pair(tmp_path / "other")
    bundle = bundle_of(tree, other)
    with pytest.raises(SignatureError, match="by another key"):
        verify_tree(tree, key=keys.public)
    mine = bundle_of(tree, keys)["verificationMaterial"]
    for material in (mine, mine | {"publicKey": {}}, mine | {"publicKey": {"hint": 7}}):
        (tree / "model.sig").write_text(json.dumps(bundle | {"verificationMaterial": material}))
        with pytest.raises(SignatureError, match="does not verify"):
            verify_tree(tree, key=keys.public)


def test_a_bundle_without_a_hint_is_verified_and_nothing_is_printed(
    tree: Path, keys: KeyPair, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(tree, keys)
    del bundle["verificationMaterial"]["publicKey"]["hint"]
    (tree / "model.sig").write_text(json.dumps(bundle))
    verify_tree(tree, key=keys.public)
    assert capfd.readouterr() == ("", "")


def test_two_readings_of_one_bundle_are_impossible(tree: Path, keys: KeyPair) -> None:
    bundle = bundle_of(tree, keys)
    # A name in the other spelling, and one twice: what is verified is what was looked at.
    forged = {**bundle["dsseEnvelope"], "payload": base64.b64encode(b"{}").decode()}
    text = json.dumps(bundle | {"dsse_envelope": forged})
    (tree / "model.sig").write_text(text)
    verify_tree(tree, key=keys.public)
    text = f'{{"dsseEnvelope": {json.dumps(bundle["dsseEnvelope"])}, {json.dumps(bundle)[1:]}'
    (tree / "model.sig").write_text(text.replace('"payloadType"', '"x": 1, "payloadType"'))
    verify_tree(tree, key=keys.public)


def test_a_signature_through_sigstores_servers_is_refused_in_words(
    tree: Path, keys: KeyPair
) -> None:
    bundle = bundle_of(tree, keys)
    for material in ({"certificate": {"rawBytes": "AA=="}}, {"tlogEntries": [{"logIndex": "1"}]}):
        (tree / "model.sig").write_text(json.dumps(bundle | {"verificationMaterial": material}))
        with pytest.raises(SignatureError, match="Sigstore's servers"):
            verify_tree(tree, key=keys.public)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 5000,
        b"[" * 1_000_000,
        b'{"a":' * 3000,
        b"9" * 100_000,
        b'{"verificationMaterial": {}, "dsseEnvelope": {}}',
        b'{"verificationMaterial": 1, "dsseEnvelope": 2}',
        b"[0" + b",0" * 3_000_000 + b"]",
        b'"' + b"a" * (MAX_BUNDLE + 1) + b'"',
    ],
    ids=lambda data: f"{data[:12]!r} {len(data)}",
)
def test_what_is_no_bundle_is_a_typed_error(data: bytes, keys: KeyPair) -> None:
    with pytest.raises(SignatureError):
        verify_bundle(data, Trust((keys.key.public_key(),)), "it")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_no_change_of_a_bundle_verifies_or_escapes_as_another_error(
    tmp_path: Path, tree: Path, keys: KeyPair
) -> None:
    made = certificates(tmp_path / "c")
    by_key = bundle_of(tree, keys)
    sign_tree(tree, key=made.key, certificate=made.leaf, certificate_chain=[made.root])
    by_certificate = json.loads((tree / "model.sig").read_bytes())
    roots = (made.root.read_bytes(),)
    paths = [
        ("mediaType",),
        ("verificationMaterial",),
        ("verificationMaterial", "publicKey"),
        ("verificationMaterial", "x509CertificateChain"),
        ("verificationMaterial", "x509CertificateChain", "certificates"),
        ("dsseEnvelope",),
        ("dsseEnvelope", "payload"),
        ("dsseEnvelope", "payloadType"),
        ("dsseEnvelope", "signatures"),
    ]

    @settings(max_examples=ROUNDS, suppress_health_check=[*HealthCheck])
    @given(
        st.sampled_from([by_key, by_certificate]),
        st.sampled_from(paths),
        _json | st.binary(max_size=80).map(lambda raw: base64.b64encode(raw).decode()),
    )
    def change(bundle: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
        changed = json.loads(json.dumps(bundle))
        inner = changed
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
        data = json.dumps(changed).encode()
        trust = Trust((keys.key.public_key(),), roots)
        error = None
        try:
            signed = verify_bundle(data, trust, "it")
        except SignatureError as exc:
            error = str(exc)
        if error is not None:
            assert "\n" not in error
            assert len(error) < 500
        else:
            # What was changed was not looked at.
            assert set(signed.parts) == {
                "config.json",
                "empty",
                "größe 模型.txt",
                "sub/weights.bin",
            }

    change()


# -- what it leaves alone ------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_is_written_or_connected_and_memory_stays_low(
    tmp_path: Path, keys: KeyPair
) -> None:
    home, work = tmp_path / "home", tmp_path / "model"
    home.mkdir()
    work.mkdir()
    sparse(work / "weights.bin", 1024**3)
    made = certificates(tmp_path / "c")
    program = f"""
import sys, tempfile
connected, written = [], []
def watch(event, args):
    # On import urllib3 binds a socket to the loopback to see whether there is IPv6.
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.bind"):
        connected.append((event, args))
    if event == "open" and isinstance(args[0], str) and args[2] & 3:
        written.append(args[0])
sys.addaudithook(watch)
from storage.container.signatures.bundles import sign_tree, verify_tree
sign_tree({str(work)!r}, key={str(keys.private)!r})
verify_tree({str(work)!r}, key={str(keys.public)!r})
sign_tree({str(work)!r}, key={str(made.key)!r}, certificate={str(made.leaf)!r},
          certificate_chain=[{str(made.root)!r}])
verify_tree({str(work)!r}, certificate_chain=[{str(made.root)!r}])
assert not connected, connected
expected = ("/proc/self/fd/", tempfile.gettempdir(), {str(work)!r}, "/dev/null")
strange = [path for path in written if not path.startswith(expected)]
assert not strange, strange
# Not ru_maxrss, which begins with that of the process that started this one.
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []
    assert int(done.stdout) < 160


def test_no_socket_is_needed(tree: Path, keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was made")

    monkeypatch.setattr(socket, "socket", refuse)
    sign_tree(tree, key=keys.private)
    verify_tree(tree, key=keys.public)
