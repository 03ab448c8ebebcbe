"""Children that use a cache, and a loop that kills them and has the cache checked.

:class:`Nursery` starts children, which do what a :class:`Job` says; :class:`KillLoop` lets some
work together and kills some of them. ``worker.py`` is their side, and names the points at which
they can be told to kill themselves.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import storage
from tests.cache.worker import TIMEOUT, Job, Model, fingerprint

__all__ = ["Child", "Job", "KillLoop", "Model", "Nursery", "Outcome", "Round", "fingerprint"]


@dataclass(frozen=True)
class Outcome:
    """What one child did, and how it ended."""

    job: Job
    signal: int | None
    """What killed it, if it was killed."""

    steps: Sequence[Mapping[str, Any]]
    """Of each step that ended: ``what``, and ``path``, ``status`` or ``error``, ``message``."""

    points: Sequence[str] | None
    """The points that it passed, if it lived to tell."""

    @property
    def errors(self) -> list[str]:
        """The errors that steps ended with, and the commands that failed."""
        told = []
        for step in self.steps:
            if "error" in step:
                told.append(f"{step['what']}: {step['error']}: {step['message']}")
            elif step.get("status"):
                told.append(f"{step['what']}: exit status {step['status']}: {step['message']}")
        return told

    @property
    def wrong(self) -> list[str]:
        """What was delivered and is no version of the model."""
        return [f"{step['what']}: {step['wrong']}" for step in self.steps if "wrong" in step]


class Child:
    """A running child."""

    def __init__(self, nursery: Nursery, job: Job, pid: int, pipe: int) -> None:
        self.job = job
        self.pid = pid
        self._nursery = nursery
        self._pipe = pipe
        self._text = b""
        self._ended = False

    def wait_until_ready(self) -> None:
        """Wait until it begins with its first step."""
        while b"\n" not in self._text and not self._ended:
            self._read()

    def kill(self) -> None:
        """Send SIGKILL; the process is reaped by :meth:`wait`."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Outcome:
        """Wait for its end."""
        while not self._ended:
            self._read()
        os.close(self._pipe)
        status = self._nursery.reap(self.pid)
        # The last line may be torn.
        lines = [json.loads(line) for line in self._text.split(b"\n")[:-1]]
        failed = next((line["failed"] for line in lines if "failed" in line), None)
        assert failed is None, f"a child failed: {failed}"
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        points = next((line["points"] for line in lines if "points" in line), None)
        assert killed in (None, signal.SIGKILL), f"a child hung, or crashed by signal {killed}"
        assert killed is not None or points is not None, f"a child ended with status {status}"
        steps = [line for line in lines if "what" in line]
        return Outcome(self.job, killed, steps, points)

    def _read(self) -> None:
        ready, _, _ = select.select([self._pipe], [], [], TIMEOUT + 30)
        assert ready, "a child neither goes on nor ends"
        data = os.read(self._pipe, 1 << 16)
        self._ended = not data
        self._text += data


