"""`storage container …`."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from storage.cli import main
from storage.container import ModelContainer, NumpyHelper, SafetensorsHelper
from tests.cli.conftest import Command, write_tree

WEIGHTS: list[np.ndarray] = [np.arange(100_000, dtype=np.float32), np.eye(3)]
INFERENCE = b"onnx model " * 1000


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    path = tmp_path / "weights.npz"
    with path.open("wb") as file:
        NumpyHelper().save(WEIGHTS, file)
    return path


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(INFERENCE)
    return path


@pytest.fixture
def built(command: Command, npz: Path, onnx: Path, tmp_path: Path) -> Path:
    out = tmp_path / "store" / "model.zip"
    out.parent.mkdir()
    result = command(
        *("container", "build", out, "--training", npz, "--inference", onnx, "--id", "m-1"),
        *("--meta", "name=iris", "--meta", "epochs:=3"),
    )
    assert (result.status, result.lines) == (0, [str(out)])
    assert "m-1" in result.err
    return out


@pytest.fixture
def uri(built: Path) -> str:
    """The container by the generic driver's name for local files: in a store like any."""
    return f"local://{built}"


# -- making ----------------------------------------------------------------------------------


def test_files_become_a_container(built: Path) -> None:
    with ModelContainer.from_file(built) as container:
        assert container.metadata == {
            "model_id": "m-1",
            "helper_type": "numpyhelper",
            "inference_model_format": "onnx",
            "name": "iris",
            "epochs": 3,
        }
        assert all(map(np.array_equal, container.get_training_model(), WEIGHTS))
        with container.get_inference_model_stream() as stream:
            assert stream.read() == INFERENCE
    assert [path.name for path in built.parent.iterdir()] == ["model.zip"]


