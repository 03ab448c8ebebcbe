"""Writing to the Hub: bytes first, then one commit that names them all.

The Hub decides for each file whether it is kept in git itself, in which case it is sent
within the commit, or in large file storage, where it is sent to before. What was sent and not
committed is in no revision, and the Hub removes it some day.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from storage.backends.base import BatchItem, ObjectInfo
from storage.backends.hf.answers import check_key, new_object
from storage.backends.hf.content import Content, Operations, Source, Stretch, git_oid
from storage.backends.hf.errors import understood
from storage.errors import (
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    ObjectExistsError,
    StorageError,
    TransientError,
    few,
    one_line,
)

if TYPE_CHECKING:
    from storage.backends.hf.answers import HubObject
    from storage.backends.hf.backend import HubBackend

__all__ = ["Upload", "copy", "delete"]

_PREUPLOAD_BATCH = 256
_STREAMS = 4
# Commits of others that may come in between, before one call gives up.
_ATTEMPTS = 8
# The Hub signs addresses for an hour at least; one that is refused earlier has not expired.
_FRESH = 600.0
# Commits that replace one that is not what was sent.
_REPAIRS = 2
_LFS = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class _File:
    """One file of an upload, and what is known of it so far."""

    item: BatchItem
    where: str
    size: int = 0
    sample: bytes = b""
    large: bool = False
    there: str | None = None
    """Identity of the file that is at this key already."""

    oid: str = ""
    """SHA-256 of a large file, git's object id of a small one."""

    @property
    def key(self) -> str:
        return self.item.key


