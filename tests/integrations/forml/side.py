"""The side of ForML: a process of its interpreter, which finds this library by its name."""

import contextlib
import datetime
import io
import multiprocessing
import os
import pickle
import queue
import shutil
import signal
import sys
import time
import uuid
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# Seconds for what takes one or two; shorter than what a test may take.
WAIT = 180
sys.path[:0] = [
    str(HERE.parents[2]),
    str(HERE / "inside"),
    str(HERE.parents[1] / "peers" / "inside"),
]

from json_lines import serve  # noqa: E402


def prepare(environment):
    """Set what is to be there before anything is imported; return the release of ForML."""
    os.environ.update(environment)
    with warnings.catch_warnings(action="ignore"):
        import forml
        import forml.runtime

    return forml.__version__


def _registry(uri, staging=None):
    from storage.integrations.forml import Registry

    return Registry(uri, staging)


def _directory(uri):
    from forml.io import asset

    return asset.Directory(_registry(uri))


def _inventory(uri):
    from storage.integrations.forml import Inventory

    return Inventory(uri)


def _plain(error):
    return f"{type(error).__qualname__}: {error}"


# -- ForML's own command ---------------------------------------------------------------------


def command(config, arguments):
    """Run ForML's command; return what it prints."""
    from forml.setup._run import group

    printed = io.StringIO()
    here = os.getcwd()
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(printed):
        try:
            group.main(["--config", config, *arguments], "forml", standalone_mode=False)
        finally:
            os.chdir(here)
    return printed.getvalue()


# -- packages --------------------------------------------------------------------------------


def create(source, target, version, name="demo-project", package="demo"):
    """Make a package out of a folder."""
    from forml import project

    project.Package.create(source, project.Manifest(name, version, package), target)


def describe(folder, version, name="demo-project", package="demo"):
    """Make a package of a folder as it is."""
    from forml import project

    project.Manifest(name, version, package).write(folder)


def push(uri, package):
    """Push a package."""
    from forml import project

    _registry(uri).push(project.Package(package))


def put(uri, name, package):
    """Publish a package as ForML does, which compares versions."""
    from forml import project

    return str(_directory(uri).get(name).put(project.Package(package)).key)


def pull(uri, project, version, target):
    """Pull a package and put it elsewhere; return its manifest."""
    found = _registry(uri).pull(project, version)
    (shutil.copytree if found.path.is_dir() else shutil.copyfile)(found.path, target)
    return [str(found.manifest.name), str(found.manifest.version), found.manifest.package]


def mount(uri, project, version, staging=None):
    """Mount a package; return the artifact, and what Python imports from the staging folder."""
    registry = _registry(uri, staging)
    artifact = registry.mount(project, version)
    return {
        "path": str(artifact.path),
        "package": artifact.package,
        "imports": [each for each in sys.path if each.startswith(str(registry._staging))],
    }


def levels(uri):
    """List all three levels as ForML does."""
    directory = _directory(uri)
    return {
        str(project): {
            str(release): [int(key) for key in directory.get(project).get(release).list()]
            for release in directory.get(project).list()
        }
        for project in directory.list()
    }


def listed(uri, project, version):
    """List all three levels as a provider does."""
    registry = _registry(uri)
    return {
        "projects": [str(key) for key in registry.projects()],
        "releases": [str(key) for key in registry.releases(project)],
        "generations": [int(key) for key in registry.generations(project, version)],
    }


# -- generations -----------------------------------------------------------------------------


def _tag(states, minute=0):
    from forml.io import asset

    when = datetime.datetime(2026, 1, 2, 3, minute, 5, 678)  # noqa: DTZ001 - as ForML has it
    return asset.Tag(
        training=asset.Tag.Training(when, datetime.datetime(2026, 1, 1)),  # noqa: DTZ001
        tuning=asset.Tag.Tuning(when, 3.3),
        states=states,
    )


def train(uri, project, version, states):
    """Keep states and close a generation with them, as ForML does; return its number."""
    release = _directory(uri).get(project).get(version)
    sids = [release.dump(state.encode()) for state in states]
    return int(release.put(_tag(sids)).key)


def states(uri, project, version, generation):
    """Return the states of a generation, in order, and whether its tag is the one that was put."""
    found = _directory(uri).get(project).get(version).get(generation)
    return {
        "states": [found.get(index).decode() for index in range(len(found.tag.states))],
        "same": found.tag == _tag(found.tag.states),
    }


def write(uri, project, version, sid, state):
    """Keep a state with an id."""
    _registry(uri).write(project, version, uuid.UUID(sid), state.encode())


def close(uri, project, version, generation, sids=(), broken=False):
    """Close a generation."""
    from forml.io import asset

    tag = asset.Tag() if broken else _tag([uuid.UUID(sid) for sid in sids])
    _registry(uri).close(project, version, generation, tag)


def read(uri, project, version, generation, sid):
    """Read a state."""
    return _registry(uri).read(project, version, generation, uuid.UUID(sid)).decode()


def open_(uri, project, version, generation):
    """Return the states that a tag names."""
    return [str(sid) for sid in _registry(uri).open(project, version, generation).states]


# -- many, and short-lived, processes --------------------------------------------------------


def _closer(uri, project, version, name, count, answers):
    from forml.io import asset

    release = _directory(uri).get(project).get(version)
    lost = 0
    for index in range(count):
        text = f"{name}-{index}"
        tag = _tag([release.dump(text.encode()), release.dump(f"{text} too".encode())])
        while True:
            try:
                # The number that ForML finds, and the generation that it then has.
                found = release.put(tag)
                break
            except asset.Level.Invalid:
                lost += 1
        answers.put([int(found.key), text, found.tag == tag])
    answers.put(lost)


