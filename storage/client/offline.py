"""Whether a source may be asked, or only the cache; and a word if the cache stands in."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING, Literal

from storage.config.ambient import is_true
from storage.errors import InvalidInput
from storage.uri import Location

if TYPE_CHECKING:
    from storage.config.plain import AnySettings

__all__ = ["Offline", "offline_mode", "warn_of_copy"]

Offline = bool | Literal["auto"] | None
"""What a call says about it; ``None`` leaves it to the settings."""


def offline_mode(
    settings: AnySettings, location: Location, offline: Offline
) -> bool | Literal["auto"]:
    """Return whether only the cache may serve ``location``, or ``"auto"``.

    Args:
        settings: decide if the call does not.
        location: the source; the Hub's own switch counts for what is on the Hub.
        offline: what the call says.

    Raises:
        InvalidInput: it says something else.
    """
    if offline is not None and offline not in (True, False, "auto"):
        raise InvalidInput(f"offline is True, False or 'auto', not {offline!r}")
    if offline is not None and offline != "auto":
        # Whoever asks for "is True" later must not be told 1.
        offline = bool(offline)
    if offline is not False and location.scheme == "hf" and is_true("HF_HUB_OFFLINE"):
        return True
    return settings.offline if offline is None else offline


def warn_of_copy(reason: str) -> None:
    """Warn whoever called the library that a cached copy stands in for the store.

    Args:
        reason: why the store does not serve it.
    """
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("storage."):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{reason}; the cached copy is used", RuntimeWarning, stacklevel=level)
