"""`report/detections.parquet`: what each measured model found, so that pictures are drawn and numbers checked without it.

One row a box: model, split, image_id, x1, y1, x2, y2 (px of the picture), score, cls, hit (IoU 0.5 with a box of its class).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dfssd.data.manifest import read_table, write_table
from dfssd.evaluate.escapes import FLOOR
from dfssd.runtime.storage import Storage

FILE = "detections.parquet"
SCHEMA = pa.schema(
    [
        ("model", pa.dictionary(pa.int16(), pa.string())),
        ("split", pa.dictionary(pa.int16(), pa.string())),
        ("image_id", pa.string()),
        *((name, pa.float32()) for name in ("x1", "y1", "x2", "y2", "score")),
        ("cls", pa.int16()),
        ("hit", pa.bool_()),
    ]
)
Found = dict[str, np.ndarray]  # by image_id: (n,7) [x1, y1, x2, y2 px, score, class, hit]


def write_detections(store: Storage, records: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> None:
    """Write the boxes (score from `escapes.FLOOR`) of every (model, split)."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for (model, split), pictures in records.items():
        for one in pictures:
            keep = one["conf"] >= FLOOR
            count = int(keep.sum())
            columns["model"] += [model] * count
            columns["split"] += [split] * count
            columns["image_id"] += [one["image_id"]] * count
            for k, name in enumerate(("x1", "y1", "x2", "y2")):
                columns[name] += one["boxes"][keep, k].tolist()
            columns["score"] += one["conf"][keep].tolist()
            columns["cls"] += one["pred_cls"][keep].astype(int).tolist()
            columns["hit"] += one["tp"][keep, 0].tolist()
    arrays = []
    for field in SCHEMA:
        words = pa.types.is_dictionary(field.type)
        array = pa.array(columns[field.name], type=pa.string() if words else field.type)
        arrays.append(array.dictionary_encode().cast(field.type) if words else array)
    write_table(store, FILE, pa.Table.from_arrays(arrays, schema=SCHEMA))


def read_detections(store: Storage) -> dict[tuple[str, str], Found]:
    """Boxes by (model, split) and image_id; a picture without a box has no entry."""
    table = read_table(store, FILE)
    column = {name: table[name].to_pylist() for name in SCHEMA.names}
    rows = np.array([column[n] for n in ("x1", "y1", "x2", "y2", "score", "cls", "hit")], np.float32).T.reshape(-1, 7)
    found: dict[tuple[str, str], dict[str, list[int]]] = {}
    for k, key in enumerate(zip(column["model"], column["split"], strict=True)):
        found.setdefault(key, {}).setdefault(column["image_id"][k], []).append(k)
    return {key: {i: rows[index] for i, index in own.items()} for key, own in found.items()}
