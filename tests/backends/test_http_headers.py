"""What the headers of answers mean: pure functions."""

from __future__ import annotations

import base64
import hashlib

import pytest
from requests.structures import CaseInsensitiveDict

from storage.backends.http.headers import (
    ContentRange,
    content_range,
    digests,
    disposition_name,
    hint,
    kept_coding,
    last_part,
    length,
    metadata,
    retry_after,
    url_text,
    validators,
)
from storage.digest import available

_OLD = "Mon, 02 Nov 2026 10:00:00 GMT"
_NOW = "Mon, 02 Nov 2026 10:01:00 GMT"
_JUST_BEFORE = "Mon, 02 Nov 2026 10:00:59 GMT"
SHA256 = hashlib.sha256(b"model")
MD5 = hashlib.md5(b"model")
CRC32C, CRC64 = "rrG8yQ==", "sMAami3HpC0="
# Computed only where a package for it is installed.
CRCS = [name for name in ("crc64nvme", "crc32c") if available(name)]


def headers(**given: str) -> CaseInsensitiveDict[str]:
    return CaseInsensitiveDict({name.replace("_", "-"): value for name, value in given.items()})


def b64(hasher: hashlib._Hash) -> str:
    return base64.b64encode(hasher.digest()).decode()


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a/b", "a/b"),
        ("a%20b/%C3%A9", "a%20b/%C3%A9"),
        ("a b", "a%20b"),
        ("é", "%C3%A9"),
        ("100%", "100%25"),
        ("%zz%41", "%25zz%41"),
        ("a?b#c", "a%3Fb%23c"),
        ("x@y:z;p=1,2+3~", "x@y:z;p=1,2+3~"),
        ('"<>\\^`{|}[]', "%22%3C%3E%5C%5E%60%7B%7C%7D%5B%5D"),
        ("a\r\nb\x00", "a%0D%0Ab%00"),
        ("\udcff", "%FF"),
    ],
)
def test_what_no_url_holds_is_encoded_and_the_rest_left_alone(text: str, sent: str) -> None:
    assert url_text(text) == sent
    assert url_text(sent) == sent


def test_question_mark_belongs_to_a_query() -> None:
    assert url_text("a=?&b=/", query=True) == "a=?&b=/"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("m/model.bin", "model.bin"),
        ("m/a%20b.bin", "a b.bin"),
        ("m/..%2F..%2Fetc%2Fpasswd", "passwd"),
        ("m/a%5Cb", "b"),
        ("m/", ""),
    ],
)
def test_last_part_of_a_path_is_a_bare_name(path: str, name: str) -> None:
    assert last_part(path) == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bytes 0-0/1234", (0, 1, 1234)),
        ("BYTES 5-9/10", (5, 10, 10)),
        ("bytes 5-9/*", (5, 10, None)),
        ("bytes */10", (0, 0, 10)),
        ("bytes 5-10/10", None),
        ("bytes 9-5/10", None),
        ("bytes 5-/10", None),
        ("items 0-0/1", None),
        ("", None),
    ],
)
def test_content_range_is_read_strictly(text: str, found: tuple[int, ...] | None) -> None:
    assert content_range(headers(Content_Range=text)) == (
        None if found is None else ContentRange(*found)
    )


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"Content_Length": "12"}, 12),
        ({"Content_Length": "12, 12"}, None),
        ({"Content_Length": "-1"}, None),
        ({"Content_Length": "12", "Transfer_Encoding": "chunked"}, None),
        ({}, None),
    ],
)
def test_length_is_told_only_where_it_is_certain(given: dict[str, str], size: int | None) -> None:
    assert length(headers(**given)) == size


