"""The side of MLflow: a process of its interpreter, which finds this library as a plug-in."""

import contextlib
import functools
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "peers" / "inside"))

from json_lines import serve


def prepare(path, environment):
    """Set what is to be there before anything is imported."""
    sys.path[:0] = path
    os.environ.update(environment)
    import mlflow

    mlflow.set_tracking_uri(environment["MLFLOW_TRACKING_URI"])
    return mlflow.__version__


def track(uri):
    """Keep runs and models elsewhere from now on."""
    import mlflow

    mlflow.set_tracking_uri(uri)


def read_model_file(server, name, source, path):
    """Register a place as a model, and ask the server for a file of it."""
    import requests
    from mlflow import MlflowClient

    client = MlflowClient()
    client.create_registered_model(name)
    version = client.create_model_version(name, source).version
    answer = requests.get(
        f"{server}/model-versions/get-artifact",
        params={"name": name, "version": version, "path": path},
        timeout=180,
    )
    return [answer.status_code, answer.text]


def _plain(value):
    """Return a value of MLflow's as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "is_dir"):
        return [value.path, value.is_dir, value.file_size]
    return value


def coded(task):
    """Let the message of an error of MLflow's begin with its code."""

    @functools.wraps(task)
    def run(**arguments):
        from mlflow.exceptions import MlflowException

        try:
            return task(**arguments)
        except MlflowException as exc:
            exc.args = (f"{exc.error_code}: {exc.message}",)
            raise

    return run


def class_for(uri):
    """Return the class that MLflow takes for a URI."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    kind = type(get_artifact_repository(uri))
    return f"{kind.__module__}.{kind.__qualname__}"


def repository(uri, method, *, arguments=()):
    """Call a method of the artifact repository of a URI."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return _plain(getattr(get_artifact_repository(uri), method)(*arguments))


def client(method, arguments):
    """Call a method of ``MlflowClient``."""
    from mlflow import MlflowClient

    return _plain(getattr(MlflowClient(), method)(**arguments))


def download(arguments):
    """Call ``mlflow.artifacts.download_artifacts``."""
    import mlflow

    return mlflow.artifacts.download_artifacts(**arguments)


def run(root, params, texts, files, folder):
    """Log a run whose artifacts are below ``root``; return its id and its URI."""
    import mlflow

    experiment = mlflow.create_experiment(f"below {root}", artifact_location=root)
    with mlflow.start_run(experiment_id=experiment) as active:
        mlflow.log_params(params)
        for path, text in texts.items():
            mlflow.log_text(text, path)
        for file, place in files.items():
            mlflow.log_artifact(file, place or None)
        mlflow.log_artifacts(folder, "folder")
    found = mlflow.get_run(active.info.run_id)
    assert found.data.params == params, found.data.params
    return {"run": active.info.run_id, "uri": found.info.artifact_uri}


def command(arguments):
    """Run MLflow's command; return what it prints."""
    from mlflow.cli import cli

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(arguments, "mlflow", standalone_mode=False)
    return printed.getvalue()


def in_application(uri):
    """Take the repository of a URI as MLflow's application does for those who ask it."""
    from mlflow.server import app
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with app.app_context():
        return repr(get_artifact_repository(uri))


def log_in_threads(uri, files):
    """Log files by several threads, of one repository."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    found = get_artifact_repository(uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: found.log_artifact(*file), files))


def log_model(run, name, weight, file):
    """Log a pyfunc model that multiplies by ``weight``, and register it."""
    import mlflow

    class Multiplier(mlflow.pyfunc.PythonModel):
        def load_context(self, context):
            self.offset = int(Path(context.artifacts["offset"]).read_text())

        def predict(self, context, model_input, params=None):
            return [weight * number + self.offset for number in model_input]

    with mlflow.start_run(run_id=run):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=Multiplier(),
            artifacts={"offset": file},
            pip_requirements=[],
            registered_model_name=name,
        )
    return {
        "uri": info.model_uri,
        "artifacts": mlflow.get_logged_model(info.model_id).artifact_location,
    }


def predict(uri, numbers):
    """Load a model and let it predict."""
    import mlflow

    return list(mlflow.pyfunc.load_model(uri).predict(numbers))


tasks = (
    *(class_for, client, command, download, in_application, log_in_threads, log_model, predict),
    *(read_model_file, repository, run, track),
)
serve({"prepare": prepare} | {task.__name__: coded(task) for task in tasks})
