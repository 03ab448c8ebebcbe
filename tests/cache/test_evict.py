"""A cache with a budget keeps to it, and gives up what was used least recently."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from storage import InsufficientSpaceError, InvalidInput, ModelMissingError, OfflineError
from storage.cache.evict import Evicted, delete, evict, make_room, trim
from storage.cache.partials import new_partial
from storage.cache.survey import occupied
from storage.cache.usage import models as cached_models
from storage.cache.usage import usage
from tests.cache.conftest import MakeClient
from tests.cache.models import KIB, Models, content
from tests.cache.processes import as_nobody, dead_owner, open_folder

HOUR = 3600.0
SIZE = 100 * KIB

MakeModels = Callable[..., Models]


@pytest.fixture
def make_models(make_client: MakeClient, tmp_path: Path) -> MakeModels:
    """Make models, and a client of the cache that evicts whatever nobody uses right now."""

    def make(**settings: object) -> Models:
        return Models(make_client(**{"cache_grace": 0} | settings), tmp_path / "fetched")

    return make


@pytest.fixture
def models(make_models: MakeModels) -> Models:
    """Models ``a``, ``b`` and ``c`` of 100 KiB in a cache of 300, used in this order."""
    found = make_models(cache_budget=3 * SIZE)
    for age, name in enumerate("cba"):
        found.add(name)
        found.used(name, (age + 1) * HOUR)
    return found


# -- the budget ----------------------------------------------------------------------------


def test_the_budget_is_kept_over_many_downloads(make_models: MakeModels) -> None:
    models = make_models(cache_budget=5 * SIZE)
    for number in range(30):
        models.add(f"model-{number}")
        assert occupied(models.cache) <= 5 * SIZE
        assert f"model-{number}" in models.there()
    assert len(models.there()) == 5


def test_without_a_budget_nothing_is_evicted(make_models: MakeModels) -> None:
    models = make_models()
    for name in "abcd":
        models.add(name)
    make_room(models.cache, 10**15)
    trim(models.cache)
    assert models.there() == set("abcd")


def test_what_fits_evicts_nothing(models: Models) -> None:
    models.put("d", {"file": b""})
    models.fetch("d")
    assert models.there() == set("abcd")


@pytest.mark.parametrize(("needed", "left"), [(1, "bc"), (SIZE, "bc"), (SIZE + 1, "c")])
def test_just_enough_goes_and_the_least_recently_used_first(
    models: Models, needed: int, left: str
) -> None:
    make_room(models.cache, needed)
    assert models.there() == set(left)
    assert occupied(models.cache) == len(left) * SIZE


def test_a_hit_is_a_use(models: Models) -> None:
    models.fetch("a", offline=True)
    make_room(models.cache, 1)
    assert models.there() == set("ac")


def test_what_is_evicted_leaves_nothing_and_comes_again(models: Models) -> None:
    path = models.keep("a")
    models.cache.close()
    models.used("a", 9 * HOUR)
    make_room(models.cache, 1)
    assert not os.path.exists(path)
    with pytest.raises(OfflineError, match="never cached"):
        models.fetch("a", offline=True)
    layout = models.cache.upper.layout
    left = models.manifests()
    assert left.keys() == {"b", "c"}
    assert set(os.listdir(layout.snapshots)) == {*models.cache.upper.manifests.ids()}
    assert {*models.cache.upper.manifests.ids()} == {*left.values()}
    assert os.listdir(layout.partial) == []
    models.fetch("a")
    assert models.there() == set("abc")


def test_what_models_share_stays_until_the_last_of_them_goes(make_models: MakeModels) -> None:
    models = make_models(cache_budget=4 * SIZE)
    shared = content("shared")
    models.add("a", {"shared": shared, "own": content("a")})
    models.add("b", {"shared": shared, "own": content("b")})
    models.used("a", 2 * HOUR)
    models.used("b", 1 * HOUR)
    assert occupied(models.cache) == 3 * SIZE
    gone = evict(models.cache, 2 * SIZE)
    assert (gone.models, gone.blobs) == (1, 1)
    # And what was written about it.
    assert SIZE < gone.bytes < SIZE + 8 * KIB
    assert models.there() == {"b"}
    evict(models.cache, 0)
    assert models.blobs() == set()


def test_a_model_of_which_others_need_all_does_not_go_for_nothing(
    make_models: MakeModels,
) -> None:
    models = make_models(cache_budget=3 * SIZE)
    models.add("part", {"shared": content("shared")})
    models.add("whole", {"shared": content("shared"), "more": content("more")})
    models.add("other")
    for age, name in enumerate(("other", "whole", "part")):
        models.used(name, (age + 1) * HOUR)
    models.cache.pin(models.location("whole"))
    make_room(models.cache, SIZE)
    assert models.there() == {"part", "whole"}


def test_copies_in_snapshots_count_and_go(make_models: MakeModels) -> None:
    models = make_models()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        info = tarfile.TarInfo("program")
        info.mode, info.size = 0o755, SIZE
        tar.addfile(info, io.BytesIO(content("program")))
    models.put("archive", {"a.tar": archive.getvalue()})
    uri = f"{models.uri('archive')}/a.tar"
    path = models.client.download(uri, unpack=True)
    assert os.access(os.path.join(path, "program"), os.X_OK)
    models.cache.close()
    assert occupied(models.cache) == 2 * SIZE
    assert usage(models.cache).copy_bytes == SIZE
    evict(models.cache, SIZE)
    assert occupied(models.cache) == 0
    assert not os.path.exists(path)


# -- what stays ----------------------------------------------------------------------------


def test_what_is_pinned_stays(models: Models) -> None:
    models.cache.pin(models.location("a"))
    make_room(models.cache, SIZE)
    assert models.there() == set("ac")


def test_what_a_process_uses_stays(models: Models) -> None:
    path = models.keep("a")
    models.used("a", 9 * HOUR)
    make_room(models.cache, SIZE)
    assert models.there() == set("ac")
    assert Path(path, "model.bin").read_bytes() == content("a")


def test_what_was_used_within_the_grace_period_stays(
    models: Models, make_client: MakeClient
) -> None:
    models.used("b", 0)
    models.used("c", -HOUR)  # the clock was set back
    models.use(make_client(cache_budget=3 * SIZE, cache_grace=1.5 * HOUR))
    make_room(models.cache, SIZE)
    assert models.there() == set("bc")
    with pytest.raises(InsufficientSpaceError):
        make_room(models.cache, 2 * SIZE)


def test_a_use_in_a_far_future_protects_nothing(models: Models, make_client: MakeClient) -> None:
    for name in "abc":
        models.used(name, -1000 * HOUR)
    models.use(make_client(cache_budget=3 * SIZE, cache_grace=HOUR))
    make_room(models.cache, 3 * SIZE)
    assert models.there() == set()


def test_what_cannot_fit_evicts_nothing_and_says_why(
    models: Models, make_client: MakeClient
) -> None:
    models.use(make_client(cache_budget=3 * SIZE, cache_grace=1.5 * HOUR))
    models.used("c", 0)
    models.cache.pin(models.location("a"))
    models.keep("b")
    with pytest.raises(InsufficientSpaceError) as caught:
        make_room(models.cache, 5000)
    message = str(caught.value)
    assert f"budget of {3 * SIZE} bytes, and 5000 more are needed: of {3 * SIZE}" in message
    assert f"{SIZE} are pinned, {SIZE} in use, {SIZE} were used within 5400 s and 0" in message
    assert "nothing was evicted" in message
    assert "STORAGE_CACHE_BUDGET" in message
    assert "\n" not in message
    assert models.there() == set("abc")


def test_a_download_that_cannot_fit_evicts_nothing(models: Models) -> None:
    models.cache.pin(models.location("c"))
    models.put("large", {"file": content("large", 2 * SIZE + 1)})
    with pytest.raises(InsufficientSpaceError, match=f"{SIZE} are pinned"):
        models.fetch("large")
    assert models.there() == set("abc")


def test_a_download_larger_than_the_budget_evicts_nothing(models: Models) -> None:
    models.put("huge", {"file": content("huge", 3 * SIZE + 1)})
    with pytest.raises(
        InsufficientSpaceError, match=f"budget of {3 * SIZE} bytes, and {3 * SIZE + 1}"
    ):
        models.fetch("huge")
    assert models.there() == set("abc")


def test_a_download_under_way_counts_and_stays(models: Models) -> None:
    with new_partial(models.cache.upper.path) as folder:
        Path(folder, "model").write_bytes(bytes(SIZE))
        make_room(models.cache, SIZE)
        assert models.there() == {"c"}
        with pytest.raises(InsufficientSpaceError, match=f"{SIZE} belong to downloads under way"):
            make_room(models.cache, 3 * SIZE)
        assert os.path.getsize(os.path.join(folder, "model")) == SIZE


def test_downloads_of_other_users_are_in_nobodys_way(make_client: MakeClient) -> None:
    with open_folder() as folder:
        models = Models(make_client(cache_dir=folder / "cache", cache_grace=0), folder / "fetched")
        models.add("a")
        with new_partial(models.cache.upper.path):

            def look() -> bool:
                told = usage(models.cache)
                return occupied(models.cache) == told.counted_bytes == told.blob_bytes == SIZE

            assert as_nobody(look)


def test_what_dead_processes_left_goes_before_any_model(models: Models) -> None:
    left = Path(models.cache.upper.layout.partial, f"{dead_owner().token}-00000000")
    left.mkdir()
    (left / "model").write_bytes(bytes(SIZE))
    make_room(models.cache, 1)
    assert not left.exists()
    assert models.there() == set("bc")


def test_what_nobody_can_find_goes_before_any_model(models: Models) -> None:
    models.put("c", {"model.bin": content("c, second version")})
    # Over the budget by nobody's fault.
    models.cache.budget = None
    models.fetch("c")
    models.used("a", 99 * HOUR)
    models.cache.budget = 3 * SIZE
    assert len(models.blobs()) == 4
    trim(models.cache)
    assert models.there() == set("abc")
    assert len(models.blobs()) == 3


# -- by hand -------------------------------------------------------------------------------


def test_evicting_to_a_size_goes_as_far_as_it_can(models: Models) -> None:
    models.cache.pin(models.location("b"))
    gone = evict(models.cache, 2 * SIZE)
    assert (gone.models, gone.blobs) == (1, 1)
    assert models.there() == set("bc")
    assert evict(models.cache, 2 * SIZE) == Evicted()
    assert evict(models.cache, 0).models == 1
    assert models.there() == {"b"}


def test_evicting_from_a_folder_that_is_no_cache_touches_nothing(
    make_client: MakeClient, cache: Path
) -> None:
    assert evict(make_client().cache, 0) == Evicted()
    assert not cache.exists()


def test_trimming_raises_nothing(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        models.cache.pin(models.location(name))
    models.cache.budget = SIZE
    trim(models.cache)
    assert models.there() == set("abc")


def test_a_source_is_deleted_however_lately_it_was_used(
    models: Models, make_client: MakeClient
) -> None:
    models.use(make_client())
    models.fetch("b")
    assert delete(models.cache, models.location("b")).models == 1
    assert models.there() == set("ac")
    with pytest.raises(ModelMissingError, match="is not in the cache"):
        delete(models.cache, models.location("b"))


def test_deleting_a_source_leaves_what_another_has_as_well(models: Models) -> None:
    models.cache.budget = None
    models.add("twin", dict(models.files["a"]))
    assert models.manifests()["twin"] == models.manifests()["a"]
    gone = delete(models.cache, models.location("a"))
    assert (gone.models, gone.blobs) == (0, 0)
    assert models.there() == {"twin", "b", "c"}


def test_all_variants_of_a_source_are_deleted(models: Models, tmp_path: Path) -> None:
    models.client.download(
        models.uri("a"), tmp_path / "filtered", cache=True, allow_patterns="*.bin"
    )
    assert len(cached_models(models.cache)) == 4
    delete(models.cache, models.location("a"))
    assert {model.uri for model in cached_models(models.cache)} == {
        models.uri("b"),
        models.uri("c"),
    }


def test_what_is_pinned_or_in_use_is_not_deleted(models: Models) -> None:
    models.cache.pin(models.location("a"))
    with pytest.raises(InvalidInput, match="is pinned"):
        delete(models.cache, models.location("a"))
    models.keep("b")
    with pytest.raises(InvalidInput, match="in use by a running process"):
        delete(models.cache, models.location("b"))
    assert models.there() == set("abc")


# -- what is there -------------------------------------------------------------------------


def test_the_models_of_a_cache_are_told(models: Models) -> None:
    path = models.keep("b")
    models.cache.pin(models.location("c"))
    os.unlink(
        models.cache.upper.blobs.path(
            models.cache.manifest(models.manifests()["a"]).files[0].digest
        )
    )
    found = {model.uri: model for model in cached_models(models.cache)}
    a, b, c = (found[models.uri(name)] for name in "abc")
    assert (a.complete, b.complete, c.complete) == (False, True, True)
    assert (a.pinned, b.pinned, c.pinned) == (False, False, True)
    assert (a.leased, b.leased, c.leased) == (False, True, False)
    assert (b.size, b.files, b.path) == (SIZE, 1, path)
    assert a.path is None or not os.path.exists(os.path.join(a.path, "model.bin"))
    assert b.manifest == models.manifests()["b"]


def test_what_a_cache_takes_is_told(models: Models, cache: Path) -> None:
    models.cache.pin(models.location("a"))
    models.keep("b")
    told = usage(models.cache)
    assert (told.root, told.models, told.blobs) == (str(cache), 3, 3)
    assert (told.blob_bytes, told.copy_bytes, told.partial_bytes) == (3 * SIZE, 0, 0)
    assert (told.pinned_bytes, told.leased_bytes) == (SIZE, SIZE)
    assert (told.budget, told.counted_bytes) == (3 * SIZE, 3 * SIZE)
    files = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()]
    assert told.total_bytes == sum(path.stat().st_size for path in files)
