"""Whatever the bytes are, only the errors of this library come, and nothing is left behind.

20,000 inputs every day, 200,000 with ``STORAGE_SOAK=1``. Hypothesis makes the bytes by which
:mod:`tests.container.fuzzing` changes good files.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import gc
import io
import json
import lzma
import os
import re
import shutil
import signal
import stat
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import errors
from storage.container import (
    BinaryHelper,
    ExtractionLimits,
    FileChunk,
    ModelContainer,
    NumpyHelper,
    SafetensorsHelper,
    extract_archive,
)
from storage.container.entries import open_entry, read_directory
from storage.container.signatures.bundles import sign_tree, verify_tree
from storage.container.signatures.signing import read_signature, verify_container
from storage.container.stored import LocalSource
from storage.errors import InvalidInput, SignatureError, StorageError
from tests.container.fuzzing import (
    Program,
    Seed,
    Unseekable,
    archive_seeds,
    changed,
    container_seeds,
    content_seeds,
    npz_seeds,
    seeds_of,
    summed,
    tensor_seeds,
    zipped,
)
from tests.container.signing_keys import certificates, key_pair

SOAK = 10 if os.environ.get("STORAGE_SOAK") == "1" else 1
MIB = 1024 * 1024
MOST_MEMORY = 160 * MIB
SECONDS = 20
"""Of the processor, for one input."""

LIMITS = ExtractionLimits(total_size=MIB, entries=100)
PROGRAMS = st.binary(min_size=8, max_size=40)
ARCHIVES = archive_seeds()
CONTAINERS = container_seeds()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 * SOAK)]
KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))


class TooSlow(BaseException):
    """An input took so long that it may be one without an end."""


class Watch:
    """Lets one input after another through, and looks what it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder / "input")
        self.out = str(folder / "out")
        self.outcomes: set[str] = set()
        self._begin = _memory("VmRSS")

    @contextlib.contextmanager
    def input(self, data: bytes) -> Iterator[None]:
        with open(self.path, "wb") as file:
            file.write(data)
        before = _open_files()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        assert _open_files() - before == set()
        assert os.listdir(self.folder) == ["input"]

    def typed(self, call: Callable[[], Any]) -> Any:
        """Return what a call returns, or the type of the error of this library that it raises."""
        try:
            found = call()
        except StorageError as exc:
            # Not the error itself, whose frames would keep open what is to be closed.
            kind, message = type(exc), str(exc)
        else:
            self.outcomes.add("fine")
            return found
        assert kind.__module__ == errors.__name__
        assert message
        assert "\n" not in message
        self.outcomes.add(kind.__name__)
        return kind

    def check_memory(self) -> None:
        assert _memory("VmHWM") - self._begin < MOST_MEMORY


def _memory(what: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))


