"""What users build and apply by the files in ``docs/kserve``."""

from __future__ import annotations

import importlib
import re
import tomllib
from typing import Any

from tests.integrations.kserve.support import REPOSITORY


def test_the_image_installs_and_runs_what_there_is() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    recipe = (REPOSITORY / "docs" / "kserve" / "Dockerfile").read_text()

    (extras,) = re.findall(rf'"{project["name"]}\[([a-z,]+)\]"', recipe)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (command_line,) = re.findall(r'ENTRYPOINT \["([a-z-]+)"\]', recipe)
    assert command_line in project["scripts"]


def test_the_manifest_is_one_for_every_uri() -> None:
    yaml: Any = importlib.import_module("yaml")  # which has no types
    text = (REPOSITORY / "docs" / "kserve" / "cluster-storage-container.yaml").read_text()
    found = yaml.safe_load(text)
    spec = found["spec"]

    assert (found["apiVersion"], found["kind"]) == (
        "serving.kserve.io/v1alpha1",
        "ClusterStorageContainer",
    )
    assert set(spec) == {
        "container",
        "supportedUriFormats",
        "supportsMultiModelDownload",
        "workloadType",
    }
    assert spec["container"]["name"] == "storage-initializer"
    assert (spec["workloadType"], spec["supportsMultiModelDownload"]) == ("initContainer", True)
    formats = spec["supportedUriFormats"]
    assert all(len(each) == 1 for each in formats)
    for uri in (
        "s3://b/m",
        "gs://b/m",
        "hf://o/m:v1",
        "hdfs://a/b",
        "webhdfs://a/b",
        "modelscope://o/m",
        "oci+fetch://r.example/m:1",
        "https://a.blob.core.windows.net/c/m",
        "https://a.file.core.windows.net/s/m",
        "https://git.example/o/m.git",
        "http://h.example/m.tar.gz",
    ):
        assert any(
            uri.startswith(each.get("prefix", "\0")) or re.search(each.get("regex", r"(?!)"), uri)
            for each in formats
        ), uri
