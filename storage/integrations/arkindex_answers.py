"""Asking Arkindex, and what it answers: versions of models, refusals, conflicts among those."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from uuid import UUID

from storage.errors import (
    AuthenticationError,
    InvalidInput,
    ModelMissingError,
    ObjectExistsError,
    StorageError,
    TransferError,
    conceal_causes,
    one_line,
)

__all__ = [
    "AVAILABLE",
    "Client",
    "ask",
    "existing_version",
    "is_available",
    "read_version",
    "translated",
]

AVAILABLE = "available"
# What a validation error says of a field "id" is no id, nor is a part of a path.
_ID = re.compile(r"[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}")


class Client(Protocol):
    """What is needed of a client of Arkindex; ``arkindex.ArkindexClient`` is one.

    An answer of 400 or more is an exception with the attributes ``status_code`` and
    ``content``, the decoded body.
    """

    @property
    def request(self) -> Callable[..., Any]:
        """Asks for an operation, by its name; ``id`` goes into its path, ``body`` is sent as JSON.

        Operations on uploads in parts have no ``id``.
        """


def ask(client: Client, operation: str, about: str, **parameters: Any) -> Any:
    """Return the answer to an operation.

    Args:
        client: asks.
        operation: its name.
        about: id of what it is about, for errors.
        parameters: ``id`` and ``body``, as the operation has them.

    Raises:
        StorageError: whatever the client raised, in this library's errors.
    """
    problem: Exception | None = None
    try:
        return client.request(operation, **parameters)
    except Exception as exc:  # noqa: BLE001 -- whose client it is, is not known
        problem = exc
    # Out here, for the context would come along as it is.
    raise translated(operation, about, problem)


def read_version(answer: Any) -> dict[str, Any]:
    """Return the version that an answer describes.

    Raises:
        StorageError: it describes none.
    """
    if not isinstance(answer, Mapping) or not answer.get("id"):
        raise StorageError(
            f"Arkindex was to describe a model version, with its id, and answered "
            f"{one_line(repr(answer), 80)}; check the address of the client"
        )
    return {**answer, "id": str(answer["id"])}


def is_available(version: Mapping[str, Any]) -> bool:
    """Tell whether a version has its archive."""
    return str(version.get("state")).lower() == AVAILABLE


def existing_version(problem: Exception) -> str | None:
    """Return the id of the version of the same content that an answer names.

    Releases of Arkindex differ: ``{"id": ["…"]}``, the version itself, ``{"existing_id": "…"}``.
    """
    status, content = getattr(problem, "status_code", None), getattr(problem, "content", None)
    if not isinstance(status, int) or not 400 <= status < 500 or not isinstance(content, Mapping):
        return None
    named = content.get("existing_id") or content.get("id")
    if isinstance(named, (list, tuple)) and len(named) == 1:
        named = named[0]
    found = isinstance(named, (str, UUID)) and _ID.fullmatch(str(named))
    return str(named) if found else None


def translated(operation: str, id: str, problem: Exception) -> StorageError:
    """Return what the exception of a client means in this library's errors."""
    status = getattr(problem, "status_code", None)
    what = f"Arkindex, {operation} of {id}"
    error: StorageError
    if not isinstance(status, int):
        kind = TransferError if isinstance(problem, OSError) else StorageError
        error = kind(one_line(f"{what}: {type(problem).__name__}: {problem}"))
    else:
        text = one_line(f"{what}: answered {status}: {_said(getattr(problem, 'content', None))}")
        if status in (401, 403):
            error = AuthenticationError(text)
        elif status == 404:
            error = ModelMissingError(id, text)
        elif status == 409:
            error = ObjectExistsError(text)
        elif status in (400, 422):
            error = InvalidInput(text)
        elif status in (408, 429) or status >= 500:
            error = TransferError(text)
        else:
            error = StorageError(text)
    error.__cause__ = problem
    # A version holds signed URLs, and some answers are one.
    conceal_causes(error)
    return error


def _said(content: Any) -> str:
    """Return what an answer says is wrong, in either of Arkindex's forms."""
    if not isinstance(content, Mapping):
        return str(content)
    errors = content.get("errors")
    if isinstance(errors, list) and all(isinstance(one, Mapping) for one in errors):
        return "; ".join(
            f"{'.'.join(map(str, one.get('attr') or ()))} {one.get('detail')}".strip()
            for one in errors
        )
    return "; ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in content.items()
        if not str(name).endswith("_url")
    )
