"""What is tried again, how often, and what is said when that did not help."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from storage.errors import (
    AuthenticationError,
    IntegrityError,
    InvalidInput,
    ModelMissingError,
    ObjectChangedError,
    StorageError,
    TransferError,
    TransientError,
    UnreachableError,
    UnsupportedOperation,
)
from storage.transfer.retry import RetryBudget, RetryPolicy
from tests.transfer.support import assert_clear


def policy(
    attempts: int = 4, timeout: float = 30.0, budget: RetryBudget | None = None
) -> RetryPolicy:
    return RetryPolicy(attempts, timeout, 0.0001, 0.001, wait_throttled=0.001, budget=budget)


class Step:
    """Fails with each of ``failures`` in turn, then returns its number of calls."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return self.calls


def broken(count: int) -> list[Exception]:
    return [TransientError(f"reset {number}") for number in range(count)]


class Clock:
    """Stands still until it is told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_works_is_done_once() -> None:
    assert policy().run(Step()) == 1


def test_passing_failures_are_repeated() -> None:
    assert policy(4).run(Step(*broken(3))) == 4


def test_spent_attempts_are_a_plain_error_that_counts_them() -> None:
    step = Step(*broken(9))
    with pytest.raises(TransferError, match=r"^reset 3 \(tried 4 times\)$") as caught:
        policy(4).run(step)
    assert step.calls == 4
    assert not isinstance(caught.value, TransientError)
    assert isinstance(caught.value.__cause__, TransientError)
    assert_clear(caught.value)


def test_one_attempt_means_no_retry() -> None:
    step = Step(*broken(2))
    with pytest.raises(TransferError, match=r"\(tried once\)$"):
        policy(1).run(step)
    assert step.calls == 1


def test_an_address_where_nobody_answers_keeps_its_type() -> None:
    step = Step(*[UnreachableError("refused")] * 9)
    with pytest.raises(UnreachableError, match=r"^refused \(tried 3 times\)$") as caught:
        policy(3).run(step)
    assert step.calls == 3
    assert_clear(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("no"),
        ModelMissingError("s3://b/k"),
        ObjectChangedError("replaced"),
        IntegrityError("wrong"),
        InvalidInput("bad"),
        UnsupportedOperation("cannot"),
        TransferError("spent"),
        StorageError("other"),
        ValueError("a bug"),
        OSError("disk"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_will_not_pass_is_tried_once_and_raised_as_it_is(error: Exception) -> None:
    step = Step(error)
    with pytest.raises(type(error)) as caught:
        policy().run(step)
    assert caught.value is error
    assert step.calls == 1


def test_a_permanent_failure_ends_the_repeating() -> None:
    step = Step(TransientError("reset"), AuthenticationError("expired"), TransientError("x"))
    with pytest.raises(AuthenticationError):
        policy().run(step)
    assert step.calls == 2


def progress(*answers: bool) -> Callable[[], bool]:
    left = list(answers)
    return lambda: left.pop(0) if left else False


def test_progress_refills_the_attempts() -> None:
    # Two of three attempts spent, then progress, again and again: never three in a row.
    answers = (False, False, True) * 5
    assert policy(3).run(Step(*broken(len(answers))), progress(*answers)) == 16


def test_standing_still_after_progress_spends_the_attempts() -> None:
    step = Step(*broken(99))
    with pytest.raises(TransferError, match=r"\(tried 3 times\)"):
        policy(3).run(step, progress(True, True))
    assert step.calls == 2 + 3


def test_progress_with_one_attempt_goes_on() -> None:
    assert policy(1).run(Step(*broken(3)), progress(True, True, True)) == 4


def test_a_wait_that_the_store_asks_for_is_kept() -> None:
    began = time.monotonic()
    assert policy().run(Step(TransientError("slow down", retry_after=0.25))) == 2
    # A lower bound only; its own waits are a thousandth of that.
    assert time.monotonic() - began >= 0.25


def test_a_store_that_asks_to_wait_is_not_hurried_by_progress() -> None:
    step = Step(*[TransientError("slow down", retry_after=0.0) for _ in range(9)])
    with pytest.raises(TransferError, match=r"\(tried 3 times\)"):
        policy(3).run(step, lambda: True)


@pytest.mark.timeout(30)
def test_a_store_that_asks_to_wait_longer_than_allowed_is_given_up() -> None:
    step = Step(TransientError("back in an hour", retry_after=3600.0))
    reason = "the store asks to wait 3600 s, more than the 60 s allowed"
    with pytest.raises(TransferError, match=rf"^back in an hour \(tried once; {reason}\)$"):
        policy(timeout=60.0).run(step)
    assert step.calls == 1


@pytest.mark.timeout(30)
def test_the_time_limit_ends_the_repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), 0

    def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr("storage.transfer.retry.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr("storage.cancellation.time", SimpleNamespace(sleep=sleep))

    def step() -> None:
        nonlocal calls
        calls += 1
        raise TransientError("reset")

    with pytest.raises(TransferError):
        RetryPolicy(10**9, timeout=0.2, wait_initial=0.001, wait_max=0.01).run(step)
    # Each wait is of 0.011 s at most, and the tries themselves take no time.
    assert calls > 0.2 / 0.011
    assert 0.2 - 0.011 < clock.now - Clock.now <= 0.2


# -- a store that is asked too often -------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every wait; none of them passes."""
    found: list[float] = []
    # Not those of threads that other tests have left.
    monkeypatch.setattr("storage.cancellation.time", SimpleNamespace(sleep=found.append))
    return found


