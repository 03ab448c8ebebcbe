"""What a source is, and how it comes into a folder as KServe's model servers expect it.

One object becomes a file of its name in the folder, a tree its content, and a source that is one
archive what the archive holds. What is on this machine already (a mounted claim, above all) is
linked and not copied.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from storage.client.client import StorageClient
from storage.client.download import Download, DownloadOptions
from storage.client.offline import offline_mode
from storage.errors import (
    AuthenticationError,
    InvalidInput,
    ModelMissingError,
    StorageError,
    UnreachableError,
    redact,
)
from storage.files import shown, translate_os_errors
from storage.integrations.kserve.authorities import Authorities
from storage.integrations.kserve.environment import Environment
from storage.integrations.kserve.hdfs import hdfs_source
from storage.integrations.kserve.notes import is_reserved
from storage.integrations.kserve.placing import Place
from storage.transfer.plan import Patterns, make_plan
from storage.transfer.progress import Meter
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.config.base import ConfigModel
    from storage.transfer.plan import Plan
    from storage.transfer.progress import ProgressCallback

__all__ = ["Wish", "bring"]

MODELS_FOLDER = "/mnt/models"
"""Where the agent of a pod with several models brings them; nobody else does."""

CLAIMS_FOLDER = "/mnt/pvc"
"""Where KServe mounts the claim of a ``pvc://`` URI."""

_FILE = "file://"
_ARCHIVE = re.compile(r"\.(?:tar(?:\.(?:gz|bz2|xz))?|tgz|taz|tz|tbz2?|txz|zip)$", re.IGNORECASE)
# Repositories are brought as they are.
_UNPACKED = ("s3", "gs", "azure", "http", "hdfs", "webhdfs")
# Of the root of a volume, or of a mounted config map.
_OF_VOLUME = re.compile(r"lost\+found|\.\..*")

