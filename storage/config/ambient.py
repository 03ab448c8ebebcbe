"""Switches in the environment that belong to other programs and mean something here, too."""

from __future__ import annotations

import os

__all__ = ["is_true"]


def is_true(variable: str) -> bool:
    """Tell whether an environment variable says yes, by the rules of ``huggingface_hub``."""
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")
