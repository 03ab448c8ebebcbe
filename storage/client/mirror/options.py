"""What a mirror is asked for, and what it did."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.digest import Digest
from storage.errors import InvalidInput
from storage.transfer.progress import ProgressCallback

if TYPE_CHECKING:
    from storage.client.mirror.crew import AnyExecutor

__all__ = ["MirrorFailure", "MirrorOptions", "MirrorResult"]


@dataclass(frozen=True, slots=True)
class MirrorFailure:
    """An object that could not be mirrored."""

    path: str
    """Relative to the source."""

    error: str
    """Name of the error's type, such as ``AuthenticationError``."""

    reason: str
    """Its message: one line, without credentials."""


@dataclass(frozen=True, slots=True)
class MirrorResult:
    """What a mirror did; every object of the source is copied, skipped or failed, once."""

    source: str
    target: str
    """The URIs, without credentials."""

    objects: int
    """Objects of the source that the patterns want."""

    copied: int
    """Objects that were written, by this call's last try at them."""

    skipped: int
    """Objects that were in place already, with the same content."""

    deleted: int
    """Objects at the destination that were removed."""

    bytes: int
    """Bytes of the objects that were copied."""

    failures: tuple[MirrorFailure, ...]
    """What failed, and why; 1,000 and what was under way then, at most."""

    resubmitted: int
    """Batches that were given out once more because nobody brought their result."""

    seconds: float

    @property
    def failed(self) -> int:
        """Number of the objects that failed."""
        return len(self.failures)


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorOptions:
    """The options of :meth:`storage.StorageOperations.mirror`, which describes them."""

    config: Any = None
    dest_config: Any = None
    executor: AnyExecutor | None = None
    allow_patterns: str | Iterable[str] | None = None
    ignore_patterns: str | Iterable[str] | None = None
    digest: str | Digest | None = None
    overwrite: bool = True
    delete: bool = False
    dry_run: bool = False
    batch_size: int = 50
    in_flight: int = 64
    progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "in_flight"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name} is a positive number, not {value!r}")
        executor = self.executor
        if executor is not None and not (isinstance(executor, Executor) or callable(executor)):
            raise InvalidInput(
                "executor is a concurrent.futures.Executor or a function that makes one, not "
                f"{type(executor).__name__}"
            )