def _forget_peak() -> None:
    """Let the peak of memory count anew from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def _open_files() -> set[tuple[str, str]]:
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue
        # Sockets and pipes are of the servers of other tests.
        if link.startswith("/") and not link.startswith("/proc"):
            found.add((descriptor, link))
    return found


def _too_slow(_: int, __: FrameType | None) -> None:
    raise TooSlow


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    folder = tmp_path / "watched"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    before = signal.signal(signal.SIGVTALRM, _too_slow)
    _forget_peak()
    found = Watch(folder)
    yield found
    signal.signal(signal.SIGVTALRM, before)
    found.check_memory()


def inputs(count: int, strategy: st.SearchStrategy[bytes], use: Callable[[bytes], None]) -> None:
    """Call ``use`` with so many inputs, ten times as many in a soak test."""
    settings(max_examples=count * SOAK, database=None)(given(strategy)(use))()


# -- containers ------------------------------------------------------------------------------


def use_container(container: ModelContainer, watch: Watch) -> None:
    """Ask a container for all that it has."""
    with container:
        assert repr(container)
        json.dumps(container.metadata)
        assert len(container.checksum) == 64
        for name in container.list_files():
            watch.typed(partial(container.get_file, name))
        for opening in (container.get_training_model_stream, container.get_inference_model_stream):
            watch.typed(partial(_read, opening))
        assert watch.typed(lambda: container.verify_signature(KEY.public_key(), "x")) is not True
        for helper in (None, NumpyHelper(MIB), SafetensorsHelper(), BinaryHelper()):
            for mmap in (False, True):
                load = partial(container.get_training_model, helper, mmap=mmap)
                _look_at(watch.typed(load))
        _rebuild(container, watch)


def _read(opening: Callable[[], Any]) -> bytes:
    with opening() as stream:
        return bytes(stream.read())


def _look_at(model: Any) -> None:
    if isinstance(model, type):
        return
    for array in model.values() if isinstance(model, dict) else model:
        assert isinstance(array, np.ndarray)
        array.tobytes()


def _rebuild(container: ModelContainer, watch: Watch) -> None:
    with container.to_builder() as builder:
        with builder.build() as same:
            assert same.checksum == container.checksum
        changed = watch.typed(lambda: builder.set_metadata("changed", 1).build())
    if isinstance(changed, ModelContainer):
        with changed:
            assert sorted(changed.entries) == sorted(container.entries)
            assert changed.metadata.pop("changed") == 1


def feed_container(data: bytes, watch: Watch) -> None:
    """Let readers of containers have some bytes: that of files, and one of the others."""
    with watch.input(data):
        kind = ModelContainer.detect_format(io.BytesIO(data))
        assert kind in ("zip", "legacy")
        # A file may have something in front, and a stream may not.
        assert ModelContainer.detect_format_file(watch.path) == "zip" or kind == "legacy"
        opened = watch.typed(lambda: ModelContainer.from_file(watch.path))
        if isinstance(opened, ModelContainer):
            use_container(opened, watch)
        others: list[Callable[[], ModelContainer]] = [
            lambda: ModelContainer.open(watch.path),
            lambda: ModelContainer.from_stream(io.BytesIO(data)),
            lambda: ModelContainer.from_stream(Unseekable(data)),
            lambda: ModelContainer.from_filechunk_stream(map(FileChunk, (data[:9], data[9:]))),
        ]
        opened = watch.typed(others[zlib.crc32(data) % len(others)])
        if isinstance(opened, ModelContainer):
            with opened:
                assert opened.metadata is not None
                if opened.legacy_source:
                    assert _read(opened.get_training_model_stream) == data


def test_any_change_of_a_container_is_read_or_refused(watch: Watch) -> None:
    inputs(4000, PROGRAMS, lambda raw: feed_container(changed(CONTAINERS, Program(raw)), watch))
    assert {"fine", "InvalidInput", "IntegrityError", "ModelMissingError"} <= watch.outcomes


def test_any_content_of_a_container_is_read_or_refused(watch: Watch) -> None:
    seeds = content_seeds()
    inputs(2000, PROGRAMS, lambda raw: feed_container(changed(seeds, Program(raw)), watch))
    assert {"fine", "InvalidInput", "UnsupportedOperation"} <= watch.outcomes


# -- what is in containers -------------------------------------------------------------------


def feed_helper(helper: Any, data: bytes, watch: Watch) -> None:
    """Read parameters from a stream, an unseekable one, and a mapped entry."""
    with watch.input(zipped({"e": data}, method=0)):
        plain = watch.typed(lambda: helper.load(io.BytesIO(data)))
        unseekable = watch.typed(lambda: helper.load(io.BufferedReader(Unseekable(data))))
        assert isinstance(plain, type) == isinstance(unseekable, type)
        for model in (plain, unseekable, watch.typed(lambda: _load_mapped(helper, watch.path))):
            _look_at(model)
        # What is mapped is let go with the arrays.
        del model


def _load_mapped(helper: Any, path: str) -> Any:
    with contextlib.closing(LocalSource.open(path)) as source:
        entry = read_directory(source)["e"]
        with open_entry(source, entry, mmap=True) as stream:
            return helper.load(stream)


@pytest.mark.parametrize(
    ("helper", "seeds", "count"),
    [(NumpyHelper(16 * MIB), npz_seeds(), 3000), (SafetensorsHelper(), tensor_seeds(), 1500)],
    ids=["NPZ", "safetensors"],
)
def test_any_change_of_parameters_is_read_or_refused(
    helper: Any, seeds: list[Seed], count: int, watch: Watch
) -> None:
    inputs(count, PROGRAMS, lambda raw: feed_helper(helper, changed(seeds, Program(raw)), watch))
    assert {"fine", "InvalidInput"} <= watch.outcomes


# -- archives --------------------------------------------------------------------------------


def feed_archive(data: bytes, watch: Watch) -> None:
    with watch.input(data):
        found = watch.typed(lambda: extract_archive(watch.path, watch.out, limits=LIMITS))
        if found == watch.out:
            _check_tree(watch.out)
            shutil.rmtree(watch.out)


def _check_tree(folder: str) -> None:
    """Check that nothing in a folder leads out of it, or is anything but a file."""
    total = count = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            found = os.lstat(path)
            kind = stat.S_IFMT(found.st_mode)
            assert kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
            assert not found.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)
            if kind == stat.S_IFLNK:
                assert f"{os.path.realpath(path)}/".startswith(f"{folder}/")
            elif kind == stat.S_IFREG:
                total += found.st_size
                count += 1
    assert total <= LIMITS.total_size
    assert count <= LIMITS.entries


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("tar", 3000),
        ("tar as it is", 500),
        ("tar inside", 1000),
        ("compressed", 500),
        ("zip", 2500),
    ],
)
def test_any_change_of_an_archive_is_extracted_or_refused(
    kind: str, count: int, watch: Watch
) -> None:
    seeds = ARCHIVES[kind]
    inputs(count, PROGRAMS, lambda raw: feed_archive(changed(seeds, Program(raw)), watch))
    assert {"fine", "InvalidInput"} <= watch.outcomes


# -- signatures ------------------------------------------------------------------------------


def test_any_change_of_a_signed_container_is_found(watch: Watch, tmp_path: Path) -> None:
    signed = CONTAINERS[0].data
    with ModelContainer.from_stream(io.BytesIO(signed)) as container:
        signature = json.dumps(container.sign(KEY)).encode()
    expected = contents(io.BytesIO(signed))
    verified = []

    def use(raw: bytes) -> None:
        data = changed(CONTAINERS[:1], Program(raw))
        with watch.input(data):
            right = watch.typed(lambda: verify_container(watch.path, [KEY.public_key()], signature))
            if right is True:
                # Only how it is packed may be another.
                assert contents(io.BytesIO(data)) == expected
                verified.append(raw)

    inputs(500, PROGRAMS, use)
    assert verified
    assert "InvalidInput" in watch.outcomes


def contents(file: io.BytesIO) -> dict[str, bytes]:
    found = {}
    for name, entry in read_directory(file).items():
        with open_entry(file, entry) as stream:
            found[name] = stream.read()
    return found


def test_any_change_of_a_signature_is_found(watch: Watch) -> None:
    data = CONTAINERS[0].data
    with ModelContainer.from_stream(io.BytesIO(data)) as container:
        signature = container.sign(KEY, "somebody")
        right = base64.b64decode(signature["signature"])
        seeds = [
            Seed("JSON", json.dumps(signature).encode()),
            Seed("text", signature["signature"].encode()),
            Seed("64 bytes", right, base64.b64encode),
            Seed(
                "in JSON",
                right,
                lambda raw: json.dumps({"signature": base64.b64encode(raw).decode()}).encode(),
            ),
        ]
        verified = []

        def use(raw: bytes) -> None:
            made = changed(seeds, Program(raw))
            with watch.input(data):
                found = watch.typed(lambda: read_signature(made))
                verify = [lambda: verify_container(watch.path, [KEY.public_key()], made)]
                if isinstance(found, dict):
                    verify.append(lambda: container.verify_signature(KEY.public_key(), found))
                for each in verify:
                    if watch.typed(each) is True:
                        assert base64.b64decode(found["signature"]) == right
                        verified.append(raw)

        inputs(500, PROGRAMS, use)
    assert verified
    assert watch.outcomes == {"fine"}


def test_any_change_of_a_bundle_is_found(watch: Watch, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "weights").write_bytes(b"weights")
    keys, made = key_pair(tmp_path / "keys"), certificates(tmp_path / "certificates")
    by_key, by_certificate = (
        Path(place).read_bytes()
        for place in (
            sign_tree(tree, tmp_path / "1.sig", key=keys.private),
            sign_tree(
                tree,
                tmp_path / "2.sig",
                key=made.key,
                certificate=made.leaf,
                certificate_chain=[made.root],
            ),
        )
    )
    trusted = keys.public.read_bytes()
    roots = [made.root.read_bytes()]
    seeds = [*_bundle_seeds("key", by_key), *_bundle_seeds("certificate", by_certificate)]
    payloads = [_payload(each) for each in (by_key, by_certificate)]
    verified = []

    def use(raw: bytes) -> None:
        data = changed(seeds, Program(raw))
        with watch.input(data):
            for verify in (
                lambda: verify_tree(tree, watch.path, key=trusted),
                lambda: verify_tree(tree, watch.path, certificate_chain=roots),
            ):
                found = watch.typed(verify)
                assert found in (None, SignatureError)
                if found is None:
                    assert _payload(data) in payloads
                    verified.append(raw)

    inputs(500, PROGRAMS, use)
    assert verified
    assert watch.outcomes == {"fine", "SignatureError"}


def _payload(bundle: bytes) -> bytes:
    """Return what is signed: its text in base64 may end in another letter and mean the same."""
    return base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"], validate=True)


def _bundle_seeds(name: str, data: bytes) -> list[Seed]:
    """Return a bundle, and what is in it, to be put back after it is changed."""
    bundle = json.loads(data)
    envelope = bundle["dsseEnvelope"]

    def with_payload(raw: bytes) -> bytes:
        payload = base64.b64encode(raw).decode()
        return json.dumps(bundle | {"dsseEnvelope": envelope | {"payload": payload}}).encode()

    def with_signature(raw: bytes) -> bytes:
        signatures = [{"sig": base64.b64encode(raw).decode(), "keyid": ""}]
        return json.dumps(bundle | {"dsseEnvelope": envelope | {"signatures": signatures}}).encode()

    return [
        Seed(f"bundle by {name}", data),
        Seed(f"payload by {name}", base64.b64decode(envelope["payload"]), with_payload),
        Seed(
            f"signature by {name}",
            base64.b64decode(envelope["signatures"][0]["sig"]),
            with_signature,
        ),
    ]


# -- anything --------------------------------------------------------------------------------

BEGINNINGS = (
    *(b"", b"PK\3\4", b"PK\5\6", b"\x93NUMPY\1\0", b"\x1f\x8b\x08\0", b"BZh9", b"\xfd7zXZ\0"),
    *(b"]\0\0", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", b"\x0a", b"{", b"\x10\0\0\0\0\0\0\0{"),
)


def test_any_bytes_at_all_are_read_or_refused(watch: Watch) -> None:
    def use(data: bytes) -> None:
        feed_container(data, watch)
        feed_archive(data, watch)
        for helper in (NumpyHelper(MIB), SafetensorsHelper(), BinaryHelper()):
            watch.typed(partial(helper.load, io.BytesIO(data)))
        watch.typed(lambda: FileChunk.FromString(data))
        watch.typed(lambda: read_signature(data))

    anything = st.builds(
        lambda begin, rest, end: begin + rest + end,
        st.sampled_from(BEGINNINGS),
        st.binary(max_size=600),
        st.sampled_from((b"", b"PK\5\6" + bytes(18))),
    )
    inputs(1500, anything, use)
    assert {"fine", "InvalidInput"} <= watch.outcomes


@pytest.mark.parametrize("kind", ["containers", "NPZ", "safetensors", *ARCHIVES])
def test_the_files_are_good_before_they_are_changed(kind: str, watch: Watch) -> None:
    if kind == "containers":
        bare = [seed for seed in CONTAINERS if re.search("bare|nothing|no entries", seed.name)]
        for seed in seeds_of(CONTAINERS, content_seeds()):
            feed_container(seed.finish(seed.data), watch)
            with ModelContainer.from_file(watch.path) as container:
                assert container.legacy_source == (seed in bare)
    elif kind in ARCHIVES:
        for seed in ARCHIVES[kind]:
            feed_archive(seed.finish(seed.data), watch)
        assert watch.outcomes == {"fine"}
    else:
        helper = NumpyHelper() if kind == "NPZ" else SafetensorsHelper()
        for seed in npz_seeds() if kind == "NPZ" else tensor_seeds():
            feed_helper(helper, seed.finish(seed.data), watch)
        assert watch.outcomes == {"fine"}


def test_the_watch_sees_what_it_is_for(watch: Watch) -> None:
    """Other errors, files that are left, and descriptors that stay open fail a test."""

    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(KeyError):
        watch.typed(partial(fail, KeyError("?")))
    with pytest.raises(AssertionError):
        watch.typed(partial(fail, InvalidInput("one\nline")))
    left = Path(watch.out)
    with pytest.raises(AssertionError), watch.input(b""):
        left.touch()
    left.unlink()
    with contextlib.ExitStack() as held, pytest.raises(AssertionError), watch.input(b""):
        held.enter_context(open(watch.path, "rb"))
    with pytest.raises(TooSlow), watch.input(b""):
        signal.raise_signal(signal.SIGVTALRM)
    # Far more than the bound: what else this process had may go back to the system meanwhile.
    hog = bytearray(MOST_MEMORY * 3 // 2)
    hog[::4096] = b"x" * (len(hog) // 4096)
    with pytest.raises(AssertionError):
        watch.check_memory()
    del hog
    _forget_peak()


# -- what was found so --------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_record_without_content_is_no_end_of_a_stream(
    compress: Callable[[bytes], bytes], watch: Watch
) -> None:
    tar = next(seed.data for seed in ARCHIVES["tar"] if "PAX" in seed.name)
    empty = bytearray(tar[:512])
    empty[124:136] = bytes(12)
    empty[156:157] = b"x"
    feed_archive(compress(summed(bytes(empty)) + tar), watch)
    assert watch.outcomes == {"fine"}


def test_streams_of_xz_are_far_apart_or_filled_up_at_the_end(watch: Watch) -> None:
    tar = ARCHIVES["tar"][0].data
    far = bytes(3 * MIB)
    feed_archive(lzma.compress(tar[:700]) + far + lzma.compress(tar[700:]) + far, watch)
    assert watch.outcomes == {"fine"}


@pytest.mark.parametrize("mmap", [False, True])
def test_an_error_lets_go_of_the_file_without_the_collector(mmap: bool, watch: Watch) -> None:
    data = bytearray(CONTAINERS[0].data)
    data[data.index(b"\x93NUMPY") + 20] ^= 1
    gc.disable()
    try:
        with watch.input(bytes(data)):
            with ModelContainer.from_file(watch.path) as container:
                load = partial(container.get_training_model, SafetensorsHelper(), mmap=mmap)
                watch.typed(load)
                watch.typed(partial(container.sign, KEY))
            del load, container
    finally:
        gc.enable()
    assert watch.outcomes == {"IntegrityError"}
