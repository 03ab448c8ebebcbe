"""The classes of the packages ``scaleout`` and ``scaleoututil``, imported when they are needed.

This library does without both: only a client of a fleet has them, and it brings them along.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from storage.errors import ConfigurationError, one_line

__all__ = ["Classes", "scaleout_classes"]


@dataclass(frozen=True, slots=True)
class Classes:
    """What the runtime uses of the two packages, by the names that it has there."""

    messages: Any
    """The module of the protobuf messages."""

    config: Any
    """The module of the settings that come from ``SCALEOUT_*`` variables."""

    Task: Any
    StoppedException: Any
    UnknownTaskType: Any
    StatusType: Any
    LoggingContext: Any
    InferenceContext: Any
    ScaleoutModel: Any
    ConnectToApiResult: Any
    GracefulExitException: Any
    GrpcConnectionOptions: Any
    LinkQuality: Any
    PriorityClass: Any
    ClassOrder: Any
    DecayPolicy: Any


@functools.cache
def scaleout_classes() -> Classes:
    """Return them.

    Raises:
        ConfigurationError: the packages are not installed, or of a release without one of these.
    """
    try:
        edge_client = _module("scaleout.client.edge_client")
        receiver = _module("scaleout.client.task_receiver")
        queue = _module("scaleoututil.queue")
        return Classes(
            messages=_module("scaleoututil.grpc.scaleout_pb2"),
            config=_module("scaleoututil.config"),
            Task=receiver.Task,
            StoppedException=receiver.StoppedException,
            UnknownTaskType=receiver.UnknownTaskType,
            StatusType=_module("scaleoututil.grpc.statustype").StatusType,
            LoggingContext=_module("scaleout.client.logging_context").LoggingContext,
            InferenceContext=_module("scaleout.client.inference_context").InferenceContext,
            ScaleoutModel=_module("scaleoututil.utils.model").ScaleoutModel,
            ConnectToApiResult=edge_client.ConnectToApiResult,
            GracefulExitException=edge_client.GracefulExitException,
            GrpcConnectionOptions=edge_client.GrpcConnectionOptions,
            LinkQuality=queue.LinkQuality,
            PriorityClass=queue.PriorityClass,
            ClassOrder=queue.ClassOrder,
            DecayPolicy=queue.DecayPolicy,
        )
    except (ImportError, AttributeError) as exc:
        raise ConfigurationError(
            "a client of a fleet needs the packages scaleout and scaleoututil, 1.1.0 or newer, "
            f"and this was not found: {one_line(exc)}; pip install 'scaleout>=1.1.0'"
        ) from exc


def _module(name: str) -> Any:
    return importlib.import_module(name)
