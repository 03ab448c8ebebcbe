"""The page that is published, its plot, and the raw figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.again import REPEATS
from tests.bench.cases import BARE, BARE_KSERVE, CASES, IMPORTS, CaseResult, Sizes
from tests.bench.containers import WORKS
from tests.bench.contestants import ALL
from tests.bench.measure import Measurement
from tests.bench.targets import (
    MIB,
    Verdict,
    best_peer,
    good,
    import_cost,
    is_ours,
    judge,
    peak,
    seconds,
)

__all__ = ["Machine", "Session", "as_json", "markdown", "plot"]

Results = Mapping[str, CaseResult]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran."""

    processor: str
    cores: int
    memory: int
    system: str
    load: tuple[float, float]
    """Load averages (1 min) before and after."""

    @classmethod
    def here(cls, load_before: float) -> Machine:
        """Describe this machine."""
        processor = platform.processor() or platform.machine()
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    processor = line.split(":", 1)[1].strip()
                    break
        except OSError:
            pass
        try:
            system = platform.freedesktop_os_release()["PRETTY_NAME"]
        except OSError:
            system = platform.system()
        return cls(
            processor,
            len(os.sched_getaffinity(0)),
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            f"{system}, {platform.system()} {platform.release().split('-')[0]}",
            (load_before, os.getloadavg()[0]),
        )


@dataclass(frozen=True, slots=True)
class Session:
    """Everything that a report tells."""

    date: str
    command: str
    sizes: Sizes
    seed: int
    machine: Machine
    versions: Mapping[str, str]
    results: Results


def as_json(session: Session) -> dict[str, Any]:
    """Return everything measured, run by run."""
    machine = session.machine
    return {
        "date": session.date,
        "command": session.command,
        "quick": session.sizes.quick,
        "seed": session.seed,
        "machine": {
            "processor": machine.processor,
            "cores": machine.cores,
            "memory": machine.memory,
            "system": machine.system,
            "load": list(machine.load),
        },
        "versions": dict(session.versions),
        "targets": [
            {"work": one.work, "target": one.target, "found": one.found, "met": one.met}
            for one in judge(session.results, quick=session.sizes.quick)
        ],
        "cases": {
            name: {
                "title": result.title,
                "bytes": result.bytes,
                "files": result.files,
                "runs": {who: [run.as_json() for run in runs] for who, runs in result.runs.items()},
            }
            for name, result in session.results.items()
        },
    }


def markdown(session: Session, picture: str) -> str:
    """Return the page; ``picture`` is the address of the plot relative to it."""
    parts = [
        "# Benchmarks",
        "This page is written by `nox -s bench`. Every contestant moves the same data from or "
        "to the same server on the same machine, or makes the same container or archive there. "
        "Compare the ratios; the seconds are those of this machine.",
        _targets(session),
        f"![Medians and peak memory of each contestant]({picture})",
        "A bar is a median (of memory: the highest peak), shorter is better, and the lines of "
        "this library are the dark ones.",
    ]
    for name, result in session.results.items():
        section = {"again": _repeats, "import": _imports, **dict.fromkeys(WORKS, _containers)}.get(
            name, _transfers
        )
        parts.append(section(result))
    parts += [_machine(session), _method(session)]
    return "\n\n".join(parts) + "\n"


def _targets(session: Session) -> str:
    verdicts = judge(session.results, quick=session.sizes.quick)
    rows = [[one.work, one.target, one.found, _word(one)] for one in verdicts]
    missed = sum(one.met is False for one in verdicts)
    met = sum(one.met is True for one in verdicts)
    unknown = len(verdicts) - met - missed
    summary = f"Of {len(verdicts)} targets {met} are met and {missed} missed" + (
        f"; {unknown} not measured." if unknown else "."
    )
    if session.sizes.quick:
        summary = (
            "**This is a quick run: it shows that everything works. Its sizes are too small to "
            "judge a target by.**"
        )
    table = _table(["work", "target", "measured", ""], rows, left={0, 1, 2, 3})
    return f"## Targets\n\n{summary}\n\n{table}"


