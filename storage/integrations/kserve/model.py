"""What a source is, and how it comes into a folder as KServe's model servers expect it.

One object becomes a file of its name in the folder, a tree its content, and a source that is one
archive what the archive holds. What is on this machine already is linked and not copied; see
``local``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from storage.client.client import StorageClient
from storage.client.download import Download, DownloadOptions
from storage.client.offline import offline_mode
from storage.client.placed import tell_present
from storage.errors import (
    AuthenticationError,
    ModelMissingError,
    StorageError,
    UnreachableError,
)
from storage.files import shown, translate_os_errors
from storage.integrations.kserve.authorities import Authorities
from storage.integrations.kserve.environment import Environment
from storage.integrations.kserve.hdfs import hdfs_source
from storage.integrations.kserve.local import ARCHIVE, demand, link, on_this_machine
from storage.integrations.kserve.placing import refuse_reserved
from storage.integrations.kserve.wish import Wish
from storage.transfer.plan import Patterns, make_plan
from storage.transfer.progress import Meter
from storage.uri import Location, parse_uri

if TYPE_CHECKING:
    from storage.config.base import ConfigModel
    from storage.transfer.download import FetchedFile
    from storage.transfer.journal import Journal
    from storage.transfer.plan import Plan

__all__ = ["bring"]

MODELS_FOLDER = "/mnt/models"
"""Where the agent of a pod with several models brings them; nobody else does."""

CLAIMS_FOLDER = "/mnt/pvc"
"""Where KServe mounts the claim of a ``pvc://`` URI."""

# Repositories are brought as they are.
_UNPACKED = ("s3", "gs", "azure", "http", "hdfs", "webhdfs")

_log = logging.getLogger(__name__)


def bring(wish: Wish, environment: Environment) -> str:
    """Bring a source to its folder, whole or not at all, and return the folder.

    Without a folder the path of something that holds the model is returned: of what is on this
    machine itself; else a folder in the cache, or where there is no cache, a temporary one.

    Raises:
        StorageError: it cannot be had.
    """
    path = on_this_machine(wish.uri)
    if path is not None:
        demand(path, wish.uri)
        return link(wish, path)
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
            return link(wish, Download(client, location, options).run(None))
        source = _Source(wish, location, client, configs)
        if nodes is not None:
            source.refusals = (StorageError,)
        return source.bring()


def _is_within(path: str, folder: str) -> bool:
    """Tell whether ``path`` is ``folder`` or below it; ``/mnt/models-2`` is not."""
    if "://" in path:
        return False
    return os.path.normpath(path) == folder or os.path.normpath(path).startswith(f"{folder}/")


# -- in a store --------------------------------------------------------------------------------


class _Planned(Download):
    """A download of what a plan says that has been made already."""

    plan: Plan | None = None

    def __init__(self, client: StorageClient, location: Location, options: DownloadOptions) -> None:
        """Keep the arguments; nothing has come yet."""
        super().__init__(client, location, options)
        self._pins: list[object] = []

    def ask(self, location: Location) -> Plan:
        """Return the plan, and for each further attempt a new one."""
        plan, self.plan = self.plan, None
        plan = super().ask(location) if plan is None else plan
        self._pins = _pins(plan)
        return plan

    def fetch(
        self,
        plan: Plan,
        folder: str | None,
        file: str | None,
        meter: Meter,
        journal: Journal | None,
        **options: Any,
    ) -> list[FetchedFile]:
        """Fetch what is not here, and take note of what was replaced meanwhile."""
        found = super().fetch(plan, folder, file, meter, journal, **options)
        if [each.info.pin for each in found] != [each.info.pin for each in plan.files]:
            self._pins = []
        return found

    def is_of(self, plan: Plan) -> bool:
        """Tell whether what has come is what ``plan`` says, and nothing newer."""
        return self._pins == _pins(plan)


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
        if ARCHIVE.search(name) is not None:
            return True
        # "download?file=model.tar.gz" says in its query what its path does not.
        url = self._location.url if self._location.type == "http" else None
        query = urlsplit(url or "").query
        return "." not in name and ARCHIVE.search(query) is not None

    def _place(self, plan: Plan | None, folder: str) -> str:
        job = self._job(plan)
        if plan is not None and not job.unpack:
            refuse_reserved(file.path for file in plan.files)
        mark = None if plan is None else plan.fingerprint()
        if mark is not None:
            # What is demanded of it now may not have been when it came.
            demands = f"{job.expected} {self._client.signature_policy!r}"
            mark = hashlib.sha256(f"{mark} {job.unpack} {demands}".encode()).hexdigest()[:32]
        with self._wish.place(folder) as place:
            if plan is not None and place.is_current(mark):
                tell_present(plan, self._wish.progress)
                return folder
            path = job.run(place.path("model"))
            with translate_os_errors(folder):
                if os.path.isdir(path):
                    os.rename(path, place.content)
                else:
                    os.mkdir(place.content)
                    name = job.location.name if plan is None else plan.files[0].path
                    os.rename(path, os.path.join(place.content, name))
            right = plan is not None and job.is_of(plan)
            place.publish(mark if right else None, durable=job.durable)
        return folder


def _pins(plan: Plan) -> list[object]:
    return [(file.info.size, file.info.pin) for file in plan.files]


def _is_usable(folder: str) -> bool:
    """Tell whether there can be a cache in ``folder``, for this user."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)
