"""MLflow's artifacts in every store of this library: ``modelstorage-s3://bucket/path`` and more.

MLflow finds the class by the entry points ``mlflow.artifact_repository`` of this package, one for
each scheme that can be listed and written. What follows ``modelstorage-`` is a URI of this library;
credentials come from the settings and the environment, as for every other call.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2 as codes
from mlflow.store.artifact.artifact_repo import ArtifactRepository, verify_artifact_path
from mlflow.utils.file_utils import create_tmp_dir

from storage.errors import (
    AuthenticationError,
    BucketMissingError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    TransferError,
    UnsupportedOperation,
    one_line,
)
from storage.facade import Storage, default_client
from storage.integrations.scratch import scratch
from storage.operations import StorageOperations
from storage.uri import Location, parse_uri

__all__ = ["PREFIX", "ModelStorageArtifactRepository"]

PREFIX = "modelstorage-"
"""What stands before the scheme of a URI of this library."""

# What a tracking server may reach for whoever asks it: stores that the operator's credentials open.
# All else is of its machine, or on a host that the URI names.
_OPEN_SCHEMES = ("s3", "gs", "azure", "hf")
# Where MLflow's server tells its workers, and the jobs that they start, where artifacts belong.
_SERVER_ROOTS = ("_MLFLOW_SERVER_ARTIFACT_ROOT", "_MLFLOW_SERVER_ARTIFACT_DESTINATION")

# MLflow's server answers with the HTTP status that belongs to the code.
_CODES = (
    (ModelMissingError, codes.RESOURCE_DOES_NOT_EXIST),
    (AuthenticationError, codes.PERMISSION_DENIED),
    (InvalidInput, codes.INVALID_PARAMETER_VALUE),
    (UnsupportedOperation, codes.NOT_IMPLEMENTED),
    (IntegrityError, codes.DATA_LOSS),
    (TransferError, codes.TEMPORARILY_UNAVAILABLE),
)


class ModelStorageArtifactRepository(ArtifactRepository):  # type: ignore[misc]
    """The artifacts below one URI, moved by the default client of :class:`storage.Storage`.

    What this library says of uploads and downloads holds: they are parallel and retried, digests
    are kept beside the bytes, and a file that does not match them is not handed over. Every
    :class:`storage.StorageError` becomes an ``MlflowException`` with the code that fits.
    """

    def __init__(self, artifact_uri: str, *args: Any, **kwargs: Any) -> None:
        """Keep the URI; nothing is asked of the store.

        Args:
            artifact_uri: ``modelstorage-`` and a URI of a tree.
            args: passed on to MLflow's own class.
            kwargs: passed on to MLflow's own class.

        Raises:
            MlflowException: it is no such URI.
        """
        super().__init__(artifact_uri, *args, **kwargs)
        with _mlflow_errors():
            self._root = _root(artifact_uri)
            self._location = parse_uri(self._root)
            _refuse_for_others(self._location)

    def __repr__(self) -> str:
        # MLflow's own shows what the URI may hold of a user and a password.
        return f"{type(self).__name__}({one_line(self.artifact_uri)!r})"

    # -- to the store ------------------------------------------------------------------------

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        """Store a file in the folder ``artifact_path``, under its own name."""
        verify_artifact_path(artifact_path)
        name = os.path.basename(os.fspath(local_file))
        with _mlflow_errors():
            Storage.upload(local_file, self._uri(posixpath.join(artifact_path or "", name)))

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Store all files of a folder in the folder ``artifact_path``.

        Stores have no empty folders: of a folder without a file nothing is stored.
        """
        verify_artifact_path(artifact_path)
        if os.path.isdir(local_dir) and not _holds_files(local_dir):
            return
        with _mlflow_errors():
            Storage.upload(local_dir, self._uri(_below(artifact_path)))

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        """Delete a file, or a folder with all that is in it; everything without a path.

        What is not there is no error.
        """
        with _mlflow_errors(), _missing_is_fine():
            StorageOperations.delete_object(self._uri(_relative(artifact_path)), recursive=True)

    # -- from the store ----------------------------------------------------------------------

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        """Return what is directly in the folder ``path``, sorted; nothing if it is a file."""
        below = _below(_relative(path))
        sizes: dict[tuple[str, bool], int | None] = {}
        with _mlflow_errors(), _missing_is_fine():
            for key, info in default_client().list_infos(self._uri(below)):
                name, slash, _ = key.partition("/")
                sizes[below + name, bool(slash)] = None if slash else info.size
        return [FileInfo(name, folder, size) for (name, folder), size in sorted(sizes.items())]

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        """Bring a file or a folder here, whole and verified, and return its path.

        Args:
            artifact_path: the file or folder; everything, if there is anything, if it is empty.
            dst_path: an existing folder, below which it gets its ``artifact_path``. Other files
                there stay. A new folder for temporary files if ``None``; it is the caller's.

        Raises:
            MlflowException: nothing is there, it cannot be read or written, or it is not what
                was stored.
        """
        path = _relative(artifact_path)
        folder = _destination(dst_path)
        target = os.path.join(folder, path) if path else folder
        with _mlflow_errors(), contextlib.nullcontext() if path else _missing_is_fine():
            if os.path.lexists(target):
                # It is put beside what is there only when all of it has arrived.
                with scratch(folder) as place:
                    found = Storage.download(self._uri(path), os.path.join(place, "content"))
                    _merge(found, target)
            else:
                Storage.download(self._uri(path), target)
        return target

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        with _mlflow_errors():
            Storage.download(self._uri(_relative(remote_file_path)), local_path)

    def _uri(self, path: str) -> str:
        """Return the URI of ``path``, which is a folder if it ends in a slash or is empty."""
        uri = self._root + path
        found, root = parse_uri(uri), self._location
        # Such as a name that ends in "#sha256=…", or hf://gpt2/name, which is a repository.
        if found != replace(root, key=root.key + path, url=found.url):
            raise InvalidInput(
                f"the artifact {one_line(path)!r} would not be below {root}: {one_line(uri)!r} "
                "means something else; choose another name"
            )
        return uri


