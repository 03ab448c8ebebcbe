"""How old a cached model may be, in settings and in calls; without pydantic."""

from __future__ import annotations

import math
import re
from typing import Any

from storage.errors import InvalidInput, one_line

__all__ = ["CACHE_FIRST", "REVALIDATE", "Freshness", "read_freshness"]

Freshness = str | float
"""``revalidate``, ``cache-first``, ``max-age=SECONDS``, or a number of seconds."""

REVALIDATE = 0.0
"""Ask the store each time whether the model is still the same; one request."""

CACHE_FIRST = math.inf
"""Take what is cached, however old it is, and ask no store."""

_WORDS = {"revalidate": REVALIDATE, "cache-first": CACHE_FIRST}
_SECONDS = r"(?:max-age\s*=\s*)?(\d+(?:\.\d+)?)"


def read_freshness(value: Any) -> float:
    """Return for how many seconds a cached model is taken without asking its store.

    Args:
        value: a :data:`Freshness`; what this function returned is one, too.

    Returns:
        Seconds: 0.0 (``REVALIDATE``) to ``math.inf`` (``CACHE_FIRST``).

    Raises:
        InvalidInput: it is none of these.
    """
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _WORDS:
            return _WORDS[word]
        if match := re.fullmatch(_SECONDS, word):
            return float(match[1])
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        return float(value)
    raise InvalidInput(
        "freshness is revalidate, cache-first, max-age=SECONDS or a number of seconds, "
        f"not {one_line(repr(value), 60)}"
    )
