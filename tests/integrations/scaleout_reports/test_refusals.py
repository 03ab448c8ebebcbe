"""What a store refuses holds up nothing else, and is delivered when it is refused no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.errors import (
    AuthenticationError,
    IntegrityError,
    StorageError,
    TransferError,
    TransientError,
)
from storage.integrations.scaleout import sender as module
from storage.integrations.scaleout.outgoing import Outgoing
from storage.integrations.scaleout.reports import Reports
from storage.integrations.scaleout.spool import Spool
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    WAIT,
    Gate,
    Gated,
    delivered,
    empty,
    fill,
    once,
    sender_to,
    until,
)


@pytest.mark.parametrize(
    "error",
    [AuthenticationError("403: no"), TransferError("413: too large"), IntegrityError("odd")],
    ids=["forbidden", "too large", "odd"],
)
def test_a_batch_that_is_refused_does_not_hold_up_the_others(
    error: StorageError,
    spool: Spool,
    store: Path,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate.error = lambda key: error if "/0000000000000003-" in key else None
    sender = sender_to(spool, store, client=gate.client(), most=2, wait_max=0.02)
    # Before the start: else the first report may be a batch by itself.
    fill(spool, *range(8))
    sender.start()
    until(lambda: not sender.counts().pending)
    assert not sender.flush(0.2)
    assert delivered(store) == once(0, 1, 4, 5, 6, 7)
    counts = sender.counts()
    assert (counts.aside, counts.delivered, counts.reachable) == (1, 6, True)
    assert "is refused and set aside, with 2 reports" in caplog.text
    assert len([key for key in gate.writes if "/0000000000000003-" in key]) >= 3
    assert Reports(store).check().missing == 2
    sender.close(WAIT)
    spool.close()
    # It is there for the next program, and that one succeeds.
    again = Spool(spool.folder, CLIENT)
    gate.error = lambda key: None
    sender = sender_to(again, store, client=gate.client())
    assert sender.counts().aside == 1
    sender.start()
    assert sender.close(WAIT)
    assert delivered(store) == once(*range(8))
    assert sender.counts() == module.Counts(0, 8, 0, 0, 0, None, True)
    assert Reports(store).check().missing == 0
    assert again.used < 2000
    again.close()


def test_what_was_set_aside_is_tried_again_after_a_while(
    spool: Spool, store: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASIDE_WAIT", 0.2)
    gate.error = lambda key: AuthenticationError("403: no")
    sender = sender_to(spool, store, client=gate.client(), wait_max=0.02)
    sender.start()
    fill(spool, 1)
    until(lambda: sender.counts().aside)
    gate.error = lambda key: None
    until(lambda: not sender.counts().aside)
    assert delivered(store) == once(1)
    sender.close(WAIT)


def test_a_batch_that_was_set_aside_and_is_damaged_is_told(
    spool: Spool, store: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.error = lambda key: AuthenticationError("403: no")
    sender = sender_to(spool, store, client=gate.client())
    fill(spool, 1)
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            sender._step()
    (kept,) = (Path(spool.folder) / "aside").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    gate.error = lambda key: None
    sender._aside_at = 0
    empty(sender)
    assert "a file is damaged" in caplog.text
    assert (Path(spool.folder) / "damaged" / kept.name).exists()
    assert (spool.damaged, sender.counts().aside) == (1, 0)


def test_what_was_set_aside_is_not_sent_again_when_the_mark_is_lost(
    spool: Spool, store: Path, gate: Gate
) -> None:
    gate.error = lambda key: AuthenticationError("403: no") if "/0000000000000003-" in key else None
    sender = sender_to(spool, store, client=gate.client(), most=2)
    fill(spool, 1, 2, 3, 4)
    sender._step()
    for _ in range(3):
        with pytest.raises(AuthenticationError):
            sender._step()
    assert sender.counts().aside == 1
    spool.close()
    (Path(spool.folder) / "mark").unlink()
    again = Spool(spool.folder, CLIENT)
    fill(again, 5)
    gate.error = lambda key: None
    empty(sender_to(again, store, client=gate.client(), most=5))
    assert delivered(store) == once(1, 2, 3, 4, 5)
    again.close()


def test_who_may_write_but_not_read_delivers_once(
    spool: Spool, store: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbid(*_: object, **__: object) -> Any:
        raise AuthenticationError("403: no")

    monkeypatch.setattr(Gated, "read", forbid, raising=False)
    monkeypatch.setattr(Gated, "stat", forbid, raising=False)
    monkeypatch.setattr(Gated, "list", forbid, raising=False)
    answers = iter([TransientError("lost")])
    gate.error = lambda key: next(answers, None)
    gate.is_applied = True
    sender = sender_to(spool, store, client=gate.client())
    sender.start()
    fill(spool, 1)
    assert sender.close(WAIT)
    assert len(gate.writes) == 2
    assert delivered(store) == once(1)


def test_who_may_not_list_goes_on_without_its_mark(
    spool: Spool,
    store: Path,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forbid(*_: object, **__: object) -> Any:
        raise AuthenticationError("403: no")

    fill(spool, 1, 2, 3)
    sender_to(spool, store, most=2)._step()
    spool.close()
    (Path(spool.folder) / "mark").unlink()
    again = Spool(spool.folder, CLIENT)
    with monkeypatch.context() as patch:
        patch.setattr(Gated, "list", forbid, raising=False)
        empty(sender_to(again, store, client=gate.client()))
    assert "may be sent there once more" in caplog.text
    # It cannot know what is there; who reads it takes each record once all the same.
    assert [record.number for record in Reports(store).records()] == [1, 2, 3]
    assert Reports(store).check().duplicates == 2
    again.close()


def test_another_content_under_the_name_of_a_batch_is_told(
    spool: Spool, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(spool, 1)
    batch = Outgoing(spool).next(10)
    assert batch is not None
    (store / batch.name).parent.mkdir(parents=True)
    (store / batch.name).write_bytes(b"something else")
    sender = sender_to(spool, store)
    for _ in range(3):
        with pytest.raises(IntegrityError, match="another content than its name says"):
            sender._step()
    fill(spool, 2)
    empty(sender)
    assert sender.counts().aside == 1
    assert "set aside" in caplog.text
