"""What a message may say of a URL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from storage import errors
from storage.errors import conceal, redact


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


@pytest.fixture
def nothing_concealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_met", {})
    monkeypatch.setattr(errors, "_concealed", ())


@pytest.mark.usefixtures("nothing_concealed")
def test_credentials_in_use_are_left_out_quoted_or_not() -> None:
    conceal("s3cr3t/k3y+", "s3cr3t/k3y+and-more", "short")
    assert redact("a s3cr3t/k3y+and-more b s3cr3t%2Fk3y%2B c short") == "a … b … c short"


@pytest.mark.usefixtures("nothing_concealed")
def test_of_many_credentials_the_oldest_are_forgotten_and_not_the_longest() -> None:
    conceal("long-" * 20, "the-first-one")
    for number in range(600):
        conceal(f"token-{number:04}", "long-" * 20)
    shown = redact("the-first-one, token-0001, token-0599, " + "long-" * 20)
    assert shown == "the-first-one, token-0001, …, …"


@pytest.mark.usefixtures("nothing_concealed")
def test_what_is_no_text_is_concealed() -> None:
    conceal("abc\udcffdefgh", "abc\ud800defgh")
    assert redact("it is abc\udcffdefgh") == "it is …"


@pytest.mark.usefixtures("nothing_concealed")
def test_no_credential_is_lost_between_threads() -> None:
    names = [f"secret-{number:03}" for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(conceal, names))
    assert redact(" ".join(names)).split() == ["…"] * 400


@pytest.mark.parametrize("piece", ["a", "a.b-", "A1b2", "://", "x://", "://@", "sig", "?://", "a@"])
def test_text_of_others_takes_no_longer_than_its_length(piece: str) -> None:
    # By steps, not by a clock: what is quadratic would not end before the tests are stopped.
    assert redact(piece * (4_000_000 // len(piece)))
