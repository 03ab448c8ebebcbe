"""What a message may say of a URL."""

from __future__ import annotations

import pytest

from storage.errors import redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host/key", "https://…@host/key"),
        ("no https://secret@host/key here", "no https://…@host/key here"),
        ("9https://user:secret@host", "9https://…@host"),
        ("s3+x://secret@host", "s3+x://…@host"),
        ("https://host/key?sig=secret", "https://host/key?…"),
        ("s3://bucket/key?versionId=v1", "s3://bucket/key?versionId=v1"),
        ("Authorization: Bearer secret", "Authorization: …"),
        # The name of a container is no secret, and without it nobody finds the blob.
        (
            "abfss://models@account.dfs.core.windows.net/key?sig=secret",
            "abfss://models@account.dfs.core.windows.net/key?…",
        ),
        (
            "abfss://user:secret@account.dfs.core.windows.net/",
            "abfss://…@account.dfs.core.windows.net/",
        ),
        ("abfss://secret@evil.example/key", "abfss://…@evil.example/key"),
    ],
)
def test_credentials_in_urls_are_left_out(text: str, shown: str) -> None:
    assert redact(text) == shown