def _word(verdict: Verdict) -> str:
    return f"**{verdict.word}**" if verdict.met is False else verdict.word


def _transfers(result: CaseResult) -> str:
    best = best_peer(result)
    reference = seconds(result, best) if best else None
    rate = "objects/s" if result.files > 1 else "MB/s"
    head = [
        "",
        "median s",
        "min s",
        "spread",
        rate,
        "x best peer",
        "transfer s",
        "CPU s",
        "peak MiB",
        "runs",
    ]
    rows: list[list[str]] = []
    faults: list[str] = []
    for name, runs in _by_time(result):
        shown = f"**{name}**" if is_ours(name) else name
        if not good(runs):
            rows.append([shown, *["-"] * (len(head) - 1)])
            faults.append(_fault(name, runs))
            continue
        middle = median(run.seconds for run in runs)
        inner = [run.transfer_seconds for run in runs if run.transfer_seconds is not None]
        amount = result.files if result.files > 1 else result.bytes / 1e6
        memory = peak(result, name)
        rows.append(
            [
                shown,
                f"{middle:.2f}",
                f"{min(run.seconds for run in runs):.2f}",
                _spread(runs),
                f"{amount / middle:,.0f}",
                f"{middle / reference:.2f}" if reference else "-",
                f"{median(inner):.2f}" if inner else "-",
                f"{median(run.cpu_seconds for run in runs):.2f}",
                f"{memory / MIB:.0f}" if memory else "-",
                f"{len(runs)}",
            ]
        )
    text = f"## {result.title}\n\n{_table(head, rows)}"
    if best:
        text += f"\n\nThe best peer is {best}."
    return "\n\n".join([text, *filter(None, ["\n".join(faults)])])


def _spread(runs: Sequence[Measurement]) -> str:
    if len(runs) == 1:
        return "-"
    times = [run.seconds for run in runs]
    return f"{(max(times) - min(times)) / median(times):.0%}"


def _fault(name: str, runs: Sequence[Measurement]) -> str:
    why = next((run.fault for run in runs if run.fault), "no run")
    return f"- {name} does not count: {why}"


def _repeats(result: CaseResult) -> str:
    rows: list[list[str]] = []
    faults: list[str] = []
    for way in REPEATS:
        runs = result.runs.get(way.name)
        if runs is None:
            continue
        shown = f"`{way.code}`"
        if is_ours(way.name):
            shown = f"**{shown}**"
        row = [shown, way.asks, "new" if way.cold else "same"]
        if not good(runs):
            rows.append([*row, *["-"] * 4])
            faults.append(_fault(way.name, runs))
            continue
        times = [run.seconds * 1000 for run in runs]
        rows.append(
            [*row, f"{median(times):.2f}", f"{min(times):.2f}", _spread(runs), f"{len(runs)}"]
        )
    head = ["", "asks", "process", "median ms", "min ms", "spread", "calls"]
    text = f"## {result.title}\n\n{_table(head, rows, left={0, 1, 2})}"
    return "\n\n".join([text, *filter(None, ["\n".join(faults)])])


def _containers(result: CaseResult) -> str:
    reference = seconds(result, WORKS[result.name].peer)
    rows: list[list[str]] = []
    faults: list[str] = []
    for name, runs in _by_time(result):
        shown = f"**{name}**" if is_ours(name) else name
        middle, memory = seconds(result, name), peak(result, name)
        if middle is None:
            rows.append([shown, *["-"] * 6])
            faults.append(_fault(name, runs))
            continue
        rows.append(
            [
                shown,
                f"{middle:.3f}",
                f"{min(run.seconds for run in runs):.3f}",
                _spread(runs),
                f"{reference / middle:.1f}" if reference else "-",
                f"{memory / MIB:.0f}" if memory else "-",
                f"{len(runs)}",
            ]
        )
    head = ["", "median s", "min s", "spread", "times as fast", "peak MiB", "runs"]
    text = f"## {result.title}\n\n{_table(head, rows)}"
    return "\n\n".join([text, *filter(None, ["\n".join(faults)])])


