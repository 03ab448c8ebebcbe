"""The side of ``arkindex-base-worker`` that publishes versions of models."""

import importlib.machinery
import logging
import sys
import types
from pathlib import Path

import arkindex_worker
from arkindex import ArkindexClient
from json_lines import serve

logging.disable(logging.CRITICAL)

# The package of all mixins imports what draws and measures images; one file of it is wanted.
package = types.ModuleType("arkindex_worker.worker")
package.__path__ = [str(Path(arkindex_worker.__file__).with_name("worker"))]
package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
sys.modules[package.__name__] = package

from arkindex_worker.worker.training import TrainingMixin  # noqa: E402


class Worker(TrainingMixin):
    """A worker, as far as the mixin asks for one."""

    def __init__(self, client, is_read_only):
        """Take the client, and whether nothing may be written."""
        self.api_client, self.is_read_only = client, is_read_only


def publish(url, token, steps, is_read_only=False):
    """Do steps, each the name of a method and its arguments; return the version at the end."""
    worker = Worker(ArkindexClient(token=token, base_url=url), is_read_only)
    for name, arguments in steps:
        if "model_path" in arguments:
            arguments["model_path"] = Path(arguments["model_path"])
        getattr(worker, name)(**arguments)
    return worker.model_version


serve({"publish": publish})
