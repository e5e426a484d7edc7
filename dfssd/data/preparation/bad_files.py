"""`bad_files.parquet`: what was not used, and why."""

from __future__ import annotations

import pyarrow as pa

from dfssd.data.formats.listing import printable
from dfssd.data.formats.source import Bad
from dfssd.data.manifest import BAD_SCHEMA, write_table
from dfssd.runtime.storage import Storage

__all__ = ["Bad", "write_bad"]


def write_bad(store: Storage, bad: list[Bad]) -> None:
    columns = (
        zip(*sorted((printable(uri), p.reason, printable(p.detail)) for uri, p in bad), strict=True)
        if bad
        else ([], [], [])
    )
    arrays = [pa.array(list(column), pa.string()) for column in columns]
    write_table(store, "bad_files.parquet", pa.Table.from_arrays(arrays, schema=BAD_SCHEMA))
