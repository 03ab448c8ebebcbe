"""The side of scaleout: a process of its interpreter, with an ``EdgeClient`` on a store."""

import os
import sys
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
# Seconds for what takes one or two; shorter than what a test may take.
WAIT = 120
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "peers" / "inside")]

from json_lines import serve  # noqa: E402


class Client:
    """An edge client whose callbacks write down what they do."""

    def __init__(self, uri, client_id, folder, log, options):
        """Make the client; ``log`` is the file that outlives it."""
        import numpy as np
        from scaleout import EdgeClient, ScaleoutModel
        from scaleoututil.helpers.helpers import get_helper

        from storage.integrations.scaleout import StorageRuntime

        self.np, self.model, self.helper = np, ScaleoutModel, get_helper("numpyhelper")
        self.log_file, self.failure = log, None
        self.runtime = StorageRuntime(uri, folder=folder, **options)
        self.edge = EdgeClient(self.train, self.validate, runtime=self.runtime)
        self.edge.set_client_id(client_id)
        self.edge.set_name(f"the {client_id}")
        self.edge.set_stage_model_callback(lambda model: self.note("staged", model.model_id))
        self.edge.set_inference_callback(self.infer)
        self.edge.set_custom_callback("calibrate", self.calibrate)
        self.thread = None

    def run(self, **how):
        """Run the client's loop, and keep why it ended."""
        try:
            self.edge.run(**how)
        except BaseException:  # noqa: BLE001 - the test asks for it
            self.failure = traceback.format_exc()
            print(self.failure, file=sys.stderr, flush=True)

    def note(self, *words):
        """Write a line that no kill takes back."""
        with open(self.log_file, "a", encoding="utf-8") as file:
            print(*words, file=file, flush=True)

    def held(self, settings):
        """Wait as long as the file ``hold`` of the settings is there, and not for an abort."""
        hold = settings.get("hold")
        while hold and os.path.exists(hold):
            self.edge.check_task_abort()
            time.sleep(0.05)

    def train(self, model, settings):
        """Add one to all weights; three metrics on the way."""
        context = self.edge.current_logging_context
        task = self.runtime.get_current_task_id()
        self.note("train", task, model.model_id, context.round_id, context.session_id)
        weights = model.get_training_model(self.helper)
        try:
            for step in range(3):
                self.edge.log_metric({"loss": 1.0 / (step + 1)})
            self.held(settings)
        except Exception as exc:
            self.note("stopped", task, type(exc).__name__, exc)
            raise
        if settings.get("fail"):
            raise RuntimeError(settings["fail"])
        trained = self.model.from_training_model([each + 1 for each in weights], self.helper)
        self.note("trained", task, context.step)
        return trained, {"training_metadata": {"num_examples": self.np.int64(7)}}

    def validate(self, model):
        """Tell the mean of the weights."""
        weights = model.get_training_model(self.helper)
        return {"mean": float(weights[0].mean()), "worst": self.np.float32("nan")}

    def infer(self, model, params):
        """Multiply the first weight."""
        first = float(model.get_training_model(self.helper)[0].flat[0])
        self.edge.log_inference_result("product", {"value": first * params["by"]})
        return first * params["by"]

    def calibrate(self, parameters):
        """Return what came, and in what context."""
        self.note("begun", os.getpid(), self.runtime.get_current_task_id())
        self.held(parameters)
        time.sleep(parameters.get("pause", 0))
        self.note("calibrated", self.edge.client_id, self.runtime.get_current_task_id())
        return {"by": self.edge.client_id, **parameters}


clients = {}


def prepare(environment):
    """Set what is to be there before anything is imported; return the release of scaleout."""
    os.environ.update(environment)
    from importlib.metadata import version

    return version("scaleout")


def start(client_id, uri, folder, log, options=None, connect=None, how=None):
    """Make a client and run it on a thread; return what connecting said."""
    clients[client_id] = client = Client(uri, client_id, folder, log, options or {})
    if connect is not None:
        result, options = client.edge.connect_to_api(**connect)
        if result.name != "Assigned":
            return [result.name, str(options)]
        if not client.edge.init_grpchandler(options):
            return [result.name, "no handler"]
    client.thread = threading.Thread(target=client.run, kwargs=how or {}, daemon=True)
    client.thread.start()
    return ["Assigned", client.edge.name]


def stop(client_id):
    """End a client; return what made it end, if it was not this."""
    client = clients.pop(client_id)
    client.runtime.stop()
    client.thread.join(WAIT)
    assert not client.thread.is_alive()
    return client.failure


def run_here(client_id, uri, folder, log, options):
    """Run a client on the main thread, as programs do, until a signal ends it."""
    client = clients[client_id] = Client(uri, client_id, folder, log, options)
    client.run()
    return client.failure


def contract():
    """Return what differs between the runtime and what an ``EdgeClient`` may ask of one."""
    import inspect

    from scaleout.client.edge_client import EdgeClientRuntime

    from storage.integrations.scaleout import StorageRuntime

    differences = []
    for name, theirs in vars(EdgeClientRuntime).items():
        if name.startswith("_"):
            continue
        ours = inspect.getattr_static(StorageRuntime, name, None)
        if isinstance(theirs, property):
            if not isinstance(ours, property):
                differences.append(name)
        elif ours is None or list(inspect.signature(ours).parameters) != list(
            inspect.signature(theirs).parameters
        ):
            differences.append(name)
    return differences


def log(client_id, metrics=(), attributes=None, telemetry=None, step=0):
    """Report something outside of any task."""
    from scaleout.client.logging_context import LoggingContext

    edge = clients[client_id].edge
    context = LoggingContext(step=step, model_id="m", round_id="r", session_id="s")
    done = [edge.log_metric(each, context=context) for each in metrics]
    if attributes:
        done.append(edge.log_attributes(attributes))
    if telemetry:
        done.append(edge.log_telemetry(key=telemetry[0], payload=telemetry[1]))
    return [all(done), context.step]