@pytest.mark.parametrize(
    ("given", "etag", "version"),
    [
        ({"ETag": '"a"'}, '"a"', None),
        ({"ETag": '"a"', "Last_Modified": _OLD, "Date": _NOW}, '"a"', None),
        ({"ETag": 'W/"a"', "Last_Modified": _OLD, "Date": _NOW}, 'W/"a"', _OLD),
        ({"Last_Modified": _OLD, "Date": _NOW}, None, _OLD),
        # It may have changed again within the same second, or a clock may be off.
        ({"Last_Modified": _JUST_BEFORE, "Date": _NOW}, None, None),
        ({"Last_Modified": _OLD}, None, None),
        ({"Last_Modified": "yesterday", "Date": _NOW}, None, None),
        ({"ETag": "no-quotes", "Date": _NOW}, None, None),
    ],
)
def test_validator_is_strong_or_none(
    given: dict[str, str], etag: str | None, version: str | None
) -> None:
    found = validators(headers(**given))
    assert (found.etag, found.version) == (etag, version)
    assert found.modified is None or found.modified.tzinfo is not None


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": _NOW, "Date": _OLD}, 60.0),
        ({"Retry_After": _OLD, "Date": _NOW}, 0.0),
        ({"Retry_After": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(given: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers(**given)) == seconds


@pytest.mark.parametrize(
    ("given", "whole", "found"),
    [
        ({"Repr_Digest": f"sha-256=:{b64(SHA256)}:"}, False, ["sha256"]),
        ({"Repr_Digest": f"md5=:{b64(MD5)}:, sha-256=:{b64(SHA256)}:"}, False, ["sha256", "md5"]),
        ({"Digest": f"SHA-256={b64(SHA256)},MD5={b64(MD5)}"}, False, ["sha256", "md5"]),
        ({"Content_Digest": f"sha-256=:{b64(SHA256)}:"}, True, ["sha256"]),
        ({"Content_Digest": f"sha-256=:{b64(SHA256)}:"}, False, []),
        ({"Content_MD5": b64(MD5)}, True, ["md5"]),
        ({"Content_MD5": b64(MD5)}, False, []),
        ({"X_Checksum_Sha256": SHA256.hexdigest()}, False, ["sha256"]),
        ({"X_Checksum_Md5": MD5.hexdigest().upper()}, False, ["md5"]),
        ({"X_Amz_Checksum_Sha256": b64(SHA256)}, True, ["sha256"]),
        ({"X_Amz_Checksum_Sha256": b64(SHA256)}, False, []),
        (
            {"X_Amz_Checksum_Sha256": b64(SHA256), "X_Amz_Checksum_Type": "COMPOSITE"},
            True,
            [],
        ),
        ({"X_Amz_Checksum_Crc64nvme": CRC64, "X_Amz_Checksum_Crc32c": CRC32C}, True, CRCS),
        ({"X_Amz_Checksum_Crc32": "m4ZBYA=="}, True, []),
        ({"X_Linked_ETag": f'"{SHA256.hexdigest()}"'}, False, ["sha256"]),
        ({"X_Linked_ETag": f'"{MD5.hexdigest()}"'}, True, []),
        ({"X_Amz_Checksum_Sha256": f"{b64(SHA256)}-3"}, False, []),
        ({"X_Goog_Hash": f"crc32c={CRC32C}, md5={b64(MD5)}"}, False, ["md5", *CRCS[1:]]),
        (
            {"X_Goog_Hash": f"md5={b64(MD5)}", "X_Goog_Stored_Content_Encoding": "gzip"},
            False,
            [],
        ),
        ({"X_Amz_Meta_Sha256": SHA256.hexdigest()}, False, ["sha256"]),
        ({"X_Ms_Meta_Sha256": "see the model card"}, False, []),
        ({"Digest": "SHA-256=short", "ETag": f'"{MD5.hexdigest()}"'}, True, []),
    ],
)
def test_digest_is_taken_only_from_what_is_one(
    given: dict[str, str], whole: bool, found: list[str]
) -> None:
    expected = {"sha256": SHA256.hexdigest(), "md5": MD5.hexdigest()}
    expected |= {"crc32c": "aeb1bcc9", "crc64nvme": "b0c01a9a2dc7a42d"}
    got = digests(headers(**given), whole=whole)
    assert [digest.algorithm for digest in got] == found
    assert all(digest.hex == expected[digest.algorithm] for digest in got)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"X_Amz_Request_Id": "1"}, True),
        ({"X_Amz_Request_Id": "1", "X_Amz_Server_Side_Encryption": "AES256"}, True),
        ({"X_Amz_Request_Id": "1", "X_Amz_Server_Side_Encryption": "aws:kms"}, False),
        (
            {
                "X_Amz_Request_Id": "1",
                "X_Amz_Server_Side_Encryption_Customer_Algorithm": "AES256",
            },
            False,
        ),
        # Frameworks for web applications make such ETags of a file's size and time.
        ({"Server": "uvicorn"}, False),
    ],
)
def test_etag_is_taken_for_an_md5_only_of_an_object_store(
    given: dict[str, str], found: bool
) -> None:
    told = hint(headers(**given, ETag=f'"{MD5.hexdigest()}"'))
    assert (told is not None) is found
    assert hint(headers(**given, ETag=f'W/"{MD5.hexdigest()}"')) is None
    assert hint(headers(**given, ETag=f'"{MD5.hexdigest()}-2"')) is None


def test_metadata_of_object_stores_is_found() -> None:
    given = headers(X_Amz_Meta_Owner="me", X_Goog_Meta_Note="x", Content_Type="text/plain")
    assert metadata(given) == {"owner": "me", "note": "x"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("attachment; filename=model.bin", "model.bin"),
        ('attachment; filename="a b; c.bin"', "a b; c.bin"),
        ('attachment; filename="a\\"b.bin"', 'a"b.bin'),
        ("attachment; filename*=UTF-8''mod%C3%A8le.bin; filename=other", "modèle.bin"),
        ('attachment; filename="modÃ¨le.bin"', "modèle.bin"),
        ("attachment; filename*=no-such-charset''x; filename=y", "y"),
        ("attachment; filename=../../etc/passwd", "passwd"),
        ('attachment; filename="..\\\\..\\\\evil.exe"', "evil.exe"),
        ('attachment; filename="C:evil"', "evil"),
        ("attachment; filename*=UTF-8''..%2F..%2Fevil", "evil"),
        ('attachment; filename=".."', None),
        ('attachment; filename="a\x01b"', None),
        ("attachment; filename=/", None),
        (f"attachment; filename={'x' * 256}", None),
        ("inline", None),
        ("", None),
    ],
)
def test_name_in_a_disposition_is_bare_or_none(text: str, name: str | None) -> None:
    assert disposition_name(headers(Content_Disposition=text)) == name


@pytest.mark.parametrize(
    ("given", "name", "kept"),
    [
        ({}, "model.bin", True),
        ({"Content_Encoding": "identity"}, "model.bin", True),
        ({"Content_Encoding": "gzip"}, "model.bin", False),
        ({"Content_Encoding": "gzip"}, "model.tar.gz", True),
        ({"Content_Encoding": "x-gzip"}, "model.TGZ", True),
        ({"Content_Encoding": "gzip", "Content_Type": "application/gzip; x=y"}, "model", True),
        ({"Content_Encoding": "gzip", "Content_Type": "application/x-tar"}, "model", False),
        ({"Content_Encoding": "br"}, "model.tar.gz", False),
        ({"Content_Encoding": "gzip, gzip"}, "model.tar.gz", False),
    ],
)
def test_coding_stays_only_where_the_file_is_a_compressed_one(
    given: dict[str, str], name: str, kept: bool
) -> None:
    assert kept_coding(headers(**given), name, None) is kept