def throttled(count: int) -> list[Exception]:
    return [TransientError("slow down", throttled=True) for _ in range(count)]


def test_a_throttled_try_is_repeated_later_than_a_broken_one(waits: list[float]) -> None:
    patient = RetryPolicy(attempts=6)
    patient.run(Step(*throttled(5)))
    for wait, least in zip(waits, (2, 4, 8, 10, 10), strict=True):
        assert least <= wait <= least + patient.wait_initial
    waits.clear()
    patient.run(Step(*broken(5)))
    for wait, least in zip(waits, (0.2, 0.4, 0.8, 1.6, 3.2), strict=True):
        assert least <= wait <= least + patient.wait_initial


def test_what_the_store_asks_for_goes_before_the_least_wait(waits: list[float]) -> None:
    RetryPolicy().run(Step(TransientError("slow down", retry_after=0.5, throttled=True)))
    assert 0.5 <= waits[0] <= 0.7


def test_the_least_wait_may_be_longer_than_the_longest_of_the_others(waits: list[float]) -> None:
    RetryPolicy(wait_max=1.0, wait_throttled=5.0).run(Step(*throttled(2)))
    assert [int(wait) for wait in waits] == [5, 5]


def test_a_store_that_is_asked_too_often_is_not_hurried_by_progress() -> None:
    step = Step(*throttled(9))
    with pytest.raises(TransferError, match=r"\(tried 3 times\)"):
        policy(3).run(step, lambda: True)


def test_a_wait_beyond_the_time_that_is_left_is_not_begun(waits: list[float]) -> None:
    step = Step(TransientError("reset"), TransientError("slow down", throttled=True))
    with pytest.raises(TransferError, match=r"tried 2 times; no further try in the 3 s allowed"):
        RetryPolicy(timeout=3.0, wait_throttled=3.5).run(step)
    assert len(waits) == 1


@pytest.mark.timeout(30)
def test_what_is_asked_for_may_be_more_than_is_left_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 6.0])
    fake = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("storage.transfer.retry.time", fake)
    with pytest.raises(TransferError, match=r"the store asks to wait 5 s, .* 10 s allowed"):
        RetryPolicy(timeout=10.0).run(Step(TransientError("slow down", retry_after=5.0)))


def test_many_that_were_refused_together_do_not_come_back_together(waits: list[float]) -> None:
    for _ in range(20):
        RetryPolicy().run(Step(TransientError("slow down", retry_after=2.0)))
    assert len(set(waits)) > 1
    assert all(2.0 <= wait <= 2.2 for wait in waits)


# -- the budget ----------------------------------------------------------------------------


def test_a_store_that_is_down_is_asked_no_more_often_than_the_budget_says() -> None:
    budget = RetryBudget(10, Clock())
    steps = [Step(*broken(99)) for _ in range(50)]
    for step in steps:
        with pytest.raises(TransferError):
            policy(4, budget=budget).run(step)
    # Every call tries once, whatever was before.
    assert sum(step.calls for step in steps) == 50 + 10


def test_an_empty_budget_is_the_reason_that_is_given() -> None:
    budget = RetryBudget(1, Clock())
    with pytest.raises(
        TransferError, match=r"^reset 1 \(tried 2 times; .*budget of retries"
    ) as exc:
        policy(budget=budget).run(Step(*broken(9)))
    assert_clear(exc.value)


def test_what_works_gives_back_what_a_retry_took() -> None:
    budget = RetryBudget(2, Clock())
    for _ in range(100):
        assert policy(budget=budget).run(Step(*broken(1))) == 2


def test_one_request_in_three_may_fail_for_ever() -> None:
    budget = RetryBudget(clock=Clock())
    chance = random.Random(5)

    def step() -> None:
        if chance.random() < 0.3:
            raise TransientError("reset")

    for _ in range(20_000):
        # So many tries that the number of them never ends it; that is not what is asked here.
        policy(50, budget=budget).run(step)


def test_progress_costs_nothing() -> None:
    budget = RetryBudget(1, Clock())
    assert policy(1, budget=budget).run(Step(*broken(9)), lambda: True) == 10


def test_time_gives_retries_back_but_no_more_than_there_were() -> None:
    clock = Clock()
    budget = RetryBudget(3, clock)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    clock.now += 2.5
    assert [budget.take() for _ in range(3)] == [True, True, False]
    clock.now += 3600
    assert [budget.take() for _ in range(4)] == [True, True, True, False]


# -- what ends a wait ----------------------------------------------------------------------


@pytest.mark.timeout(30)
def test_a_wait_ends_when_nobody_wants_the_result_any_more() -> None:
    cancel = threading.Event()
    step = Step(TransientError("slow down", retry_after=100.0))
    threading.Timer(0.05, cancel.set).start()
    with pytest.raises(TransferError, match="the transfer is over"):
        policy(timeout=300.0).run(step, cancel=cancel)
    assert step.calls == 1


def test_retries_print_nothing_in_a_program_without_logging(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    policy().run(Step(*broken(2)))
    assert capfd.readouterr() == ("", "")