def stage(client_id, model_id):
    """Stage a model by the client itself; return its id and mean."""
    client = clients[client_id]
    model = client.edge.stage_model(model_id)
    return [model.model_id, client.validate(model)["mean"]]


def infer(client_id, model_id, by):
    """Run an inference by the client itself."""
    from scaleout.client.inference_context import InferenceContext

    client = clients[client_id]
    with client.edge.inference_context(InferenceContext(inference_id="i", model_id=model_id)):
        return client.edge.run_inference(model_id, {"by": by})


def ask(client_id, attribute):
    """Return an attribute of the client or the runtime that is text."""
    client = clients[client_id]
    if attribute == "link_quality":
        return client.edge.link_quality.name
    if attribute == "pending":
        binding = client.runtime._binding
        return binding.sender.counts().pending + len(binding.outbox.tasks())
    return getattr(client.edge, attribute)()


def again(client_id):
    """Report after the end of a client, then let it run once more; return what was kept."""
    from scaleoututil.grpc import scaleout_pb2

    client = clients[client_id]
    client.runtime.stop()
    client.thread.join(WAIT)
    kept = [client.edge.log_telemetry(key="late", payload={})]
    client.thread = threading.Thread(target=client.run, daemon=True)
    client.thread.start()
    deadline = time.monotonic() + WAIT
    while not client.runtime.send_status("here again", scaleout_pb2.LogLevel.AUDIT, "LIFE"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kept.append(client.edge.log_telemetry(key="again", payload={}))
    return kept


def fork(client_id):
    """Fork while other threads hold every lock of the runtime; return what the child could do."""
    client = clients[client_id]
    runtime = client.runtime
    held, done = threading.Event(), threading.Event()

    def hold():
        with runtime._lock, runtime._runner._lock, runtime._binding.spool.lock:
            held.set()
            done.wait(WAIT)

    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(WAIT)
    child = os.fork()
    if not child:
        runtime.check_task_abort()
        kept = client.edge.log_telemetry(key="child", payload={}, priority="alert")
        os._exit(10 + kept)
    done.set()
    deadline = time.monotonic() + WAIT / 4
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.05)
    return [os.waitstatus_to_exitcode(ended[1]), client.edge.log_telemetry(key="own", payload={})]


def autonomous(client_id, hold=None):
    """Begin a task by the client itself; return its id."""
    client = clients[client_id]

    def work():
        client.held({"hold": hold})
        return {"done": client.runtime.get_current_task_id()}

    return client.edge.start_autonomous_task(work, "survey", {"hold": hold}).correlation_id


def make_model(path, values, model_id):
    """Write a model as the peer does."""
    import numpy as np
    from scaleoututil.helpers.helpers import get_helper
    from scaleoututil.utils.model import ScaleoutModel

    weights = [np.array(values, dtype=np.float32)]
    model = ScaleoutModel.from_training_model(weights, get_helper("numpyhelper"))
    model.to_builder().set_model_id(model_id).build().save_to_file(path)


def chunks_of(client_id, model_id):
    """Return the messages of a model, as the library makes them of the generated class."""
    messages = list(clients[client_id].runtime.get_model_chunks(model_id))
    return [[type(each).__name__, each.SerializeToString().hex()] for each in messages]


def peer_chunks(path, chunk_size):
    """Return the same of a file, as the peer makes them."""
    from scaleoututil.utils.model import ScaleoutModel

    chunks = ScaleoutModel.from_file(path).get_filechunk_stream(chunk_size)
    return [each.SerializeToString().hex() for each in chunks]


def read_chunks(messages):
    """Let the peer read a model out of messages; return its id and first weight."""
    from scaleoututil.grpc import scaleout_pb2
    from scaleoututil.helpers.helpers import get_helper
    from scaleoututil.utils.model import ScaleoutModel

    parsed = [scaleout_pb2.FileChunk.FromString(bytes.fromhex(each)) for each in messages]
    model = ScaleoutModel.from_filechunk_stream(parsed)
    return [model.model_id, float(model.get_training_model(get_helper("numpyhelper"))[0][0])]


def send_model(client_id, path):
    """Store a model as the peer's runtime has it sent."""
    from scaleoututil.utils.model import ScaleoutModel

    return clients[client_id].runtime.send_model_to_combiner(ScaleoutModel.from_file(path))


def priorities(client_id):
    """Change the priority classes; return their names, and what was refused."""
    from scaleout import ClassOrder, PriorityClass

    edge, refused = clients[client_id].edge, []
    edge.add_priority_class(PriorityClass(name="own", priority=90, order=ClassOrder.FIFO))
    for attempt in (
        lambda: edge.add_priority_class(edge.priority_classes[0]),
        lambda: edge.remove_priority_class("missing"),
        lambda: edge.replace_priority_class(
            PriorityClass(name="missing", priority=1, order=ClassOrder.FIFO)
        ),
    ):
        try:
            attempt()
        except (ValueError, KeyError) as exc:
            refused.append(type(exc).__name__)
    edge.replace_priority_class(PriorityClass(name="own", priority=95, order=ClassOrder.LIFO))
    kept = edge.log_telemetry(key="urgent", payload={"value": 1}, priority="own")
    names = {each.name: each.priority for each in edge.priority_classes}
    edge.remove_priority_class("own")
    return [names, refused, kept, "own" in [each.name for each in edge.priority_classes]]


serve({name: value for name, value in list(globals().items()) if callable(value)})