def test_a_container_goes_to_a_store(command: Command, npz: Path, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    result = command(
        "container", "build", f"local://{tmp_path}/up/m.zip", "--training", npz, "--json"
    )
    assert (result.status, result.err) == (0, "")
    document = result.json
    assert document["uri"] == f"local://{tmp_path}/up/m.zip"
    assert document["size"] == (tmp_path / "up" / "m.zip").stat().st_size
    with ModelContainer.from_file(tmp_path / "up" / "m.zip") as container:
        assert container.model_id == document["model_id"]
        assert all(map(np.array_equal, container.get_training_model(), WEIGHTS))


def test_a_container_gets_other_metadata(command: Command, uri: str, tmp_path: Path) -> None:
    out = tmp_path / "tagged.zip"
    result = command("container", "build", out, "--from", uri, "--meta", "name=iris-2", "--json")
    assert result.status == 0
    with ModelContainer.from_file(out) as container:
        assert container.metadata["name"] == "iris-2"
        assert container.metadata["epochs"] == 3
        assert container.model_id == result.json["model_id"] != "m-1"
        assert all(map(np.array_equal, container.get_training_model(), WEIGHTS))
        assert container.has_inference_model


def test_any_file_is_a_training_model(command: Command, tmp_path: Path) -> None:
    raw = tmp_path / "weights.pt"
    raw.write_bytes(b"\x80\x04anything")
    out = tmp_path / "raw.zip"
    assert command("container", "build", out, "--training", raw).status == 0
    assert "helper_type" not in ModelContainer.from_file(out).metadata
    assert command("container", "extract", out, "training", "-").out == raw.read_bytes()
    replaced = tmp_path / "replaced.zip"
    build = ("container", "build", replaced, "--training", raw, "--from", out)
    assert "--helper" in command(*build).error
    assert command(*build, "--helper", "torchhelper").status == 0
    assert ModelContainer.from_file(replaced).metadata["helper_type"] == "torchhelper"
    result = command("container", "build", tmp_path / "nested.zip", "--training", out)
    assert (result.status, "--from" in result.error) == (1, True)


def test_what_reads_safetensors_is_noted_where_others_do_not_trip_over_it(
    command: Command, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    with weights.open("wb") as file:
        SafetensorsHelper().save({"a": WEIGHTS[0]}, file)
    out = tmp_path / "model.zip"
    assert command("container", "build", out, "--training", weights).status == 0
    with ModelContainer.from_file(out) as container:
        assert "helper_type" not in container.metadata
        assert np.array_equal(container.get_training_model()["a"], WEIGHTS[0])


def test_a_container_without_a_training_model(command: Command, onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "only.zip"
    assert command("container", "build", out, "--inference", onnx, "--format", "x").status == 0
    with ModelContainer.from_file(out) as container:
        assert not container.has_training_model
        assert container.get_inference_model_format() == "x"
    result = command("container", "extract", out, "training", "-")
    assert (result.status, result.out) == (1, b"")
    assert "training_model.bin" in result.error


def test_a_failed_build_leaves_nothing(command: Command, onnx: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.zip"
    for arguments in (["--training", tmp_path / "absent"], ["--from", tmp_path / "absent"]):
        result = command("container", "build", tmp_path / "model.zip", *arguments)
        assert result.status == 1
        assert "absent" in result.error
    assert command("container", "build", out, "--inference", onnx).status == 1
    assert command("container", "build", f"{tmp_path}/", "--inference", onnx).status == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


# -- looking ---------------------------------------------------------------------------------


def test_inspect_tells_what_is_inside(command: Command, built: Path, uri: str, npz: Path) -> None:
    for source in (str(built), uri):
        document = command("container", "inspect", source, "--json").json
        assert document["uri"] == source
        assert (document["model_id"], document["legacy"]) == ("m-1", False)
        assert document["metadata"]["name"] == "iris"
        assert document["size"] == built.stat().st_size
        assert document["format_version"] == 2
        assert "checksum" not in document
        entries = {entry.pop("name"): entry for entry in document["entries"]}
        assert entries.keys() == {"metadata.json", "training_model.bin", "inference_model.bin"}
        assert entries["training_model.bin"]["size"] == npz.stat().st_size
        packed = entries["inference_model.bin"]
        assert packed["method"] == "deflated"
        assert packed["stored_size"] < packed["size"] == len(INFERENCE)


def test_inspect_for_people(command: Command, uri: str, built: Path) -> None:
    result = command("container", "inspect", uri, "--checksum")
    assert result.status == 0
    assert "metadata.name: iris" in result.lines
    assert "metadata.epochs: 3" in result.lines
    assert "model_id: m-1" in result.lines
    assert f"checksum: {hashlib.sha256(built.read_bytes()).hexdigest()}" in result.lines
    assert [line.split()[2] for line in result.lines if line.endswith(".bin")] == [
        "training_model.bin",
        "inference_model.bin",
    ]


def test_a_legacy_file_is_told_as_one(command: Command, npz: Path) -> None:
    assert command("container", "inspect", npz, "--json").json["legacy"] is True


def test_parts_are_extracted(command: Command, uri: str, npz: Path, tmp_path: Path) -> None:
    result = command("container", "extract", uri, "training", tmp_path / "w.npz")
    assert (result.status, result.lines) == (0, [str(tmp_path / "w.npz")])
    assert (tmp_path / "w.npz").read_bytes() == npz.read_bytes()
    folder = tmp_path / "into"
    folder.mkdir()
    result = command("container", "extract", uri, "inference", folder, "--json")
    assert result.json == {"path": str(folder / "inference_model.bin"), "size": len(INFERENCE)}
    assert (folder / "inference_model.bin").read_bytes() == INFERENCE
    assert command("container", "extract", uri, "inference", "-").out == INFERENCE


def test_two_things_cannot_go_to_standard_output(command: Command) -> None:
    result = command("container", "extract", "model.zip", "training", "-", "--json")
    assert (result.status, result.out) == (2, b"")
    assert "both" in result.json_error["message"]


def test_a_damaged_part_is_not_put_there(command: Command, built: Path, tmp_path: Path) -> None:
    data = bytearray(built.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        data[archive.getinfo("training_model.bin").header_offset + 100_000] ^= 1
    built.write_bytes(data)
    result = command("container", "extract", built, "training", tmp_path / "w.npz", "--json")
    assert (result.status, result.out) == (1, b"")
    assert result.json_error["type"] == "IntegrityError"
    assert not list(tmp_path.glob("*w.npz*"))


# -- signatures ------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return _write_keys(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())


def _write_keys(
    folder: Path,
    name: str,
    key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey,
    password: bytes | None = None,
) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password)
    pem = serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(pem, spki))
    return private, public


def test_a_signature_is_verified(
    command: Command, built: Path, uri: str, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    out = tmp_path / "model.sig.json"
    result = command("container", "sign", uri, "--key", private, "--signer", "me", "--out", out)
    assert (result.status, result.lines) == (0, [str(out)])
    signature = json.loads(out.read_bytes())
    assert signature["model_id"] == "m-1"
    assert signature["algorithm"] == "ed25519"
    assert signature["signer_id"] == "me"
    assert command("container", "sign", built, "--key", private).json.items() <= signature.items()
    for form in (out, signature["signature"]):
        result = command("container", "verify", uri, "--key", public, "--signature", form)
        assert (result.status, result.out) == (0, b"")
    plain = tmp_path / "base64"
    plain.write_text(signature["signature"] + "\n")
    result = command(
        *("container", "verify", built, "--key", public, "--signature", plain, "--json")
    )
    assert result.json == {"ok": True, "uri": str(built), "model_id": "m-1"}


def test_a_wrong_signature_is_an_error(
    command: Command, built: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    _, stranger = _write_keys(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    signature = command("container", "sign", built, "--key", private).json["signature"]
    verify = ("container", "verify", built, "--signature")
    assert command(*verify, signature, "--key", public).status == 0
    tagged = tmp_path / "tagged.zip"
    command("container", "build", tagged, "--from", built, "--meta", "a=b")
    for arguments in (
        (*verify, signature, "--key", stranger),
        (*verify, signature[:-8] + "AAAAAA==", "--key", public),
        ("container", "verify", tagged, "--signature", signature, "--key", public),
    ):
        result = command(*arguments, "--json")
        assert (result.status, result.out) == (1, b"")
        assert result.json_error["type"] == "SignatureError"


def test_what_is_no_signature_is_told_as_that(
    command: Command, built: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    for text in ("nothing of the kind", str(built), str(tmp_path / "absent")):
        result = command(
            *("container", "verify", built, "--key", keys[1], "--signature", text, "--json")
        )
        assert (result.status, result.json_error["type"]) == (1, "InvalidInput")
    result = command("container", "verify", built, "--key", keys[1])
    assert (result.status, "--signature" in result.error) == (1, True)


def test_an_encrypted_key_needs_its_password(command: Command, built: Path, tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    private, public = _write_keys(tmp_path, "locked", key, b"pass word")
    result = command("container", "sign", built, "--key", private)
    assert result.status == 1
    assert "password" in result.error
    password = tmp_path / "password"
    password.write_text("pass word\n")
    signed = command("container", "sign", built, "--key", private, "--password-file", password)
    signature = signed.json["signature"]
    result = command("container", "verify", built, "--key", public, "--signature", signature)
    assert result.status == 0
    password.write_text("wrong")
    result = command("container", "sign", built, "--key", private, "--password-file", password)
    assert result.status == 1
    assert "wrong" not in result.error.replace("is wrong", "")


def test_a_folder_gets_a_bundle(command: Command, tmp_path: Path) -> None:
    private, public = _write_keys(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    tree = write_tree(tmp_path / "tree", {"a.bin": b"a", "b/c.bin": b"c"})
    result = command("container", "sign", tree, "--key", private)
    assert (result.status, result.lines) == (0, [str(tree / "model.sig")])
    assert command("container", "verify", tree, "--key", public).status == 0
    (tree / "a.bin").write_bytes(b"b")
    result = command("container", "verify", tree, "--key", public, "--json")
    assert (result.status, result.json_error["type"]) == (1, "SignatureError")


def test_no_file_that_is_read_is_replaced(
    command: Command, built: Path, keys: tuple[Path, Path], onnx: Path, tmp_path: Path
) -> None:
    ec_key, _ = _write_keys(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    before = {path: path.read_bytes() for path in (built, onnx, keys[0], ec_key)}
    for arguments in (
        *(("sign", built, "--key", keys[0], "--out", path) for path in before),
        *(("sign", onnx, "--key", ec_key, "--out", path) for path in before),
        ("extract", built, "inference", built),
        ("extract", f"file://{built}", "inference", built),
        ("build", onnx, "--inference", onnx),
        ("build", f"file://{onnx}", "--training", onnx),
    ):
        result = command("container", *arguments, "--json")
        assert (result.status, result.json_error["type"]) == (1, "InvalidInput"), arguments
    assert {path: path.read_bytes() for path in before} == before
    # A container may be what it is made of, and a signature replaces an older one.
    assert command("container", "build", built, "--from", built, "--meta", "a=b").status == 0
    for _ in range(2):
        signing = command("container", "sign", built, "--key", keys[0], "--out", tmp_path / "sig")
        assert signing.status == 0


def test_a_folder_is_signed_also_where_signatures_are_required(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = _write_keys(tmp_path, "ec", ec.generate_private_key(ec.SECP256R1()))
    tree = write_tree(tmp_path / "tree", {"a.bin": b"a"})
    monkeypatch.setenv("STORAGE_REQUIRE_SIGNATURE", str(public))
    assert command("download", tree).status == 1
    assert command("container", "sign", tree, "--key", private).status == 0
    assert command("container", "verify", tree, "--key", public).status == 0
    assert command("download", tree).status == 0


# -- misuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["build"],
        ["build", "out.zip"],
        ["build", "out.zip", "--helper", "numpyhelper", "--inference", "model.onnx"],
        ["build", "out.zip", "--training", "a", "--format", "onnx"],
        ["build", "out.zip", "--inference", "noending"],
        ["build", "out.zip", "--training", "a", "--meta", "novalue"],
        ["build", "out.zip", "--training", "a", "--meta", "a:={"],
        ["build", "out.zip", "--training", "s3://bucket/key"],
        ["inspect"],
        ["inspect", "s3:///key"],
        ["extract", "model.zip", "metadata", "-"],
        ["extract", "model.zip", "training"],
        ["sign", "model.zip"],
        ["sign", "model.zip", "--key", "k", "--chain", "c"],
        ["verify", "model.zip", "--signature", "s"],
        ["verify", "model.zip", "--key", "k", "--root", "r"],
    ],
)
def test_misuse(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["container", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("storage: error: ")
    assert err.endswith("--help\n")
