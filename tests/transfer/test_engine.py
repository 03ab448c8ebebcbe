"""Many tasks on a few threads: order, limits, failures, interrupts, and nothing left running."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from storage.transfer.engine import Budget, CancelledError, run_tasks

Task = Callable[[threading.Event], None]
WAIT = 30.0


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread for thread in threading.enumerate() if thread not in before] == []


@pytest.mark.parametrize("connections", [1, 4, 64])
def test_every_task_runs_once(connections: int) -> None:
    done: list[int] = []
    tasks = [lambda _, number=number: done.append(number) for number in range(200)]
    run_tasks(tasks, Budget(connections), 1000)
    assert sorted(done) == list(range(200))


def test_on_one_thread_tasks_run_in_order_and_in_the_caller() -> None:
    seen: list[tuple[int, str]] = []
    tasks = [
        lambda _, number=number: seen.append((number, threading.current_thread().name))
        for number in range(20)
    ]
    run_tasks(tasks, Budget(8), 1)
    assert seen == [(number, threading.current_thread().name) for number in range(20)]


def test_no_tasks_are_done_at_once() -> None:
    run_tasks([], Budget(4), 0)


def test_tasks_are_made_only_when_a_thread_is_free_for_them() -> None:
    made, waiting = 0, threading.Semaphore(0)
    release = threading.Event()

    def task(_: threading.Event) -> None:
        waiting.release()
        assert release.wait(WAIT)

    def tasks() -> Iterator[Task]:
        nonlocal made
        for _ in range(10):
            made += 1
            yield task

    runner = threading.Thread(target=run_tasks, args=(tasks(), Budget(3), 10))
    runner.start()
    for _ in range(3):
        assert waiting.acquire(timeout=WAIT)
    assert made == 3
    release.set()
    runner.join(WAIT)
    assert made == 10


def test_the_budget_is_shared_by_transfers_at_the_same_time() -> None:
    budget = Budget(3)
    lock = threading.Lock()
    running = most = 0
    full, release = threading.Event(), threading.Event()

    def task(_: threading.Event) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == 3:
                full.set()
        assert release.wait(WAIT)
        with lock:
            running -= 1

    runners = [threading.Thread(target=run_tasks, args=([task] * 5, budget, 5)) for _ in range(2)]
    for runner in runners:
        runner.start()
    assert full.wait(WAIT)
    release.set()
    for runner in runners:
        runner.join(WAIT)
    assert most == 3


@pytest.mark.parametrize("connections", [1, 4])
def test_the_first_failure_is_raised_and_nothing_more_begins(connections: int) -> None:
    begun: list[int] = []

    def task(number: int, cancel: threading.Event) -> None:
        begun.append(number)
        if number == 3:
            raise ValueError("number 3")
        if number > 3:
            assert cancel.wait(WAIT)

    with pytest.raises(ValueError, match="number 3"):
        run_tasks([partial(task, number) for number in range(500)], Budget(connections), 500)
    assert len(begun) <= 4 + connections


def test_a_failure_tells_the_tasks_that_run() -> None:
    others = threading.Barrier(4)
    cancelled: list[bool] = []

    def patient(cancel: threading.Event) -> None:
        others.wait(WAIT)
        cancelled.append(cancel.wait(WAIT))
        raise CancelledError

    def failing(_: threading.Event) -> None:
        others.wait(WAIT)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run_tasks([patient, patient, patient, failing], Budget(4), 4)
    assert cancelled == [True] * 3


def test_a_failure_frees_the_connections() -> None:
    budget = Budget(2)

    def failing(_: threading.Event) -> None:
        raise ValueError

    for _ in range(5):
        with pytest.raises(ValueError):  # noqa: PT011 -- it has no text
            run_tasks([failing] * 3, budget, 3)
    done: list[int] = []
    run_tasks([lambda _: done.append(1)] * 4, budget, 4)
    assert len(done) == 4


@pytest.mark.parametrize("connections", [1, 4])
def test_a_failure_to_make_a_task_is_raised_too(connections: int) -> None:
    done: list[int] = []

    def tasks() -> Iterator[Task]:
        yield lambda _: done.append(1)
        raise OSError("no space for the next file")

    with pytest.raises(OSError, match="no space"):
        run_tasks(tasks(), Budget(connections), 10)
    assert done == [1]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_interrupt_stops_everything(threads: int) -> None:
    begun: list[int] = []
    ready = threading.Barrier(threads)

    def task(number: int, cancel: threading.Event) -> None:
        begun.append(number)
        if len(begun) <= threads:
            ready.wait(WAIT)
        if number == 0:
            # To the calling thread, as Ctrl-C does.
            os.kill(os.getpid(), signal.SIGINT)
        assert cancel.wait(WAIT)

    with pytest.raises(KeyboardInterrupt):
        run_tasks([partial(task, number) for number in range(50)], Budget(threads), 50)
    assert len(begun) == threads


def test_slow_tasks_begin_on_a_few_threads_and_more_join_while_that_helps() -> None:
    moved = 0
    most = running = 0
    lock = threading.Lock()
    everyone = threading.Event()

    def task(_: threading.Event) -> None:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
            if running == 16:
                everyone.set()
        everyone.wait(WAIT)

    def faster_and_faster() -> int:
        nonlocal moved
        moved = moved * 3 + 1
        return moved

    run_tasks([task] * 16, Budget(16), 16, faster_and_faster)
    assert most == 16


def test_more_threads_that_move_no_more_bytes_are_not_added() -> None:
    looks = 0
    names: set[str] = set()
    done = threading.Event()

    def task(_: threading.Event) -> None:
        names.add(threading.current_thread().name)
        assert done.wait(WAIT)

    def steady() -> int:
        nonlocal looks
        looks += 1
        if looks == 12:
            done.set()
        # Of every look: so much that nobody waits for a network.
        return looks * 10**9

    run_tasks([task] * 16, Budget(16), 16, steady)
    # The first rate is compared with nothing, so one doubling is allowed.
    assert len(names) <= 8


def test_threads_that_wait_for_a_slow_link_are_all_begun_at_once() -> None:
    everyone = threading.Barrier(16)

    def task(_: threading.Event) -> None:
        everyone.wait(WAIT)

    # Not a byte more, however many there are.
    run_tasks([task] * 16, Budget(16), 16, lambda: 0)


def test_a_budget_is_free_again_after_an_error_inside_it() -> None:
    budget = Budget(1)
    with contextlib.suppress(ValueError), budget:
        raise ValueError
    with budget:
        pass
