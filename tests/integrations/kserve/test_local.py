"""Sources that are on this machine already: they are linked to, and nothing of them is lost."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from storage.integrations.kserve.initializer import main
from tests.integrations.kserve.support import MODEL, public_key, tar, tree


def test_a_claim_is_linked_and_not_copied(tmp_path: Path) -> None:
    claim, target = tmp_path / "claim [1]", tmp_path / "models"
    for path, content in MODEL.items():
        place = claim / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (claim / "lost+found").mkdir()

    for source in (str(claim), f"file://{claim}", f"{claim}/"):
        assert main([source, str(target)]) == 0
        assert tree(target) == MODEL
        assert sorted(os.listdir(target)) == ["config.json", "empty", "weights"]
        assert os.readlink(target / "weights") == str(claim / "weights")
    (claim / "config.json").unlink()
    assert main([str(claim), str(target)]) == 0
    assert sorted(os.listdir(target)) == ["empty", "weights"]
    assert main([str(claim / "empty"), str(tmp_path / "one")]) == 0
    assert os.readlink(tmp_path / "one" / "empty") == str(claim / "empty")


def test_a_claim_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = tmp_path / "claims" / "team"
    (claim / "iris").mkdir(parents=True)
    (claim / "iris" / "model.bin").write_bytes(b"1")
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'[stores.team]\nprefix = "pvc://team/"\nmount_root = "{tmp_path}/claims"\n'
    )
    monkeypatch.setenv("STORAGE_SETTINGS_FILE", str(settings))

    assert main(["pvc://team/iris", str(tmp_path / "d")]) == 0
    assert os.readlink(tmp_path / "d" / "model.bin") == str(claim / "iris" / "model.bin")
    assert main(["pvc://team/../iris", str(tmp_path / "e")]) == 1
    assert "pvc://team" in capsys.readouterr().err


def test_patterns_choose_files_of_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = tmp_path / "claim"
    (claim / "weights").mkdir(parents=True)
    for name in ("a.bin", "b.txt", "weights/c.bin", "weights/d.txt"):
        (claim / name).write_bytes(b"1")
    monkeypatch.setenv("STORAGE_ALLOW_PATTERNS", "*.bin")
    monkeypatch.setenv("STORAGE_IGNORE_PATTERNS", '["a*"]')

    assert main([str(claim), str(tmp_path / "d")]) == 0
    assert tree(tmp_path / "d") == {"weights/c.bin": b"1"}
    monkeypatch.setenv("STORAGE_ALLOW_PATTERNS", "*.onnx")
    assert main([str(claim), str(tmp_path / "e")]) == 1
    assert os.listdir(tmp_path / "e") == []


def test_patterns_follow_links_to_folders_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tmp_path / "claim"
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "a.bin").write_bytes(b"1")
    claim.mkdir()
    (claim / "weights").symlink_to(tmp_path / "shared")
    (claim / "circle").symlink_to(claim)
    monkeypatch.setenv("STORAGE_ALLOW_PATTERNS", "*.bin")

    assert main([str(claim), str(tmp_path / "d")]) == 0
    assert tree(tmp_path / "d") == {"weights/a.bin": b"1"}


def test_a_digest_is_expected_of_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.bin").write_bytes(b"1")
    right = f"{tmp_path}/model.bin#sha256={hashlib.sha256(b'1').hexdigest()}"
    wrong = f"{tmp_path}/model.bin#sha256={hashlib.sha256(b'2').hexdigest()}"

    for number, source in enumerate((right, f"file://{right}")):
        assert main([source, str(tmp_path / str(number))]) == 0
        assert tree(tmp_path / str(number)) == {"model.bin": b"1"}
    for number, source in enumerate((wrong, f"file://{wrong}"), 2):
        assert main([source, str(tmp_path / str(number))]) == 1
        assert tree(tmp_path / str(number)) == {}
    assert "expected sha256" in capsys.readouterr().err


def test_a_signature_is_demanded_of_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.bin").write_bytes(b"1")
    (tmp_path / "public.pem").write_bytes(public_key())
    monkeypatch.setenv("STORAGE_REQUIRE_SIGNATURE", str(tmp_path / "public.pem"))

    assert main([str(tmp_path / "model"), str(tmp_path / "d")]) == 1
    assert os.listdir(tmp_path / "d") == []
    assert "sign" in capsys.readouterr().err


def test_a_destination_inside_of_its_source_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.bin").write_bytes(b"1")

    assert main([str(tmp_path), str(tmp_path / "d")]) == 1
    assert "inside" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path)]) == 0
    assert (tmp_path / "model.bin").read_bytes() == b"1"


def test_a_file_is_not_replaced_by_a_link_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.bin").write_bytes(b"1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model").mkdir()
    (tmp_path / "model" / "model" / "a").write_bytes(b"1")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model.bin").symlink_to(tmp_path / "model.bin")

    assert main([str(tmp_path / "model.bin"), str(tmp_path)]) == 0
    assert main([str(tmp_path / "model"), str(tmp_path)]) == 1
    assert main([str(tmp_path / "links"), str(tmp_path)]) == 1
    assert "would be lost" in capsys.readouterr().err
    expected = {"model.bin": b"1", "model/model/a": b"1", "links/model.bin": b"1"}
    assert tree(tmp_path) == expected
    (tmp_path / "model.tar").write_bytes(tar({"b": b"2"}, "w"))
    assert main([str(tmp_path / "model.tar"), str(tmp_path)]) == 0
    assert tree(tmp_path)["b"] == b"2"


@pytest.mark.parametrize("patterns", ["", "*"])
def test_what_is_noted_of_a_claim_is_not_linked(
    patterns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tmp_path / "claim"
    (claim / f".modelstorage.{'0' * 16}").mkdir(parents=True)
    (claim / f".modelstorage.{'0' * 16}" / "model").write_bytes(b"half")
    (claim / ".modelstorage").write_text("{}")
    (claim / "model.bin").write_bytes(b"1")
    monkeypatch.setenv("STORAGE_ALLOW_PATTERNS", patterns)

    assert main([str(claim), str(tmp_path / "d")]) == 0
    assert os.listdir(tmp_path / "d") == ["model.bin"]
