"""Ask for one model again and again in one process, and note how long each call took.

``python ask.py CLIENT HOW MODEL CALLS --timings FILE``; addresses and credentials come from
the environment. The first call fills the cache or finds it filled, the second one loads what
only it needs; neither is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

Ask = Callable[[], str]


def use_storage(model: str, how: str) -> tuple[Ask, Ask]:
    """Return the ordinary download by this library, and the repeated one."""
    from storage import S3Config, Storage

    config = None
    if model.startswith("s3://"):
        config = S3Config(
            access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
            secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        )
    return (
        lambda: Storage.download(model, config=config),
        lambda: Storage.download(model, config=config, freshness=how),
    )


def use_huggingface_hub(model: str, how: str) -> tuple[Ask, Ask]:
    """Return the ordinary download by the Hub's own client, and the repeated one."""
    from huggingface_hub import snapshot_download

    local = how == "cache-first"
    return (
        lambda: snapshot_download(model),
        lambda: snapshot_download(model, local_files_only=local),
    )


CLIENTS: dict[str, Callable[[str, str], tuple[Ask, Ask]]] = {
    "storage": use_storage,
    "huggingface_hub": use_huggingface_hub,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("client", choices=sorted(CLIENTS))
    parser.add_argument("how", choices=["cache-first", "revalidate"])
    parser.add_argument("model")
    parser.add_argument("calls", type=int)
    parser.add_argument("--timings", required=True)
    job = parser.parse_args()
    first, again = CLIENTS[job.client](job.model, job.how)
    path = first()
    # What was just fetched is written to the disk now, not while others are measured.
    os.sync()
    again()
    calls = []
    for _ in range(job.calls):
        begin = time.perf_counter()
        found = again()
        calls.append(time.perf_counter() - begin)
        if found != path:
            raise SystemExit(f"first {path}, then {found}")
    with open(job.timings, "w") as stream:
        json.dump({"path": path, "calls": calls}, stream)


if __name__ == "__main__":
    main()
