"""The figures that were promised, and whether they are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from tests.bench.cases import BARE, BARE_KSERVE, IMPORTS, CaseResult
from tests.bench.containers import ASIDE, WORKS
from tests.bench.contestants import ALL, PEERS
from tests.bench.measure import Measurement

__all__ = ["Verdict", "best_peer", "import_cost", "judge", "peak", "seconds"]

MIB = 1024**2
NOTHING = "-"

Results = Mapping[str, CaseResult]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target and what was found."""

    work: str
    target: str
    found: str
    met: bool | None
    """``None``: a figure that it needs was not measured, or the run was too small to tell."""

    @property
    def word(self) -> str:
        """``met``, ``missed``, ``not judged`` or ``not measured``."""
        if self.met is None:
            return "not measured" if self.found == NOTHING else "not judged"
        return "met" if self.met else "missed"


def good(runs: Sequence[Measurement]) -> bool:
    """Tell whether these runs count: there are some, and none failed."""
    return bool(runs) and all(run.fault is None for run in runs)


def seconds(result: CaseResult | None, name: str) -> float | None:
    """Return the median wall clock of ``name``; ``None`` if it has no runs that count."""
    runs = result.runs.get(name, ()) if result else ()
    return median(run.seconds for run in runs) if good(runs) else None


def peak(result: CaseResult | None, name: str) -> int | None:
    """Return the highest memory of all runs of ``name``, in bytes."""
    runs = result.runs.get(name, ()) if result else ()
    return max(run.peak_memory for run in runs) if good(runs) else None


def best_peer(result: CaseResult | None) -> str | None:
    """Return the peer with the shortest median."""
    times = {peer.name: seconds(result, peer.name) for peer in PEERS}
    known = {name: value for name, value in times.items() if value is not None}
    return min(known, key=lambda name: known[name]) if known else None


def import_cost(result: CaseResult | None, name: str) -> float | None:
    """Return the seconds of an import above those of its interpreter alone."""
    statement = next(one for one in IMPORTS if one.name == name)
    whole = seconds(result, name)
    bare = seconds(result, BARE_KSERVE if statement.kserve else BARE)
    return None if whole is None or bare is None else whole - bare


def judge(results: Results, *, quick: bool = False) -> list[Verdict]:
    """Compare what was measured with every target that these cases speak of.

    Args:
        results: by the name of the case.
        quick: the sizes were too small for a judgement; only say what was found.
    """
    verdicts = _judge(results)
    return [replace(one, met=None) for one in verdicts] if quick else verdicts


def _judge(results: Results) -> list[Verdict]:
    verdicts: list[Verdict] = []
    if download := results.get("download"):
        best = best_peer(download)
        verdicts.append(_ratio(download, "storage+blake3", best, 1.0, "verified", "the best peer"))
    if small := results.get("small"):
        verdicts.append(_ratio(small, "storage", "s5cmd", 0.7))
        verdicts.append(_ratio(small, "storage", "kserve-storage", 0.1))
    if upload := results.get("upload"):
        verdicts.append(_ratio(upload, "storage", "s5cmd", 1.0))
    if http := results.get("http"):
        verdicts.append(_ratio(http, "storage+blake3", "cp", 1.25, "verified"))
    if again := results.get("again"):
        verdicts.append(_limit(again, "storage, cache-first", 0.010, "in process, cache-first"))
        verdicts.append(
            _limit(again, "storage-command, offline", 0.150, "`storage download`, offline")
        )
    for work in WORKS.values():
        if result := results.get(work.name):
            verdicts.append(_speedup(result, "storage", work.peer, work.factor))
    if imports := results.get("import"):
        cost = import_cost(imports, "storage")
        verdicts.append(
            Verdict(
                "`import storage`",
                "≤ 60 ms over a bare interpreter",
                NOTHING if cost is None else f"{cost * 1000:.0f} ms",
                None if cost is None else cost <= 0.060,
            )
        )
    if set(results) - {"import"} - ASIDE:
        verdicts.append(_memory(results))
    return verdicts


def _ratio(
    result: CaseResult,
    name: str,
    against: str | None,
    limit: float,
    remark: str = "",
    who: str | None = None,
) -> Verdict:
    ours, theirs = seconds(result, name), seconds(result, against) if against else None
    target = f"≤ {limit:g} x {who or against}"
    work = f"{result.title}, {remark}" if remark else result.title
    if ours is None or theirs is None:
        return Verdict(work, target, NOTHING, None)
    ratio = ours / theirs
    found = f"{ratio:.2f} x {against} ({ours:.2f} s against {theirs:.2f} s)"
    return Verdict(work, target, found, ratio <= limit)


def _speedup(result: CaseResult, name: str, against: str, factor: float) -> Verdict:
    ours, theirs = seconds(result, name), seconds(result, against)
    target = f"≥ {factor:g} times as fast as {against}"
    if ours is None or theirs is None:
        return Verdict(result.title, target, NOTHING, None)
    found = f"{theirs / ours:.1f} times ({ours:.3f} s against {theirs:.2f} s)"
    return Verdict(result.title, target, found, theirs / ours >= factor)


def _limit(result: CaseResult, name: str, limit: float, remark: str) -> Verdict:
    found = seconds(result, name)
    return Verdict(
        f"{result.title}, {remark}",
        f"≤ {limit * 1000:.0f} ms",
        NOTHING if found is None else f"{found * 1000:.3g} ms",
        None if found is None else found <= limit,
    )


def _memory(results: Results) -> Verdict:
    peaks = [
        (value, name, result.title)
        for result in results.values()
        if result.name not in ASIDE
        for name in result.runs
        if is_ours(name) and (value := peak(result, name)) is not None
    ]
    work, target = "Peak memory, all of the above", "≤ 160 MiB"
    if not peaks:
        return Verdict(work, target, NOTHING, None)
    value, name, title = max(peaks)
    found = f"{value / MIB:.0f} MiB ({name}, {title[0].lower()}{title[1:]})"
    return Verdict(work, target, found, value <= 160 * MIB)


def is_ours(name: str) -> bool:
    """Tell whether a contestant or a statement of this name is this library's."""
    return name.startswith("storage") or (name in ALL and ALL[name].ours)
