"""The model container: one file with the weights of a model and what is to be known of it.

The format is that of ``ScaleoutModel`` in ``scaleoututil`` (https://pypi.org/project/scaleoututil/),
see :mod:`storage.container.metadata`; each side reads the files of the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from storage.container.entries import open_entry
from storage.container.filechunks import CHUNK_SIZE, FileChunk, to_filechunks
from storage.container.held import Held
from storage.container.loading import Contents, is_container
from storage.container.metadata import FILES, INFERENCE_MODEL, TRAINING_MODEL, helper_name
from storage.container.stored import publish
from storage.container.weights.helpers import NumpyHelper, get_helper
from storage.digest import hash_file
from storage.errors import InvalidInput, ModelMissingError, one_line
from storage.files import shown

if TYPE_CHECKING:
    from storage import StorageClient, StorageConfig
    from storage.container.builder import ModelContainerBuilder
    from storage.container.entries import Entry
    from storage.container.source import Source
    from storage.container.weights.helpers import Helper

__all__ = ["ModelContainer"]


class ModelContainer(Held):
    """A model in one file that describes itself, and never changes.

    It holds the training model (the weights, as a helper wrote them), where it is wanted an
    inference model (an ONNX file, say) and other files, and metadata::

        with ModelContainer.from_file("model.zip") as container:
            print(container.model_id, container.metadata)
            weights = container.get_training_model()

    A changed copy is made by :meth:`to_builder`::

        tagged = container.to_builder().set_metadata("tag", "v2").build()

    A container keeps open what its bytes are in: the file it was opened from, an object in a
    store, or a temporary file without a name, which is gone when the container is closed,
    forgotten, or its process killed. Threads may share one, and a forked child may go on with
    it. It cannot be pickled or copied: send the file.
    """

    def __init__(self) -> None:
        """Refuse: a container comes from one of the methods below, or from a builder."""
        raise TypeError(
            "a ModelContainer is not made by calling its class; use from_training_model, "
            "from_file, from_stream, from_filechunk_stream, open, or a ModelContainerBuilder"
        )

    # Set by _create().
    _contents: Contents
    _helper: Helper | None
    _legacy_source: bool
    _checksum: str | None

    @classmethod
    def _create(
        cls,
        source: Source,
        contents: Contents,
        *,
        helper: Helper | None,
        legacy_source: bool,
    ) -> Self:
        """Make a container that owns ``source``; for the builder alone."""
        self = object.__new__(cls)
        self._hold(source)
        self._contents = contents
        self._helper = helper
        self._legacy_source = legacy_source
        self._checksum = None
        return self

    # Where containers come from.

    @staticmethod
    def from_training_model(
        model_params: Any, helper: Helper | None = None, metadata: dict[str, Any] | None = None
    ) -> ModelContainer:
        """Make a container of the parameters of a model, with a fresh ``model_id``.

        Args:
            model_params: what the helper's ``save()`` takes; for numpy a list of arrays.
            helper: writes them; :class:`NumpyHelper` if there is none.
            metadata: what else is to be known. A ``model_id`` in it is ignored.

        Raises:
            InvalidInput: the metadata cannot be kept as JSON, or there is nothing to hold.
        """
        with _builder_class().from_training_model(model_params, helper) as builder:
            return builder.set_metadata_dict(metadata or {}).build()

    @staticmethod
    def from_file(file_path: str | os.PathLike[str]) -> ModelContainer:
        """Open a file that holds a container, or is the bare training model.

        A container's file is not copied but kept open, so it may be moved or deleted. If
        somebody writes into it, reading fails with an ``IntegrityError``. What is no container
        (an NPZ file, or any other bytes) is copied into one as its training model, see
        :attr:`legacy_source`.

        Raises:
            InvalidInput: it is a container, but damaged, cut short, or of a newer format.
            ModelMissingError: there is no such file.
        """
        with _builder_class().from_file(file_path) as builder:
            return builder.build()

    @staticmethod
    def from_stream(stream: BinaryIO) -> ModelContainer:
        """Read a container, or a bare training model, from a binary stream.

        Args:
            stream: is read from its beginning if it can be sought, else from where it stands,
                to its end, into a temporary file. It is not closed.

        Raises:
            InvalidInput: as :meth:`from_file`.
        """
        with _builder_class().from_stream(stream) as builder:
            return builder.build()

    @staticmethod
    def from_filechunk_stream(filechunk_stream: Iterable[Any]) -> ModelContainer:
        """Read a container, or a bare training model, from ``FileChunk`` messages.

        Args:
            filechunk_stream: messages with bytes in ``data``: :class:`FileChunk`, or those of
                the class that gRPC generates.

        Raises:
            InvalidInput: as :meth:`from_file`, or something is no such message.
        """
        with _builder_class().from_filechunk_stream(filechunk_stream) as builder:
            return builder.build()

    @staticmethod
    def open(
        uri: str | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        client: StorageClient | None = None,
        cache: bool = False,
    ) -> ModelContainer:
        """Open a container where it is, on any store.

        Its directory and metadata are read by a few ranged requests, and an entry when it is
        asked for; nothing else is fetched. Each request is pinned to the version that was there
        at first. What is no container, or is in a store without ranges, is fetched whole.

        Args:
            uri: of one object, or a path of this machine (then it is :meth:`from_file`).
            config: credentials and options of the store.
            client: opens it; by default that of :class:`storage.Storage`.
            cache: download it through the cache, verified, because it is to stay; it is read
                from there.

        Raises:
            ModelMissingError: nothing is there.
            InvalidInput: it is a tree, or no whole container.
            StorageError: as any download.
        """
        with _builder_class().open(uri, config=config, client=client, cache=cache) as builder:
            return builder.build()

    def to_builder(self) -> ModelContainerBuilder:
        """Return a builder that begins with what this container holds.

        It shares the bytes and not the life of this container: either may be closed first, and
        nothing is copied.
        """
        return _builder_class()._of(
            self._duplicate(), self._contents, legacy_source=self._legacy_source
        )

    @staticmethod
    def detect_format(stream: BinaryIO) -> str:
        """Return ``"zip"`` if a stream holds a container, else ``"legacy"``.

        Args:
            stream: can be sought, and stands at its beginning afterwards. A container's first
                two bytes are ``PK``; an NPZ file's are too, but it has no ``metadata.json``.
        """
        stream.seek(0)
        try:
            found = stream.read(2) == b"PK" and is_container(stream)
        finally:
            stream.seek(0)
        return "zip" if found else "legacy"

    @staticmethod
    def detect_format_file(file_path: str | os.PathLike[str]) -> str:
        """Return ``"zip"`` if a file holds a container, else (or without a file) ``"legacy"``.

        Bytes before the archive are allowed, as ``zipfile`` allows them.
        """
        try:
            with open(file_path, "rb") as file:
                found = is_container(file)
        except (OSError, ValueError):  # no such file, or no path
            found = False
        return "zip" if found else "legacy"

    # What it holds.

    def __repr__(self) -> str:
        model_id, helper = (
            one_line(self._contents.metadata.get(key, "?")) for key in ("model_id", "helper_type")
        )
        return f"<ModelContainer model_id={model_id} helper={helper}>"

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata, without the format's version: a copy that may be changed."""
        copy: dict[str, Any] = json.loads(json.dumps(self._contents.metadata))
        return copy

    @property
    def model_id(self) -> str | None:
        """What identifies the model: a UUID, or what was set; ``None`` if nothing does."""
        model_id: str | None = self._contents.metadata.get("model_id")
        return model_id

    @property
    def format_version(self) -> int:
        """Version of the format that it was written in."""
        return self._contents.format_version

    @property
    def legacy_source(self) -> bool:
        """Whether it was made of a bare training model, as there were before containers."""
        return self._legacy_source

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The entries of the ZIP archive by name, in the order of its directory."""
        return MappingProxyType(self._contents.entries)

    @property
    def size(self) -> int:
        """Bytes of the whole container."""
        with self._lock:
            return self._opened().size

    @property
    def has_training_model(self) -> bool:
        """Whether there are weights in it."""
        return TRAINING_MODEL in self._contents.entries

    @property
    def has_inference_model(self) -> bool:
        """Whether there is a second form of the model in it, ready to be used."""
        return INFERENCE_MODEL in self._contents.entries

    def get_inference_model_format(self) -> str | None:
        """Return the format of the inference model (``"onnx"``, ``"pt"``), if it is known."""
        found: str | None = self._contents.metadata.get("inference_model_format")
        return found

    def list_files(self) -> list[str]:
        """Return the names of the attached files."""
        return [
            name.removeprefix(FILES)
            for name in self._contents.entries
            if name.startswith(FILES) and name != FILES
        ]

    def has_file(self, name: str) -> bool:
        """Tell whether a file of that name is attached."""
        return FILES + name in self._contents.entries

    # Reading.

    def get_training_model(self, helper: Helper | None = None, *, mmap: bool = False) -> Any:
        """Return the parameters of the model.

        Args:
            helper: reads them, now and when none is given later. By default the one that wrote
                them, as far as the metadata tell, else :class:`NumpyHelper`.
            mmap: map the weights, if they are stored uncompressed in a local file, instead of
                reading them. It takes no time and no memory before they are used; changes stay
                in this process; what they refer to may outlive the container. Checksums are
                not looked at, and the file must not be cut short meanwhile.

        Raises:
            ModelMissingError: there is no training model.
            UnsupportedOperation: the metadata name a helper that is not installed.
            InvalidInput: the helper cannot read it.
            IntegrityError: the bytes do not have their checksum.
        """
        if helper is not None:
            self._helper = helper
        chosen = self._find_helper()
        with self._entry_stream(TRAINING_MODEL, mmap=mmap) as stream:
            if chosen is not None:
                return chosen.load(stream)
            try:
                return NumpyHelper().load(stream)
            except InvalidInput as exc:
                raise InvalidInput(
                    f"nothing tells which helper wrote the training model of {self!r}, and it is "
                    f"not numpy's ({one_line(exc)}); give the helper"
                ) from exc

    def get_model_params(self, helper: Helper | None = None) -> Any:
        """Return :meth:`get_training_model`, of which it is the old name."""
        warnings.warn(
            "get_model_params is deprecated, use get_training_model",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.get_training_model(helper)

    @contextlib.contextmanager
    def get_training_model_stream(self) -> Iterator[BinaryIO]:
        """Open the training model for reading, as a context manager; nothing is unpacked.

        Raises:
            ModelMissingError: there is none.
            IntegrityError: on reading, if the bytes do not have their checksum.
        """
        with self._entry_stream(TRAINING_MODEL) as stream:
            yield stream

    @contextlib.contextmanager
    def get_inference_model_stream(self) -> Iterator[BinaryIO]:
        """Open the inference model for reading; as :meth:`get_training_model_stream`."""
        with self._entry_stream(INFERENCE_MODEL) as stream:
            yield stream

    @contextlib.contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """Open an attached file for reading; as :meth:`get_training_model_stream`."""
        with self._entry_stream(FILES + name) as stream:
            yield stream

    def get_file(self, name: str) -> bytes:
        """Return the bytes of an attached file; as :meth:`get_training_model_stream`."""
        with self.open_file(name) as stream:
            return stream.read()

    def get_file_stream(self) -> BinaryIO:
        """Open the whole container for reading: each time another stream, to be closed."""
        with contextlib.closing(self._duplicate()) as source:
            return source.stream(0, source.size)

    def get_filechunk_stream(
        self, chunk_size: int = CHUNK_SIZE, message: Any = FileChunk
    ) -> Iterator[Any]:
        """Yield the whole container as messages.

        Args:
            chunk_size: bytes in a message; gRPC refuses messages of more than 4 MiB by default.
            message: makes one, called with ``data=``: :class:`FileChunk`, whose
                ``SerializeToString()`` gives the bytes for the wire, or the class that gRPC
                generates.

        Raises:
            InvalidInput: ``chunk_size`` is not positive.
        """
        with self.get_file_stream() as stream:
            yield from to_filechunks(stream, chunk_size, message)

    def save_to_file(self, file_path: str | os.PathLike[str]) -> None:
        """Write the container to a file, which appears whole or not at all.

        The container reads from that file afterwards; what it was in before is let go. The file
        that it is read from already is left alone.

        Args:
            file_path: in a folder that exists; a file there is replaced.

        Raises:
            DestinationError: it cannot be written (``InsufficientSpaceError``: no room).
            IntegrityError: the file that the container was opened from was written to.
        """
        try:
            path = os.path.realpath(file_path)
        except ValueError as exc:
            raise InvalidInput(f"{shown(file_path)} is no path: {exc}") from exc
        with contextlib.closing(self._duplicate()) as source:
            saved = publish(source, path)
        if saved is not None:
            self._replace(saved)

    # Whether it is the right one.

    @property
    def checksum(self) -> str:
        """The SHA-256 of the whole container, in hex; computed once."""
        if self._checksum is None:
            with self.get_file_stream() as stream:
                self._checksum = hash_file(stream, ["sha256"])["sha256"].hex
        return self._checksum

    def verify_checksum(self, checksum: str | None) -> bool:
        """Tell whether :attr:`checksum` is the expected one; none expected is fine."""
        return checksum is None or self.checksum == checksum

    def sign(self, private_key: Any, signer_id: str | None = None) -> dict[str, Any]:
        """Return a signature of the container, which is not kept in it.

        What is signed are the names and contents of all entries, the same bytes as
        ``scaleoututil`` signs: each side verifies the signatures of the other.

        Args:
            private_key: an ``Ed25519PrivateKey`` of the package ``cryptography``, or the path
                or the bytes of a PEM file of one.
            signer_id: who signs, if it is to be noted.

        Returns:
            ``model_id``, ``algorithm`` (``"ed25519"``), ``signature`` (Base64) and, if there is
            one, ``signer_id``.

        Raises:
            InvalidInput: it is no such key, or there are entries that the format does not know.
        """
        from storage.container.signatures.signing import sign_hash

        return {"model_id": self.model_id, **sign_hash(self._hash(), private_key, signer_id)}

    def verify_signature(self, public_key: Any, signature: str | Mapping[str, Any]) -> bool:
        """Tell whether a signature is of this container and by this key.

        Args:
            public_key: an ``Ed25519PublicKey``, or the path or the bytes of a PEM file of one.
            signature: the Base64 text, or all that :meth:`sign` returned. One that is malformed
                is not valid.

        Raises:
            InvalidInput: it is no such key, or there are entries that the format does not know.
        """
        from storage.container.signatures.signing import verify_hash

        return verify_hash(self._hash(), public_key, signature)

    # Its end.

    def close(self) -> None:
        """Let go of the file, or of the connections to the store; a second time is fine.

        Metadata can still be read, streams that are open may be read to their end, and mapped
        weights stay.
        """
        super().close()

    # Inside.

    def _entry_stream(self, name: str, *, mmap: bool = False) -> BinaryIO:
        # Not under the lock, for it may take a request.
        with contextlib.closing(self._duplicate()) as source:
            if (entry := self._contents.entries.get(name)) is None:
                raise ModelMissingError(
                    source.name,
                    f"{source.name} holds no {name}; it holds {', '.join(self._contents.entries)}",
                )
            return open_entry(source, entry, mmap=mmap)

    def _find_helper(self) -> Helper | None:
        if self._helper is not None:
            return self._helper
        name = helper_name(self._contents.metadata)
        return None if name is None else get_helper(name)

    def _hash(self) -> bytes:
        from storage.container.signatures.signing import check_names, entries_hash

        with contextlib.closing(self._duplicate()) as source:
            check_names(source.name, self._contents.entries)
            return entries_hash(source, self._contents.entries)


def _builder_class() -> type[ModelContainerBuilder]:
    # It makes containers, so it knows this module.
    from storage.container.builder import ModelContainerBuilder

    return ModelContainerBuilder
