"""Run one command and say what it cost.

Reads a JSON job from standard input and prints a JSON account. A process of its own, and a
small one, for a reason: the kernel counts the memory of the process that starts a program
towards that program's peak, so a large harness would be measured instead of what it starts.
Only the standard library, as little of it as possible.
"""

import json
import os
import select
import signal
import sys
import time

TICK = 0.05
TREE_TICK = 0.1


def descendants(pid: int) -> list[int]:
    """Return the live descendants of ``pid``; empty where the kernel does not list them."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{pid}/task/{task}/children") as stream:
                children = [int(word) for word in stream.read().split()]
        except OSError:
            continue
        for child in children:
            found.append(child)
            found.extend(descendants(child))
    return found


def proportional_size(pid: int) -> int:
    """Return the bytes of memory of ``pid``, a page that n processes share counted as 1/n."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as stream:
            for line in stream:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # It ended between the listing and the reading.
    return 0


def main() -> None:
    job = json.load(sys.stdin)
    os.chdir(job["directory"])
    errors = os.open(job["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDWR)
    actions = [
        (os.POSIX_SPAWN_DUP2, nothing, 0),
        (os.POSIX_SPAWN_DUP2, nothing, 1),
        (os.POSIX_SPAWN_DUP2, errors, 2),
    ]
    argv = job["argv"]
    start = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, job["environment"], file_actions=actions, setpgroup=0)
    ended = select.poll()
    ended.register(os.pidfd_open(pid), select.POLLIN)

    processes, tree_peak, timed_out = 1, 0, False
    tick = TICK
    while not ended.poll(tick * 1000):
        if time.perf_counter() - start > job["timeout"]:
            timed_out = True
            break
        below = descendants(pid)
        tick = TREE_TICK if below else TICK
        if below:
            processes = max(processes, 1 + len(below))
            tree_peak = max(tree_peak, sum(map(proportional_size, [pid, *below])))
    seconds = time.perf_counter() - start
    # Not waited for yet, so the number still names this group and nobody else's.
    try:  # noqa: SIM105 -- contextlib would be more memory
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    _, status, usage = os.wait4(pid, 0)
    account = {
        "seconds": seconds,
        "exit_status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # The largest single process, exact; then the sampled sum over all of them.
        "peak_memory": max(usage.ru_maxrss * 1024, tree_peak),
        "processes": processes,
    }
    print(json.dumps(account))


if __name__ == "__main__":
    main()
