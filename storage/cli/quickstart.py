"""``storage quickstart``: a small model goes through a store and back, before your eyes.

Everything is below one folder: the model, a directory that serves as the store, the cache,
and what was downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.cli.output import count, human_size, human_time
from storage.digest import Digest, hash_file, tree_digest
from storage.errors import DestinationError, IntegrityError, ModelMissingError, StorageError
from storage.files import translate_os_errors

if TYPE_CHECKING:
    from storage.client import StorageClient
    from storage.transfer.progress import Progress

__all__ = ["Quickstart", "quickstart"]

_NOTE = "QUICKSTART.txt"
_NOTE_TEXT = """\
Made by `storage quickstart`; delete this folder when you are done with it.

model/     a small model
store/     a directory that serves as the store
served/    what was downloaded from the store
cache/     what `storage` keeps of its downloads
"""
_ROWS, _COLUMNS = 2048, 4096


@dataclass(frozen=True, slots=True)
class Quickstart:
    """What happened and where things lie."""

    folder: str
    model: str
    uri: str
    path: str
    """Where the download was published."""

    cached_path: str
    digest: Digest
    """Of the tree, as ``storage.tree_digest`` defines it."""

    objects: int
    size: int
    """Bytes."""

    tampered_uri: str
    refusal: str
    """The message of the error that the tampered copy caused."""

    seconds: dict[str, float]
    """How long each step took."""

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "ok": True,
            "folder": self.folder,
            "model": self.model,
            "uri": self.uri,
            "path": self.path,
            "cached_path": self.cached_path,
            "digest": str(self.digest),
            "objects": self.objects,
            "size": self.size,
            "tampered": {"uri": self.tampered_uri, "published": False, "message": self.refusal},
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
        }

    def lines(self) -> list[str]:
        """Return it for people."""
        took = {name: human_time(value) for name, value in self.seconds.items()}
        amount = f"{count(self.objects, 'file')}, {human_size(self.size)}"
        return [
            f"Made a model ({amount}):",
            f"  {self.model}",
            f"  {self.digest}",
            f"Uploaded it to a store, which is a directory here, in {took['upload']}:",
            f"  {self.uri}",
            f"Downloaded it, verified it against the digest and published it in "
            f"{took['download']}:",
            f"  {self.path}",
            f"Downloaded it into the cache in {took['cache']}; again, with nothing to fetch, "
            f"in {took['cached']}:",
            f"  {self.cached_path}",
            "Changed one byte of a copy in the store; its download was refused and nothing "
            "was published:",
            f"  {self.refusal}",
            "Have a look:",
            f"  storage ls -l {shlex.quote(self.uri)}",
            f"Everything is in {self.folder}; delete it when you are done.",
        ]


def quickstart(folder: str | None = None) -> Quickstart:
    """Make a model, upload it, download it, verify it, and refuse a tampered copy.

    Args:
        folder: where everything goes: absent, empty, or of an earlier run; a new temporary
            folder if ``None``. It stays.

    Raises:
        DestinationError: the folder cannot be written, or holds something else.
        StorageError: something does not work as it should.
    """
    from storage.client import StorageClient
    from storage.config import Settings

    place = tempfile.gettempdir() if folder is None else os.path.abspath(folder)
    with translate_os_errors(place):
        root = _prepare(folder)
        model = os.path.join(root, "model")
        _make_model(model)
        digests = _hash_files(model)
    # Settings made here and not loaded: nothing may lead out of the folder.
    settings = Settings(cache_dir=Path(root, "cache"))
    with StorageClient(settings=settings) as client:
        return _Run(client, root, model, tree_digest(digests), digests).run()


class _Run:
    """The steps after the model is made."""

    def __init__(
        self,
        client: StorageClient,
        root: str,
        model: str,
        digest: Digest,
        files: dict[str, Digest],
    ) -> None:
        self._client = client
        self._root = root
        self._model = model
        self._digest = digest
        self._files = files
        self._seconds: dict[str, float] = {}
        store = os.path.join(root, "store", "models", "quickstart")
        self._uri = f"file://{store}/v1/"
        self._tampered = f"file://{store}/v1-tampered/"
        self._tampered_file = os.path.join(store, "v1-tampered", "weights.bin")

    def run(self) -> Quickstart:
        for uri in (self._uri, self._tampered):
            # What an earlier run left, should it have had other files.
            with contextlib.suppress(ModelMissingError):
                self._client.delete_object(uri, recursive=True)
        self._timed("upload", lambda: self._client.upload(self._model, self._uri))
        path = self._download()
        cached_path = self._download_twice()
        refusal = self._refuse_tampered()
        return Quickstart(
            folder=self._root,
            model=self._model,
            uri=self._uri,
            path=path,
            cached_path=cached_path,
            digest=self._digest,
            objects=len(self._files),
            size=sum(os.path.getsize(os.path.join(self._model, name)) for name in self._files),
            tampered_uri=self._tampered,
            refusal=refusal,
            seconds=self._seconds,
        )

    def _download(self) -> str:
        dest = os.path.join(self._root, "served", "quickstart")
        path: str = self._timed(
            "download",
            # The folder is of an earlier run, whoever has changed it since.
            lambda: self._client.download(self._uri, dest, digest=self._digest, overwrite=True),
        )
        with translate_os_errors(path):
            served = _hash_files(path)
        if served != self._files:
            raise IntegrityError(f"{path} is not what {self._model} is; please report this")
        return path

    def _download_twice(self) -> str:
        last: Progress | None = None

        def note(progress: Progress) -> None:
            nonlocal last
            last = progress

        def download() -> str:
            # All of a local tree would be used where it lies; a selection of it is cached.
            return self._client.download(
                self._uri, allow_patterns="*", digest=self._digest, progress=note
            )

        first = self._timed("cache", download)
        path: str = self._timed("cached", download)
        assert last is not None
        moved = last.bytes_done - last.bytes_present
        if path != first or moved:
            raise StorageError(
                f"{self._uri}: expected the second download to come from the cache, but {moved} "
                f"bytes were fetched to {path}; please report this"
            )
        return path

    def _refuse_tampered(self) -> str:
        self._client.copy_object(self._uri, self._tampered)
        with translate_os_errors(self._tampered_file), open(self._tampered_file, "r+b") as file:
            file.seek(_ROWS * _COLUMNS // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        dest = os.path.join(self._root, "served", "tampered")
        try:
            self._client.download(self._tampered, dest, digest=self._digest)
        except IntegrityError as exc:
            if os.path.lexists(dest):
                raise StorageError(
                    f"{dest}: a tampered model was published; please report this"
                ) from exc
            return str(exc)
        raise StorageError(f"{self._tampered} is tampered and was accepted; please report this")

    def _timed(self, name: str, step: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = step()
        self._seconds[name] = time.perf_counter() - began
        return result


def _prepare(folder: str | None) -> str:
    """Return the folder to work in, which then bears our note; never somebody else's."""
    if folder is None:
        root = tempfile.mkdtemp(prefix="storage-quickstart-")
    else:
        root = os.path.abspath(folder)
        os.makedirs(root, exist_ok=True)
    note = os.path.join(root, _NOTE)
    if os.listdir(root):
        if not os.path.isfile(note):
            raise DestinationError(
                f"{root} holds other files; expected an absent or empty folder, or one of an "
                "earlier quickstart; name another one"
            )
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(os.path.join(root, "cache"))
    with open(note, "w", encoding="utf-8") as file:
        file.write(_NOTE_TEXT)
    return root


def _make_model(folder: str) -> None:
    """Write a linear layer with quantised weights, the same on every machine."""
    tokens = [f"token{index}" for index in range(_ROWS)]
    pairs = zip(tokens[::2], tokens[1::2], strict=True)
    config = {
        "model_type": "linear",
        "dtype": "int8",
        "shape": [_ROWS, _COLUMNS],
        "weights": "weights.bin",
    }
    files = {
        "config.json": json.dumps(config, indent=2).encode() + b"\n",
        "weights.bin": random.Random(0).randbytes(_ROWS * _COLUMNS),
        "vocab.txt": "".join(f"{token}\n" for token in tokens).encode(),
        "tokenizer/merges.txt": "".join(f"{left} {right}\n" for left, right in pairs).encode(),
    }
    os.makedirs(os.path.join(folder, "tokenizer"), exist_ok=True)
    for name, data in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)


def _hash_files(folder: str) -> dict[str, Digest]:
    digests = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            digests[os.path.relpath(path, folder)] = hash_file(path, ("sha256",))["sha256"]
    return digests
