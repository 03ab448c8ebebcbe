"""The priority classes that a client may name in its reports.

A record keeps the name of its class. All are delivered in the order in which they were made, and
none is ever dropped: of a class, ``order``, ``capacity`` and ``decay`` are kept for whoever asks,
and its ``priority`` decides whether its records wait for others to go with them.
"""

from __future__ import annotations

from typing import Any

from storage.integrations.scaleout.classes import Classes

__all__ = ["Priorities"]

_DEFAULT = "__default__"
# What scaleout's own runtime begins with: name, priority, the newest first, demoted after.
_BACKLOG = "backlog"
_FIRST = (
    ("alert", 80, False),
    ("model_update", 70, False),
    ("telemetry", 40, True),
    ("inference", 30, True),
    ("artifact", 20, False),
    (_BACKLOG, 10, False),
)
_STALE = 300.0
_URGENT = 80


class Priorities:
    """The classes by name. Safe for many threads: whatever changes them is one step of a dict."""

    def __init__(self, classes: Classes) -> None:
        """Begin with those of scaleout's own runtime."""
        order = classes.ClassOrder
        stale = classes.DecayPolicy(demote_after=(_STALE, _BACKLOG))
        self._by_name: dict[str, Any] = {
            name: classes.PriorityClass(
                name=name,
                priority=priority,
                order=order.LIFO if is_stack else order.FIFO,
                decay=stale if is_stack else None,
            )
            for name, priority, is_stack in _FIRST
        }

    def all(self) -> list[Any]:
        """Return the classes."""
        return list(self._by_name.values())

    def add(self, cls: Any) -> None:
        """Add a class.

        Raises:
            ValueError: there is one of that name.
        """
        if cls.name == _DEFAULT or cls.name in self._by_name:
            raise ValueError(f"there is a priority class {cls.name!r} already")
        self._by_name[cls.name] = cls

    def remove(self, name: str) -> None:
        """Remove a class; records that name it are delivered all the same.

        Raises:
            KeyError: there is none of that name.
            ValueError: it is the one of records whose class is unknown.
        """
        if name == _DEFAULT:
            raise ValueError(f"the priority class {name!r} cannot be removed")
        del self._by_name[name]

    def replace(self, cls: Any) -> None:
        """Replace the class of the same name.

        Raises:
            KeyError: there is none of that name.
            ValueError: it is the one of records whose class is unknown.
        """
        if cls.name == _DEFAULT:
            raise ValueError(f"the priority class {cls.name!r} cannot be replaced")
        if cls.name not in self._by_name:
            raise KeyError(cls.name)
        self._by_name[cls.name] = cls

    def is_urgent(self, name: str | None) -> bool:
        """Tell whether records of a class wait for no others."""
        found = self._by_name.get(name or "")
        return found is not None and found.priority >= _URGENT