def _by_time(result: CaseResult) -> list[tuple[str, Sequence[Measurement]]]:
    return sorted(
        result.runs.items(),
        key=lambda item: median(run.seconds for run in item[1]) if good(item[1]) else 1e9,
    )


def _imports(result: CaseResult) -> str:
    rows = []
    for statement in IMPORTS:
        cost = import_cost(result, statement.name)
        if cost is None:
            continue
        runs = result.runs[statement.name]
        memory = median(run.peak_memory for run in runs)
        shown = f"`{statement.code}`"
        rows.append(
            [
                f"**{shown}**" if is_ours(statement.name) else shown,
                f"{cost * 1000:.0f}",
                f"{median(run.seconds for run in runs) * 1000:.0f}",
                f"{min(run.seconds for run in runs) * 1000:.0f}",
                f"{memory / MIB:.0f}",
            ]
        )
    bare = seconds(result, BARE) or 0.0
    head = ["", "ms over bare", "median ms", "min ms", "peak MiB"]
    text = f"## {result.title}\n\n{_table(head, rows)}\n\nA bare interpreter: {bare * 1000:.0f} ms"
    other = seconds(result, BARE_KSERVE)
    if other is not None:
        text += f"; the one that has `kserve_storage`: {other * 1000:.0f} ms"
    return text + "."


def _machine(session: Session) -> str:
    machine = session.machine
    rows = [
        ["processor", f"{machine.processor}, {machine.cores} cores"],
        ["memory", f"{machine.memory / 1024**3:.0f} GiB"],
        ["system", machine.system],
        ["load before and after", f"{machine.load[0]:.1f}, {machine.load[1]:.1f}"],
        ["date", session.date],
        *([name, version] for name, version in session.versions.items()),
    ]
    return "## Machine and versions\n\n" + _table(["", ""], rows, left={0, 1})


def _method(session: Session) -> str:
    sizes = session.sizes
    rounds = "1 round follows" if sizes.rounds == 1 else f"{sizes.rounds} rounds follow"
    warm_up = (
        f"A quick run discards nothing, so caches are cold. {rounds[0].upper()}{rounds[1:]}"
        if sizes.quick
        else "Each case but the upload begins with one discarded run of everybody, which warms the "
        f"caches of the server, of the disk and of Python's bytecode. Then {rounds}"
    )
    return f"""## How it is measured

```
{session.command}
```

- One SeaweedFS (`weed mini`) is started for the whole session, on the loopback interface and on
  the same cores as the contestants. The data are random (seed {session.seed}), so nothing
  compresses.
- {warm_up} in which everybody runs once, in turns; each round starts with another
  contestant, so that noise hits all alike. Imports take {sizes.import_rounds}
  rounds.{_rare(session)}
- Each run is a fresh process with an empty environment and its own defaults. *Median*, *min* and
  *spread* (longest minus shortest, as a share of the median) are wall clock from its start to its
  end. *Transfer* is what a Python client takes after its import, measured inside the process.
  *CPU* is processor time of the process and its children, the server's not included.
- *Peak* is the largest resident memory in any run, from the kernel; for contestants that start
  processes at least the sampled sum over all of them, shared pages counted once.
- Before each run the destination is removed and the disk is synced, and what a container or an
  archive is made of is read once, so that nobody waits for the disk. After each run the result is
  compared with the source by SHA-256, outside the timed part; who fails or delivers other bytes
  is not counted, and named. An upload goes to a fresh bucket, is read back and compared.
- `storage` is the facade in Python without an expected digest, `storage+blake3` and
  `storage+sha256` verify one before they publish, `storage-command` is the command. No peer
  verifies a digest. s5cmd and rclone are started directly, not through a Python wrapper.
  boto3 has no download of trees: it gets a loop over one transfer manager.
- A second download finds all files in the cache of the library that is asked; the first one,
  which filled it, is not counted. *Same* process: {sizes.repeat_calls} calls one after another,
  and one before them that is discarded. *New* process: from its start to its end, in
  {sizes.repeat_rounds} rounds and a discarded one. The S3 server is that of the other cases;
  the Hub is the one of the tests, a server in Python that answers both libraries. What is
  delivered is compared with the source. Revalidating asks whether the model has changed.
- Containers and archives are made of normally distributed 32-bit floats, archives of text
  besides. Each library works in an interpreter of its own; timed is the work alone, inside the
  process, after the same on a tiny model: neither its start, nor imports, nor reading the
  weights that a container is made of.
  Building and re-tagging end with a saved file, which nobody syncs to the disk; loading
  ends when all of one array and a little of each have been used, with `mmap=True` in
  this library. Each re-tags and loads the container that it built. Before each run the disk is
  synced; after each run the weights in what was made are compared with the source. *Peak*
  includes the weights where a process holds them."""


