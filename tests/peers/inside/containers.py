"""A small language of what is done with containers, spoken by both programs.

The names of the model, its builder and their methods are the same on both sides, so the same
code runs a list of steps on either. This module imports neither of them.
"""

import contextlib
import hashlib

BLOCK = 1024 * 1024


def sha256(stream):
    """Return the SHA-256 of what is left in a binary stream, and how long it is."""
    hasher, size = hashlib.sha256(), 0
    while block := stream.read(BLOCK):
        hasher.update(block)
        size += len(block)
    return [hasher.hexdigest(), size]


def load_arrays(paths):
    """Read ``.npy`` files."""
    import numpy as np

    return [np.load(path) for path in paths]


def facts_of_arrays(arrays):
    """Return type, shape and hash of each array."""
    return [[a.dtype.str, list(a.shape), hashlib.sha256(a.tobytes()).hexdigest()] for a in arrays]


class Interpreter:
    """Does steps with the classes of one program."""

    def __init__(self, model, builder, get_helper, message):
        """Take the model's class, the builder's, the lookup of helpers and the chunks' class."""
        self.model, self.builder, self.get_helper = model, builder, get_helper
        self.message = message
        self._opened = contextlib.ExitStack()

    def run(self, steps):
        """Do ``steps``, lists of a name and its arguments; return the model that is there last.

        The names are those of factories, and of methods of the builder and the model. ``reopen``
        saves the model to the path given and loads that.
        """
        this = self.builder() if steps[0][0].startswith("set_") else None
        with self._opened:  # until the end: a raw stream is read when the model is built
            for name, *arguments in steps:
                this = getattr(self, "_" + name, self._method(name))(this, *arguments)
        return this

    def describe(self, model, helper=None, decode=True):
        """Return all that can be asked of a model, but for its own bytes' layout."""
        facts = {
            "metadata": model.metadata,
            "model_id": model.model_id,
            "checksum": model.checksum,
            "legacy_source": model.legacy_source,
            "has_training_model": model.has_training_model,
            "has_inference_model": model.has_inference_model,
            "inference_format": model.get_inference_model_format(),
        }
        with model.get_file_stream() as stream:
            facts["file"] = sha256(stream)
        if model.has_training_model:
            with model.get_training_model_stream() as stream:
                facts["training_bytes"] = sha256(stream)
            if decode:
                arrays = model.get_training_model(helper and self.get_helper(helper))
                facts["training_arrays"] = facts_of_arrays(arrays)
        if model.has_inference_model:
            with model.get_inference_model_stream() as stream:
                facts["inference_bytes"] = sha256(stream)
        return facts

    @staticmethod
    def _method(name):
        return lambda this, *arguments: getattr(this, name)(*arguments)

    def _from_training_model(self, this, arrays, helper=None):
        helper = helper and self.get_helper(helper)
        return self.builder.from_training_model(load_arrays(arrays), helper)

    def _model_from_training_model(self, this, arrays, helper=None, metadata=None):
        helper = helper and self.get_helper(helper)
        return self.model.from_training_model(load_arrays(arrays), helper, metadata)

    def _from_file(self, this, path):
        return self.builder.from_file(path)

    def _from_stream(self, this, path):
        return self.builder.from_stream(self._opened.enter_context(open(path, "rb")))

    def _from_chunks(self, this, path):
        return self.builder.from_filechunk_stream(self.read_chunks(path))

    def _set_helper(self, this, name):
        return this.set_helper(self.get_helper(name))

    def _set_training_model(self, this, arrays, helper=None):
        return this.set_training_model(load_arrays(arrays), helper and self.get_helper(helper))

    def _set_inference_model(self, this, path, format):
        with open(path, "rb") as file:
            return this.set_inference_model(file.read(), format)

    def _set_inference_model_stream(self, this, path, format):
        with open(path, "rb") as file:
            return this.set_inference_model_stream(file, format)

    def _reopen(self, this, path):
        this.save_to_file(path)
        return self.model.from_file(path)

    def _send(self, this, path, *size):
        with open(path, "wb") as file:
            for chunk in this.get_filechunk_stream(*size):
                data = chunk.SerializeToString()
                file.write(len(data).to_bytes(8, "big") + data)
        return this

    def read_chunks(self, path):
        """Yield the messages of a file that ``send`` wrote."""
        with open(path, "rb") as file:
            while head := file.read(8):
                yield self.message.FromString(file.read(int.from_bytes(head, "big")))