def _collect(answers, count, processes):
    """Return ``count`` answers of processes, and see them end; all of them are ended on failure."""
    deadline = time.monotonic() + WAIT
    found = []
    try:
        while len(found) < count:
            with contextlib.suppress(queue.Empty):
                found.append(answers.get(timeout=1))
                continue
            codes = [process.exitcode for process in processes]
            if any(codes) or time.monotonic() > deadline:
                raise RuntimeError(f"{len(found)} of {count} answers, exit codes {codes}")
        for process in processes:
            process.join(timeout=WAIT)
    finally:
        for process in processes:
            process.kill()
    return found


def close_at_once(uri, project, version, processes, count):
    """Let several processes close generations; return number and states of each, and losses."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    closers = [
        context.Process(target=_closer, args=(uri, project, version, f"p{number}", count, answers))
        for number in range(processes)
    ]
    for closer in closers:
        closer.start()
    found = _collect(answers, processes * (count + 1), closers)
    return {
        "closed": [each for each in found if isinstance(each, list)],
        "lost": sum(each for each in found if isinstance(each, int)),
    }


def _at_once(task, calls):
    """Do a task in several processes; return what each returned or raised."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def run(index, arguments):
        try:
            answers.put([index, task(**arguments), None])
        except Exception as exc:  # noqa: BLE001 - all of it is an answer
            answers.put([index, None, _plain(exc)])

    running = [context.Process(target=run, args=call) for call in enumerate(calls)]
    for process in running:
        process.start()
    found = _collect(answers, len(running), running)
    return [
        {"value": value, "raised": raised}
        for _, value, raised in sorted(found, key=lambda answer: answer[0])
    ]


def mount_at_once(uri, project, version, staging, processes):
    """Let several processes mount a package."""
    arguments = {"uri": uri, "project": project, "version": version, "staging": staging}
    return _at_once(mount, [arguments] * processes)


def mount_in_threads(uris, project, staging, rounds):
    """Let threads mount, one for each registry; return what each thread mounted, and sys.path."""
    before, interval = list(sys.path), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(uris)) as pool:
            found = []
            for number in range(rounds):
                places = [f"{staging}/{number}"] * len(uris)
                found.append(list(pool.map(_read_mounted, uris, [project] * len(uris), places)))
        return {"read": found, "imports": [path for path in sys.path if path not in before]}
    finally:
        sys.setswitchinterval(interval)
        sys.path[:] = before


def _read_mounted(uri, project, staging):
    registry = _registry(uri, staging)
    (release,) = registry.releases(project)
    artifact = registry.mount(project, release)
    manifest = registry.pull(project, release).manifest
    return [str(artifact.path), artifact.package, manifest.package]


def push_at_once(uri, packages):
    """Let several processes push packages."""
    return _at_once(push, [{"uri": uri, "package": package} for package in packages])


def _die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(task, before, arguments):
    """Run a task in a process that is killed right before it calls ``module:function``."""
    module, _, path = before.partition(":")
    *owners, function = path.split(".")
    __import__(module)

    def run():
        owner = sys.modules[module]
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, function, _die)
        globals()[task](**arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=WAIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise RuntimeError(f"{task} was still running after {WAIT} s")
    return process.exitcode


def _elsewhere(text, project, version, generation):
    registry = pickle.loads(text)
    tag = registry.open(project, version, generation)
    states = [registry.read(project, version, generation, sid).decode() for sid in tag.states]
    return os.getpid(), states, pickle.dumps(registry)


def pickled(uri, stagings, project, version, generation):
    """Use registries in another process; return what was read there, and if they came back."""
    context = multiprocessing.get_context("spawn")
    answers = []
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for staging in stagings:
            registry = _registry(uri, staging)
            registry.open(project, version, generation)  # it has connections
            arguments = (pickle.dumps(registry), project, version, generation)
            pid, states, text = pool.submit(_elsewhere, *arguments).result(timeout=WAIT)
            back = pickle.loads(text)
            inventory = _inventory(uri)
            answers.append(
                {
                    "elsewhere": pid != os.getpid(),
                    "states": states,
                    "equal": back == registry and hash(back) == hash(registry),
                    "inventory": pickle.loads(pickle.dumps(inventory)) == inventory,
                    "size": len(text),
                }
            )
    return answers


def compare(one, other):
    """Compare two registries, and two inventories; each is a list of arguments."""
    left, right = _registry(*one), _registry(*other)
    inventories = _inventory(one[0]), _inventory(other[0])
    assert (left == right) == (hash(left) == hash(right)) == (len({left, right}) == 1)
    return [left == right, inventories[0] == inventories[1], repr(left)]


# -- applications ----------------------------------------------------------------------------


def applications(uri):
    """List the applications."""
    return list(_inventory(uri).list())


def put_application(uri, path):
    """Store a descriptor."""
    from forml import application

    _inventory(uri).put(application.Descriptor.Handle(path))


def application(uri, name):
    """Return the name that a descriptor gives itself, and the project that it uses."""
    found = _inventory(uri).get(name)
    return [found.name, str(found._strategy._project)]


def guarded(task):
    """Let an error of ForML's have its whole name."""

    def run(**arguments):
        import forml

        try:
            return task(**arguments)
        except forml.AnyError as exc:
            raise RuntimeError(_plain(exc)) from exc

    return run


if __name__ == "__main__":
    TASKS = [
        command, create, describe, push, put, pull, mount, levels, listed, train, states, write,
        close, read, open_, close_at_once, mount_at_once, mount_in_threads, push_at_once,
        killed, pickled, compare, applications,
        put_application, application,
    ]  # fmt: skip
    serve({"prepare": prepare} | {task.__name__: guarded(task) for task in TASKS})
