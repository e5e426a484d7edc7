"""`bad_files.parquet`: what was not used, and why."""

from __future__ import annotations

import pyarrow as pa

from dfssd.data.checks import Problem
from dfssd.data.manifest import BAD_SCHEMA, write_table
from dfssd.runtime.storage import Storage

Bad = tuple[str, Problem]  # uri, and what is wrong with it


def write_bad(store: Storage, bad: list[Bad]) -> None:
    columns = zip(*sorted((uri, p.reason, p.detail) for uri, p in bad), strict=True) if bad else ([], [], [])
    arrays = [pa.array(list(column), pa.string()) for column in columns]
    write_table(store, "bad_files.parquet", pa.Table.from_arrays(arrays, schema=BAD_SCHEMA))
