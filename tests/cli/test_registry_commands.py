"""`storage registry …`."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

import storage
from storage.cli import main
from storage.container.signatures.bundles import sign_tree
from storage.registry import ModelRegistry, PendingVersion
from tests.cli.conftest import FILES, Command, Result, read_tree, write_tree
from tests.container.signing_keys import key_pair

NEXT = {name: data for name, data in FILES.items() if name != "empty.txt"} | {
    "config.json": b'{"model_type": "tree"}\n',
    "notes.txt": b"better",
}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Where the registry is, or is going to be."""
    return f"file://{tmp_path}/registry"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "model", FILES)


@pytest.fixture
def registry(uri: str, model: Path, tmp_path: Path) -> ModelRegistry:
    """A registry with two versions of one model."""
    found = ModelRegistry(uri)
    found.init()
    found.push("iris", model, metrics={"accuracy": 0.5})
    found.push("iris", write_tree(tmp_path / "next", NEXT), description="better", parent=1)
    found.set_alias("iris", "production", 1)
    return found


class Inside:
    """Runs the command in this process, which is quicker."""

    def __init__(self, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
        self._captured = capsysbinary

    def __call__(self, *args: str | Path) -> Result:
        self._captured.readouterr()
        status = main(["registry", *map(str, args)])
        out, err = self._captured.readouterr()
        return Result(status, out, err.decode())


@pytest.fixture
def run(capsysbinary: pytest.CaptureFixture[bytes]) -> Inside:
    return Inside(capsysbinary)


# -- the life of a model ---------------------------------------------------------------------


def test_a_model_is_published_and_used_by_processes(
    command: Command, uri: str, model: Path, tmp_path: Path
) -> None:
    assert command("registry", "init", uri).status == 0
    pushed = command("registry", "push", uri, "iris", model, "--alias", "production")
    assert (pushed.status, pushed.lines) == (0, ["iris@1"])
    assert "published iris@1" in pushed.err
    pulled = command("registry", "pull", uri, "iris@production", tmp_path / "out")
    assert (pulled.status, pulled.lines) == (0, [str(tmp_path / "out")])
    assert read_tree(tmp_path / "out") == FILES
    cached = command("registry", "pull", uri, "iris", "--quiet")
    assert (cached.status, cached.err) == (0, "")
    assert read_tree(Path(cached.lines[0])) == FILES
    os.rename(tmp_path / "registry", tmp_path / "elsewhere")
    away = command("registry", "pull", uri, "iris@1", "--offline", "--quiet")
    assert (away.status, away.lines, away.err) == (0, cached.lines, "")
    never = command("registry", "pull", uri, "lily", "--offline", "--json")
    assert (never.status, never.out) == (1, b"")


def test_the_commands_of_the_page_run(
    run: Inside, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, files in (("model", FILES), ("better", NEXT)):
        write_tree(tmp_path / "out" / name, files)
    page = Path(storage.__file__).parents[1] / "docs" / "registry.md"
    (block,) = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    block = block.replace("s3://models/registry", uri).replace("/mnt/", f"{tmp_path}/mnt/")
    for line in block.splitlines():
        result = run(*shlex.split(line)[2:])
        assert result.status == 0, (line, result.err)
    assert read_tree(tmp_path / "mnt" / "models") == NEXT


def test_init_says_whether_there_was_one(run: Inside, uri: str, tmp_path: Path) -> None:
    where = str(tmp_path / "registry")
    assert run("init", uri, "--json").json == {"ok": True, "uri": where, "created": True}
    assert run("init", uri, "--json").json == {"ok": True, "uri": where, "created": False}
    result = run("init", uri)
    assert (result.status, result.out) == (0, b"")
    assert "already" in result.err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_bytes(b"")
    result = run("init", tmp_path / "other")
    assert (result.status, "holds something" in result.error) == (1, True)
    # It is not even asked.
    result = run("init", "http://127.0.0.1:9/registry")
    assert (result.status, "only if it is absent" in result.error) == (1, True)


def test_without_a_registry_there_is_advice(run: Inside, uri: str, model: Path) -> None:
    for args in (
        ("push", uri, "iris", model),
        ("pull", uri, "iris"),
        ("ls", uri),
        ("show", uri, "iris"),
        ("alias", uri, "iris"),
        ("diff", uri, "iris", "1"),
        ("rm", uri, "iris@1"),
        ("gc", uri),
    ):
        result = run(*args)
        assert (result.status, result.out) == (1, b"")
        assert "registry init" in result.error


# -- push ------------------------------------------------------------------------------------


def test_push_takes_all_that_can_be_said_of_a_version(
    run: Inside, uri: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    folder = write_tree(tmp_path / "third", {"a.bin": b"a", "b.txt": b"b"})
    result = run(
        *("push", uri, "iris", folder, "--ignore", "*.txt", "--parent", "2"),
        *("--description", "a third one", "--tag", "stage=test", "--tag", "small"),
        *("--set", "optimizer=adam", "--set", "epochs:=3", "--metric", "accuracy=0.75"),
        *("--alias", "staging", "--alias", "canary", "--json"),
    )
    assert (result.status, result.err) == (0, "")
    document = result.json
    assert (document["model"], document["number"], document["existing"]) == ("iris", 3, False)
    assert (document["aliases"], document["moved"]) == (["staging", "canary"], 1)
    version = registry.show("iris", "canary")
    assert [file.path for file in version.files] == ["a.bin"]
    assert version.parent == 2
    assert version.attributes.document() == {
        "description": "a third one",
        "tags": {"stage": "test", "small": ""},
        "configuration": {"optimizer": "adam", "epochs": 3},
        "metrics": {"accuracy": 0.75},
    }


def test_what_is_published_already_is_the_version_that_it_is(
    run: Inside, uri: str, registry: ModelRegistry, model: Path
) -> None:
    result = run("push", uri, "iris", model, "--alias", "again")
    assert (result.status, result.lines) == (0, ["iris@1"])
    assert "has these files already" in result.err
    document = run("push", uri, "iris", model, "--json").json
    assert (document["number"], document["existing"], document["moved"]) == (1, True, 0)
    assert registry.aliases("iris") == {"production": 1, "again": 1}
    assert registry.numbers("iris") == [1, 2]


def test_what_somebody_else_published_meanwhile_was_not_published_by_this(
    run: Inside,
    uri: str,
    registry: ModelRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_tree(tmp_path / "third", {"a.bin": b"a"})
    claim = PendingVersion._claim

    def overtaken(pending: PendingVersion) -> int:
        monkeypatch.setattr(PendingVersion, "_claim", claim)
        registry.push("iris", folder)
        return claim(pending)

    monkeypatch.setattr(PendingVersion, "_claim", overtaken)
    document = run("push", uri, "iris", folder, "--json").json
    assert (document["number"], document["existing"], document["moved"]) == (3, True, 1)


# -- pull ------------------------------------------------------------------------------------


def test_pull_says_what_moved(
    run: Inside, uri: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    document = run("pull", uri, "iris@1", tmp_path / "out", "--json").json
    assert (document["model"], document["version"]) == ("iris", 1)
    assert (document["path"], document["size"]) == (str(tmp_path / "out"), SIZE)
    assert (document["objects"], document["moved"]) == (len(FILES), SIZE)
    assert run("pull", uri, "iris@production", "--json").json["moved"] == SIZE
    # Of the other version the cache has the larger part.
    new = sum(len(data) for name, data in NEXT.items() if FILES.get(name) != data)
    assert run("pull", uri, "iris", "--json").json["moved"] == new
    assert "here already" in run("pull", uri, "iris").err


@pytest.mark.filterwarnings("default:.*the cached copy is used")
def test_pull_tells_the_number_of_an_alias_offline_too(
    run: Inside, uri: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    def number(*args: str | Path) -> object:
        return run("pull", uri, *args, "--json").json["number"]

    assert number("iris@1", tmp_path / "out") == number("iris@production") == 1
    assert number("iris") == 2
    assert number("iris@production", "--freshness", "cache-first") == 1
    registry.set_alias("iris", "production", 2)
    (tmp_path / "registry").rename(tmp_path / "elsewhere")
    assert number("iris@production", "--offline") == 1
    assert number("iris", tmp_path / "other", "--offline") == 2
    assert main(["cache", "rm", f"{uri}/models/iris@1/"]) == 0
    assert number("iris@production", "--offline") is None


def test_pull_takes_the_options_of_a_download(
    run: Inside, uri: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_tree(out, {"mine.txt": b"mine"})
    pull = ("pull", uri, "iris@1", out, "--allow", "*.json", "--ignore", "x*")
    assert run(*pull).status == 1
    assert run(*pull, "--overwrite", "--cache", "--link", "symlink").status == 0
    assert read_tree(out) == {"config.json": FILES["config.json"]}
    assert (out / "config.json").is_symlink()
    keys = key_pair(tmp_path / "keys")
    refused = run("pull", uri, "iris", tmp_path / "no", "--require-signature", keys.public)
    assert (refused.status, "is not signed" in refused.error) == (1, True)
    assert not (tmp_path / "no").exists()
    sign_tree(write_tree(tmp_path / "signed", FILES), key=keys.private)
    run("push", uri, "iris", tmp_path / "signed")
    assert run("pull", uri, "iris", "--require-signature", keys.public).status == 0


def test_the_cache_tells_where_a_version_is(
    command: Command, uri: str, registry: ModelRegistry, tmp_path: Path
) -> None:
    path = command("registry", "pull", uri, "iris@production", "--quiet").lines
    for reference in ("production", "1"):
        source = f"{uri}/models/iris@{reference}/"
        assert command("cache", "path", source).lines == path
        assert source.removeprefix("file://") in command("cache", "ls").out.decode()
    never = command("cache", "path", f"{uri}/models/iris@2/")
    assert (never.status, never.out) == (1, b"")
    assert "never cached" in never.error
    # And where the registry is not there.
    (tmp_path / "registry").rename(tmp_path / "elsewhere")
    assert command("cache", "path", f"{uri}/models/iris@1/").lines == path


# -- looking ---------------------------------------------------------------------------------


def test_ls_lists_models_and_versions(
    run: Inside, uri: str, registry: ModelRegistry, model: Path
) -> None:
    registry.push("lily", model)
    assert run("ls", uri).lines == ["iris", "lily"]
    assert run("ls", uri, "--json").json == ["iris", "lily"]
    first, second = (line.split() for line in run("ls", uri, "iris").lines)
    assert (first[:3], first[4:]) == (["1", str(SIZE), str(len(FILES))], ["production"])
    assert (second[0], second[4:]) == ("2", ["-", "better"])
    one, two = run("ls", uri, "iris", "--json").json
    assert (one["number"], one["aliases"], one["size"], one["parent"]) == (
        1,
        ["production"],
        SIZE,
        None,
    )
    assert (one["metrics"], two["description"], two["parent"]) == ({"accuracy": 0.5}, "better", 1)
    assert "files" not in one


def test_ls_gives_pages(run: Inside, uri: str, registry: ModelRegistry, tmp_path: Path) -> None:
    for number in range(3, 6):
        registry.push("iris", write_tree(tmp_path / str(number), {"n": str(number).encode()}))

    def numbers(*args: str) -> list[int]:
        return [each["number"] for each in run("ls", uri, "iris", "--json", *args).json]

    assert numbers() == [1, 2, 3, 4, 5]
    assert numbers("--limit", "2") == [1, 2]
    assert numbers("--limit", "2", "--after", "2") == [3, 4]
    assert numbers("--after", "4") == [5]
    assert numbers("--after", "5") == []


def test_show_describes_a_version(run: Inside, uri: str, registry: ModelRegistry) -> None:
    registry.update("iris", 1, tags={"stage": "tested"})
    lines = run("show", uri, "iris@production").lines
    for line in ("model: iris", "number: 1", "aliases: production", f"size: {SIZE}"):
        assert line in lines
    assert "metrics.accuracy: 0.5" in lines
    assert "tags.stage: tested" in lines
    assert [line.split()[1] for line in lines[-len(FILES) :]] == sorted(FILES)
    document = run("show", uri, "iris", "--json").json
    assert (document["number"], document["description"]) == (2, "better")
    assert [file["path"] for file in document["files"]] == sorted(NEXT)
    assert set(document["files"][0]) == {"path", "size", "blake3", "sha256"}


def test_texts_of_many_lines_are_shown_in_one(
    run: Inside, uri: str, registry: ModelRegistry
) -> None:
    registry.update("iris", 2, description="better\n+ model.bin", tags={"why": "a\r\nb"})
    shown = run("show", uri, "iris").lines
    assert "description: better + model.bin" in shown
    assert "tags.why: a b" in shown
    assert ": description:  -> better + model.bin" in run("diff", uri, "iris", "1").lines
    assert run("ls", uri, "iris").lines[1].endswith("better + model.bin")


def test_diff_tells_what_changed(run: Inside, uri: str, registry: ModelRegistry) -> None:
    result = run("diff", uri, "iris", "production")
    assert result.lines == [
        "~ config.json",
        "- empty.txt",
        "+ notes.txt",
        ": description:  -> better",
        ": metrics.accuracy: 0.5 -> None",
        ": parent: None -> 1",
    ]
    assert "1 added, 1 removed, 1 changed, 2 unchanged" in result.err
    document = run("diff", uri, "iris", "1", "2", "--json").json
    assert (document["old"], document["new"]) == (1, 2)
    assert [file["path"] for file in document["added"]] == ["notes.txt"]
    assert [file["path"] for file in document["removed"]] == ["empty.txt"]
    assert [pair["new"]["path"] for pair in document["changed"]] == ["config.json"]
    assert document["unchanged"] == ["tokenizer/merges.txt", "weights.bin"]
    assert document["fetched"] == len(NEXT["config.json"]) + len(NEXT["notes.txt"])
    assert document["attributes"]["description"] == {"old": "", "new": "better"}


# -- aliases ---------------------------------------------------------------------------------


def test_aliases_move_only_from_where_they_are_expected(
    run: Inside, uri: str, registry: ModelRegistry
) -> None:
    assert run("alias", uri, "iris").lines == ["production 1"]
    moved = run("alias", uri, "iris@2", "production", "--expected", "1", "--json")
    assert moved.json == {"ok": True, "model": "iris", "alias": "production", "number": 2}
    lost = run("alias", uri, "iris@1", "production", "--expected", "1", "--json")
    assert (lost.status, lost.json_error["type"]) == (1, "ObjectChangedError")
    assert run("alias", uri, "iris@production", "staging", "--expected", "none").status == 0
    assert run("alias", uri, "iris@1", "staging", "--expected", "none").status == 1
    assert run("alias", uri, "iris", "--json").json == {"production": 2, "staging": 2}
    assert [
        line.split()[1] for line in run("alias", uri, "iris", "production", "--history").lines
    ] == [
        "2",
        "1",
    ]
    assert run("alias", uri, "iris", "staging", "--delete", "--expected", "1").status == 1
    assert run("alias", uri, "iris", "staging", "--delete").status == 0
    assert registry.aliases("iris") == {"production": 2}
    entries = run("alias", uri, "iris", "staging", "--history", "--json").json
    assert [entry["version"] for entry in entries] == [None, 2]
    assert run("alias", uri, "iris@7", "staging").status == 1


def test_a_misspelt_model_or_alias_is_noticed(
    run: Inside, uri: str, registry: ModelRegistry, model: Path
) -> None:
    missing = run("alias", uri, "irsi", "--json")
    assert (missing.status, missing.json_error["type"]) == (1, "ModelMissingError")
    never = run("alias", uri, "iris", "porduction", "--history")
    assert (never.status, never.out) == (0, b"")
    assert "was never set" in never.err
    registry.push("lily", model)
    assert run("alias", uri, "lily", "--json").json == {}


# -- removing --------------------------------------------------------------------------------


def test_what_is_deleted_is_collected(run: Inside, uri: str, registry: ModelRegistry) -> None:
    refused = run("rm", uri, "iris@1")
    assert (refused.status, "production" in refused.error) == (1, True)
    removed = run("rm", uri, "iris@1", "--force", "--json")
    assert removed.json == {"ok": True, "model": "iris", "number": 1}
    assert run("rm", uri, "iris@1").status == 1
    foreseen = run("gc", uri, "--dry-run", "--json").json
    done = run("gc", uri, "--json").json
    assert foreseen["freed"] == done["freed"] == len(FILES["config.json"])
    assert run("gc", uri, "--json").json["removed"] == 0
    assert run("pull", uri, "iris@2").status == 0
    note = run("gc", uri, "--grace", "60")
    assert (note.status, note.out) == (0, b"")
    assert "removed 0 blobs" in note.err


# -- misuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("push", "R", "a/b", "src"), "name of a model"),
        (("push", "R", "iris", "s3://b/src"), "local path"),
        (("push", "R", "iris", "src", "--metric", "loss=low"), "NAME=NUMBER"),
        (("push", "R", "iris", "src", "--set", "epochs:=x"), "not JSON"),
        (("push", "R", "iris", "src", "--alias", "latest"), "is not set"),
        (("pull", "R", "iris@"), "alias"),
        (("pull", "R", "iris@0"), "from 1"),
        (("ls", "R", "--after", "1"), "MODEL"),
        (("ls", "R", "iris", "--limit", "many"), "number"),
        (("alias", "R", "iris@1"), "ALIAS is missing"),
        (("alias", "R", "iris", "production"), "as in iris@1"),
        (("alias", "R", "iris@1", "production", "--delete"), "takes a version"),
        (("alias", "R", "iris", "--expected", "1"), "--expected"),
        (("rm", "R", "iris"), "as in iris@1"),
        (("rm", "R", "iris@production"), "by its number"),
        (("gc", "R", "--grace", "-1"), "seconds"),
    ],
)
def test_misuse_has_its_own_status(run: Inside, args: tuple[str, ...], text: str) -> None:
    result = run(*args)
    assert (result.status, result.out) == (2, b"")
    assert text in result.error
