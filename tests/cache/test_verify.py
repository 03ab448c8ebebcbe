"""Verifying a cache finds what is wrong and nothing else, and repairing makes it right again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import IntegrityError, OfflineError, StorageClient
from storage.cache import blobs as blobs_module
from storage.cache.blobs import Blobs
from storage.cache.manifests import Manifest, Manifests
from storage.cache.verify import Problem, Report, verify
from storage.digest import Digest, hash_file
from tests.cache.conftest import MakeClient
from tests.cache.parcels import archive
from tests.cache.support import Source, blob_files, flip_byte, tree_bytes, wrong_blobs
from tests.servers import OddHTTP, read_only_view
from tests.servers.odd_http import Reply, Request, StaticFile

MODEL = {"model.bin": b"weights" * 1000, "config/a.json": b"{}", "empty": b""}
LARGE = len(MODEL["model.bin"])

memory = pytest.mark.kinds("memory")


def check(client: StorageClient, *, full: bool = True) -> Report:
    return verify(client.cache, full=full)


def found(client: StorageClient, *, full: bool = True) -> list[str]:
    return [problem.kind for problem in check(client, full=full).problems]


def only(report: Report) -> Problem:
    (problem,) = report.problems
    return problem


def large_blob(cache: Path) -> Path:
    return next(path for path in blob_files(cache) if path.stat().st_size == LARGE)


# -- finding -------------------------------------------------------------------------------


@memory
@pytest.mark.parametrize("full", [False, True])
def test_a_cache_that_is_right_has_no_problems(
    client: StorageClient, source: Source, full: bool
) -> None:
    assert check(client, full=full) == Report(0, 0, ())
    client.download(source.put_model(MODEL))
    hashed: list[int] = []
    report = verify(client.cache, full=full, progress=hashed.append)
    size = sum(map(len, MODEL.values()))
    assert report == Report(len(MODEL), size if full else 0, ())
    assert sum(hashed) == report.bytes


@memory
@pytest.mark.parametrize("keep_times", [False, True])
def test_a_flipped_byte_is_found_and_put_away_and_the_model_named(
    client: StorageClient, source: Source, cache: Path, keep_times: bool
) -> None:
    uri = source.put_model(MODEL)
    other = source.put_model({"copy.bin": MODEL["model.bin"]}, "other")
    client.download(uri)
    client.download(other)
    blob = large_blob(cache)
    flip_byte(blob, 3000, keep_times=keep_times)
    # Who changes the time back can be found out by hashing only.
    assert found(client, full=False) == ([] if keep_times else ["blob"])
    if keep_times:
        problem = only(check(client))
        assert (problem.kind, problem.path) == ("blob", str(blob))
        assert problem.uris == tuple(sorted([uri, other]))
        assert problem.quarantined_to is not None
        assert Path(problem.quarantined_to).parent == cache / "quarantine"
        assert Path(problem.quarantined_to).stat().st_size == LARGE
    assert not blob.exists()
    assert wrong_blobs(cache) == []
    # What is in quarantine stays a problem of the models that it was a part of.
    problems = check(client).problems
    assert {problem.kind for problem in problems} == {"missing"}
    assert {uri for problem in problems for uri in problem.uris} == {uri, other}
    with pytest.raises(OfflineError, match="damaged"):
        client.download(uri, offline=True)


@memory
@pytest.mark.parametrize("full", [False, True])
def test_a_blob_of_another_size_is_found(
    client: StorageClient, source: Source, cache: Path, full: bool
) -> None:
    client.download(source.put_model(MODEL))
    blob = large_blob(cache)
    times = blob.stat()
    blob.chmod(0o644)
    os.truncate(blob, 100)
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert found(client, full=full) == ["blob"]


@memory
def test_a_blob_in_doubt_is_hashed_once(client: StorageClient, source: Source, cache: Path) -> None:
    client.download(source.put_model(MODEL))
    for blob in blob_files(cache):
        os.utime(blob)
    report = check(client, full=False)
    assert (report.bytes, report.problems) == (sum(map(len, MODEL.values())), ())
    assert check(client, full=False).bytes == 0


@memory
@pytest.mark.parametrize("full", [False, True])
def test_what_is_missing_damaged_or_strange_is_named(
    client: StorageClient, source: Source, cache: Path, full: bool
) -> None:
    uris = [source.put_model({"a": b"%d" % number}, f"m{number}") for number in range(3)]
    for uri in uris:
        client.download(uri)
    root = client.cache.upper
    refs = {Path(path).parent.name[-1]: path for path, _ in root.refs.paths()}
    manifests = {
        number: root.refs.read(path).manifest  # type: ignore[union-attr]
        for number, path in refs.items()
    }
    manifest = client.cache.upper.layout.manifest(manifests["0"])
    os.truncate(manifest, 20)
    os.truncate(refs["1"], 20)
    blob = root.manifests.load(manifests["2"]).files[0].digest  # type: ignore[union-attr]
    os.unlink(client.cache.upper.blobs.path(blob))
    strays = [cache / "blobs" / "x", cache / "blobs" / "blake3" / "ab" / "cd"]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_bytes(b"x")
    problems = check(client, full=full).problems
    assert {(problem.kind, problem.path, problem.uris) for problem in problems} == {
        ("manifest", manifest, (uris[0],)),
        ("ref", refs["1"], (uris[1],)),
        ("missing", client.cache.upper.layout.manifest(manifests["2"]), (uris[2],)),
        *(("stray", str(stray), ()) for stray in strays),
    }


@memory
def test_a_ref_that_leads_nowhere_is_named(client: StorageClient, source: Source) -> None:
    uri = source.put_model(MODEL)
    client.download(uri)
    (manifest_id,) = client.cache.upper.manifests.ids()
    os.unlink(client.cache.upper.layout.manifest(manifest_id))
    problem = only(check(client))
    assert (problem.kind, problem.uris) == ("ref", (uri,))


@memory
def test_a_list_of_files_that_nothing_leads_to_is_no_problem(
    client: StorageClient, source: Source, cache: Path
) -> None:
    client.download(source.put_model(MODEL))
    (ref,) = client.cache.upper.refs.all()
    large_blob(cache).unlink()
    assert found(client) == ["missing"]
    os.unlink(client.cache.upper.refs.path(ref.source))
    assert found(client) == []


def _add(folder: Path) -> None:
    (folder / "extra").write_text("mine")


def _remove(folder: Path) -> None:
    (folder / "model.bin").unlink()


def _replace(folder: Path) -> None:
    _remove(folder)
    (folder / "model.bin").symlink_to("config/a.json")


@memory
@pytest.mark.parametrize("damage", [_add, _remove, _replace])
def test_a_wrong_snapshot_is_made_anew(
    client: StorageClient, source: Source, damage: Callable[[Path], None]
) -> None:
    uri = source.put_model(MODEL)
    path = Path(client.download(uri))
    damage(path)
    problem = only(check(client, full=False))
    assert (problem.kind, problem.path, problem.uris) == ("snapshot", str(path), (uri,))
    assert tree_bytes(path) == MODEL
    assert found(client) == []


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_damaged_copy_of_a_program_is_made_anew(
    client: StorageClient, tmp_path: Path, keep_times: bool
) -> None:
    path = Path(client.download(archive(tmp_path), unpack=True))
    assert found(client) == []
    flip_byte(path / "bin" / "run", keep_times=keep_times)
    assert found(client, full=False) == ([] if keep_times else ["snapshot"])
    assert found(client) == (["snapshot"] if keep_times else [])
    assert (path / "bin" / "run").read_bytes() == b"#!/bin/sh\n" * 100
    assert found(client) == []


def test_a_copy_that_is_right_but_not_known_to_be_is_no_problem(
    client: StorageClient, tmp_path: Path
) -> None:
    path = Path(client.download(archive(tmp_path), unpack=True))
    os.utime(path / "bin" / "run")
    assert found(client, full=False) == []
    assert check(client, full=False).bytes == 0


# -- where nothing can be changed ------------------------------------------------------------


@memory
def test_a_read_only_cache_is_only_reported(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    client = make_client()
    path = Path(client.download(source.put_model(MODEL)))
    blob = large_blob(cache)
    flip_byte(blob)
    (path / "extra").write_text("mine")
    client.close()
    with read_only_view(cache) as view:
        report = check(make_client(cache_dir=view))
    assert sorted(problem.kind for problem in report.problems) == ["blob"]
    problem = only(report)
    assert problem.quarantined_to is None
    assert "cannot be moved" in problem.what
    assert blob.exists()


@memory
def test_lower_caches_are_verified_and_left_alone(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    before = blob_files(cache)
    flip_byte(large_blob(cache))
    upper = make_client(cache_dir=tmp_path / "upper", cache_lower=[cache])
    for _ in range(2):
        problem = only(check(upper, full=False))
        assert (problem.kind, problem.uris, problem.quarantined_to) == ("blob", (uri,), None)
    assert blob_files(cache) == before
    # What the lower cache has wrong comes into the upper one.
    assert tree_bytes(upper.download(uri)) == MODEL
    assert blob_files(cache) == before
    assert [Path(problem.path).is_relative_to(cache) for problem in check(upper).problems] == [True]


@memory
def test_a_model_may_be_in_two_caches(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model({"a": b"1"})
    make_client().download(uri)
    source.put_file("model/b", b"2")
    upper = make_client(cache_dir=tmp_path / "upper", cache_lower=[cache])
    upper.download(uri)
    assert len(blob_files(tmp_path / "upper")) == 1
    assert found(upper) == []


# -- while others work -----------------------------------------------------------------------


@memory
@pytest.mark.parametrize("full", [False, True])
def test_what_goes_away_meanwhile_is_no_problem(
    client: StorageClient, source: Source, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    client.download(source.put_model(MODEL))
    root = client.cache.upper
    (ref,) = root.refs.all()
    load = Manifests.load

    def evict(manifests: Manifests, manifest_id: str) -> Manifest | None:
        manifest = load(manifests, manifest_id)
        os.unlink(root.refs.path(ref.source))
        shutil.rmtree(root.layout.snapshots, ignore_errors=True)
        os.unlink(root.layout.manifest(manifest_id))
        for file in () if manifest is None else manifest.files:
            Path(root.blobs.path(file.digest)).unlink(missing_ok=True)
        return manifest

    monkeypatch.setattr(Manifests, "load", evict)
    assert found(client, full=full) == []


@memory
@pytest.mark.parametrize("settle", [False, True])
def test_a_right_blob_that_came_while_a_wrong_one_was_hashed_stays(
    client: StorageClient,
    source: Source,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settle: bool,
) -> None:
    client.download(source.put_model(MODEL))
    blob = large_blob(cache)
    flip_byte(blob)
    digest = Digest("blake3", blob.name)

    def hash_and_replace(file: Any, algorithms: Any) -> dict[str, Digest]:
        digests = hash_file(file, algorithms)
        monkeypatch.undo()
        # Another process has put it away and fetched it again.
        os.unlink(blob)
        fresh = tmp_path / "fresh"
        fresh.write_bytes(MODEL["model.bin"])
        Blobs(client.cache.upper.layout).add(str(fresh), digest, LARGE, durable=False)
        return digests

    monkeypatch.setattr(blobs_module, "hash_file", hash_and_replace)
    if settle:
        client.cache.settle(digest, LARGE)
    else:
        assert found(client, full=False) == []
    assert blob.read_bytes() == MODEL["model.bin"]
    assert not os.path.exists(cache / "quarantine") or not os.listdir(cache / "quarantine")


@memory
def test_blobs_of_a_download_that_did_not_end_are_no_problem(
    client: StorageClient, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifests, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            client.download(source.put_model(MODEL))
    report = check(client)
    assert (report.checked, report.problems) == (len(MODEL), ())


# -- repairing -------------------------------------------------------------------------------


@pytest.mark.kinds("memory", "s3", "hub")
def test_what_is_damaged_is_fetched_again_and_nothing_else(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    path = client.download(uri, config=source.config)
    client.download(source.put_model({"a": b"fine"}, "fine"), config=source.config)
    assert client.repair(full=True) == []
    flip_byte(large_blob(cache), keep_times=True)
    source.forget()
    assert client.repair() == []
    (repair,) = client.repair(full=True, config=source.config)
    assert (repair.uri, repair.outcome) == (uri, "repaired")
    assert set(source.bodies) == {"model/model.bin"}
    assert tree_bytes(path) == MODEL
    assert found(client) == []
    assert client.repair(full=True, config=source.config) == []


@pytest.mark.kinds("web")
def test_a_file_of_a_web_server_is_fetched_again(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model({"model.bin": MODEL["model.bin"]})
    path = client.download(uri)
    large_blob(cache).unlink()
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "repaired")
    assert Path(path).read_bytes() == MODEL["model.bin"]


@memory
@pytest.mark.parametrize("patterns", [{}, {"allow_patterns": ["*.bin"]}])
def test_a_damaged_list_of_files_is_made_again(
    client: StorageClient, source: Source, patterns: dict[str, Any]
) -> None:
    uri = source.put_model(MODEL)
    client.download(uri, **patterns)
    (manifest_id,) = client.cache.upper.manifests.ids()
    os.truncate(client.cache.upper.layout.manifest(manifest_id), 30)
    source.forget()
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "repaired")
    assert source.bodies == []
    assert found(client) == []
    client.download(uri, offline=True, **patterns)


def test_an_archive_is_fetched_and_unpacked_again(
    client: StorageClient, tmp_path: Path, cache: Path
) -> None:
    model = archive(tmp_path)
    path = client.download(model, unpack=True)
    before = tree_bytes(path)
    for blob in blob_files(cache):
        blob.unlink()
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (str(model), "repaired")
    assert tree_bytes(path) == before
    assert found(client) == []


@memory
def test_a_source_that_has_changed_gives_its_new_version(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    client.download(uri)
    large_blob(cache).unlink()
    source.put_model({"model.bin": b"new"})
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "changed")
    assert tree_bytes(client.download(uri, offline=True)) == {"model.bin": b"new"}
    assert found(client) == []


@memory
def test_a_source_that_is_gone_or_may_not_be_asked_is_told(
    make_client: MakeClient, source: Source, cache: Path
) -> None:
    client = make_client()
    uri = source.put_model({"model.bin": MODEL["model.bin"]})
    client.download(uri)
    large_blob(cache).unlink()
    (repair,) = make_client(offline=True).repair()
    assert (repair.outcome, type(repair.error)) == ("failed", OfflineError)
    source.delete("model/model.bin")
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "failed")
    assert "has it no more" in repair.what
    assert found(client) == ["missing"]


def test_a_source_that_does_not_answer_is_told(
    make_client: MakeClient, odd_http: Callable[..., OddHTTP], cache: Path
) -> None:
    file = StaticFile(MODEL["model.bin"])
    working = True

    def answer(request: Request) -> Reply:
        return file(request) if working else Reply(503)

    client = make_client(transfer={"attempts": 1})
    uri = f"{odd_http(answer).url}/model.bin"
    client.download(uri)
    large_blob(cache).unlink()
    working = False
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "failed")
    assert "503" in repair.what
    assert repair.error is not None


def test_a_uri_with_a_secret_cannot_be_asked_again(
    client: StorageClient, odd_http: Callable[..., OddHTTP], cache: Path
) -> None:
    server = odd_http(StaticFile(MODEL["model.bin"]))
    uri = f"{server.url}/model.bin?token=SECRET"
    client.download(uri)
    large_blob(cache).unlink()
    server.clear()
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (f"{server.url}/model.bin?…", "unknown")
    assert "whole URI" in repair.what
    assert server.requests == []
    assert "SECRET" not in repr(repair)
    client.download(uri)
    assert client.repair() == []


@pytest.mark.kinds("s3")
def test_another_endpoint_is_not_asked(client: StorageClient, source: Source, cache: Path) -> None:
    uri = source.put_model(MODEL)
    client.download(uri, config=source.config)
    large_blob(cache).unlink()
    (repair,) = client.repair()
    assert (repair.uri, repair.outcome) == (uri, "unknown")
    assert source.fields["endpoint_url"] in repair.what
    (repair,) = client.repair(config=source.config)
    assert repair.outcome == "repaired"


@memory
def test_what_cannot_be_repaired_is_put_out_of_the_way(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_model(MODEL)
    client.download(uri)
    ((ref, _),) = client.cache.upper.refs.paths()
    os.truncate(ref, 20)
    stray = cache / "blobs" / "blake3" / "stray"
    stray.write_bytes(b"x")
    repairs = {repair.uri: repair for repair in client.repair()}
    assert set(repairs) == {uri, str(stray)}
    assert (repairs[uri].outcome, repairs[str(stray)].outcome) == ("unknown", "repaired")
    assert found(client) == []
    assert client.repair() == []


@memory
def test_damage_is_repaired_from_what_a_lower_cache_had(
    make_client: MakeClient, source: Source, cache: Path, tmp_path: Path
) -> None:
    uri = source.put_model(MODEL)
    make_client().download(uri)
    flip_byte(large_blob(cache))
    upper = make_client(cache_dir=tmp_path / "upper", cache_lower=[cache])
    (repair,) = upper.repair()
    assert (repair.uri, repair.outcome) == (uri, "repaired")
    assert tree_bytes(upper.download(uri, offline=True)) == MODEL


@memory
def test_an_expected_digest_is_still_compared_after_a_repair(
    client: StorageClient, source: Source, cache: Path
) -> None:
    uri = source.put_file("model.bin", MODEL["model.bin"])
    client.download(uri)
    large_blob(cache).unlink()
    client.repair()
    with pytest.raises(IntegrityError):
        client.download(uri, digest="0" * 64, offline=True)
