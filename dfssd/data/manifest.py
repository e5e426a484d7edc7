"""The manifest: one row an image, and the only thing later stages read about the data.

| column | type | meaning |
|---|---|---|
| image_id | string | first 16 hex digits of the file's sha256 |
| uri | string | where it lies |
| width, height | int32 | px, after the EXIF rotation |
| split | dictionary<string> | train, val, test, unlabelled-only, left-out (a near-duplicate of val or test) |
| labelled | bool | may teacher and student see its boxes in training |
| group | int32 | near-duplicate group; never spans two splits |
| boxes | list<struct<cls:int16, cx,cy,w,h:float32>> | 0..1, centre form; null: nobody labelled it; empty: defect-free |
| white | float32 | value that becomes 255 in a picture of more than 8 bits (`data/images.py`); 0: 8 bits |
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dfssd.data.shared_table import read_tables
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

FORMAT_VERSION = 1
TRAIN, VAL, TEST, UNLABELLED_ONLY = "train", "val", "test", "unlabelled-only"
LEFT_OUT = "left-out"  # near-duplicates of images of val or test: nothing trains on them, nothing is measured on them
SPLITS = (TRAIN, VAL, TEST, UNLABELLED_ONLY, LEFT_OUT)

_BOX = pa.struct(
    [("cls", pa.int16()), ("cx", pa.float32()), ("cy", pa.float32()), ("w", pa.float32()), ("h", pa.float32())]
)
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("labelled", pa.bool_()),
        ("group", pa.int32()),
        ("boxes", pa.list_(_BOX)),
        ("white", pa.float32()),
    ]
)
WITHHELD_SCHEMA = pa.schema([("image_id", pa.string()), ("boxes", pa.list_(_BOX))])
_CANDIDATE = pa.struct([*_BOX, ("score", pa.float32()), ("agreement", pa.float32())])
PSEUDO_SCHEMA = pa.schema([("image_id", pa.string()), ("teacher", pa.string()), ("boxes", pa.list_(_CANDIDATE))])
BAD_SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

# Boxes are (n,5) float32 arrays [cls, cx, cy, w, h] in memory; candidates have two more columns [score, agreement].
Boxes = np.ndarray


@dataclass
class Row:
    """One image of the manifest; `boxes` is None where nobody labelled it."""

    image_id: str
    uri: str
    width: int
    height: int
    split: str
    labelled: bool
    group: int
    boxes: Boxes | None
    white: float = 0.0


@dataclass
class Manifest:
    """Rows and what the table's metadata says about all of them."""

    rows: list[Row]
    names: list[str]
    meta: dict[str, Any]

    def of_split(self, split: str) -> list[Row]:
        return [row for row in self.rows if row.split == split]

    def labelled_rows(self) -> list[Row]:
        """Train images whose boxes may be used, in the order of their ids."""
        return sorted((r for r in self.rows if r.split == "train" and r.labelled), key=lambda r: r.image_id)

    def unlabelled_rows(self) -> list[Row]:
        """Images to be pseudo-labelled, in the order of their ids; never one of val or test."""
        rows = (r for r in self.rows if r.split in (TRAIN, UNLABELLED_ONLY) and not r.labelled)
        return sorted(rows, key=lambda r: r.image_id)


def boxes_to_arrow(boxes: list[Boxes | None], struct: pa.StructType) -> pa.Array:
    """Pack (n,k) arrays into a list<struct> column; the first column is the class."""
    counts = [0 if b is None else len(b) for b in boxes]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    width = struct.num_fields
    full = [b for b in boxes if b is not None and len(b)]
    flat = np.concatenate(full).astype(np.float32) if full else np.zeros((0, width), np.float32)
    columns = [pa.array(flat[:, i], type=struct.field(i).type, safe=False) for i in range(width)]
    values = pa.StructArray.from_arrays(columns, fields=list(struct))
    mask = pa.array([b is None for b in boxes], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=mask)


