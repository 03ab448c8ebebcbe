"""The file system of every store as other libraries use it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from storage import Storage
from tests.facade.stores import STORES, Store
from tests.servers.nginx_http import NginxHTTP, put_file

TABLE = pyarrow.table({"id": list(range(1000)), "name": [f"row {n}" for n in range(1000)]})


def parquet_bytes() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(TABLE, buffer, row_group_size=100)
    return buffer.getvalue()


def check(fs: Any, csv: str, table: str) -> None:
    """Read one file by pandas and one, by its footer first, by pyarrow."""
    with fs.open(csv) as file:
        assert pandas.read_csv(file)["b"].tolist() == [2, 4]
    assert parquet.read_table(table, filesystem=fs).equals(TABLE)
    assert pandas.read_parquet(table, filesystem=fs, columns=["id"])["id"].sum() == 499_500


@pytest.mark.parametrize("name", STORES)
def test_pandas_and_pyarrow_read_by_it(make_store: Callable[[str], Store], name: str) -> None:
    store = make_store(name)
    store.put_all({"t/data.csv": b"a,b\n1,2\n3,4\n", "t/data.parquet": parquet_bytes()})
    fs = Storage.filesystem(store.base, config=store.config)
    path = store.filesystem_path("t")
    assert sorted(each.rpartition("/")[2] for each in fs.ls(path, detail=False)) == [
        "data.csv",
        "data.parquet",
    ]
    check(fs, f"{path}/data.csv", f"{path}/data.parquet")


def test_pandas_and_pyarrow_read_over_http(nginx_http: NginxHTTP, prefix: str) -> None:
    put_file(nginx_http.data, f"{prefix}/data.csv", b"a,b\n1,2\n3,4\n")
    put_file(nginx_http.data, f"{prefix}/data.parquet", parquet_bytes())
    fs = Storage.filesystem(f"{nginx_http.endpoint}/{prefix}/data.csv")
    check(fs, f"{prefix}/data.csv", f"{prefix}/data.parquet")


def test_what_pandas_writes_is_an_object(
    make_store: Callable[[str], Store], tmp_path: Path
) -> None:
    for name in ("seaweedfs-obstore", "gcs-fsspec", "azurite-obstore"):
        store = make_store(name)
        fs = Storage.filesystem(store.base, config=store.config)
        with fs.open(store.filesystem_path("made.csv"), "w", newline="") as file:
            pandas.DataFrame({"a": [1], "b": [2]}).to_csv(file, index=False)
        assert store.get_raw("made.csv") == b"a,b\n1,2\n"
