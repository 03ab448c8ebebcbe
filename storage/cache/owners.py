"""Who made a file, and whether that process still lives.

What a process keeps in a cache for itself carries its owner in its name::

    <host>-<boot>-<pid namespace>-<pid>-<start time>[-<8 random hex digits>]

The start time tells a process from a later one with the same number. On the same machine the
process table decides, not a lock: there are file systems on which every lock "succeeds". Of a
process on another machine or in another container a held lock tells that it lives; if none is
held, it is given a day without any change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from storage.files import boot_id, is_locked

__all__ = ["Owner", "boot_id", "current_owner", "is_alive", "is_locked", "may_live", "new_name"]

_PROC = "/proc"
_HAS_NAMESPACES = sys.platform == "linux"
_UNKNOWN_BOOT = "0" * 8
_TOKEN = re.compile(
    r"([0-9a-f]{16})-([0-9a-f]{8})-([0-9]{1,20})-([1-9][0-9]{0,19})-([0-9]{1,20})(?:-[0-9a-f]{8})?",
    re.ASCII,
)
# Seconds without any change after which what cannot be told to be alive counts as dead.
_ABANDONED = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told from all others, before and after it, here and elsewhere."""

    host: str
    """Hash of the name and the id of the machine: 16 hex digits."""

    boot: str
    """Hash of the id of the boot, 8 hex digits; all zero if the system has none."""

    namespace: int
    """Which process table ``pid`` is in; 0 if the system does not tell."""

    pid: int

    started: int
    """Clock ticks from boot to the start of the process; 0 if the system does not tell."""

    @property
    def token(self) -> str:
        """The owner as a part of a file's name; :meth:`parse` reads it."""
        return f"{self.host}-{self.boot}-{self.namespace}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, name: str) -> Owner | None:
        """Return the owner that a token or a :func:`new_name` tells; none if it tells none."""
        match = _TOKEN.fullmatch(name)
        if match is None:
            return None
        host, boot, namespace, pid, started = match.groups()
        return cls(host, boot, int(namespace), int(pid), int(started))


def current_owner() -> Owner:
    """Return this process; a forked child is another one."""
    return _owner(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner(pid: int) -> Owner:
    host = _hash(os.uname().nodename, _read("/etc/machine-id"))[:16]
    boot = boot_id()
    namespace = started = 0
    with contextlib.suppress(OSError):
        namespace = os.stat(f"{_PROC}/self/ns/pid").st_ino
        # Else it shows the processes of another namespace, in which other numbers hold.
        if os.readlink(f"{_PROC}/self") == str(pid):
            _, started = _process(pid)
    return Owner(host, _hash(boot)[:8] if boot else _UNKNOWN_BOOT, namespace, pid, started)


# A number may come back in a descendant.
os.register_at_fork(after_in_child=_owner.cache_clear)


def new_name() -> str:
    """Return a name for a file of this process that nothing else has."""
    return f"{current_owner().token}-{os.urandom(4).hex()}"


def is_alive(owner: Owner) -> bool | None:
    """Tell whether a process lives: certainly, certainly not, or ``None`` if that is unknown.

    A zombie is dead. Unknown are the processes of other machines and of other pid namespaces.
    """
    me = current_owner()
    if owner == me:
        return True
    if owner.host != me.host:
        return None
    if owner.boot != me.boot:
        return None if _UNKNOWN_BOOT in (owner.boot, me.boot) else False
    if owner.namespace != me.namespace or (_HAS_NAMESPACES and not owner.namespace):
        return None
    if owner.started and me.started:
        try:
            alive, started = _process(owner.pid)
        except OSError:
            pass  # gone, or the process of another user and hidden
        else:
            return alive and started == owner.started
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    # Somebody has the number. Without a start time to compare, it is the owner.
    return None if owner.started else True


def may_live(owner: Owner | None, lock: str, last_change: Callable[[], float], now: float) -> bool:
    """Tell whether something in a cache has to be taken for in use.

    Args:
        owner: who made it; ``None`` if its name does not tell.
        lock: the file that its owner holds locked as long as it lives. A forked child shares
            the lock, and so goes on to protect what it got from a parent that has died.
        last_change: when it was changed last, in seconds since the epoch; called only if that
            decides.
        now: seconds since the epoch.
    """
    alive = None if owner is None else is_alive(owner)
    if alive is None and now - last_change() < _ABANDONED:
        return True
    return alive or is_locked(lock)


def _process(pid: int) -> tuple[bool, int]:
    """Return whether a process runs, and its start time in ticks since the boot."""
    with open(f"{_PROC}/{pid}/stat", "rb", buffering=0) as file:
        # The second field is the name in parentheses, and may hold anything.
        fields = file.read().rpartition(b")")[2].split()
    # A process whose first thread has ended, but not the others, looks like a zombie.
    return fields[0] not in (b"Z", b"X") or int(fields[17]) > 1, int(fields[19])


def _read(path: str) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode("ascii", "replace").strip()
    except OSError:
        return ""


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
