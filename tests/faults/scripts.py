"""Scripts for a fault proxy that several tests want."""

from __future__ import annotations

from storage.testing.fault_script import Fault, Request, Script

__all__ = ["once"]


def once(
    fault: Fault, *methods: str, to: str = "", without: str | None = None, number: int = 1
) -> Script:
    """Return a script by which one request meets ``fault``.

    Args:
        fault: what it meets.
        methods: those that count; all if there are none.
        to: a part of the targets that count.
        without: a part of the targets that do not.
        number: of the request among those that count.
    """
    left = iter([None] * (number - 1) + [fault])

    def script(request: Request) -> Fault | None:
        counts = not methods or request.method in methods
        if not counts or to not in request.target:
            return None
        if without is not None and without in request.target:
            return None
        return next(left, None)

    return script
