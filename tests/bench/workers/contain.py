"""Make, change or open a model container, or make an archive, and note how long it took.

``python contain.py CLIENT WORK SOURCE TARGET --timings FILE``. Each library is used the way its
own documentation shows, with its own defaults. What is timed is the work alone, which everybody
has done once before on a tiny model: imports, the weights that come from a file, and what is
done for the check afterwards are not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARRAYS = 8

Job = argparse.Namespace
Work = Callable[[], object]


def weights(path: str) -> list[Any]:
    """Return the arrays of a model: equal parts of a file of 32-bit floats."""
    import numpy

    return list(numpy.fromfile(path, dtype="<f4").reshape(ARRAYS, -1))


def touch(arrays: list[Any]) -> float:
    """Use a little of every array and all of the first one."""
    return float(sum(float(array[:16].sum()) for array in arrays) + arrays[0].sum())


def use_storage(job: Job) -> Work:
    """Return the work as this library does it."""
    from storage.container import ModelContainer

    if job.work == "build":
        arrays = weights(job.source)

        def build() -> None:
            with ModelContainer.from_training_model(arrays) as model:
                model.save_to_file(job.target)

        return build

    def retag() -> None:
        with (
            ModelContainer.from_file(job.source) as model,
            model.to_builder().set_metadata("tag", "v2").build() as tagged,
        ):
            tagged.save_to_file(job.target)

    def load() -> float:
        with ModelContainer.from_file(job.source) as model:
            return touch(model.get_training_model(mmap=True))

    return {"retag": retag, "map": load}[job.work]


def use_storage_archive(job: Job) -> Work:
    """Return the making of an archive by this library."""
    from storage.container import create_archive

    return lambda: keep(create_archive(job.source), job)


def use_scaleoututil(job: Job) -> Work:
    """Return the work as the container's own library does it."""
    from scaleoututil.utils.model import (  # type: ignore[import-not-found, unused-ignore]
        ScaleoutModel,
    )

    if job.work == "build":
        arrays = weights(job.source)

        def build() -> None:
            with ScaleoutModel.from_training_model(arrays) as model:
                model.save_to_file(job.target)

        return build

    def retag() -> None:
        with (
            ScaleoutModel.from_file(job.source) as model,
            model.to_builder().set_metadata("tag", "v2").build() as tagged,
        ):
            tagged.save_to_file(job.target)

    def load() -> float:
        with ScaleoutModel.from_file(job.source) as model:
            return touch(model.get_training_model())

    return {"retag": retag, "map": load}[job.work]


def use_arkindex(job: Job) -> Work:
    """Return the making of an archive by the library for workers of Arkindex."""
    from arkindex_worker.worker.training import (  # type: ignore[import-not-found, unused-ignore]
        create_archive,
    )

    return lambda: keep(create_archive(Path(job.source)), job)


def keep(archive: Any, job: Job) -> None:
    """Enter what makes an archive, stop the clock, and keep the archive for the check."""
    with archive as (path, *_):
        job.done = time.perf_counter()
        shutil.copyfile(path, job.target)


CLIENTS: dict[str, Callable[[Job], Work]] = {
    "storage": use_storage,
    "scaleoututil": use_scaleoututil,
    "arkindex-base-worker": use_arkindex,
}


def rehearse(use: Callable[[Job], Work], job: Job) -> None:
    """Do the work on a tiny model, so that everything it needs is imported."""
    with tempfile.TemporaryDirectory() as folder:
        tree = os.path.join(folder, "tree")
        os.mkdir(tree)
        source, target = os.path.join(tree, "weights"), os.path.join(folder, "target")
        with open(source, "wb") as file:
            file.write(bytes(range(256)) * ARRAYS)
        if job.work == "archive":
            source = tree
        elif job.work != "build":
            built = os.path.join(folder, "built")
            use(argparse.Namespace(work="build", source=source, target=built))()
            source = built
        use(argparse.Namespace(work=job.work, source=source, target=target))()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("client", choices=sorted(CLIENTS))
    parser.add_argument("work", choices=["build", "retag", "map", "archive"])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--timings", required=True)
    job = parser.parse_args()

    ours = job.client == "storage" and job.work == "archive"
    use = use_storage_archive if ours else CLIENTS[job.client]
    rehearse(use, job)
    work = use(job)
    # What was written before is not to be carried to the disk while this is timed.
    os.sync()
    begin = time.perf_counter()
    found = work()
    done = getattr(job, "done", time.perf_counter())
    timings = {"transfer": done - begin, "found": found}
    with open(job.timings, "w") as stream:
        json.dump(timings, stream)


if __name__ == "__main__":
    main()
