"""Stores of the cases that keep repositories: Hubs, registries of images, git."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from tests.backends.oci_support import Entry, Pusher
from tests.integrations.kserve.places import Files, Place, Servers
from tests.servers import OddHTTP, Reply
from tests.servers.git_http import PASSWORD, USER, GitHTTP
from tests.servers.modelscope import TOKEN, ModelScope
from tests.servers.registry import PASSWORD as REGISTRY_PASSWORD
from tests.servers.registry import USER as REGISTRY_USER
from tests.servers.registry import Registry

Layer = list[Entry | tuple[str, bytes]]


class Repositories(Servers):
    """Puts the files of a case into repositories."""

    def _hf(self, name: str, files: Files, claims: Sequence[Path], private: bool = False) -> Place:
        """Use a Hub; files below ``v1:`` are those of the branch, the tag and a pull request."""
        repo = self.hub.repo(f"owner/{name}", private=private)
        first, last = _of_revisions(files)
        commit = self.hub.put(repo, first or last)
        repo.branches["v1"] = repo.tags["1.0"] = repo.pulls["refs/pr/1"] = commit.id
        if first:
            self.hub.put(repo, last)
        token = self._scratch / "hub-token"
        token.write_text(self.hub.writer.token)
        names = {
            "commit": commit.id,
            "token": self.hub.writer.token,
            "token_file": str(token),
        }
        return Place(f"hf://owner/{name}", {"HF_ENDPOINT": self.hub.url}, names)

    def _hf_private(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        return self._hf(name, files, claims, private=True)

    def _hf_short(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use a model without an owner, as the oldest ones are."""
        repo = self.hub.repo(name)
        self.hub.put(repo, _of_revisions(files)[1])
        return Place(f"hf://{name}", {"HF_ENDPOINT": self.hub.url})

    # --- images ---------------------------------------------------------------------------------

    def _oci(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use an image as KServe wants it, all below ``/models``, in one layer by gzip."""
        return self._image(name, [_below("models/", files)])

    def _oci_plain(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        return self._image(name, [_below("models/", files)], coding="")

    def _oci_zstd(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        return self._image(name, [_below("models/", files)], coding="zstd")

    def _oci_root(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        return self._image(name, [_below("", files)])

    def _oci_layers(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use two layers, of which the upper one has the files and the lower one other bytes."""
        first, *_ = files
        return self._image(name, [[(f"models/{first}", b"1")], _below("models/", files)])

    def _oci_whiteout(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use two layers, of which the upper one removes the last file."""
        *_, last = files
        return self._image(name, [_below("models/", files), [(f"models/.wh.{last}", b"")]])

    def _oci_link(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use a layer in which ``b`` is the same file as the first."""
        first, *_ = files
        link = Entry("models/b", hard=f"models/{first}")
        return self._image(name, [[*_below("models/", files), link]])

    def _oci_private(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use a registry that asks for a password; the variables lead to it."""
        server = self._get("oci_private_registry")
        assert isinstance(server, Registry)
        login = base64.b64encode(f"{REGISTRY_USER}:{REGISTRY_PASSWORD}".encode()).decode()
        place = self._image(name, [_below("models/", files)], server, login=login)
        config = self._scratch / "docker.json"
        config.write_text(json.dumps({"auths": {server.host: {"auth": login}}}))
        place.environment["KSERVE_OCI_DOCKER_CONFIG"] = str(config)
        return place

    def _image(
        self,
        name: str,
        layers: list[Layer],
        server: Registry | None = None,
        coding: str = "gzip",
        login: str = "",
    ) -> Place:
        if server is None:
            found = self._get("oci_registry")
            assert isinstance(found, Registry)
            server = found
        headers = {"Authorization": f"Basic {login}"} if login else {}
        pusher = Pusher.of(server, name, **headers)
        digest = pusher.image("v1", layers, coding)["digest"]
        names = {"image": pusher.uri(), "digest": pusher.uri(f"@{digest}")}
        return Place(pusher.uri(":v1"), {"KSERVE_OCI_INSECURE_REGISTRY": "true"}, names)

    # --- git ------------------------------------------------------------------------------------

    def _git(self, name: str, files: Files, claims: Sequence[Path], place: str = "open") -> Place:
        server = self._once("git", self._start_git)
        server.create(name)
        server.commit(name, dict(_plain(files)))
        # As the class of the URI says, it is https.
        front = self._front("git-tls", f"http://127.0.0.1:{server.port}")
        settings = self._scratch / "git-settings"
        (settings / "git").mkdir(parents=True, exist_ok=True)
        (settings / "git" / "config").write_text(f"[http]\n\tsslCAInfo = {front.ca_file}\n")
        environment = {
            "REQUESTS_CA_BUNDLE": str(front.ca_file),
            "XDG_CONFIG_HOME": str(settings),
        }
        beside = f"{front.endpoint}/{place}"
        names = {
            "beside": beside,
            "named": f"{beside}/{name}.git".replace("https://", f"https://{USER}@"),
            "password": PASSWORD,
            "user": USER,
        }
        return Place(f"{beside}/{name}.git", environment, names)

    def _start_git(self) -> GitHTTP:
        folder = self._scratch / "git"
        folder.mkdir()
        return self._stack.enter_context(GitHTTP(folder))

    def _git_private(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        return self._git(name, files, claims, "private")

    # --- ModelScope -----------------------------------------------------------------------------

    def _modelscope(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use ModelScope; files below ``v1:`` are those of a revision."""

        def start() -> ModelScope:
            return ModelScope(self._stack.enter_context(OddHTTP(lambda _: Reply(500))))

        server = self._once("modelscope", start)
        first, last = _of_revisions(files)
        server.models[f"owner/{name}"] = {"master": last, "v1": first}
        environment = {"MODELSCOPE_ENDPOINT": server.server.url}
        return Place(f"modelscope://owner/{name}", environment, {"token": TOKEN})

    def _modelscope_private(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        place = self._modelscope(name, files, claims)
        server: ModelScope = self._once("modelscope", _never)
        server.private.add(f"owner/{name}")
        return place


def _never() -> ModelScope:
    raise AssertionError("it runs already")


def _plain(files: Files) -> dict[str, bytes]:
    plain = {path: content for path, content in files.items() if isinstance(content, bytes)}
    assert len(plain) == len(files)
    return plain


def _below(folder: str, files: Files) -> Layer:
    return [(folder + path, content) for path, content in _plain(files).items()]


def _of_revisions(files: Files) -> tuple[dict[str, bytes], dict[str, bytes]]:
    first: dict[str, bytes] = {}
    last: dict[str, bytes] = {}
    for path, content in files.items():
        assert isinstance(content, bytes)
        of, name = (first, path[3:]) if path.startswith("v1:") else (last, path)
        of[name] = content
    return first, last
