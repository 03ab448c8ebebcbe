"""For the pages: docstrings are reStructuredText where code is meant, the pages are Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`~?(?:[\w.]+\.)?(\w+)`")


class Docstrings(griffe.Extension):
    """Turns roles into code and ``::`` into what Markdown shows as a colon, or as nothing."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = re.sub(r"(?m)^::$", "", text)
            obj.docstring.value = re.sub(r"(?m)::$", ":", text)