class Upload:
    """Files that are written together."""

    def __init__(
        self,
        hub: HubBackend,
        items: Sequence[BatchItem],
        if_absent: bool = False,
        if_match: ObjectInfo | None = None,
        on_bytes: Callable[[int], object] | None = None,
    ) -> None:
        """Check the keys; nothing is asked or read yet.

        Raises:
            InvalidInput: a key is none that git can hold, or is given twice.
        """
        hub.check_writable()
        self._files = [_File(item, hub.where(item.key)) for item in items]
        for file in self._files:
            check_key(file.key, file.where, writing=True)
        self._keys = frozenset(file.key for file in self._files)
        if len(self._keys) != len(items):
            raise InvalidInput(f"{hub.where('')}: a key is given twice in one commit")
        self._hub = hub
        self._session = hub.session
        self._if_absent = if_absent
        self._if_match = if_match
        self._on_bytes = on_bytes or (lambda count: None)
        self._where = hub.where(items[0].key if len(items) == 1 else "")
        self._looked = self._lost = False
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads = max(1, min(_STREAMS, hub.options.connections))

    def run(self) -> list[HubObject]:
        """Send the bytes, commit them, and tell what is there."""
        unanswered = self._hub.unanswered
        # After any other answer than a passing one nobody wonders what became of that try.
        self._lost = self._keys in unanswered
        unanswered.discard(self._keys)
        try:
            return self._run()
        except TransientError:
            if self._lost:
                unanswered.add(self._keys)
            raise

    def _run(self) -> list[HubObject]:
        conditional = self._if_absent or self._if_match is not None
        with (
            Source(self._hub.options.memory // 4) as source,
            Operations(self._on_bytes) as operations,
        ):
            commit = self._done_before(source) if conditional and self._lost else None
            if commit is None:
                parent = self._permitted() if conditional else None
                commit = self._ask_how(source)
                large = [file for file in self._files if file.large]
                self._in_threads(lambda file: self._send_large(source, file), large)
                for file in self._files:
                    self._add(source, file, operations)
                # All of them or none: what another commit put there meanwhile is replaced too.
                if conditional or any(file.there != file.oid for file in self._files):
                    self._lost = self._lost or conditional
                    commit = self._publish(operations, parent)
        return [new_object(file.key, file.size, file.oid, commit) for file in self._files]

    # -- conditions --------------------------------------------------------------------------

    def _permitted(self) -> str:
        """Return a commit at which the conditions hold; only that may be the parent.

        Raises:
            ObjectExistsError: a key is there and should not be.
            ObjectChangedError: the file is not the expected one.
        """
        hub = self._hub
        head = hub.commit_of(hub.revision, self._where)
        found = hub.files_at(head, [file.key for file in self._files])
        if self._if_absent and found:
            raise ObjectExistsError(
                f"{hub.where(min(found))} exists already and is not to be overwritten"
            )
        if self._if_match is not None:
            there = found.get(self._files[0].key)
            if there is None or there.etag != self._if_match.etag:
                raise ObjectChangedError(f"{self._where} is no longer the file that was expected")
        return head

    def _done_before(self, source: Source) -> str | None:
        """Return the commit that holds just these files, which an earlier try may have made.

        That the keys exist, or are not what they were, is then its own doing.
        """
        hub = self._hub
        head = hub.commit_of(hub.revision, self._where)
        found = hub.files_at(head, [file.key for file in self._files])
        self._look(source)
        for file in self._files:
            info = found.get(file.key)
            if info is None or info.size != file.size:
                return None
            with source.opened(file.key, file.item.payload, file.where) as content:
                file.oid = content.sha256() if info.digests else git_oid(content.data())
            if info.etag != f'"{file.oid}"':
                return None
        return head

    def _publish(self, operations: Operations, parent: str | None) -> str:
        """Commit, and look whether the commit holds what was sent; else commit once more."""
        expected = {file.key: file.oid for file in self._files}
        for _ in range(_REPAIRS + 1):
            made = self._commit(operations, parent)
            wrong = wrong_files(self._hub, made, expected, self._where)
            if not wrong:
                return made
            # Nobody but this upload put them there, and nobody else may have come after it.
            parent = made if parent is not None else None
        raise _damaged(self._where, made, wrong)

    def _commit(self, operations: Operations, parent: str | None) -> str:
        count = len(self._files)
        summary = f"Upload {self._files[0].key if count == 1 else f'{count} files'}"
        for _ in range(_ATTEMPTS):
            try:
                return commit(self._hub, summary, operations, parent, self._where)
            except ObjectChangedError:
                # Somebody committed meanwhile, perhaps something else.
                if parent is None:
                    break
                parent = self._permitted()
        raise _restless(self._where)

    # -- bytes -------------------------------------------------------------------------------

    def _look(self, source: Source) -> None:
        if not self._looked:
            for file in self._files:
                file.size, file.sample = source.look(file.key, file.item.payload, file.where)
        self._looked = True

    def _ask_how(self, source: Source) -> str | None:
        """Learn which files are large ones by the Hub's rules, and what is there already."""
        hub, commit = self._hub, None
        self._look(source)
        path = hub.api(f"preupload/{quote(hub.revision, safe='')}")
        for start in range(0, len(self._files), _PREUPLOAD_BATCH):
            some = self._files[start : start + _PREUPLOAD_BATCH]
            asked = [
                {
                    "path": file.key,
                    "sample": base64.b64encode(file.sample).decode(),
                    "size": file.size,
                }
                for file in some
            ]
            response = self._session.call("POST", path, self._where, json={"files": asked})
            with understood(self._where):
                answer = response.json()
                told = {each["path"]: each for each in answer["files"]}
                commit = commit or answer.get("commitOid")
                for file in some:
                    # An empty file is in git whatever its name: storage takes no empty objects.
                    file.large = told[file.key]["uploadMode"] == "lfs" and file.size > 0
                    file.there = told[file.key].get("oid")
        return commit

    def _send_large(self, source: Source, file: _File) -> None:
        """Put a file into large file storage, unless it is there."""
        hub, where = self._hub, file.where
        with source.opened(file.key, file.item.payload, where) as content:
            file.oid = content.sha256()
            asked = {
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": [{"oid": file.oid, "size": content.size}],
                "hash_algo": "sha256",
                "ref": {"name": hub.revision},
            }
            path = hub.git("info/lfs/objects/batch")
            response = self._session.call("POST", path, where, json=asked, headers=_LFS)
            upload, verify = _actions(response.json, where)
            if upload is None:
                return
            self._put(where, content, file.oid, upload)
            if verify is not None:
                self._session.call(
                    "POST",
                    self._session.own_url(verify["href"]),
                    where,
                    json={"oid": file.oid, "size": content.size},
                    headers=_plain(verify.get("header")),
                )

    def _put(self, where: str, content: Content, oid: str, action: Mapping[str, Any]) -> None:
        header = _plain(action.get("header"))
        url = self._session.own_url(action["href"])
        expires = time.monotonic() + _FRESH
        if "chunk_size" not in header:
            self._put_stretch(where, url, content, (0, content.size), header, expires)
            return
        with understood(where):
            length = int(header["chunk_size"])
            count = -(-content.size // length)
            # The public Hub numbers them 00001, 00002 and so on.
            numbered = {int(name): each for name, each in header.items() if name.isdecimal()}
            addresses = [numbered[number] for number in range(1, count + 1)]

        def put(index: int) -> dict[str, Any]:
            span = (index * length, min((index + 1) * length, content.size))
            etag = self._put_stretch(where, addresses[index], content, span, {}, expires)
            return {"partNumber": index + 1, "etag": etag}

        done = {"oid": oid, "parts": self._in_threads(put, range(count))}
        try:
            self._session.call("POST", url, where, json=done, headers=_LFS, patient=True)
        except StorageError as exc:
            if type(exc) is not StorageError:
                raise
            # The parts are not what was announced, most likely.
            raise TransientError(f"{one_line(exc)}; the parts have to be sent again") from exc

    def _put_stretch(
        self,
        where: str,
        url: str,
        content: Content,
        span: tuple[int, int],
        headers: Mapping[str, str],
        expires: float,
    ) -> str:
        body = Stretch(content, *span, self._on_bytes, self._stop)
        response = self._session.send("PUT", url, where, headers=headers, body=body, patient=True)
        if response.status_code >= 300:
            fresh = time.monotonic() < expires
            raise self._session.error(response, where, fresh=fresh)
        self._session.discard(response)
        return response.headers.get("ETag", "")

    def _add(self, source: Source, file: _File, operations: Operations) -> None:
        if file.large:
            operations.add_large(file.key, file.oid, file.size)
            return
        with source.opened(file.key, file.item.payload, file.where) as content:
            data = content.data()
        file.oid = git_oid(data)
        operations.add_file(file.key, data)

    def _in_threads(self, function: Callable[[T], R], arguments: Iterable[T]) -> list[R]:
        """Call ``function`` for each argument, a few at once; the first failure ends them all."""
        work = list(arguments)
        if len(work) < 2 or self._threads < 2:
            return [function(argument) for argument in work]
        with ThreadPoolExecutor(min(self._threads, len(work)), "hub-upload") as pool:
            # What happens in a thread belongs to the span that began it.
            futures = [pool.submit(copy_context().run, function, argument) for argument in work]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                failures = [found for future in done if (found := future.exception()) is not None]
                if failures:
                    # What fails from here on fails because of this one.
                    self._failure = self._failure or failures[0]
                    raise self._failure
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [future.result() for future in futures]


def commit(
    hub: HubBackend,
    summary: str,
    operations: Operations,
    parent: str | None,
    where: str,
) -> str:
    """Commit and return the new commit.

    Raises:
        ObjectChangedError: the branch is not at ``parent``, or another commit came first.
        ModelMissingError: a file to be deleted is not there.
    """
    header = {"summary": f"{summary} with modelstorage", "description": ""}
    if parent is not None:
        header["parentCommit"] = parent
    response = hub.session.call(
        "POST",
        hub.api(f"commit/{quote(hub.revision, safe='')}"),
        where,
        headers={"Content-Type": "application/x-ndjson"},
        body=operations.after(header),
        patient=True,
    )
    with understood(where):
        return str(response.json()["commitOid"])


def wrong_files(hub: HubBackend, commit: str, expected: Mapping[str, str], where: str) -> list[str]:
    """Return those files of a commit that are not what was sent.

    What the Hub stores beside the commit it holds to the SHA-256 that was announced. What came
    within the commit is held to nothing.

    Args:
        hub: where it is.
        commit: that was just made.
        expected: the identities of the files, by their keys.
        where: for messages.
    """
    try:
        found = hub.files_at(commit, list(expected))
    except ModelMissingError as exc:
        raise TransientError(f"{where}: the commit {commit} cannot be looked at yet") from exc
    return [
        key
        for key, oid in expected.items()
        if (info := found.get(key)) is None or info.etag != f'"{oid}"'
    ]


def copy(hub: HubBackend, pairs: Sequence[tuple[str, str]], version: str | None = None) -> None:
    """Commit files of the repository again under other names, all in one commit.

    A large file is only named. A small one is part of the commit that holds it, so its few
    bytes pass through this machine.
    """
    hub.check_writable()
    for _, key in pairs:
        check_key(key, hub.where(key), writing=True)
    if not pairs:
        return
    where = hub.where(pairs[0][0] if len(pairs) == 1 else "")
    head = hub.commit_of(hub.revision, where)
    origin = hub.commit_of(version, where) if version is not None else head
    sources = hub.files_at(origin, [source for source, _ in pairs])
    found = hub.files_at(head, [key for _, key in pairs])
    changed: dict[str, str] = {}
    with Operations() as operations:
        for source, key in pairs:
            info = sources.get(source)
            if info is None:
                raise ModelMissingError(hub.where(source))
            there = found.get(key)
            if there is not None and there.etag == info.etag:
                continue
            changed[key] = (info.etag or "").strip('"')
            if info.digests:
                operations.add_large(key, info.digests[0].hex, info.size)
            else:
                with hub.read(source, pin=info) as body:
                    operations.add_file(key, b"".join(bytes(piece) for piece in body))
        if not changed:
            return
        summary = f"Copy {len(changed)} files" if len(changed) > 1 else f"Copy {source} to {key}"
        try:
            made = commit(hub, summary, operations, None, where)
        except ObjectChangedError as exc:
            raise _restless(where) from exc
    if wrong := wrong_files(hub, made, changed, where):
        raise _damaged(where, made, wrong)


def delete(hub: HubBackend, keys: Sequence[str]) -> None:
    """Delete those of ``keys`` that are there, in one commit."""
    hub.check_writable()
    for key in keys:
        check_key(key, hub.where(key), writing=True)
    if not keys:
        return
    where = hub.where(keys[0] if len(keys) == 1 else "")
    for _ in range(_ATTEMPTS):
        head = hub.commit_of(hub.revision, where)
        found = hub.files_at(head, list(dict.fromkeys(keys)))
        if not found:
            return
        summary = f"Delete {min(found) if len(found) == 1 else f'{len(found)} files'}"
        with Operations() as operations:
            for key in found:
                operations.add("deletedFile", {"path": key})
            try:
                commit(hub, summary, operations, head, where)
            except ObjectChangedError:
                continue
            return
    raise _restless(where)


def _damaged(where: str, commit: str, keys: Sequence[str]) -> TransientError:
    return TransientError(
        f"{where}: the commit {commit} holds something else than was sent ({few(keys)}); the way "
        "to the Hub damages what passes"
    )


def _restless(where: str) -> TransientError:
    return TransientError(f"{where}: others kept committing to the branch meanwhile")


def _actions(
    answer: Callable[[], Any], where: str
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return how to upload an object, if it has to be, and how to verify that it arrived.

    Raises:
        StorageError: the Hub does not take it.
    """
    with understood(where):
        told = answer()["objects"][0]
        problem = told.get("error")
        actions = told.get("actions") or {}
        upload, verify = actions.get("upload"), actions.get("verify")
        if not all(isinstance(each["href"], str) for each in (upload, verify) if each is not None):
            raise TypeError
    if problem:
        raise StorageError(
            f"{where}: the Hub does not take the file ({one_line(problem)}); see its message"
        )
    return upload, verify


def _plain(header: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in (header or {}).items()}
