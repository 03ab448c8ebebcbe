"""Any order of reports, failures, damage and restarts, against a plain list."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from storage import files
from storage.errors import (
    AuthenticationError,
    StorageError,
    TransientError,
)
from storage.integrations.scaleout.spool import Spool
from tests.integrations.scaleout_reports.support import (
    CLIENT,
    Gate,
    delivered,
    empty,
    observation,
    once,
    sender_to,
)


class Machine(RuleBasedStateMachine):
    """A program that reports, stops, and meets a store that fails: against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.store = self.folder / "store"
        self.gate = Gate()
        self.client = self.gate.client()
        self.taken: list[int] = []
        self.count = 0
        self.boot = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(files, "boot_id", lambda: f"boot {self.boot}")
        self.open()

    def open(self) -> None:
        self.spool = Spool(
            self.folder / "spool", CLIENT, segment_bytes=500, max_record=700, max_bytes=20_000
        )
        self.sender = sender_to(self.spool, self.store, client=self.client, most=3)

    @rule(size=st.sampled_from([0, 100, 300, 1000]))
    def report(self, size: int) -> None:
        self.count += 1
        try:
            self.spool.append(observation(self.count, size))
        except StorageError:
            return
        self.taken.append(self.count)

    @rule(
        fault=st.sampled_from([None, None, "away", "lost", "refused"]),
        steps=st.integers(1, 4),
    )
    def step(self, fault: str | None, steps: int) -> None:
        error = {
            None: None,
            "away": TransientError("away"),
            "lost": TransientError("lost"),
            "refused": AuthenticationError("403"),
        }[fault]
        self.gate.error = lambda key: error
        self.gate.is_applied = fault == "lost"
        for _ in range(steps):
            try:
                self.sender._step()
            except StorageError:
                assert error is not None
        self.gate.error = lambda key: None

    @rule(
        torn=st.booleans(),
        mark=st.sampled_from([None, None, None, 0, 1, "gone"]),
        is_another_boot=st.booleans(),
    )
    def reopen(self, torn: bool, mark: int | str | None, is_another_boot: bool) -> None:
        self.spool.close()
        self.boot += is_another_boot
        segments = sorted((self.folder / "spool" / "segments").iterdir())
        if torn and segments:
            with open(segments[-1], "ab") as file:
                file.write(b"0badc0de {")
        if mark == "gone":
            (self.folder / "spool" / "mark").unlink()
        elif mark is not None:
            with open(self.folder / "spool" / "mark", "r+b") as file:
                file.seek(512 * int(mark))
                file.write(b"x")
        self.open()

    def teardown(self) -> None:
        import shutil

        self.patch.undo()
        self.gate.error = lambda key: None
        self.sender._aside_at = 0
        empty(self.sender)
        assert self.sender.counts().aside == 0
        assert self.spool.pending == 0
        self.spool.close()
        assert delivered(self.store) == once(*self.taken)
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    suppress_health_check=list(HealthCheck),
)
