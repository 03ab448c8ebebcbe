"""``require_signature=`` for versions: nothing is handed over that is not signed."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import ModelMissingError, SignatureError, SignaturePolicy, StorageClient
from storage.container.signatures.bundles import sign_tree
from storage.registry import ModelRegistry
from tests.container.signing_keys import KeyPair, key_pair
from tests.facade.stores import MemoryStore, tree_bytes
from tests.registry.test_pull import MODEL, write_tree


@pytest.fixture
def registry(client: StorageClient) -> ModelRegistry:
    """An empty registry."""
    found = ModelRegistry(MemoryStore().base, client=client)
    found.init()
    return found


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[KeyPair, KeyPair]:
    folder = tmp_path_factory.mktemp("keys")
    return key_pair(folder / "ours"), key_pair(folder / "theirs")


def test_a_required_signature_is_verified_wherever_a_version_comes_from(
    registry: ModelRegistry,
    keys: tuple[KeyPair, KeyPair],
    tmp_path: Path,
) -> None:
    ours, theirs = keys
    folder = write_tree(tmp_path / "signed", MODEL)
    sign_tree(folder, key=ours.private)
    signed = tree_bytes(folder)
    for files in (signed, MODEL, signed | {"config.json": b"other"}):
        registry.push("iris", write_tree(tmp_path / "src", files))
    policy = SignaturePolicy.key(ours.public)
    for options in (
        {},
        {"offline": True},
        {"dest": tmp_path / "out"},
        {"dest": tmp_path / "out", "offline": True},
    ):
        path = registry.pull("iris", 1, require_signature=policy, **options)
        assert tree_bytes(path) == signed
        with pytest.raises(SignatureError):
            registry.pull(
                "iris", 1, require_signature=SignaturePolicy.key(theirs.public), **options
            )
    for number in (2, 3):
        for dest in (None, tmp_path / "wrong"):
            with pytest.raises(SignatureError):
                registry.pull("iris", number, dest, require_signature=policy)
    assert not (tmp_path / "wrong").exists()


def test_a_part_of_a_signed_version_comes_with_its_signature(
    registry: ModelRegistry,
    keys: tuple[KeyPair, KeyPair],
    tmp_path: Path,
) -> None:
    folder = write_tree(tmp_path / "signed", MODEL)
    sign_tree(folder, key=keys[0].private)
    registry.push("iris", folder)
    policy = SignaturePolicy.key(keys[0].public)
    for options in ({}, {"offline": True}, {"dest": tmp_path / "out"}):
        path = registry.pull(
            "iris", 1, allow_patterns="*.json", require_signature=policy, **options
        )
        assert sorted(tree_bytes(path)) == ["config.json", "model.sig"]
    with pytest.raises(ModelMissingError):
        registry.pull("iris", 1, allow_patterns="*.onnx", require_signature=policy)
