"""The page about faults, from the log of the faulty transfers.

::

    STORAGE_SOAK=1 STORAGE_FAULTS_LOG=runs.jsonl pytest tests/faults/test_faulty_transfers.py
    python -m tests.faults.report runs.jsonl --out docs/faults.md
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from tests.faults.harness import BOUND, DOWN, SLOW, STALL, UP, WAIT, WRONG, Outcome
from tests.faults.stores import SITES, ShimSite

__all__ = ["main", "page"]

_TITLES = {
    "s3-obstore": "S3, obstore",
    "s3-fsspec": "S3, s3fs",
    "gcs-obstore": "GCS, obstore",
    "gcs-fsspec": "GCS, gcsfs",
    "azure-obstore": "Azure, obstore",
    "azure-fsspec": "Azure, adlfs",
    "hf": "Hub",
    "http": "HTTP",
}
_BLIND = {"gcs-obstore": ShimSite.blind}

_MEANING = {
    "reset": "the connection is reset while the answer comes",
    "reset_request": "the connection is reset while the request goes up",
    "truncate": "the answer ends before the length that it told",
    "truncate_unsized": "the answer ends early, and never told its length",
    "stall": "the answer stops, and the connection stays open",
    "stall_answer": "the request is carried out, and no answer comes",
    "throttle": "the answer comes at 4 KiB/s for a while",
    "status": "408, 429, 500 or 503, some with Retry-After",
    "error_body": "status 200, with an error's document instead of what was asked for",
    "lost_answer": "the request is carried out, and answered by 500 or a reset",
    "flip": "one bit of an object is another one when it arrives",
    "flip_request": "one bit of an object is another one when the store gets it",
    "change": "somebody replaces the object while it is read",
    "expire": "the credentials expire, now and for all that follows",
}

_NOTICED = {
    "reset, truncate": "the connection, and the length that the store told; a range goes on where "
    "it broke",
    "truncate_unsized": "the size that the store told when it was asked before; a download of "
    "unknown size without a digest cannot tell the end from a cut",
    "stall, stall_answer": "`stall_timeout`: no byte for so long",
    "throttle": f"nobody, and rightly: a slow link is no fault (it lasted {SLOW} s here)",
    "status, lost_answer": "the status; what was carried out is carried out again, which changes "
    "nothing, and an upload that may not overwrite looks whether what is there is its own",
    "error_body": "the size and the entity tag, which are not the object's",
    "flip": "a digest: of the store, of whoever uploaded the object with this library, or the one "
    "that the caller expects",
    "flip_request": "the store, which compares what arrives with the digest that is sent along",
    "change": "the entity tag or version that each request is pinned to; the object is fetched "
    "anew, never spliced",
    "expire": "the store; nothing is asked again, and nobody can clean up before there are new "
    "credentials",
}

_PAGE = Template(
    """# Faults

What becomes of a transfer when the network, the store or a neighbour misbehaves: it ends
whole, or with a clear error and nothing published. This page is written by the tests: $total
transfers over real servers behind a proxy that breaks things by a seed (`FaultProxy` in
`storage.testing`), single objects, objects in parts and trees, to a destination or through
the cache. In $faulty of them something went wrong, $events times in all. They were run with

    STORAGE_SOAK=1 STORAGE_FAULTS_LOG=runs.jsonl pytest tests/faults/test_faulty_transfers.py
    python -m tests.faults.report runs.jsonl --out docs/faults.md

and every day a tenth of them is. A test that fails names the command that repeats its seed.

$sums

*Whole* means: byte for byte a version that the source really had, read back around this
library. *A clear error* means: one of the [errors](errors.md) of this library, in one line,
and nothing published: the destination is absent or has its old content, the cache serves
nothing of it, each object of an upload is absent, the old one or the whole new one, and no
part of an upload takes up space. And when nothing goes wrong any more, the same call
succeeds. *Wrong* is everything else, and has to be 0.

The errors were $errors.

No transfer hangs. With a `stall_timeout` of $stall s, and a store that asks to wait for $wait s
at most, a transfer with n faults had to end within $bound s + n × $cost s; the slowest took
$slowest s. The Hub answers a commit when all of it is written, so requests that write there
may take ten stall timeouts.