def _rare(session: Session) -> str:
    """Say who makes one run only."""
    if session.sizes.rounds == 1:
        return ""
    groups = []
    for result in session.results.values():
        action = CASES[result.name].action
        names = [name for name in result.runs if name in ALL and action in ALL[name].once]
        if names:
            groups.append(f"{', '.join(names)} ({_lower(result.title)})")
    if not groups:
        return ""
    return (
        " Some whose runs take long make one counted run and no discarded one: "
        f"{'; '.join(groups)}. The column *runs* tells."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: set[int] | None = None) -> str:
    aligned = left if left is not None else {0}
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if index in aligned else "--:" for index in range(len(head))) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines)


# The plot: panels of horizontal bars.

_WIDTH, _LABEL, _VALUE, _ROW, _HEAD, _GAP = 760, 190, 90, 20, 30, 18
_OURS, _PEER = "#1f4e79", "#b8c4d0"


def plot(results: Results) -> str:
    """Return an SVG picture with a panel for each case, and one for memory."""
    panels = []
    for name, result in results.items():
        if name == "import":
            bars = {
                one.code: cost * 1000
                for one in IMPORTS
                if (cost := import_cost(result, one.name)) is not None
            }
            panels.append((f"{result.title}, milliseconds over a bare interpreter", bars, "{:.0f}"))
            continue
        times = {who: value for who in result.runs if (value := seconds(result, who)) is not None}
        if name == "again":
            times = {who: value * 1000 for who, value in times.items()}
            panels.append((f"{result.title}, milliseconds", times, "{:.2f}"))
            continue
        panels.append((f"{result.title}, seconds", times, "{:.2f}"))
    for name, result in results.items():
        if name not in ("again", "import", *WORKS):
            peaks = {who: value / MIB for who in result.runs if (value := peak(result, who))}
            panels.append((f"Peak memory: {_lower(result.title)}, MiB", peaks, "{:.0f}"))

    body: list[str] = []
    y = _GAP
    for title, bars, style in panels:
        body.append(f'<text x="12" y="{y + 12}" class="t">{escape(title)}</text>')
        y += _HEAD
        largest = max(bars.values(), default=0.0) or 1.0
        for label, value in sorted(bars.items(), key=lambda item: item[1]):
            length = max(1.0, (_WIDTH - _LABEL - _VALUE) * max(value, 0.0) / largest)
            mine = is_ours(label) or label in {one.code for one in IMPORTS if is_ours(one.name)}
            shown = escape(_short(label))
            body.append(
                f'<text x="{_LABEL - 8}" y="{y + 12}" class="{"o" if mine else "p"}">{shown}</text>'
                f'<rect x="{_LABEL}" y="{y + 1}" width="{length:.1f}" height="{_ROW - 6}" '
                f'fill="{_OURS if mine else _PEER}"/>'
                f'<text x="{_LABEL + length + 6:.1f}" y="{y + 12}">{style.format(value)}</text>'
            )
            y += _ROW
        y += _GAP
    style_sheet = (
        "text{font:12px sans-serif;fill:#222}.t{font-weight:bold;font-size:13px}"
        ".o,.p{text-anchor:end}.o{font-weight:bold}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" '
        f'viewBox="0 0 {_WIDTH} {y}" role="img">\n<style>{style_sheet}</style>\n'
        f'<rect width="{_WIDTH}" height="{y}" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]


def _short(label: str) -> str:
    return label.removeprefix("from storage import ").removeprefix("import ")