_DIGEST = re.compile(r"(?:sha256|blake3)=[0-9a-fA-F]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """One source, where it should go, and which of its files."""

    uri: str
    folder: str | None
    """``None``: wherever it can be read."""

    patterns: Patterns
    beside: tuple[str, ...] = ()
    """Sources that the same call has brought into the same folder before."""

    only: tuple[str, ...] | None = None
    """All sources that the folder is to have; ``None``: any."""

    progress: ProgressCallback | None = None

    def place(self, source: str, folder: str) -> Place:
        """Return the place of ``source`` in the ``folder``."""
        beside = [_identity(uri) for uri in self.beside]
        only = None if self.only is None else [_identity(uri) for uri in self.only]
        return Place(folder, source, beside=beside, only=only)


def bring(wish: Wish, environment: Environment) -> str:
    """Bring a source to its folder, whole or not at all, and return the folder.

    Without a folder the path of something that holds the model is returned: of what is on this
    machine itself; else a folder in the cache, or where there is no cache, a temporary one.

    Raises:
        StorageError: it cannot be had.
    """
    path = _on_this_machine(wish.uri)
    if path is not None:
        _demand(path, wish.uri)
        return _link(wish, path)
    if _is_within(wish.uri, MODELS_FOLDER):
        folder = wish.uri if wish.folder is None else wish.folder
        _log.info("%s is brought by the agent of the pod; nothing is fetched", wish.uri)
        if wish.folder is not None:
            with translate_os_errors(folder):
                os.makedirs(folder, exist_ok=True)
        return folder
    if _is_within(wish.uri, CLAIMS_FOLDER):
        raise ModelMissingError(
            wish.uri,
            f"{shown(wish.uri)} is not there: expected a file or folder of the claim that is "
            f"mounted at {CLAIMS_FOLDER}; check the path, and that the claim is mounted",
        )
    with ExitStack() as held:
        uri, nodes = hdfs_source(wish.uri, environment, held) or (wish.uri, None)
        location = parse_uri(uri)
        if location.scheme == "file":
            raise ModelMissingError(
                wish.uri,
                f"{shown(wish.uri)} is neither a file or folder of this machine nor a URI; "
                "expected something like s3://bucket/model",
            )
        authorities = held.enter_context(Authorities(environment))
        client = held.enter_context(StorageClient(settings=environment.settings(location)))
        configs: Iterator[ConfigModel | None]
        if nodes is not None:
            configs = iter(nodes)
        elif client.settings.store_for(location) is not None:
            configs = iter((None,))  # the settings name the store, and they go first
        else:
            configs = environment.configs(location, authorities)
        if location.scheme == "pvc":
            # Checked before it is linked to: no link in the claim leads out of it.
            options = DownloadOptions(config=next(configs))
            return _link(wish, Download(client, location, options).run(None))
        source = _Source(wish, location, client, configs)
        if nodes is not None:
            source.refusals = (StorageError,)
        return source.bring()


# -- on this machine ---------------------------------------------------------------------------


def _on_this_machine(uri: str) -> str | None:
    """Return the path of a source that is a file or folder here, and there; else ``None``.

    Raises:
        ModelMissingError: it can only be one, and is not there.
    """
    path = _path_of(uri)
    if path is not None and not os.path.exists(path):
        raise ModelMissingError(
            path,
            f"{shown(path or uri)} is not there: expected a file or folder of this machine; check "
            "the path, and that its volume is mounted",
        )
    return path


def _path_of(uri: str) -> str | None:
    """Return the path that a source can only be; ``None`` if it is something else."""
    if "://" not in uri:
        return uri if os.path.exists(uri) else _without_digest(uri)
    if not uri.startswith(_FILE):
        return uri if os.path.exists(uri) else None
    path = uri.removeprefix(_FILE)
    path = path.removeprefix("localhost") if path.startswith("localhost/") else path
    return path if os.path.exists(path) else _without_digest(path) or path


def _without_digest(path: str) -> str | None:
    """Return the path before a digest that is expected of it, if there is one, and the path is."""
    plain, _, digest = path.rpartition("#")
    return plain if _DIGEST.fullmatch(digest) and os.path.exists(plain) else None


def _demand(path: str, uri: str) -> None:
    """Refuse what is here if it has not the digest, or the signature, that it has to have."""
    location = Location("file", "", os.path.abspath(path).lstrip("/"))
    if not uri.endswith(path):
        digest = uri.rpartition("#")[2].replace("=", ":").lower()
        location = replace(location, digest=digest)
    with StorageClient() as client:
        if location.digest is not None or client.signature_policy is not None:
            Download(client, location, DownloadOptions()).run(None)


def _is_within(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or below it; ``/mnt/models-2`` is not."""
    if "://" in path:
        return False
    return os.path.normpath(path) == folder or os.path.normpath(path).startswith(f"{folder}/")


def _link(wish: Wish, path: str) -> str:
    """Put links to a file, or to what is in a folder, into the folder."""
    if wish.folder is None:
        return path
    source = os.path.abspath(path)
    real, target = os.path.realpath(source), os.path.realpath(wish.folder)
    if real == target:
        return wish.folder
    if os.path.isdir(real) and target.startswith(os.path.join(real, "")):
        raise InvalidInput(
            f"the destination {shown(wish.folder)} is inside of the source {shown(path)}; choose "
            "one elsewhere"
        )
    names = _linked(source, wish.patterns)
    if os.path.isfile(real) and real == os.path.join(target, os.path.basename(source)):
        return wish.folder
    _refuse_own(names, target)
    with wish.place(_identity(wish.uri), wish.folder) as place:
        with translate_os_errors(wish.folder):
            os.mkdir(place.content)
        archive = next(iter(names.values())) if len(names) == 1 else ""
        if _ARCHIVE.search(archive) and os.path.isfile(archive):
            from storage.container.archives.extract import extract_into

            with translate_os_errors(wish.folder):
                extract_into(archive, place.content)
        else:
            with translate_os_errors(wish.folder):
                for name, origin in names.items():
                    link = os.path.join(place.content, name)
                    os.makedirs(os.path.dirname(link), exist_ok=True)
                    os.symlink(origin, link)
        place.publish()
    return wish.folder


def _refuse_own(names: Mapping[str, str], target: str) -> None:
    """Refuse to put a link where the very file or folder is that it would lead to."""
    for name, origin in names.items():
        place, real = os.path.join(target, name), os.path.realpath(origin)
        if real == place or real.startswith(os.path.join(place, "")):
            raise InvalidInput(
                f"{shown(origin)} is {shown(real)}, and the destination has a place for it where "
                "that would be lost; choose a destination elsewhere"
            )


def _is_model(name: str) -> bool:
    """Tell whether what has this name at the top of a folder is a part of a model."""
    return not _OF_VOLUME.fullmatch(name) and not is_reserved(name)


def _linked(source: str, patterns: Patterns) -> dict[str, str]:
    """Return what is linked to: absolute paths, by the name of the link.

    Raises:
        ModelMissingError: there is nothing, or nothing of it is wanted.
    """
    if not os.path.isdir(source):
        return {os.path.basename(source): source}
    found: dict[str, str] = {}
    total = 0
    with translate_os_errors(source):
        if not patterns.active:
            names = sorted(os.listdir(source))
            found = {name: os.path.join(source, name) for name in names if _is_model(name)}
        else:
            for path, place in _files(source):
                total += 1
                if patterns.wants(path):
                    found[path] = place
    if not found:
        what = f"none of its {total} files matches the patterns" if total else "it is empty"
        raise ModelMissingError(source, f"{shown(source)}: {what}; there is no model")
    return found


def _files(source: str) -> Iterator[tuple[str, str]]:
    """Yield all files below a folder, links to folders followed: relative and absolute paths."""

    def fail(error: OSError) -> None:
        raise error

    seen = {os.path.realpath(source)}
    for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
        base = os.path.relpath(folder, source)
        if base == ".":
            folders[:] = filter(_is_model, folders)
        folders[:] = [name for name in folders if not is_reserved(name)]
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if os.path.islink(os.path.join(folder, name)) and real in seen:
                folders.remove(name)
            seen.add(real)
        for name in sorted(names):
            if is_reserved(name):
                continue
            yield os.path.normpath(os.path.join(base, name)), os.path.join(folder, name)


# -- in a store --------------------------------------------------------------------------------


class _Planned(Download):
    """A download of what a plan says that has been made already."""

    plan: Plan | None = None
    latest: Plan | None = None
    """What the last attempt was about."""

    def ask(self, location: Location) -> Plan:
        """Return the plan, and for each further attempt a new one."""
        plan, self.plan = self.plan, None
        self.latest = super().ask(location) if plan is None else plan
        return self.latest


class _Source:
    """One source in a store, and how it is brought here."""

    def __init__(
        self,
        wish: Wish,
        location: Location,
        client: StorageClient,
        configs: Iterator[ConfigModel | None],
    ) -> None:
        self._wish = wish
        self._location = location
        self._client = client
        self._configs = configs
        self._config: ConfigModel | None = None
        self._patterns = wish.patterns
        # What leads to the next config.
        self.refusals: tuple[type[StorageError], ...] = (AuthenticationError, ModelMissingError)

    def bring(self) -> str:
        """Bring it to its folder; return that."""
        plan = self._plan()
        if self._wish.folder is not None:
            return self._place(plan, self._wish.folder)
        if _is_usable(str(self._client.settings.cache_dir)):
            path = self._job(plan).run(None)
            return path if os.path.isdir(path) else os.path.dirname(path)
        with translate_os_errors("a temporary folder"):
            folder = tempfile.mkdtemp(prefix="modelstorage-")
        try:
            return self._place(plan, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _plan(self) -> Plan | None:
        """Ask the store what there is; ``None`` where only the cache may be asked."""
        offline = offline_mode(self._client.settings, self._location, None)
        refusal: StorageError | None = None
        for config in self._configs:
            self._config = config
            if offline is True:
                return None
            try:
                return self._plan_with(config)
            except StorageError as exc:
                if offline == "auto" and refusal is None and isinstance(exc, UnreachableError):
                    return None
                # What was tried besides is nobody's failure: the first word counts.
                refusal = refusal or exc
                if not isinstance(exc, self.refusals):
                    break
        assert refusal is not None
        raise refusal

    def _plan_with(self, config: ConfigModel | None) -> Plan:
        client, location = self._client, self._location
        backend = client.backend(location, config)
        where = str(location)
        try:
            return client.run_retried(make_plan, backend, location, self._patterns, where=where)
        except ModelMissingError:
            if not self._patterns.active or location.forces_tree:
                raise
            # One object is what was asked for by its name, whatever the patterns say of trees.
            plan = client.run_retried(make_plan, backend, location, Patterns(), where=where)
            if plan.is_tree:
                raise
            self._patterns = Patterns()
            return plan

    def _job(self, plan: Plan | None) -> _Planned:
        """Return the download of what is there."""
        location = self._location
        patterns = self._patterns
        unpack = self._is_archive(plan)
        if unpack and plan is not None and plan.is_tree:
            location = location.child(plan.files[0].info.key.removeprefix(location.prefix))
            patterns, plan = Patterns(), None
        options = DownloadOptions(
            config=self._config,
            patterns=patterns,
            unpack=unpack,
            progress=self._wish.progress,
            overwrite=True,
        )
        job = _Planned(self._client, location, options)
        job.plan = plan
        return job

    def _is_archive(self, plan: Plan | None) -> bool:
        """Tell whether all there is is one archive."""
        if self._location.type not in _UNPACKED or (plan is not None and len(plan.files) != 1):
            return False
        name = self._location.name if plan is None else plan.files[0].path
        if _ARCHIVE.search(name) is not None:
            return True
        # "download?file=model.tar.gz" says in its query what its path does not.
        url = self._location.url if self._location.type == "http" else None
        query = urlsplit(url or "").query
        return "." not in name and _ARCHIVE.search(query) is not None

    def _place(self, plan: Plan | None, folder: str) -> str:
        job = self._job(plan)
        mark = None if plan is None else plan.fingerprint()
        if mark is not None:
            mark = hashlib.sha256(f"{mark} {job.unpack}".encode()).hexdigest()[:32]
        with self._wish.place(_identity(self._wish.uri), folder) as place:
            if plan is not None and place.is_current(mark):
                self._tell_present(plan)
                return folder
            path = job.run(place.path("model"))
            with translate_os_errors(folder):
                if os.path.isdir(path):
                    os.rename(path, place.content)
                else:
                    os.mkdir(place.content)
                    name = job.location.name if plan is None else plan.files[0].path
                    os.rename(path, os.path.join(place.content, name))
            if plan is None or job.latest is None or _pins(job.latest) != _pins(plan):
                mark = None  # the source changed meanwhile
            place.publish(mark, durable=job.durable)
        return folder

    def _tell_present(self, plan: Plan) -> None:
        meter = Meter("download", plan.uri, plan.size, len(plan.files), self._wish.progress)
        meter.add_present(plan.size or 0)
        for _ in plan.files:
            meter.add_object()
        meter.finish()


def _pins(plan: Plan) -> list[object]:
    return [(file.info.size, file.info.pin) for file in plan.files]


def _is_usable(folder: str) -> bool:
    """Tell whether there can be a cache in ``folder``, for this user."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)


def _identity(uri: str) -> str:
    """Return what tells a source from others, without what may be a credential."""
    path = _path_of(uri)
    return f"file://{os.path.abspath(path)}" if path is not None else redact(uri)
