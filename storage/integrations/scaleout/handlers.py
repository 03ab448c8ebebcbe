"""What a client does for each kind of task, with the callbacks of its ``EdgeClient``.

Callbacks are called as scaleout's own runtime calls them. What it only logs is told here: a
callback that is missing or raises makes the task fail, whatever its kind.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import InvalidInput, ModelMissingError
from storage.integrations.scaleout.classes import Classes
from storage.integrations.scaleout.documents import CUSTOM, KINDS
from storage.integrations.scaleout.records import plain

__all__ = ["Done", "Handlers", "answer"]

_ANSWER = "result of a task"


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a task."""

    response: Mapping[str, Any]
    """As the result has it."""

    model: Any = None
    """The trained model, a ``ScaleoutModel``."""


class Handlers:
    """The kinds of tasks, done with one ``EdgeClient``."""

    def __init__(
        self,
        client: Any,
        classes: Classes,
        get_model: Callable[[str], Any],
        send_status: Callable[..., object],
        send_validation: Callable[[Any, Mapping[str, Any]], object],
    ) -> None:
        """Prepare.

        Args:
            client: the ``EdgeClient``; its callbacks are looked up when they are needed.
            classes: of scaleout.
            get_model: returns a model by its id, ``None`` if there is none.
            send_status: reports a text, with ``type=``.
            send_validation: reports the metrics of a request.
        """
        self._client = client
        self._classes = classes
        self._get_model = get_model
        self._send_status = send_status
        self._send_validation = send_validation
        self._kinds: dict[str, Callable[[Any], Done]] = {
            KINDS["train"]: self._train,
            KINDS["validate"]: self._validate,
            KINDS["stage"]: self._stage,
            KINDS["infer"]: self._infer,
        }

    def can(self, type_: str) -> bool:
        """Tell whether this client has what a task of that type needs."""
        needed = {
            KINDS["train"]: self._client.train_callback,
            KINDS["validate"]: self._client.validate_callback,
            KINDS["stage"]: True,
            KINDS["infer"]: self._client.inference_callback,
        }
        return bool(needed.get(type_, type_ in self._client.registered_callbacks))

    def run(self, request: Any) -> Done:
        """Do what a ``TaskRequest`` asks for.

        Raises:
            Exception: whatever the callback raises, ``StoppedException`` among it.
        """
        if request.type.startswith(CUSTOM):
            return self._custom(request)
        kind = self._kinds.get(request.type)
        if kind is None:
            raise self._classes.UnknownTaskType(f"unknown type of task: {request.type}")
        return kind(request)

    # -- the kinds ---------------------------------------------------------------------------

    def _train(self, request: Any) -> Done:
        with self._logging(request):
            begun = time.monotonic()
            model = self._model(request)
            fetched = time.monotonic() - begun
            callback = self._callback(self._client.train_callback, "train")
            self._tell(f"training of model {request.model_id} begins", "MODEL_UPDATE")
            settings = _data(request).get("client_settings", {})
            begun = time.monotonic()
            trained, meta = callback(model, settings)
            if trained is None:
                raise InvalidInput("the train callback returned no model")
            told = answer(meta).response
            examples = told.get("training_metadata", {}).get("num_examples", 0)
            if not isinstance(examples, (int, float)) or examples <= 0:
                raise InvalidInput(
                    "the train callback has to return num_examples > 0 in training_metadata, and "
                    f"returned {examples!r}"
                )
            update = str(uuid.uuid4())
            times = {"processing_time": time.monotonic() - begun, "fetch_model": fetched}
            out = trained.to_builder().set_model_id(update).build()
            self._tell(f"training of model {request.model_id} is done", "MODEL_UPDATE", "AUDIT")
            return Done(
                {"model_update_id": update, "meta": {**told, **times, "config": request.data}}, out
            )

    def _validate(self, request: Any) -> Done:
        with self._logging(request):
            model = self._model(request)
            callback = self._callback(self._client.validate_callback, "validate")
            self._tell(f"validation of model {request.model_id} begins", "MODEL_VALIDATION")
            metrics = callback(model)
            if metrics is None:
                return Done({})
            told = plain(metrics, _ANSWER)
            self._send_validation(request, told)
            self._tell(
                f"validation of model {request.model_id} is done", "MODEL_VALIDATION", "AUDIT"
            )
            return Done({"metrics": told})

    def _stage(self, request: Any) -> Done:
        model = self._client.stage_model(model=self._model_id(request))
        if self._client.stage_model_callback is not None:
            self._client.stage_model_callback(model)
        return Done({"model_id": request.model_id})

    def _infer(self, request: Any) -> Done:
        model_id = self._model_id(request)
        context = self._classes.InferenceContext(
            inference_id=request.correlation_id, model_id=model_id
        )
        with self._client.inference_context(context):
            parameters = _data(request).get("parameters", {})
            found = self._client.run_inference(model=model_id, params=parameters)
        try:
            return Done({"result": plain(found, _ANSWER)})
        except InvalidInput:
            # scaleout's own runtime sends nothing back at all; reports are for the rest.
            return Done({"result": None, "note": f"no JSON: a {type(found).__name__}"})

    def _custom(self, request: Any) -> Done:
        callback = self._client.registered_callbacks.get(request.type)
        if callback is None:
            raise self._classes.UnknownTaskType(f"unknown type of task: {request.type}")
        with self._logging(request):
            found = callback(_data(request).get("parameters", {}))
        return answer(found)

    # -- what they share ---------------------------------------------------------------------

    def _logging(self, request: Any) -> Any:
        return self._client.logging_context(self._classes.LoggingContext(request=request))

    def _tell(self, text: str, type_: str, level: str = "INFO") -> None:
        if self._classes.config.SCALEOUT_CLIENT_STATUS_REPORTING:
            self._send_status(text, log_level=level, type=type_)

    def _model_id(self, request: Any) -> str:
        if not request.model_id:
            raise InvalidInput("the task names no model")
        return str(request.model_id)

    def _model(self, request: Any) -> Any:
        model_id = self._model_id(request)
        model = self._get_model(model_id)
        if model is None:
            raise ModelMissingError(model_id, f"there is no model {model_id}")
        return model

    @staticmethod
    def _callback(callback: Any, kind: str) -> Any:
        if callback is None:
            raise InvalidInput(f"this client has no {kind} callback")
        return callback


def _data(request: Any) -> Any:
    return json.loads(request.data) if request.data else {}


def answer(found: Any) -> Done:
    """Return what a callback returned as what came of its task.

    Raises:
        InvalidInput: it is no JSON.
    """
    told = plain(found, _ANSWER)
    return Done(told if isinstance(told, dict) else {"result": told})
