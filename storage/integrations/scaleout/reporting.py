"""What a client reports, on its way to the spool; the priority classes that it may name."""

from __future__ import annotations

import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from storage.errors import StorageError, one_line
from storage.integrations.scaleout import records
from storage.integrations.scaleout.classes import scaleout_classes
from storage.integrations.scaleout.priorities import Priorities
from storage.integrations.scaleout.processes import forget_in_child

if TYPE_CHECKING:
    from storage.integrations.scaleout.binding import Binding

__all__ = ["Reporting"]

_log = logging.getLogger(__name__)


class Reporting(ABC):
    """The part of a runtime that reports."""

    def __init__(self) -> None:
        """Prepare."""
        self._priorities: Priorities | None = None
        self._lock = threading.RLock()
        """Held while something is made that there is once."""
        forget_in_child(self)

    def forget(self) -> None:
        """Give up what threads of the parent may hold; for the child of a fork.

        What a child reports is refused: the folder is the parent's.
        """
        self._lock = threading.RLock()

    @abstractmethod
    def _bound(self) -> Binding:
        """Return what the client works with; open it if that was not done."""

    @abstractmethod
    def get_current_task_id(self) -> str | None:
        """Return the id of the task that the calling thread does, if it does one."""

    def send_metric(
        self, metrics: Mapping[str, Any], model_id: str, step: int, round_id: str, session_id: str
    ) -> bool:
        """Keep metrics until the store has them; return whether they are kept."""
        return self._report(
            lambda task: records.metric(
                metrics,
                model_id=model_id,
                step=step,
                round_id=round_id,
                session_id=session_id,
                task_id=task,
            )
        )

    def send_attributes(self, attributes: Mapping[str, Any], priority: str | None = None) -> bool:
        """Keep attributes until the store has them; return whether they are kept."""
        kept = [
            self._report(
                lambda task, key=key, value=value: records.attribute(  # type: ignore[misc]
                    key, value, priority=priority, task_id=task
                ),
                priority,
            )
            for key, value in attributes.items()
        ]
        return all(kept)

    def send_telemetry(
        self,
        key: str | Mapping[str, Any] | None = None,
        payload: Mapping[str, Any] | None = None,
        telemetry: Mapping[str, Any] | None = None,
        priority: str | None = None,
    ) -> bool:
        """Keep an observation until the store has it; return whether it is kept.

        A mapping of several, as ``telemetry`` or in place of ``key``, is a record each; that is
        the older form.
        """
        if isinstance(key, Mapping):
            telemetry, key = key, None
        if telemetry is None and key is None:
            _log.warning("telemetry was reported without a key; it is dropped")
            return False
        observed: list[tuple[str, Mapping[str, Any]]] = []
        if telemetry is not None:
            warnings.warn(
                "send_telemetry with a dict of several is deprecated, use key and payload",
                DeprecationWarning,
                stacklevel=2,
            )
            observed += [
                (name, {"value": value, **(payload or {})}) for name, value in telemetry.items()
            ]
        if key is not None:
            observed.append((key, payload or {}))
        kept = [
            self._report(
                lambda task, name=name, told=told: records.telemetry(  # type: ignore[misc]
                    name, told, priority=priority, task_id=task
                ),
                priority,
            )
            for name, told in observed
        ]
        return all(kept)

    def send_inference_result(
        self,
        key: str,
        payload: Mapping[str, Any],
        inference_id: str,
        model_id: str,
        priority: str | None = None,
    ) -> bool:
        """Keep what an inference found until the store has it; return whether it is kept."""
        return self._report(
            lambda _: records.inference(
                key,
                payload,
                inference_id=inference_id,
                model_id=model_id,
                priority=priority,
            ),
            priority,
        )

    def send_status(self, msg: str, log_level: int | str = "INFO", type: str | None = None) -> bool:
        """Keep a text for people until the store has it; return whether it is kept.

        Args:
            msg: the text.
            log_level: of the messages' ``LogLevel``, as its number or its name.
            type: what it is about.
        """
        if isinstance(log_level, int):
            log_level = str(scaleout_classes().messages.LogLevel.Name(log_level))
        return self._report(
            lambda task: records.status(str(msg), level=log_level, type=type, task_id=task)
        )

    def _send_validation(self, request: Any, metrics: Mapping[str, Any]) -> bool:
        return self._report(
            lambda task: records.report(
                "validation",
                metrics if isinstance(metrics, Mapping) else {"value": metrics},
                model_id=request.model_id,
                round_id=request.round_id,
                session_id=request.session_id,
                task_id=task,
            )
        )

    def _report(
        self, make: Callable[[str | None], records.Report], priority: str | None = None
    ) -> bool:
        try:
            binding = self._bound()
            binding.spool.append(make(self.get_current_task_id()))
            if self._classes_of_priority().is_urgent(priority):
                binding.sender.hurry()
        except StorageError as exc:
            _log.error("a report is lost: %s", one_line(exc))
            return False
        return True

    # -- priority classes --------------------------------------------------------------------

    def _classes_of_priority(self) -> Priorities:
        with self._lock:
            if self._priorities is None:
                self._priorities = Priorities(scaleout_classes())
            return self._priorities

    def list_priority_classes(self) -> list[Any]:
        """Return the priority classes that reports may name."""
        return self._classes_of_priority().all()

    def add_priority_class(self, cls: Any) -> None:
        """Add a priority class.

        Raises:
            ValueError: there is one of that name.
        """
        self._classes_of_priority().add(cls)

    def remove_priority_class(self, name: str, force: bool = False) -> int:
        """Remove a priority class; its records are delivered all the same, and none is moved.

        Raises:
            KeyError: there is none of that name.
            ValueError: it cannot be removed.
        """
        self._classes_of_priority().remove(name)
        return 0

    def replace_priority_class(self, cls: Any) -> None:
        """Replace the priority class of the same name.

        Raises:
            KeyError: there is none of that name.
        """
        self._classes_of_priority().replace(cls)
