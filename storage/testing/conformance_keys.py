"""What must hold of keys: they are literal, whatever is in them."""

from __future__ import annotations

from functools import partial

import pytest

from storage.backends.base import Backend, bytes_payload
from storage.errors import InvalidInput, ModelMissingError, StorageError
from storage.testing.conformance_support import (
    Raw,
    Scenario,
    fails,
    in_threads,
    keys_of,
    needs,
    read_all,
    stored,
)
from storage.transfer.retry import RetryPolicy

__all__ = ["Keys"]

# 900 characters in parts that every file system can hold.
_LONG = "/".join(["k" * 224] * 4)
assert len(_LONG) == 899

_ODD = {
    "space": "a b/c d.bin",
    "outer-spaces": " a / b ",
    "percent": "a%41/100%",
    "percent-slash": "a%2Fb",
    "plus": "a+b",
    "brackets": "w[1].bin",
    "hash": "n#1/#2",
    "accent": "modèle/é",
    "accent-decomposed": "mode\u0300le/e\u0301",
    "other-scripts": "模型/модель/🤗.bin",
    "question-mark": "a?b",
    "version-query": "a?versionId=1",
    "ampersand": "a&b=c&amp;d",
    "star": "a*b/**",
    "tilde": "~a/~",
    "colon": "a:b",
    "braces": "{a}/{b,c}",
    "quotes": 'it\'s/"quoted"',
    "backslash": "a\\b/c\\",
    "backslash-dots": "a\\..\\c",
    "angles": "a<b>c|d^e`f",
    "punctuation": "a;b,c@d$e!f(g)h=i",
    "hidden": ".hidden/.git",
    "dots": "a..b/.../..c/d.",
    "dashes": "-rf/--help",
    "long": _LONG + "9",
    "part-of-255": "x/" + "p" * 255,
    "scheme": "s3:/bucket",
}
_ODD_SEGMENTS = {
    "empty-segment": "a//b",
    "leading-slash": "/a",
    "dot-segment": "a/./b",
    "dot-dot-segment": "a/../b",
    "dot-dot-first": "../a",
}
_ALIKE = {
    "case": ("m/Model", "m/model"),
    "plus-and-space": ("m/a+b", "m/a b"),
    "escaped-letter": ("m/%41", "m/A"),
    "escaped-percent": ("m/%2541", "m/%41"),
    "escaped-slash": ("m/a%2Fb", "m/a/b"),
    "unicode-form": ("m/\u00e9", "m/e\u0301"),
    "escaped-accent": ("m/%C3%A9", "m/\u00e9"),
    "glob": ("m/w[1]", "m/w1"),
    "extension": ("m/a", "m/a.bin"),
    "trailing-dot": ("m/a", "m/a."),
    "trailing-space": ("m/a", "m/a "),
}


