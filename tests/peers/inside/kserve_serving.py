"""A model server of KServe's, run by an interpreter that has its release and scikit-learn.

``train FOLDER`` writes a model and prints what it predicts; ``serve URI`` serves it, fetched by
the class that takes the place of ``kserve_storage.Storage``.
"""

import argparse
import json
import os
import sys
from pathlib import Path

NAME = "iris"
ENDINGS = (".joblib", ".pkl", ".pickle")


def train(folder):
    """Train a classifier; print flowers and their classes as JSON."""
    import joblib
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    flowers, classes = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=1000).fit(flowers, classes)
    Path(folder).mkdir(parents=True, exist_ok=True)
    joblib.dump(model, Path(folder, "model.joblib"))
    some = flowers[::10]
    json.dump({"flowers": some.tolist(), "classes": model.predict(some).tolist()}, sys.stdout)


def serve(uri, options):
    """Serve the model that is at ``uri`` until the process is ended."""
    import joblib
    from kserve import InferRequest, InferResponse, Model, ModelServer
    from kserve.utils.utils import get_predict_input, get_predict_response

    from storage.integrations.kserve import Storage

    class Classifier(Model):
        def __init__(self):
            super().__init__(NAME)
            self._model = None

        def load(self):
            folder = Storage.download(uri)
            (file,) = (name for name in os.listdir(folder) if name.endswith(ENDINGS))
            self._model = joblib.load(os.path.join(folder, file))
            self.ready = True
            return self.ready

        def predict(
            self, payload: dict | InferRequest, headers: dict | None = None
        ) -> dict | InferResponse:
            answer = self._model.predict(get_predict_input(payload))
            return get_predict_response(payload, answer, self.name)

    assert "kserve_storage" not in sys.modules
    model = Classifier()
    model.load()
    ModelServer(http_port=options.port, enable_grpc=False, workers=1).start([model])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "serve"])
    parser.add_argument("where")
    parser.add_argument("--port", type=int)
    arguments, _ = parser.parse_known_args()
    if arguments.what == "train":
        train(arguments.where)
    else:
        # What KServe's own parser would take for its options.
        sys.argv[1:] = []
        serve(arguments.where, arguments)
