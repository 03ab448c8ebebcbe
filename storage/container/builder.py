"""Makes model containers: of parameters, or of another container and what is to change."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from storage.container.entries import read_directory
from storage.container.filechunks import filechunk_data
from storage.container.loading import TEMPORARY, Contents, blocks_of, read_contents, spool
from storage.container.metadata import (
    FILES,
    FORMAT_VERSION,
    HELPER_KEYS,
    INFERENCE_MODEL,
    METADATA,
    TRAINING_MODEL,
    encode_metadata,
    helper_label,
    helper_name,
)
from storage.container.model import ModelContainer
from storage.container.stored import LocalSource, discard, unnamed_file
from storage.container.weights.helpers import NumpyHelper, get_helper
from storage.container.zipped import ZipWriter
from storage.errors import InvalidInput
from storage.files import translate_os_errors

if TYPE_CHECKING:
    from storage import StorageClient, StorageConfig
    from storage.container.source import Source
    from storage.container.weights.helpers import Helper

__all__ = ["ModelContainerBuilder"]

_MODEL_ID = "model_id"


class ModelContainerBuilder:
    """Makes a :class:`ModelContainer`, step by step; every step returns the builder.

    ::

        container = (
            ModelContainerBuilder.from_training_model(weights)
            .set_metadata("session", "s1")
            .set_inference_model(onnx, "onnx")
            .build()
        )
        tagged = container.to_builder().set_metadata("tag", "v2").build()

    The ``model_id`` of what is built:

    - of parameters (:meth:`from_training_model`) a fresh UUID, whatever was set;
    - of what was loaded (:meth:`from_file` and the others, ``to_builder()``) the one it had, if
      nothing changes; the one given by :meth:`set_model_id`; else a fresh one, as it is another
      model. A ``model_id`` that is set as metadata counts as a change and is not used, but for
      one that follows :meth:`set_model_id`.

    A builder may build more than once. What it holds open it lets go when it is closed or
    forgotten; the containers that it built do not depend on it. It is for one thread.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._create_new = False
        # What was loaded: a container, or the bytes of a bare training model.
        self._source: Source | None = None
        self._contents = Contents({}, {}, FORMAT_VERSION)
        self._bare: Source | None = None
        self._legacy_source = False
        # What is to be different.
        self._helper: Helper | None = None
        self._helper_type: str | None = None
        self._training_model: Any = None
        self._metadata: dict[str, Any] = {}
        self._has_model_id = False
        self._parts: dict[str, bytes | Source] = {}
        self._inference_format: str | None = None

        self._held = contextlib.ExitStack()
        self._release = weakref.finalize(self, self._held.close)

    # Where builders come from.

    @classmethod
    def from_training_model(cls, model_params: Any, helper: Helper | None = None) -> Self:
        """Begin with the parameters of a model; see :meth:`ModelContainer.from_training_model`.

        They are written by :meth:`build`, each time.
        """
        builder = cls()
        builder._create_new = True
        return builder.set_training_model(model_params, helper)

    @classmethod
    def from_file(cls, file_path: str | os.PathLike[str]) -> Self:
        """Begin with what a file holds; see :meth:`ModelContainer.from_file`."""
        return cls._load(LocalSource.open(file_path))

    @classmethod
    def from_stream(cls, stream: BinaryIO) -> Self:
        """Begin with what a stream holds; see :meth:`ModelContainer.from_stream`.

        All of it is read now.
        """
        with contextlib.suppress(AttributeError, OSError):
            stream.seek(0)
        return cls._load(spool(blocks_of(stream), "the stream"), strict=True)

    @classmethod
    def from_filechunk_stream(cls, filechunk_stream: Iterable[Any]) -> Self:
        """Begin with messages; see :meth:`ModelContainer.from_filechunk_stream`.

        All of them are read now.
        """
        source = spool(filechunk_data(filechunk_stream), "the stream of FileChunks")
        return cls._load(source, strict=True)

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        config: StorageConfig | dict[str, Any] | None = None,
        client: StorageClient | None = None,
        cache: bool = False,
    ) -> Self:
        """Begin with a container in a store; see :meth:`ModelContainer.open`.

        What the new container takes over of it is fetched by :meth:`build`.
        """
        from storage.container.remote import open_source

        return cls._load(open_source(uri, config=config, client=client, cache=cache))

    @classmethod
    def _load(cls, source: Source, *, strict: bool = False) -> Self:
        builder = cls()
        builder._held.callback(source.close)
        try:
            contents = read_contents(source, strict=strict)
        except BaseException:
            builder.close()
            raise
        if contents is None:
            builder._bare = source
            builder._legacy_source = True
        else:
            builder._source = source
            builder._contents = contents
        return builder

    @classmethod
    def _of(cls, source: Source, contents: Contents, *, legacy_source: bool) -> Self:
        """Begin with a container that is open; own ``source``. For ``to_builder()`` alone."""
        builder = cls()
        builder._held.callback(source.close)
        builder._source = source
        builder._contents = contents
        builder._legacy_source = legacy_source
        return builder

    # What is to be different.

    def set_metadata(self, key: str, value: Any) -> Self:
        """Set one key of the metadata; :meth:`build` checks that JSON can hold it."""
        self._metadata[key] = value
        return self

    def set_metadata_dict(self, metadata: Mapping[str, Any]) -> Self:
        """Set some keys of the metadata; the others stay."""
        self._metadata.update(metadata)
        return self

    def set_model_id(self, model_id: str) -> Self:
        """Say what identifies the model; see the class for when it counts."""
        self._metadata[_MODEL_ID] = model_id
        self._has_model_id = True
        return self

    def set_helper(self, helper: Helper | None) -> Self:
        """Say what writes and reads the training model, instead of a name given before."""
        self._helper = helper
        self._helper_type = None
        return self

    def set_helper_type(self, helper_type: str) -> Self:
        """Say it by name, which :func:`get_helper` has to know when :meth:`build` is called."""
        self._helper_type = helper_type
        self._helper = None
        return self

    def set_training_model(self, model_params: Any, helper: Helper | None = None) -> Self:
        """Replace the training model.

        Args:
            model_params: what the helper's ``save()`` takes; ``None`` takes back what was set.
            helper: writes them. By default the one that was set, else the one that wrote what
                is replaced, else :class:`NumpyHelper`.
        """
        if helper is not None:
            self.set_helper(helper)
        self._training_model = model_params
        self._bare = None
        return self

    def set_inference_model(self, data: bytes, fmt: str) -> Self:
        """Set the inference model.

        Args:
            data: its bytes.
            fmt: its format, such as ``"onnx"`` or ``"pt"``.
        """
        return self._set_inference(_as_bytes(data), fmt)

    def set_inference_model_stream(self, stream: BinaryIO, fmt: str) -> Self:
        """Set the inference model to the rest of a stream, which is read now and not closed."""
        return self._set_inference(self._keep(stream), fmt)

    def set_file(self, name: str, data: bytes) -> Self:
        """Attach a file.

        Args:
            name: without a path.
            data: its bytes.

        Raises:
            InvalidInput: ``name`` is no plain name.
        """
        self._parts[_file_entry(name)] = _as_bytes(data)
        return self

    def set_file_stream(self, name: str, stream: BinaryIO) -> Self:
        """Attach the rest of a stream as a file; it is read now and not closed."""
        self._parts[_file_entry(name)] = self._keep(stream)
        return self

    def _set_inference(self, part: bytes | Source, fmt: str) -> Self:
        self._parts[INFERENCE_MODEL] = part
        self._inference_format = fmt
        return self

    def _keep(self, stream: BinaryIO) -> Source:
        source = spool(blocks_of(stream), "the stream")
        self._held.callback(source.close)
        return source

    # The end.

    def build(self, dir: str | os.PathLike[str] | None = None) -> ModelContainer:
        """Make the container.

        If nothing changes it shares the bytes that were loaded. Else it is written to a
        temporary file without a name; entries that stay as they are keep their compressed
        bytes, without being unpacked.

        Args:
            dir: folder for that file, by default that for temporary files. On the file system
                where the container is to be saved, saving copies nothing.

        Raises:
            InvalidInput: there is nothing to hold; or metadata cannot be written as JSON.
            UnsupportedOperation: a helper is needed and not installed.
            DestinationError: the file cannot be written (``InsufficientSpaceError``: no room).
            Exception: what the helper's ``save()`` raises.
        """
        self._demand_open()
        helper = self._find_helper()
        metadata = self._merge_metadata(helper)
        if not self._is_changed():
            if self._source is None:
                raise InvalidInput(
                    "there is nothing to build a container of; set a training model, an "
                    "inference model, a file or metadata"
                )
            source, contents = self._source.duplicate(), self._contents
            contents = replace(contents, metadata=metadata)
        else:
            data, metadata = encode_metadata(metadata)
            source = self._write(data, helper, dir)
            contents = Contents(read_directory(source), metadata, FORMAT_VERSION)
        return ModelContainer._create(
            source, contents, helper=helper, legacy_source=self._legacy_source
        )

    def close(self) -> None:
        """Let go of what is held open; a second time is fine. What was built stays."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside.

    def _demand_open(self) -> None:
        if not self._release.alive:
            raise InvalidInput("this ModelContainerBuilder is closed; begin with another one")

    def _find_helper(self) -> Helper | None:
        """Return the helper that was set, or has to write; else the metadata tell who reads."""
        if self._helper is not None:
            return self._helper
        if self._helper_type:
            return get_helper(self._helper_type)
        if self._training_model is None:
            return None
        name = helper_name(self._contents.metadata)
        return NumpyHelper() if name is None else get_helper(name)

    def _merge_metadata(self, helper: Helper | None) -> dict[str, Any]:
        metadata = dict(self._contents.metadata)
        if self._training_model is not None:
            # They are of what is replaced.
            for key in HELPER_KEYS:
                metadata.pop(key, None)
        metadata.update((key, value) for key, value in self._metadata.items() if key != _MODEL_ID)
        if helper is not None and not any(key in metadata for key in HELPER_KEYS):
            key, name = helper_label(helper)
            metadata[key] = name
        if INFERENCE_MODEL in self._parts:
            metadata["inference_model_format"] = self._inference_format
        if self._is_changed():
            if self._has_model_id and not self._create_new:
                metadata[_MODEL_ID] = self._metadata[_MODEL_ID]
            else:
                metadata[_MODEL_ID] = str(uuid.uuid4())
        return metadata

    def _is_changed(self) -> bool:
        return (
            self._training_model is not None
            or self._bare is not None
            or bool(self._parts)
            or bool(self._metadata)
        )

    def _write(
        self, metadata: bytes, helper: Helper | None, folder: str | os.PathLike[str] | None
    ) -> LocalSource:
        where = TEMPORARY if folder is None else os.fspath(folder)
        with contextlib.ExitStack() as undo:
            with translate_os_errors(where):
                file = unnamed_file(folder)
                undo.callback(discard, file)
                writer = ZipWriter(file)
                writer.write(METADATA, metadata)
            if self._training_model is not None:
                assert helper is not None
                with _translate_no_space(where):
                    self._write_parameters(writer, helper, folder)
            with translate_os_errors(where):
                self._write_others(writer)
                writer.close()
                source = LocalSource.adopt(file, "the container")
            undo.pop_all()
            return source

    def _write_parameters(
        self, writer: ZipWriter, helper: Helper, folder: str | os.PathLike[str] | None
    ) -> None:
        if getattr(helper, "streams", False):
            with writer.entry(TRAINING_MODEL) as window:
                helper.save(self._training_model, window)
            return
        # Others may want more of a file than writing, such as a descriptor.
        with contextlib.ExitStack() as held:
            file = unnamed_file(folder)
            held.callback(discard, file)
            helper.save(self._training_model, file)
            written = LocalSource.adopt(file, "what the helper wrote")
            held.callback(written.close)
            writer.add(TRAINING_MODEL, written)

    def _write_others(self, writer: ZipWriter) -> None:
        replaced = self._training_model is not None or self._bare is not None
        if self._bare is not None:
            writer.add(TRAINING_MODEL, self._bare)
        kept = self._contents.entries
        for name in dict.fromkeys([TRAINING_MODEL, INFERENCE_MODEL, *kept, *self._parts]):
            if name == METADATA or (name == TRAINING_MODEL and replaced):
                continue
            part = self._parts.get(name)
            if isinstance(part, bytes):
                writer.write(name, part)
            elif part is not None:
                writer.add(name, part)
            elif name in kept:
                assert self._source is not None
                writer.copy(self._source, kept[name])


@contextlib.contextmanager
def _translate_no_space(where: str) -> Iterator[None]:
    # Any other error of the system may be the helper's own, which is the caller's.
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            with translate_os_errors(where):
                raise
        raise


def _as_bytes(data: bytes) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(f"data must be bytes, not {type(data).__name__}")
    return data


def _file_entry(name: str) -> str:
    if not name or "/" in name or "\\" in name or ".." in name or "\0" in name:
        raise InvalidInput(f"{name!r} cannot be attached: a name without a path is needed")
    return FILES + name
