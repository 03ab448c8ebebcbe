"""Models by their ids: from any store, through the cache; and back."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from storage.container.filechunks import CHUNK_SIZE, FileChunk, filechunk_data, to_filechunks
from storage.errors import IntegrityError, InvalidInput, ModelMissingError
from storage.files import shown, translate_os_errors
from storage.integrations.scaleout import layout
from storage.integrations.scratch import scratch

if TYPE_CHECKING:
    from storage.client.client import StorageClient
    from storage.client.offline import Offline
    from storage.config.freshness import Freshness
    from storage.uri import Location

__all__ = ["ModelStore"]

_ID = "{model_id}"
_NAME = "model"


class ModelStore:
    """The models of a fleet. Safe for many threads.

    A model never changes: whatever is changed gets another id. So what is in the cache is taken
    from there, and no store is asked, unless ``freshness`` says otherwise.
    """

    def __init__(
        self,
        client: StorageClient,
        root: Location,
        config: Any = None,
        *,
        others: str | Sequence[str] = (),
        freshness: Freshness = "cache-first",
        offline: Offline = None,
        folder: str | None = None,
    ) -> None:
        """Prepare; nothing is asked of a store.

        Args:
            client: moves the bytes, and has the cache.
            root: the fleet; its own models are below ``models/``, and updates go there.
            config: for its store.
            others: URIs with ``{model_id}`` in them, of any stores, where a model is looked for
                if the fleet does not have it; what is there may also be bare weights.
            freshness: of what is in the cache.
            offline: as for a download; by default the cache serves whenever a store cannot be
                reached, and alone if the settings say so.
            folder: where models on their way are; by default the one for temporary files.

        Raises:
            InvalidInput: one of ``others`` has no ``{model_id}``.
        """
        self._client = client
        self._root = root
        self._config = config
        self._others = (others,) if isinstance(others, str) else tuple(others)
        for uri in self._others:
            if _ID not in uri:
                raise InvalidInput(
                    f"the URI of models has no {_ID} in it; write it where the id is"
                )
        self._freshness = freshness
        self._offline = offline
        self._folder = folder

    def uri(self, model_id: str) -> str:
        """Return the URI of a model of the fleet.

        Raises:
            InvalidInput: that cannot be the id of one.
        """
        return str(self._root.child(layout.model_key(model_id)))

    @contextlib.contextmanager
    def open(self, model_id: str) -> Iterator[BinaryIO]:
        """Open a model for reading, whole and verified; nothing of it stays but in the cache.

        Raises:
            ModelMissingError: no store has it.
            UnreachableError: a store cannot be reached, and the cache does not have it.
            StorageError: as any download.
        """
        own = self.uri(model_id)
        with self._scratch() as folder:
            path = os.path.join(folder, _NAME)
            try:
                self._download(own, path, self._config)
            except ModelMissingError:
                if not self._others:
                    raise
                self._download_other(model_id, path)
            with translate_os_errors(path), open(path, "rb") as file:
                # As long as it is open it is there, whoever is killed.
                os.unlink(path)
                yield file

    def _download_other(self, model_id: str, path: str) -> None:
        for number, template in enumerate(self._others, start=1):
            try:
                self._download(template.replace(_ID, model_id), path, None)
            except ModelMissingError:
                if number == len(self._others):
                    raise
            else:
                return

    def _download(self, uri: str, path: str, config: Any) -> None:
        offline = self._offline
        if offline is None and self._client.settings.offline is False:
            offline = "auto"
        self._client.download(
            uri,
            path,
            config=config,
            cache=True,
            link="hardlink",
            freshness=self._freshness,
            offline=offline,
            durable=False,
        )

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[str]:
        folder = self._folder or tempfile.gettempdir()
        with translate_os_errors(folder):
            os.makedirs(folder, exist_ok=True)
        with scratch(folder) as own:
            yield own

    def load(self, model_id: str, kind: Any) -> Any:
        """Return a model as an object of its own, which does not need this library any more.

        Args:
            model_id: of the model.
            kind: the class ``ScaleoutModel``.

        Raises:
            IntegrityError: what is there says that it is another model.
            StorageError: as :meth:`open`.
        """
        with self.open(model_id) as file:
            model = kind.from_stream(file)
        if model.legacy_source:
            # Bare weights do not say which model they are.
            return model.to_builder().set_model_id(model_id).build()
        if model.model_id != model_id:
            found = model.model_id
            model.close()
            raise IntegrityError(
                f"the model {model_id} says that it is {found!r}; it was stored under a wrong name"
            )
        return model

    def chunks(
        self, model_id: str, message: Any = FileChunk, chunk_size: int = CHUNK_SIZE
    ) -> Iterator[Any]:
        """Yield a model as messages, as the gRPC service of a combiner would.

        Args:
            model_id: of the model.
            message: :class:`storage.container.FileChunk`, or the class that gRPC generates.
            chunk_size: bytes in a message.

        Raises:
            StorageError: as :meth:`open`.
        """
        with self.open(model_id) as file:
            yield from to_filechunks(file, chunk_size, message)

    def accept(self, model_id: str, chunks: Iterable[Any]) -> str:
        """Store a model that comes as messages, as the service of a combiner would.

        Args:
            model_id: of the model.
            chunks: messages with bytes in ``data``.

        Returns:
            Its URI.

        Raises:
            InvalidInput: something is no such message, or it cannot be the id of a model.
            StorageError: as any upload.
        """
        with self._scratch() as folder:
            path = os.path.join(folder, _NAME)
            with translate_os_errors(path), open(path, "xb") as file:
                for data in filechunk_data(chunks):
                    file.write(data)
            return self.upload(path, model_id)

    def publish(self, path: str | os.PathLike[str], model_id: str | None = None) -> str:
        """Store a model that somebody has as a file, so that tasks may name it.

        Args:
            path: of a container, or of bare weights.
            model_id: what it is to be called; by default what the container says. A container
                that says something else is stored as a copy that says this.

        Returns:
            Its id.

        Raises:
            InvalidInput: it has no id, or one that cannot be a name.
            ModelMissingError: there is no such file.
            StorageError: as any upload.
        """
        from storage.container.model import ModelContainer

        if ModelContainer.detect_format_file(path) == "legacy":
            if model_id is None:
                raise InvalidInput(
                    f"{shown(path)} is no container, so nothing tells its model's id"
                )
            self.upload(path, model_id)
            return model_id
        with ModelContainer.from_file(path) as found:
            wanted = layout.check_model(found.model_id if model_id is None else model_id)
            if wanted == found.model_id:
                self.upload(path, wanted)
            else:
                with found.to_builder().set_model_id(wanted).build() as named:
                    self.accept(wanted, named.get_filechunk_stream())
        return wanted

    def upload(self, path: str | os.PathLike[str], model_id: str) -> str:
        """Store a model that is in a file.

        Nobody else has its id, so what may be there is what an earlier try left, and is replaced.

        Returns:
            Its URI.

        Raises:
            StorageError: as any upload.
        """
        uri = self.uri(model_id)
        self._client.upload(path, uri, config=self._config)
        return uri
