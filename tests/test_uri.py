"""URIs: what each form means, what is refused, and what is never shown."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import InvalidInput
from storage.uri import SUPPORTED_PROTOCOLS, Location, parse_uri

SHA = "a" * 64


@pytest.mark.parametrize(
    ("uri", "scheme", "bucket", "key"),
    [
        ("s3://bucket/key", "s3", "bucket", "key"),
        ("S3://bucket/key", "s3", "bucket", "key"),
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3", "bucket", ""),
        ("s3://bucket/a/b/", "s3", "bucket", "a/b/"),
        ("s3://bucket//a", "s3", "bucket", "/a"),
        ("gs://bucket/key", "gs", "bucket", "key"),
        ("gcs://bucket/key", "gs", "bucket", "key"),
        ("azure://container/key", "azure", "container", "key"),
        ("az://container/key", "azure", "container", "key"),
        ("pvc://claim/key", "pvc", "claim", "key"),
        ("memory://name/key", "memory", "name", "key"),
        ("oci://h.example:5000/a/b", "oci", "h.example:5000/a/b", ""),
        ("oci://H.example/a/b:v1", "oci", "h.example/a/b", ""),
        ("oci+fetch://h.example/a:v1/m/x y", "oci", "h.example/a", "m/x y"),
        ("oci://localhost/a", "oci", "localhost/a", ""),
        ("oci://[::1]:5000/a", "oci", "[::1]:5000/a", ""),
        ("oci://busybox", "oci", "docker.io/library/busybox", ""),
        ("oci://owner/model:v1", "oci", "docker.io/owner/model", ""),
        ("file:///abs/path", "file", "", "abs/path"),
        ("file://localhost/abs/path", "file", "", "abs/path"),
        ("/abs/path", "file", "", "abs/path"),
        ("http://host:8080/a/b", "http", "host:8080", "a/b"),
        ("https://host/a/b", "https", "host", "a/b"),
        ("https://host//a//b", "https", "host", "/a//b"),
        ("https://u:p@HOST:8443/a%20b?x=1#top", "https", "host:8443", "a%20b"),
        ("http://[::1]:8080/a", "http", "[::1]:8080", "a"),
        ("sftp://host/a/b", "sftp", "host", "a/b"),
    ],
)
def test_form_of_a_uri(uri: str, scheme: str, bucket: str, key: str) -> None:
    location = parse_uri(uri)
    assert (location.scheme, location.bucket, location.key) == (scheme, bucket, key)


@pytest.mark.parametrize(
    "key", ["a b", "%41", "a+b", "[1]", "x#y", "é", "a?b=c", "a&b", "~", "#sha256=12", "*"]
)
@pytest.mark.parametrize("scheme", ["s3", "gs", "azure", "pvc", "memory"])
def test_keys_are_literal(scheme: str, key: str) -> None:
    location = parse_uri(f"{scheme}://bucket/models/{key}")
    assert location.key == f"models/{key}"
    assert parse_uri(f"{scheme}://bucket/models").child(key).key == f"models/{key}"
    assert parse_uri(f"{scheme}://bucket/models/").child(key).key == f"models/{key}"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_any_key_survives(key: str) -> None:
    location = parse_uri(f"s3://bucket/k/{key}.bin")
    assert location.key == f"k/{key}.bin"
    assert parse_uri(str(location)) == location


def test_plain_path_is_absolute_and_keeps_its_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(parse_uri("models/iris")) == f"{tmp_path}/models/iris"
    assert parse_uri("models/iris/").forces_tree
    assert parse_uri(tmp_path).key == str(tmp_path).lstrip("/")


@pytest.mark.parametrize(
    ("uri", "version"),
    [
        ("s3://b/k?versionId=3sL4kqtJlcpXro.rMSpXd3dI", "3sL4kqtJlcpXro.rMSpXd3dI"),
        ("gs://b/k?generation=1700000000000000", "1700000000000000"),
    ],
)
def test_pinned_version(uri: str, version: str) -> None:
    location = parse_uri(uri)
    assert (location.key, location.version) == ("k", version)
    assert str(location) == uri


def test_pin_of_another_store_is_part_of_the_key() -> None:
    assert parse_uri("s3://b/k?generation=12").key == "k?generation=12"
    assert parse_uri("gs://b/k?generation=abc").key == "k?generation=abc"


@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_digest_fragment(algorithm: str) -> None:
    location = parse_uri(f"s3://b/k#{algorithm}={SHA.upper()}")
    assert (location.key, location.digest) == ("k", f"{algorithm}:{SHA}")


@pytest.mark.parametrize("fragment", [f"#md5={SHA}", f"#sha256={SHA[:-1]}", f"#sha256={SHA}0", "#"])
def test_any_other_fragment_is_part_of_the_key(fragment: str) -> None:
    location = parse_uri(f"s3://b/k{fragment}")
    assert (location.key, location.digest) == (f"k{fragment}", None)


@pytest.mark.parametrize(
    ("uri", "account", "container", "key"),
    [
        ("azure://c/p", None, "c", "p"),
        ("abfs://c@acct.dfs.core.windows.net/p", "acct", "c", "p"),
        ("abfss://c@acct.dfs.core.windows.net/p/q", "acct", "c", "p/q"),
        ("https://acct.blob.core.windows.net/c/p%20q", "acct", "c", "p q"),
        ("https://ACCT.blob.core.windows.net/c/p", "acct", "c", "p"),
        ("https://acct.blob.core.usgovcloudapi.net/c/p", "acct", "c", "p"),
    ],
)
def test_azure_forms(uri: str, account: str | None, container: str, key: str) -> None:
    location = parse_uri(uri)
    assert location.scheme == "azure"
    assert (location.account, location.bucket, location.key) == (account, container, key)


@pytest.mark.parametrize(
    ("query", "version", "rest"),
    [
        ("sv=1&sig=a%2Bb", None, "sv=1&sig=a%2Bb"),
        ("versionId=2026-01-02T03:04:05.0000001Z", "2026-01-02T03:04:05.0000001Z", None),
        ("sv=1&versionid=2026-01-02T03%3A04%3A05Z&sig=x", "2026-01-02T03:04:05Z", "sv=1&sig=x"),
    ],
)
def test_query_of_an_azure_url_names_a_version_or_is_a_credential(
    query: str, version: str | None, rest: str | None
) -> None:
    location = parse_uri(f"https://acct.blob.core.windows.net/c/p?{query}")
    assert (location.version, location.query) == (version, rest)
    assert "sig" not in str(location)


def test_version_in_an_azure_url_belongs_to_one_object() -> None:
    with pytest.raises(InvalidInput, match="version"):
        parse_uri("https://acct.blob.core.windows.net/c/tree/?versionid=1")


@pytest.mark.parametrize(
    "uri",
    [
        "https://evil.example/https://a.blob.core.windows.net/c/x",
        "https://acct.blob.core.windows.net.evil.example/c/x",
        "https://acct.blob.core.windows.net@evil.example/c/x",
        "https://evil.example/acct.blob.core.windows.net/c/x",
        "https://acct.blob.core.windows.net:8443/c/x",
        "https://x.acct.blob.core.windows.net/c/x",
        "http://acct.blob.core.windows.net/c/x",
        "https://user@acct.blob.core.windows.net/c/x",
    ],
)
def test_look_alike_of_an_azure_host_is_plain_http(uri: str) -> None:
    assert parse_uri(uri).type == "http"


@pytest.mark.parametrize(
    ("uri", "kind", "repo", "revision", "path"),
    [
        ("hf://owner/model", "model", "owner/model", None, ""),
        ("hf://gpt2", "model", "gpt2", None, ""),
        ("hf://gpt2@main/config.json", "model", "gpt2", "main", "config.json"),
        ("hf://owner/model@v1/a/b", "model", "owner/model", "v1", "a/b"),
        ("hf://owner/model:v1", "model", "owner/model", "v1", ""),
        ("hf://owner/model@refs/pr/1", "model", "owner/model", "refs/pr/1", ""),
        ("hf://owner/model:refs/pr/12/a", "model", "owner/model", "refs/pr/12", "a"),
        ("hf://owner/model@feature%2Fx/a", "model", "owner/model", "feature/x", "a"),
        ("hf://datasets/owner/data/x.csv", "dataset", "owner/data", None, "x.csv"),
        ("hf://spaces/owner/demo", "space", "owner/demo", None, ""),
    ],
)
def test_hub_forms(uri: str, kind: str, repo: str, revision: str | None, path: str) -> None:
    location = parse_uri(uri)
    assert location.repo_type == kind
    assert (location.bucket, location.version, location.key) == (repo, revision, path)
    assert parse_uri(str(location)) == location


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "s3://",
        "s3:///key",
        "s3://bu cket/key",
        "s3://user@bucket/key",
        "s3://bucket:80/key",
        "s3://../key",
        "s3://b/k\0x",
        "\0",
        "s3://b/tree/?versionId=1",
        "pvc://claim/../other",
        "pvc://claim/a/../../other",
        "pvc:///a",
        "file://host/path",
        "file:relative",
        "https://",
        "https://host:port/",
        "https://host/a\r\nX: y",
        "abfss://c@evil.example/p",
        "abfss://c@acct.dfs.core.windows.net.evil.example/p",
        "hf://",
        "hf://owner/model@",
        "hf://datasets/",
        "hf://owner/../x",
        "hf://./model",
        "hf://owner/model?x=1",
        "hf://owner/mo del/a",
        f"#sha256={SHA}",
    ],
)
def test_what_is_no_uri_is_refused(uri: str) -> None:
    if uri == "file:relative":  # has no authority, so it is the name of a file
        assert parse_uri(uri).scheme == "file"
        return
    with pytest.raises(InvalidInput) as caught:
        parse_uri(uri)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", [None, 3, b"s3://b/k", ["s3://b/k"]])
def test_what_is_no_text_is_refused(uri: object) -> None:
    with pytest.raises(InvalidInput):
        parse_uri(uri)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:CANARY@host/a",
        "https://host/a?X-Amz-Signature=CANARY",
        "https://acct.blob.core.windows.net/c/p?sig=CANARY",
        "sftp://user:CANARY@host/a",
    ],
)
def test_credentials_are_never_shown(uri: str) -> None:
    location = parse_uri(uri)
    assert "CANARY" not in str(location) + repr(location) + repr(location.spec())


@pytest.mark.parametrize("protocol", SUPPORTED_PROTOCOLS)
def test_spec_names_the_type_of_every_supported_protocol(protocol: str) -> None:
    path = "/name/path" if protocol == "file" else "name/path"
    spec = parse_uri(f"{protocol}://{path}").spec()
    assert spec["type"] == ("http" if protocol == "https" else protocol)
    assert spec["scheme"] == protocol
    assert {"bucket", "path", "uri"} <= spec.keys()


def test_spec_of_a_file_has_its_absolute_path() -> None:
    assert parse_uri("file:///models/iris").spec()["path"] == "/models/iris"


def test_location_is_a_value() -> None:
    location = parse_uri("s3://b/k")
    assert location == Location("s3", "b", "k")
    assert hash(location) == hash(Location("s3", "b", "k"))
    assert pickle.loads(pickle.dumps(location)) == location


@pytest.mark.parametrize(
    ("uri", "path", "key", "url"),
    [
        ("https://h/m", "a b/c", "m/a%20b/c", "https://h/m/a%20b/c"),
        ("https://h/m/", "100%/é", "m/100%25/%C3%A9", "https://h/m/100%25/%C3%A9"),
        ("https://h", "a+b?#", "a%2Bb%3F%23", "https://h/a%2Bb%3F%23"),
        ("https://u:p@h:1/m?s=%2F", "%41", "m/%2541", "https://u:p@h:1/m/%2541?s=%2F"),
    ],
)
def test_child_of_a_url_is_encoded_and_keeps_what_is_around_the_path(
    uri: str, path: str, key: str, url: str
) -> None:
    child = parse_uri(uri).child(path)
    assert (child.key, child.url) == (key, url)
    assert child.name == path.rsplit("/", 1)[-1]
    assert parse_uri(url) == child


def test_encoded_slash_is_no_part_of_a_files_name() -> None:
    assert parse_uri("https://h/api/owner%2Fmodel").name == "model"


@pytest.mark.parametrize(
    ("uri", "version", "shown"),
    [
        ("oci://h.example/a", None, "oci://h.example/a"),
        ("oci://h.example/a:v1", "v1", "oci://h.example/a:v1"),
        ("oci://h.example/a:v1/m/b", "v1", "oci://h.example/a:v1/m/b"),
        (f"oci://h.example/a@sha256:{SHA}", f"sha256:{SHA}", f"oci://h.example/a@sha256:{SHA}"),
        (
            f"oci://h.example/a:v1@sha256:{SHA}/b",
            f"sha256:{SHA}",
            f"oci://h.example/a@sha256:{SHA}/b",
        ),
    ],
)
def test_an_image_is_named_by_its_tag_or_digest(uri: str, version: str | None, shown: str) -> None:
    location = parse_uri(uri)
    assert location.version == version
    assert str(location) == shown
    assert parse_uri(shown) == location
    child = location.child("x/y")
    assert child.version == version
    assert parse_uri(str(child)).key == f"{location.key}/x/y".lstrip("/")


@pytest.mark.parametrize(
    "uri",
    [
        "oci://",
        "oci://h.example/",
        "oci://h.example/a/",
        "oci://u:p@h.example/a",
        "oci://h.example/a:",
        "oci://h.example/a:v 1",
        "oci://h.example/a@sha256:abc",
        "oci://h.example/../a",
        "oci://h.example/a//b",
        "oci://h example/a",
    ],
)
def test_what_names_no_image_is_refused(uri: str) -> None:
    with pytest.raises(InvalidInput, match="does not name an image"):
        parse_uri(uri)