class Nursery:
    """Starts children; a context manager."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="nursery-")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cache.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(storage.__file__).parents[1],
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def start(self, job: Job) -> Child:
        """Start a child."""
        self._count += 1
        path = os.path.join(self._folder.name, f"{self._count}")
        os.mkfifo(path)
        # Without waiting for the other end, which the nursery opens.
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        pid = self._ask({"job": asdict(job), "pipe": path})
        os.unlink(path)
        os.set_blocking(pipe, True)
        return Child(self, job, pid, pipe)

    def run(self, *jobs: Job) -> list[Outcome]:
        """Run one child for each job, all at the same time, and wait for all."""
        children = [self.start(job) for job in jobs]
        return [child.wait() for child in children]

    def reap(self, pid: int) -> int:
        """Return the status of a child that has ended."""
        return self._ask({"reap": pid})

    def _ask(self, order: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], TIMEOUT + 30)
        assert ready, "the nursery does not answer"
        line = self._process.stdout.readline()
        assert line, "the nursery has died"
        return int(line)


@dataclass(frozen=True)
class Round:
    """What happened before a check."""

    number: int
    outcomes: Sequence[Outcome]

    @property
    def killed(self) -> int:
        """How many children were killed."""
        return sum(outcome.signal is not None for outcome in self.outcomes)

    def __str__(self) -> str:
        told = [
            f"{outcome.job.kill_point or 'no point'}, signal {outcome.signal}, "
            f"{len(outcome.steps)} steps"
            for outcome in self.outcomes
        ]
        return f"round {self.number}: {'; '.join(told)}"


class KillLoop:
    """Lets children work on one cache, kills some in the middle, and has the cache checked."""

    def __init__(
        self,
        nursery: Nursery,
        jobs: Sequence[Job],
        check: Callable[[Round], object],
        *,
        seed: int = 0,
        longest: float = 0.2,
        points: Mapping[int, Sequence[str]] | None = None,
        spared: Collection[int] = (),
        during: Callable[[random.Random], object] | None = None,
    ) -> None:
        """Describe the loop.

        Args:
            nursery: starts the children.
            jobs: of those that run together; one without an end is always killed, and so is
                at least one of all, unless one has a kill point of its own.
            check: called after each round, when none of them runs; raises if something is
                wrong. That no child was given a wrong byte is checked already.
            seed: of the moments, the victims and the jobs.
            longest: seconds from the readiness of all to the last kill.
            points: of some jobs with an end, by number, points that they pass. In every other
                round one of these jobs kills itself at one of its points, if it comes to it;
                all points are gone through in random order.
            spared: numbers of jobs that are never killed.
            during: called once all children are ready, while they work.
        """
        self._nursery = nursery
        self._jobs = jobs
        self._check = check
        self._seed = seed
        self._longest = longest
        self._points = [(index, name) for index, names in (points or {}).items() for name in names]
        random.Random(seed).shuffle(self._points)
        self._spared = frozenset(spared)
        self._during = during

    def run(self, rounds: int, first: int = 0) -> list[Round]:
        """Run ``rounds`` rounds, numbered from ``first``; each repeats by its number."""
        return [self._round(number) for number in range(first, first + rounds)]

    def at_points(self, points: Sequence[str]) -> list[Round]:
        """Run a round for each of ``points``, at which the first job kills itself."""
        return [self._round(number, point) for number, point in enumerate(points)]

    def _round(self, number: int, point: str | None = None) -> Round:
        rng = random.Random(f"{self._seed} {number}")
        jobs = [replace(job, seed=rng.randrange(2**32)) for job in self._jobs]
        if point is not None:
            jobs[0] = replace(jobs[0], kill_point=point)
        elif self._points and number % 2:
            index, name = self._points[number // 2 % len(self._points)]
            jobs[index] = replace(jobs[index], kill_point=name)
        mortal = [index for index in range(len(jobs)) if index not in self._spared]
        doomed = {
            index
            for index in mortal
            if jobs[index].kill_point is None and (jobs[index].steps is None or rng.random() < 0.5)
        }
        if not doomed and all(job.kill_point is None for job in jobs):
            doomed = {rng.choice(mortal)}
        delays = sorted((rng.uniform(0, self._longest), index) for index in doomed)

        children = [self._nursery.start(job) for job in jobs]
        for child in children:
            child.wait_until_ready()
        begin = time.monotonic()
        if self._during is not None:
            self._during(rng)
        for delay, index in delays:
            # It is the moment that is random; nothing is waited for.
            time.sleep(max(0.0, begin + delay - time.monotonic()))
            children[index].kill()
        done = Round(number, [child.wait() for child in children])
        try:
            for outcome in done.outcomes:
                assert not outcome.wrong, outcome.wrong
            self._check(done)
        except BaseException as exc:
            exc.add_note(f"seed {self._seed}, {done}")
            raise
        return done