def _root(artifact_uri: str) -> str:
    """Return the URI of this library that MLflow's is about, with a slash at its end."""
    if not artifact_uri.startswith(PREFIX):
        raise InvalidInput(f"{one_line(artifact_uri)!r} does not begin with {PREFIX!r}")
    uri = artifact_uri.removeprefix(PREFIX)
    # MLflow moves a query or a fragment behind whatever it appends to the path.
    if "?" in uri or "#" in uri:
        raise InvalidInput(
            f"{one_line(artifact_uri)!r} is to be the root of artifacts, which takes no '?' and "
            "no '#'; leave them out"
        )
    if ".." in uri.split("/"):
        raise InvalidInput(f"{one_line(artifact_uri)!r}: '..' may not leave the root of artifacts")
    scheme, _, rest = uri.partition(":")
    if not rest.startswith("//"):
        # Python's urlunsplit drops the slashes of an empty host: file:///a becomes file:/a.
        uri = f"{scheme}://{rest}"
    return uri if uri.endswith("/") else f"{uri}/"


def _refuse_for_others(location: Location) -> None:
    """Refuse, in a tracking server, what its clients may name and may not reach.

    MLflow keeps its clients from the server's own files, and from hosts that they name, by the
    schemes that it knows. They can register any URI as the place of a model.

    Raises:
        InvalidInput: it is not below the artifact root or destination of the server.
    """
    if location.scheme in _OPEN_SCHEMES or not _in_server():
        return
    for name in _SERVER_ROOTS:
        uri = os.environ.get(name, "")
        if uri.startswith(PREFIX):
            root = parse_uri(_root(uri))
            is_below = location.key.startswith(root.key)
            if is_below and replace(location, key=root.key, url=root.url) == root:
                return
    raise InvalidInput(
        f"{location}: a tracking server reaches files of its machine, and hosts that a URI names, "
        "only below its own --default-artifact-root or --artifacts-destination"
    )


def _in_server() -> bool:
    """Tell whether this is a tracking server, or a job of one; MLflow's command is neither."""
    if _SERVER_ROOTS[0] in os.environ:
        return True
    # Its application, by another program than the one that sets the variables.
    flask = sys.modules.get("flask")
    return (
        flask is not None
        and flask.has_app_context()
        and flask.current_app.import_name == "mlflow.server"
    )


def _relative(path: str | None) -> str:
    """Return a path of MLflow's without what is redundant in it; the root is empty.

    Raises:
        MlflowException: it leaves the root.
    """
    text = posixpath.normpath(path or ".")
    if text.startswith("/") or text.split("/", 1)[0] == "..":
        raise MlflowException(
            f"the artifact path {path!r} leaves the artifacts of its run; name a relative path",
            codes.INVALID_PARAMETER_VALUE,
        )
    return "" if text == "." else text


def _below(folder: str | None) -> str:
    return f"{folder}/" if folder else ""


def _holds_files(folder: str) -> bool:
    return any(names for _, _, names in os.walk(folder, followlinks=True))


def _destination(path: str | None) -> str:
    """Return the folder to download to, as MLflow's own repositories want it."""
    if not path:
        return str(create_tmp_dir())
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise MlflowException(
            f"the folder {path!r} to download to does not exist; make it",
            codes.RESOURCE_DOES_NOT_EXIST,
        )
    if not os.path.isdir(path):
        raise MlflowException(
            f"{path!r} is to be downloaded to and is no folder; name one",
            codes.INVALID_PARAMETER_VALUE,
        )
    return path


def _merge(source: str, target: str) -> None:
    """Move a file or a folder to ``target``; into the folder that is there, file by file."""
    if os.path.isdir(source) and os.path.isdir(target):
        for name in os.listdir(source):
            _merge(os.path.join(source, name), os.path.join(target, name))
    else:
        os.replace(source, target)


@contextlib.contextmanager
def _missing_is_fine() -> Iterator[None]:
    """Let nothing be where something was expected, but not in a bucket that does not exist."""
    try:
        yield
    except BucketMissingError:
        raise
    except ModelMissingError:
        return


@contextlib.contextmanager
def _mlflow_errors() -> Iterator[None]:
    try:
        yield
    except (StorageError, OSError) as exc:
        found = (code for kind, code in _CODES if isinstance(exc, kind))
        raise MlflowException(str(exc), next(found, codes.INTERNAL_ERROR)) from exc
