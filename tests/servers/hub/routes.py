"""The read side of the test Hub's API, and who may use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.servers.hub.state import Account, Commit, Entry, Repo, State
from tests.servers.hub.wire import Answer, Request, problem

if TYPE_CHECKING:
    from tests.servers.hub.server import Hub

__all__ = ["Denied", "Routes", "identify", "ranged"]

_TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
_ACTIONS = {
    "branch",
    "commit",
    "commits",
    "lfs-files",
    "paths-info",
    "preupload",
    "refs",
    "resolve",
    "revision",
    "tag",
    "tree",
    "xet-read-token",
    "xet-write-token",
}


class Denied(Exception):
    """The request is refused; the answer says why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer.status))
        self.answer = answer


def identify(state: State, request: Request) -> Account | None:
    """Return whose token the request brings.

    Raises:
        Denied: it is nobody's.
    """
    if "authorization" not in request.headers:
        return None
    account = state.accounts.get(request.token or "")
    if account is None:
        raise Denied(problem(401, "Invalid credentials in Authorization header"))
    return account


def ranged(request: Request, file: Path, size: int, headers: dict[str, str]) -> Answer:
    """Return a file's bytes, or the range of them that is asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or match.group(0) == "bytes=-":
        return Answer(200, headers, file=file)
    first, last = match.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    if start >= size or start >= end:
        return Answer(416, {**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Answer(206, headers, file=file, span=(start, end))


class Routes:
    """Answers what reads; ``uploads.py`` has what writes."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._state = hub.state

    # -- who may -----------------------------------------------------------------------------

    def repo(self, kind: str, name: str, request: Request, *, write: bool = False) -> Repo:
        """Return a repository that the request may read (or write).

        Raises:
            Denied: it may not, or there is none; which of the two, an anonymous request is
                not told.
        """
        account = identify(self._state, request)
        repo = self._state.repos.get((kind, name))
        if repo is not None and repo.private and (account is None or not account.owns(repo)):
            repo = None
        if repo is None:
            if account is None:
                raise Denied(problem(401, "Invalid username or password.", "RepoNotFound"))
            raise Denied(problem(404, "Repository not found", "RepoNotFound"))
        if write:
            if account is None:
                raise Denied(problem(401, "Invalid username or password."))
            if not account.writes or not account.owns(repo):
                raise Denied(
                    problem(
                        403,
                        "You don't have the rights to write to this repository, or your token "
                        "has not the required permissions",
                    )
                )
        return repo

    def _check_terms(self, repo: Repo, request: Request) -> None:
        if not repo.gated:
            return
        account = identify(self._state, request)
        if account is None:
            message = f"Access to {repo.type} {repo.id} is restricted. You must have access to it "
            raise Denied(problem(401, f"{message}and be authenticated to it.", "GatedRepo"))
        if not account.owns(repo) and account.name not in repo.admitted:
            message = f"Access to {repo.type} {repo.id} is restricted and you are not in the "
            raise Denied(problem(403, f"{message}authorized list.", "GatedRepo"))

    def commit(self, repo: Repo, revision: str) -> Commit:
        """Return the commit that ``revision`` means.

        Raises:
            Denied: there is none.
        """
        commit = repo.find(revision)
        if commit is None:
            raise Denied(problem(404, f"Invalid rev id: {revision}", "RevisionNotFound"))
        return commit

    # -- dispatch ----------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        parts = request.parts
        if parts[0] == "api":
            return self._api(request, parts[1:])
        kind = "model"
        if parts[0] in ("datasets", "spaces"):
            kind, parts = _TYPES[parts[0]], parts[1:]
        for length in (1, 2):
            name = "/".join(parts[:length])
            rest = parts[length:]
            if rest[:1] == ["resolve"] and len(rest) > 2:
                if new := self._state.renamed.get((kind, name)):
                    return self._moved(request, name, new)
                return self._resolve(request, kind, name, rest[1], "/".join(rest[2:]))
            if parts[length - 1].endswith(".git") and rest[:2] == ["info", "lfs"]:
                name = name.removesuffix(".git")
                return self._hub.uploads.lfs(request, kind, name, rest[2:])
        return problem(404, "Not found")

    def _moved(self, request: Request, old: str, new: str) -> Answer:
        return Answer(307, {"Location": request.path.replace(old, new, 1)})

    def _api(self, request: Request, parts: list[str]) -> Answer:
        if parts == ["whoami-v2"]:
            return self._whoami(request)
        if parts == ["validate-yaml"]:
            return Answer.json({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            return self._hub.uploads.create_repo(request)
        if parts == ["complete-multipart"]:
            return self._hub.uploads.complete(request)
        if parts[0] == "resolve-cache":
            kind, name = _TYPES[parts[1]], "/".join(parts[2:-2])
            for length in (1, 2):  # the name has one part or two
                name = "/".join(parts[2 : 2 + length])
                if (kind, name) in self._state.repos:
                    rest = parts[2 + length :]
                    return self._cached(request, kind, name, rest[0], "/".join(rest[1:]))
            return problem(404, "Not found")
        if parts[0] not in _TYPES or len(parts) < 2:
            return problem(404, "Not found")
        kind = _TYPES[parts[0]]
        length = 2 if len(parts) > 2 and parts[2] not in _ACTIONS else 1
        if len(parts) > 3 and parts[3] in _ACTIONS and (kind, parts[1]) not in self._state.repos:
            length = 2
        name, rest = "/".join(parts[1 : 1 + length]), parts[1 + length :]
        if new := self._state.renamed.get((kind, name)):
            return self._moved(request, name, new)
        action = rest[0] if rest else "revision"
        routes: dict[tuple[str, str], Callable[..., Answer]] = {
            ("GET", "revision"): self._info,
            ("GET", "tree"): self._tree,
            ("POST", "paths-info"): self._paths,
            ("GET", "refs"): self._refs,
            ("GET", "commits"): self._commits,
            ("GET", "lfs-files"): self._lfs_files,
            ("POST", "preupload"): self._hub.uploads.preupload,
            ("POST", "commit"): self._hub.uploads.commit,
            ("POST", "branch"): self._hub.uploads.create_branch,
            ("POST", "tag"): self._hub.uploads.create_tag,
        }
        route = routes.get((request.method, action))
        if route is None:
            return problem(404, "Not found")
        return route(request, kind, name, *rest[1:2], "/".join(rest[2:]))

    # -- answers -----------------------------------------------------------------------------

    def _whoami(self, request: Request) -> Answer:
        account = identify(self._state, request)
        if account is None:
            return problem(401, "Invalid username or password.")
        role = "write" if account.writes else "read"
        return Answer.json(
            {
                "type": "user",
                "id": account.name,
                "name": account.name,
                "orgs": [{"type": "org", "name": name} for name in account.orgs],
                "auth": {"type": "access_token", "accessToken": {"role": role}},
            }
        )

    def _resolve(self, request: Request, kind: str, name: str, revision: str, path: str) -> Answer:
        repo = self.repo(kind, name, request)
        commit = self.commit(repo, revision)
        self._check_terms(repo, request)
        entry = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.id}
        if entry is None:
            answer = problem(404, "Entry not found", "EntryNotFound")
            answer.headers.update(headers)
            return answer
        headers |= {
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(entry.size),
            "X-Linked-ETag": f'"{entry.etag}"',
        }
        if entry.lfs:
            # An ETag of the redirect itself, as the Hub sends it: nothing to go by.
            headers |= {"ETag": f'"{entry.git}"', "Location": self._hub.cdn_url(entry)}
            return Answer(302, headers)
        if self._hub.direct:
            headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.etag}"'}
            return self._file(request, entry, headers)
        where = "/".join(quote(part, safe="") for part in (*name.split("/"), commit.id))
        location = f"/api/resolve-cache/{kind}s/{where}/{quote(entry.path)}?etag=%22{entry.etag}%22"
        return Answer(307, {**headers, "ETag": f'"{entry.etag}"', "Location": location})

    def _cached(self, request: Request, kind: str, name: str, oid: str, path: str) -> Answer:
        repo = self.repo(kind, name, request)
        commit = self.commit(repo, oid)
        self._check_terms(repo, request)
        entry = commit.files.get(path)
        if entry is None:
            return problem(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.etag}"'}
        return self._file(request, entry, headers)

    def _file(self, request: Request, entry: Entry, headers: dict[str, str]) -> Answer:
        return ranged(request, self._state.blobs.path(entry.sha256), entry.size, headers)

    def _info(
        self, request: Request, kind: str, name: str, revision: str = "main", _: str = ""
    ) -> Answer:
        repo = self.repo(kind, name, request)
        commit = self.commit(repo, revision or "main")
        if wanted := request.arguments.get("expand"):
            known = {"sha": commit.id, "private": repo.private, "lastModified": commit.stamp}
            chosen = {name: known[name] for name in wanted if name in known}
            return Answer.json({"_id": commit.id[:24], "id": repo.id} | chosen)
        blobs = request.argument("blobs") in ("true", "True", "1")
        siblings = []
        for entry in sorted(commit.files.values(), key=lambda entry: entry.path):
            sibling: dict[str, Any] = {"rfilename": entry.path}
            if blobs:
                sibling |= {"blobId": entry.git, "size": entry.size}
                if entry.lfs:
                    lfs = entry.described()["lfs"]
                    assert isinstance(lfs, dict)
                    sibling["lfs"] = {
                        "sha256": entry.sha256,
                        "size": entry.size,
                        "pointerSize": lfs["pointerSize"],
                    }
            siblings.append(sibling)
        return Answer.json(
            {
                "_id": commit.id[:24],
                "id": repo.id,
                "modelId": repo.id,
                "author": repo.id.partition("/")[0],
                "sha": commit.id,
                "lastModified": commit.stamp,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(
        self, request: Request, kind: str, name: str, revision: str = "main", path: str = ""
    ) -> Answer:
        repo = self.repo(kind, name, request)
        commit = self.commit(repo, revision)
        folder = f"{path.rstrip('/')}/" if path else ""
        below = [each for each in commit.files.values() if each.path.startswith(folder)]
        if path and not below:
            return problem(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        recursive = (request.argument("recursive") or "").lower() == "true"
        expand = (request.argument("expand") or "").lower() == "true"
        items = list(_below(commit, below, folder, recursive))
        if expand:
            for item in items:
                item["lastCommit"] = _last_commit(repo, commit, str(item["path"]))
        size = min(int(request.argument("limit") or self._hub.page), self._hub.page)
        begin = int(request.argument("cursor") or 0)
        answer = Answer.json(items[begin : begin + size])
        if begin + size < len(items):
            kept = f"recursive={recursive}&expand={expand}&limit={size}&cursor={begin + size}"
            answer.headers["Link"] = f'<{self._hub.url}{request.path}?{kept}>; rel="next"'
        return answer

    def _paths(
        self, request: Request, kind: str, name: str, revision: str = "main", _: str = ""
    ) -> Answer:
        repo = self.repo(kind, name, request)
        commit = self.commit(repo, revision)
        data = request.data().decode()
        if "json" in request.headers.get("content-type", ""):
            asked = json.loads(data)
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = Request("hub", "GET", "", data, {}, request.stream).arguments
            paths = form.get("paths", [])
            expand = form.get("expand", [""])[0].lower() == "true"
        found: list[dict[str, object]] = []
        for path in paths:
            entry = commit.files.get(path)
            if entry is not None:
                item = entry.described()
            elif any(each.startswith(f"{path}/") for each in commit.files):
                item = {"type": "directory", "oid": commit.id, "size": 0, "path": path}
            else:
                continue
            if expand:
                item["lastCommit"] = _last_commit(repo, commit, path)
            found.append(item)
        return Answer.json(found)

    def _refs(self, request: Request, kind: str, name: str, *_: str) -> Answer:
        repo = self.repo(kind, name, request)

        def named(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"{prefix}{name}", "targetCommit": oid}
                for name, oid in names.items()
            ]

        answer = {
            "branches": named(repo.branches, "refs/heads/"),
            "tags": named(repo.tags, "refs/tags/"),
            "converts": [],
        }
        if request.argument("include_prs"):
            answer["pullRequests"] = named(repo.pulls, "")
        return Answer.json(answer)

    def _commits(
        self, request: Request, kind: str, name: str, revision: str = "main", _: str = ""
    ) -> Answer:
        repo = self.repo(kind, name, request)
        return Answer.json(
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.stamp,
                    "authors": [{"user": commit.author}],
                }
                for commit in _history(repo, self.commit(repo, revision))
            ]
        )

    def _lfs_files(self, request: Request, kind: str, name: str, *_: str) -> Answer:
        repo = self.repo(kind, name, request, write=True)
        head = repo.head()
        return Answer.json(
            [
                {
                    "fileOid": entry.sha256,
                    "filename": entry.path,
                    "oid": entry.sha256,
                    "pushedAt": head.stamp,
                    "ref": "main",
                    "size": entry.size,
                }
                for entry in head.files.values()
                if entry.lfs
            ]
        )


def _below(
    commit: Commit, entries: Iterable[Entry], folder: str, recursive: bool
) -> Iterator[dict[str, object]]:
    folders: set[str] = set()
    for entry in sorted(entries, key=lambda entry: entry.path):
        parts = entry.path[len(folder) :].split("/")
        for length in range(1, len(parts) if recursive else min(2, len(parts))):
            path = folder + "/".join(parts[:length])
            if path not in folders:
                folders.add(path)
                yield {"type": "directory", "oid": commit.id, "size": 0, "path": path}
        if recursive or len(parts) == 1:
            yield entry.described()


def _history(repo: Repo, commit: Commit) -> Iterator[Commit]:
    current: Commit | None = commit
    while current is not None:
        yield current
        current = None if current.parent is None else repo.commits.get(current.parent)


def _last_commit(repo: Repo, commit: Commit, path: str) -> dict[str, str]:
    def at(commit: Commit) -> object:
        below = f"{path}/"
        return [
            (each.path, each.git)
            for each in commit.files.values()
            if each.path == path or each.path.startswith(below)
        ]

    last, now = commit, at(commit)
    for each in _history(repo, commit):
        if at(each) != now:
            break
        last = each
    return {"id": last.id, "title": last.title, "date": last.stamp}
