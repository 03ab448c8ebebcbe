"""Runs a storage initializer again and again, each time as a process of its own.

Its modules are imported once, before the processes are forked: that is most of a run's time.
"""

import atexit
import contextlib
import ctypes
import importlib
import os
import runpy
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

from json_lines import serve

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_KEEPCAPS = 8
CAPABILITIES_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2

# Before this process has a view of its own, in which everybody is root.
IS_ROOT = not os.getuid()

libc = ctypes.CDLL(None, use_errno=True)


def prepare(modules, path, environment):
    """Import modules that the initializer imports later, found below ``path`` too.

    ``environment`` is for what is read while a module is imported.
    """
    sys.path[:0] = path
    os.environ.update(environment)
    return [str(importlib.import_module(name).__file__) for name in modules]


def mount(point, folders):
    """Give this process a view of the file system in which ``point`` holds ``folders`` too.

    They are mount points there, as volumes of a pod are. Nobody else sees any of it.
    """
    user, group = os.getuid(), os.getgid()
    _checked("unshare", libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, "/", MS_REC | MS_PRIVATE)
    there = {name: os.path.join(point, name) for name in os.listdir(point)}
    view = tempfile.mkdtemp()
    # What was there stays: the tests themselves may lie below it.
    for name, source in {**there, **folders}.items():
        target = os.path.join(view, name)
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            Path(target).touch()
        _mount(source, target, MS_BIND | MS_REC)
    _mount(view, point, MS_BIND | MS_REC)


def _mount(source, target, flags):
    names = [None if name is None else os.fsencode(name) for name in (source, target)]
    _checked(f"mount {target}", libc.mount(*names, None, flags, None))


def _checked(what, answer):
    if answer:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def run(program, arguments, environment, folder, limit, user=None):
    """Run a script, or a module, and return its exit status and what it printed.

    Args:
        program: path of the script, or name of the module.
        arguments: of its command line.
        environment: all of its variables.
        folder: where it works; what it prints is kept there.
        limit: seconds after which it is killed; the status is ``None`` then.
        user: id of the user that it runs as, if this is root.
    """
    places = [os.path.join(folder, name) for name in ("stdout", "stderr")]
    began = time.monotonic()
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            for number, place in enumerate(places, 1):
                file = os.open(place, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
                os.dup2(file, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.clear()
            os.environ.update(environment)
            tempfile.tempdir = None
            os.chdir(folder)
            if user is not None and IS_ROOT:
                _become(user)
            status = _main(program, arguments)
        finally:
            os._exit(status)
    status = _waited(child, began + limit)
    printed = [Path(place).read_text(errors="replace") for place in places]
    return {"status": status, "out": printed[0], "err": printed[1]}


def _become(user):
    """Give up all rights of root but one, to read: the interpreter may be in a folder of root's."""
    _checked("prctl", libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    header = struct.pack("Ii", CAPABILITIES_VERSION, 0)
    rights = struct.pack("6I", *([1 << CAP_DAC_READ_SEARCH] * 2), 0, 0, 0, 0)
    _checked("capset", libc.capset(header, rights))


def _main(program, arguments):
    sys.argv = [program, *arguments]
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - until the process ends
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    status = 0
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as an interpreter that ends with it
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _waited(child, deadline):
    pause = 0.002
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(pause * 1.3, 0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def tree(folder):
    """Return the files below ``folder``, links followed: path to content, byte by character."""
    if not os.path.isdir(folder):
        return None
    found = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            file = os.path.join(parent, name)
            with open(file, "rb") as opened:
                found[os.path.relpath(file, folder)] = opened.read().decode("latin-1")
    return found


serve({task.__name__: task for task in (prepare, mount, run, tree)})
