"""The side of ``scaleoututil``."""

import base64
import json
import sys
import zipfile

from containers import Interpreter
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from json_lines import serve
from scaleoututil.grpc import scaleout_pb2
from scaleoututil.helpers.helpers import get_helper
from scaleoututil.utils.model import ScaleoutModel, ScaleoutModelBuilder

steps = Interpreter(ScaleoutModel, ScaleoutModelBuilder, get_helper, scaleout_pb2.FileChunk)


def run(steps_, helper=None, decode=True):
    """Do steps and describe the model that comes out."""
    return steps.describe(steps.run(steps_), helper, decode)


def make(steps_):
    """Do steps, and only that."""
    steps.run(steps_).close()


def detect(path):
    """Return what the peer takes a file and the same as a stream for."""
    with open(path, "rb") as stream:
        return [ScaleoutModel.detect_format_file(path), ScaleoutModel.detect_format(stream)]


def sign(path, key, signer_id=None):
    """Sign a container with a private key in PEM."""
    private = load_pem_private_key(key.encode(), None)
    with ScaleoutModel.from_file(path) as model:
        return model.sign(private, signer_id)


def verify(path, key, signature):
    """Tell whether a signature of a container is right."""
    public = load_pem_public_key(key.encode())
    with ScaleoutModel.from_file(path) as model:
        return model.verify_signature(public, signature)


def stored_metadata(path):
    """Return metadata.json as it is."""
    with zipfile.ZipFile(path) as zipped:
        return json.loads(zipped.read("metadata.json"))


def descriptor():
    """Return the descriptor of the peer's messages, from which anyone can make the classes."""
    return base64.b64encode(scaleout_pb2.DESCRIPTOR.serialized_pb).decode()


def attach(path, target, files):
    """Attach files to a container, which releases before 1.1 cannot."""
    builder = ScaleoutModelBuilder.from_file(path)
    for name, source in files.items():
        with open(source, "rb") as file:
            builder.set_file_stream(name, file)
    with builder.build() as model:
        model.save_to_file(target)
        return model.model_id


def attached(path):
    """Return the attached files, as text."""
    with ScaleoutModel.from_file(path) as model:
        return {name: model.get_file(name).decode() for name in model.list_files()}


def helpers_of_theirs_here(repository, arrays, path, helper):
    """Let this library's container, in this process, use the peer's own helper."""
    sys.path.insert(0, repository)
    from containers import facts_of_arrays, load_arrays

    from storage.container import ModelContainer

    theirs = get_helper(helper)
    with ModelContainer.from_training_model(load_arrays(arrays), theirs) as model:
        model.save_to_file(path)
        # The binary one reads no container, its own program's neither: it wants a descriptor.
        loaded = model.get_training_model(theirs) if helper == "numpyhelper" else []
        return [model.metadata, facts_of_arrays(loaded)]


TASKS = [
    attach, attached, descriptor, detect, helpers_of_theirs_here, make, run, sign,
    stored_metadata, verify,
]  # fmt: skip
serve({task.__name__: task for task in TASKS})