def boxes_from_arrow(column: pa.ChunkedArray | pa.Array) -> list[Boxes | None]:
    """Unpack a list<struct> column into (n,k) float32 arrays; null stays None."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # an empty table has no chunk to combine
        return []
    struct = array.values
    fields = [struct.field(i).to_numpy(zero_copy_only=False) for i in range(struct.type.num_fields)]
    flat = np.stack([f.astype(np.float32) for f in fields], 1)
    offsets, valid = array.offsets.to_numpy(), array.is_valid().to_numpy(zero_copy_only=False)
    return [flat[offsets[i] : offsets[i + 1]].copy() if valid[i] else None for i in range(len(array))]


def write_table(store: Storage, name: str, table: pa.Table) -> None:
    """Write one parquet file; it appears only when it is complete."""
    with store.writer(name) as stream:
        pq.write_table(table, stream)


def read_table(store: Storage, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read(name)))


def write_manifest(store: Storage, manifest: Manifest) -> None:
    """Write `manifest.parquet`; rows are sorted by image_id, so that equal content gives an equal file."""
    rows = sorted(manifest.rows, key=lambda r: r.image_id)
    arrays = []
    for column in SCHEMA:
        if column.name == "boxes":
            arrays.append(boxes_to_arrow([r.boxes for r in rows], _BOX))
        elif column.name == "split":
            arrays.append(pa.array([r.split for r in rows]).dictionary_encode().cast(column.type))
        else:
            arrays.append(pa.array([getattr(r, column.name) for r in rows], type=column.type))
    meta = {"names": manifest.names, "format_version": FORMAT_VERSION, **manifest.meta}
    schema = SCHEMA.with_metadata({"dfssd": json.dumps(meta, sort_keys=True)})
    write_table(store, "manifest.parquet", pa.Table.from_arrays(arrays, schema=schema))


def read_manifest(dataset: Storage, shared: bool = False) -> Manifest:
    """Read `manifest.parquet` from the dataset artefact.

    Args:
        shared: the processes of a machine read it together, once (`data.shared_table`).

    Raises:
        DfssdError: it was written by a format this version does not know.
    """
    table = read_tables(dataset, ["manifest.parquet"], shared)
    meta = json.loads((table.schema.metadata or {}).get(b"dfssd", b"{}"))
    if meta.get("format_version") != FORMAT_VERSION:
        raise DfssdError(
            f"manifest has format version {meta.get('format_version')}, this version reads {FORMAT_VERSION}",
            where=dataset.path("manifest.parquet"),
            todo="run dfssd prepare again under a new --run-name",
        )
    # 'white' came later: a manifest without it is of 8-bit pictures only
    columns = {name: table[name].to_pylist() for name in SCHEMA.names if name != "boxes" and name in table.column_names}
    boxes = boxes_from_arrow(table["boxes"])
    rows = [Row(**{name: column[i] for name, column in columns.items()}, boxes=boxes[i]) for i in range(table.num_rows)]
    return Manifest(rows, meta.pop("names"), meta)


def write_withheld(store: Storage, withheld: dict[str, Boxes]) -> None:
    """Write the boxes of images that are treated as unlabelled; only evaluation may read them."""
    ids = sorted(withheld)
    arrays = [pa.array(ids, pa.string()), boxes_to_arrow([withheld[i] for i in ids], _BOX)]
    write_table(store, "withheld.parquet", pa.Table.from_arrays(arrays, schema=WITHHELD_SCHEMA))


def read_withheld(store: Storage) -> dict[str, Boxes]:
    """Boxes by image_id that exist for images treated as unlabelled; for evaluation alone."""
    if not store.exists("withheld.parquet"):
        return {}
    table = read_table(store, "withheld.parquet")
    boxes = boxes_from_arrow(table["boxes"])
    return {i: b for i, b in zip(table["image_id"].to_pylist(), boxes, strict=True) if b is not None}


def pseudo_table(image_ids: list[str], teacher: str, boxes: list[Boxes | None]) -> pa.Table:
    """Table of candidates, one row an unlabelled image; `teacher` is the digest of the teacher's weights."""
    arrays = [
        pa.array(image_ids, pa.string()),
        pa.array([teacher] * len(image_ids), pa.string()),
        boxes_to_arrow(boxes, _CANDIDATE),
    ]
    return pa.Table.from_arrays(arrays, schema=PSEUDO_SCHEMA)


def read_pseudo(store: Storage, shared: bool = False) -> dict[str, Boxes]:
    """All candidates by image_id, as (n,7) arrays [cls, cx, cy, w, h, score, agreement]; `shared` as for a manifest."""
    names = [name for name in store.files() if name.startswith("shard-")]
    if not names:
        return {}
    table = read_tables(store, names, shared)
    pairs = zip(table["image_id"].to_pylist(), boxes_from_arrow(table["boxes"]), strict=True)
    return {i: b for i, b in pairs if b is not None}
