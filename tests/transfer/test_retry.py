"""What is tried again, how often, and what is said when that did not help."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

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
from storage.transfer.retry import RetryPolicy
from tests.transfer.support import assert_clear


def policy(attempts: int = 4, timeout: float = 30.0) -> RetryPolicy:
    return RetryPolicy(attempts, timeout, wait_initial=0.0001, wait_max=0.001)


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
    with pytest.raises(TransferError, match=r"back in an hour \(tried once\)"):
        policy(timeout=60.0).run(step)
    assert step.calls == 1


@pytest.mark.timeout(30)
def test_the_time_limit_ends_the_repeating() -> None:
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        raise TransientError("reset")

    with pytest.raises(TransferError):
        RetryPolicy(10**9, timeout=0.2, wait_initial=0.001, wait_max=0.01).run(step)
    assert calls > 1


def test_retries_print_nothing_in_a_program_without_logging(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    policy().run(Step(*broken(2)))
    assert capfd.readouterr() == ("", "")