class Keys(Scenario):
    """Each kind of key is a test of its own, so that an exception can be declared for it."""

    @pytest.mark.parametrize("key", _ODD.values(), ids=_ODD)
    def test_odd_key_is_read(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put(key, b"12345")
        info = backend.stat(key)
        assert (info.key, info.size) == (key, 5)
        with backend.read(key, pin=info) as body:
            assert body.info.key == key
            assert b"".join([bytes(piece) for piece in body]) == b"12345"

    @needs("list")
    @pytest.mark.parametrize("key", _ODD.values(), ids=_ODD)
    def test_odd_key_is_listed(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put(key, b"12345")
        raw.put("other", b"1")
        assert keys_of(backend.list()) == sorted([key, "other"])

    @needs("list")
    @pytest.mark.parametrize("key", _ODD.values(), ids=_ODD)
    def test_odd_prefix_is_literal(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put(f"{key}/x", b"1")
        raw.put(f"{key}/y/z", b"1")
        raw.put("other/x", b"1")
        assert keys_of(backend.list(f"{key}/")) == [f"{key}/x", f"{key}/y/z"]

    @needs("write")
    @pytest.mark.parametrize("key", _ODD.values(), ids=_ODD)
    def test_odd_key_is_written(self, backend: Backend, raw: Raw, key: str) -> None:
        info = backend.write(key, bytes_payload(b"12345"))
        assert info.key == key
        assert raw.keys() == {key}
        assert raw.get(key) == b"12345"

    @needs("copy")
    @pytest.mark.parametrize("key", _ODD.values(), ids=_ODD)
    def test_odd_key_is_copied(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put(key, b"12345")
        backend.copy(key, "plain")
        backend.copy("plain", f"copies/{key}")
        assert raw.keys() == {key, "plain", f"copies/{key}"}
        assert raw.get("plain") == raw.get(f"copies/{key}") == b"12345"

    @needs("delete")
    @pytest.mark.parametrize("key", _ODD.values(), ids=_ODD)
    def test_odd_key_is_deleted(self, backend: Backend, raw: Raw, key: str) -> None:
        raw.put(key, b"12345")
        raw.put("other", b"1")
        backend.delete([key])
        assert raw.keys() == {"other"}

    @needs("write")
    @pytest.mark.parametrize("key", _ODD_SEGMENTS.values(), ids=_ODD_SEGMENTS)
    def test_key_of_odd_segments_is_literal_or_refused(
        self, backend: Backend, raw: Raw, key: str
    ) -> None:
        # What such a key becomes when somebody normalises it.
        raw.put("a/b", b"old")
        raw.put("b", b"old")
        before = raw.keys()
        if backend.capabilities.any_key:
            backend.write(key, bytes_payload(b"12345"))
            assert stored(raw, key) == b"12345"
            assert raw.keys() == before | {key}
            assert backend.stat(key).key == key
            assert read_all(backend, key) == b"12345"
        else:
            with fails(InvalidInput):
                backend.write(key, bytes_payload(b"12345"))
            assert raw.keys() == before
        assert raw.get("a/b") == raw.get("b") == b"old"

    @pytest.mark.parametrize("key", _ODD_SEGMENTS.values(), ids=_ODD_SEGMENTS)
    def test_key_of_odd_segments_is_not_another_object(
        self, backend: Backend, raw: Raw, key: str
    ) -> None:
        raw.put("a/b", b"old")
        raw.put("b", b"old")
        expected = ModelMissingError if backend.capabilities.any_key else InvalidInput
        with fails(expected):
            backend.stat(key)
        with fails(expected):
            read_all(backend, key)

    @needs("delete")
    @pytest.mark.parametrize("key", _ODD_SEGMENTS.values(), ids=_ODD_SEGMENTS)
    def test_delete_of_odd_segments_removes_no_other_object(
        self, backend: Backend, raw: Raw, key: str
    ) -> None:
        raw.put("a/b", b"old")
        raw.put("b", b"old")
        if backend.capabilities.any_key:
            backend.delete([key])
        else:
            with fails(InvalidInput):
                backend.delete(["b", key])
        assert raw.keys() == {"a/b", "b"}

    @needs("list")
    def test_prefix_of_odd_segments_is_literal_or_refused(self, backend: Backend, raw: Raw) -> None:
        raw.put("a/b", b"1")
        if backend.capabilities.any_key:
            raw.put("a//b", b"1")
            assert keys_of(backend.list("a//")) == ["a//b"]
            assert keys_of(backend.list("a/")) == ["a//b", "a/b"]
        else:
            with fails(InvalidInput):
                list(backend.list("a//"))

    @pytest.mark.parametrize("pair", _ALIKE.values(), ids=_ALIKE)
    def test_keys_that_look_alike_are_two(
        self, backend: Backend, raw: Raw, pair: tuple[str, str]
    ) -> None:
        first, second = pair
        raw.put(first, b"first")
        with fails(ModelMissingError):
            backend.stat(second)
        raw.put(second, b"second")
        assert read_all(backend, first) == b"first"
        assert read_all(backend, second) == b"second"
        if backend.capabilities.list:
            assert keys_of(backend.list("m/")) == sorted(pair)

    def test_key_may_be_the_beginning_of_another(self, backend: Backend, raw: Raw) -> None:
        raw.put("m/k", b"1")
        raw.put("m/k/child", b"12")
        assert read_all(backend, "m/k") == b"1"
        assert read_all(backend, "m/k/child") == b"12"
        if backend.capabilities.list:
            assert keys_of(backend.list("m/k/")) == ["m/k/child"]

    @needs("write")
    def test_empty_key_is_refused(self, backend: Backend, raw: Raw) -> None:
        with fails(StorageError):
            backend.write("", bytes_payload(b"1"))
        with fails(StorageError):
            backend.stat("")
        assert raw.keys() == set()

    @needs("write")
    def test_key_with_a_nul_is_refused(self, backend: Backend, raw: Raw) -> None:
        with fails(StorageError):
            backend.write("a\0b", bytes_payload(b"1"))
        assert raw.keys() == set()

    @needs("list")
    def test_many_keys_under_one_prefix(self, backend: Backend, raw: Raw) -> None:
        keys = [f"many/{number:05}" for number in range(self.count)]
        if backend.capabilities.write:
            # A backend makes one attempt, and of thousands some may fail for a passing reason.
            attempts = RetryPolicy()
            writes = [partial(backend.write, key, bytes_payload(key.encode())) for key in keys]
            in_threads([partial(attempts.run, write) for write in writes], 16)
        else:
            for key in keys:
                raw.put(key, key.encode())
        raw.put("many-more/1", b"1")
        raw.put("man", b"1")
        found = list(backend.list("many/"))
        assert sorted(info.key for info in found) == keys
        assert {info.size for info in found} == {len(keys[0])}
        assert raw.keys() == {*keys, "many-more/1", "man"}
        if backend.capabilities.delete:
            backend.delete(keys)
            assert list(backend.list("many/")) == []
            assert raw.keys() == {"many-more/1", "man"}