## Downloads

Each cell says how many transfers that met the fault ended whole / with an error. Most meet
one kind of fault, some meet all kinds; one transfer can be in several rows.

$down

## Uploads

$up

$left
## Who notices

$noticed

## What nobody can notice

- A byte that is flipped on the way from a server that vouches for nothing (most plain HTTP
  servers) arrives as if it were right, unless the caller expects a digest (`digest=`, or
  `#sha256=…` in the URI). The downloads above that meet a flip over HTTP expect one.
- A byte that is flipped on the way up to such a server is not seen by the server. Without TLS
  the object is read back and compared, and sent again if it is another one; until that has
  happened the damaged one is there, and it stays if the connection or the credentials end.
- An answer to an upload in parts that begins it, if that never comes: nobody knows the name of
  what was begun. On S3 it is looked for and ended. On GCS it stays; it holds no bytes.
- A small file of a commit to the Hub travels inside the request's document, which no digest
  protects; large files do have one.
- A listing has no digest. TLS protects the names in it.
- What `open(uri, "rb")` gives is read in pieces, in any order, so that no digest is compared.
  All pieces are of one version.
$blind"""
)


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the page in Markdown."""
    met = [outcome for outcome in outcomes if outcome.faults]
    errors = Counter(outcome.ended for outcome in met if outcome.ended not in ("whole", WRONG))
    left = [outcome for outcome in outcomes if outcome.left]
    sums = [
        _sums(title, [outcome for outcome in met if outcome.direction in directions])
        for title, directions in (
            ("downloads", ("down",)),
            ("uploads", ("up",)),
            ("all", ("down", "up")),
        )
    ]
    blind = "\n".join(
        f"- Left out above: `{kind}` on {_TITLES[site]}, because {reason}."
        for site, kinds in _BLIND.items()
        for kind, reason in kinds.items()
    )
    return _PAGE.substitute(
        total=f"{len(outcomes):,}",
        faulty=f"{len(met):,}",
        events=f"{sum(len(outcome.faults) for outcome in met):,}",
        sums=_rows(("", "transfers", "whole", "a clear error", "wrong"), sums),
        errors=", ".join(f"{count} `{name}`" for name, count in errors.most_common()),
        stall=STALL,
        wait=WAIT,
        bound=f"{BOUND:.0f}",
        cost=STALL + WAIT + 0.5,
        slowest=f"{max(outcome.seconds for outcome in outcomes):.1f}",
        down=_table(met, "down", DOWN),
        up=_table(met, "up", UP),
        left=_left(left),
        noticed=_rows(("fault", "noticed by"), _NOTICED.items()),
        blind=blind + "\n",
    )


def _sums(title: str, outcomes: Sequence[Outcome]) -> list[str]:
    ends = Counter(outcome.ended for outcome in outcomes)
    whole, wrong = ends["whole"], ends[WRONG]
    counts = (len(outcomes), whole, len(outcomes) - whole - wrong, wrong)
    return [title, *map(str, counts)]


def _left(left: Sequence[Outcome]) -> str:
    if not left:
        return ""
    return (
        f"After {len(left)} of the uploads whose credentials expired midway, parts of an upload "
        "stay at the store: nobody may remove them then. Let the bucket's lifecycle rules do it.\n"
    )


def _table(outcomes: Iterable[Outcome], direction: str, kinds: Iterable[str]) -> str:
    cells: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        if outcome.direction == direction:
            for kind in set(outcome.faults):
                cells[kind, outcome.site][outcome.ended] += 1
    rows = []
    for kind in kinds:
        row = [f"{kind}: {_MEANING[kind]}"]
        for site in SITES:
            found = cells[kind, site]
            wrong = f", {found[WRONG]} wrong" if found[WRONG] else ""
            failed = found.total() - found["whole"] - found[WRONG]
            row.append(f"{found['whole']} / {failed}{wrong}" if found else "–")
        rows.append(row)
    return _rows(("fault", *(_TITLES[site] for site in SITES)), rows)


def _rows(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Read the log and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, help="what STORAGE_FAULTS_LOG named")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    lines = arguments.log.read_text(encoding="utf-8").splitlines()
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    arguments.out.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
