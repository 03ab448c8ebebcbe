"""A pinned source keeps what it has, and what it will have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage import ModelMissingError
from storage.cache.cache import ModelCache
from storage.cache.evict import evict
from storage.cache.pins import Pin
from storage.cache.refs import Ref, Source, identity_of
from storage.cache.survey import Survey
from storage.uri import Location, parse_uri
from tests.cache.conftest import MakeClient
from tests.cache.models import Models, content


@pytest.fixture
def models(make_client: MakeClient, tmp_path: Path) -> Models:
    """Two models in a cache that evicts whatever nobody uses right now."""
    found = Models(make_client(cache_grace=0), tmp_path / "fetched")
    found.add("a")
    found.add("b")
    return found


def note(cache: ModelCache, location: Location, origin: str = "") -> Ref:
    """Let the cache say that ``location`` had a model that is there, whatever it is."""
    manifest = next(iter(cache.upper.manifests.ids()))
    source = Source(location.scheme, str(location), identity_of(location), origin)
    ref = Ref(source, manifest, 1.0, 1.0)
    cache.upper.refs.set(ref)
    return ref


def pinned(models: Models) -> set[str]:
    return Survey(models.cache).pinned


def test_a_pin_is_told_and_taken_back(models: Models) -> None:
    assert models.cache.pin(models.location("a"))
    assert not models.cache.pin(models.location("a"))
    (pin,) = models.cache.pins.all()
    assert isinstance(pin, Pin)
    assert (pin.scheme, pin.uri) == ("memory", models.uri("a"))
    assert pinned(models) == {models.manifests()["a"]}
    assert models.cache.unpin(models.location("a"))
    assert not models.cache.unpin(models.location("a"))
    assert models.cache.pins.all() == []
    assert pinned(models) == set()


def test_nothing_is_unpinned_where_no_cache_is(make_client: MakeClient, cache: Path) -> None:
    assert not make_client().cache.unpin(parse_uri("s3://bucket/model"))
    assert not cache.exists()


def test_what_is_not_cached_cannot_be_pinned(models: Models) -> None:
    models.put("c")
    with pytest.raises(ModelMissingError, match=r"is not in the cache .* download it first"):
        models.cache.pin(models.location("c"))
    assert models.cache.pins.all() == []


def test_pinning_does_not_make_a_cache(make_client: MakeClient, cache: Path) -> None:
    with pytest.raises(ModelMissingError):
        make_client().cache.pin(parse_uri("s3://bucket/model"))
    assert not cache.exists()


def test_what_was_evicted_while_it_was_pinned_is_not_pinned(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = models.cache.pins.add

    def slowly(location: Location) -> bool:
        evict(models.cache, 0)
        return add(location)

    monkeypatch.setattr(models.cache.pins, "add", slowly)
    with pytest.raises(ModelMissingError):
        models.cache.pin(models.location("a"))
    assert models.cache.pins.all() == []


def test_a_pin_follows_new_versions(models: Models) -> None:
    models.cache.pin(models.location("a"))
    models.put("a", {"model.bin": content("a, second version")})
    models.fetch("a")
    evict(models.cache, 0)
    assert models.there() == {"a"}
    assert len(models.blobs()) == 1


def test_a_pin_holds_for_all_filters(models: Models, tmp_path: Path) -> None:
    models.put("c", {"model.bin": content("c"), "vocabulary": b"words"})
    uri = models.uri("c")
    models.client.download(uri, tmp_path / "some", cache=True, allow_patterns="*.bin")
    models.cache.pin(models.location("c"))
    models.client.download(uri, tmp_path / "others", cache=True, ignore_patterns="*.bin")
    evict(models.cache, 0)
    found = list(models.cache.upper.refs.all())
    assert {ref.source.uri for ref in found} == {uri}
    assert len({ref.manifest for ref in found}) == 2


def test_a_pin_stays_until_the_model_comes_back(models: Models) -> None:
    models.cache.pin(models.location("a"))
    for ref in list(models.cache.upper.refs.all()):
        os.unlink(models.cache.upper.refs.path(ref.source))
    models.fetch("a")
    models.fetch("b")
    evict(models.cache, 0)
    assert models.there() == {"a"}


def test_a_damaged_pin_holds(models: Models) -> None:
    models.cache.pin(models.location("a"))
    (path,) = Path(models.cache.upper.layout.pins).iterdir()
    path.write_bytes(b"torn by a power cut")
    evict(models.cache, 0)
    assert models.there() == {"a"}
    models.cache.pin(models.location("a"))
    assert [pin.uri for pin in models.cache.pins.all()] == [models.uri("a")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://host/m?part=1", "https://host/m?part=2"),
        ("http://host/m", "https://host/m"),
        ("s3://bucket/m", "gs://bucket/m"),
        ("s3://bucket/m", "s3://bucket/m?versionId=v2"),
    ],
)
def test_a_pin_is_of_one_source_only(models: Models, one: str, other: str) -> None:
    note(models.cache, parse_uri(one))
    with pytest.raises(ModelMissingError):
        models.cache.pin(parse_uri(other))
    assert models.cache.pin(parse_uri(one))
    assert not models.cache.unpin(parse_uri(other))


def test_a_new_signature_is_the_same_source_and_no_secret_is_kept(
    models: Models, cache: Path
) -> None:
    signed = "https://user:hunter2@host/m?v=1&X-Amz-Date={0}&X-Amz-Signature=s3cret{0}"
    note(models.cache, parse_uri(signed.format(1)))
    assert models.cache.pin(parse_uri(signed.format(2)))
    for path in cache.rglob("*"):
        text = str(path) if not path.is_file() else f"{path}{path.read_bytes()!r}"
        assert "s3cret" not in text
        assert "hunter2" not in text


def test_a_pin_holds_for_every_endpoint(models: Models) -> None:
    location = parse_uri("s3://bucket/m")
    note(models.cache, location, origin="https://minio.example")
    assert models.cache.pin(location)
    assert pinned(models) != set()


def test_what_only_a_lower_cache_has_can_be_pinned(
    models: Models, make_client: MakeClient, tmp_path: Path, cache: Path
) -> None:
    models.use(make_client(cache_dir=tmp_path / "upper", cache_lower=(cache,)))
    assert models.cache.pin(models.location("a"))
    assert os.listdir(tmp_path / "upper" / "pins")
    assert not (cache / "pins").exists()
