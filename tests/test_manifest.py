import numpy as np
import pyarrow as pa
import pytest

from dfssd.data.manifest import (
    SCHEMA,
    Manifest,
    Row,
    pseudo_table,
    read_manifest,
    read_pseudo,
    read_table,
    write_manifest,
    write_table,
)
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage


def _rows() -> list[Row]:
    box = np.array([[2, 0.5, 0.5, 0.25, 0.125], [0, 0.1, 0.2, 0.1, 0.1]], np.float32)
    return [
        Row("b" * 16, "/x/b.png", 64, 32, "train", True, 1, box),
        Row("a" * 16, "/x/a.png", 64, 32, "val", False, 0, np.zeros((0, 5), np.float32)),
        Row("c" * 16, "/x/c.png", 64, 32, "unlabelled-only", False, 2, None),
    ]


def test_null_and_empty_boxes_stay_apart(tmp_path):
    store = Storage(str(tmp_path))
    write_manifest(store, Manifest(_rows(), ["p", "q", "r"], {"seed": 1}))
    back = read_manifest(store)
    assert [r.image_id[0] for r in back.rows] == ["a", "b", "c"]
    assert back.rows[0].boxes.shape == (0, 5)  # looked at, and free of defects
    assert back.rows[2].boxes is None  # nobody looked
    np.testing.assert_array_equal(back.rows[1].boxes, _rows()[0].boxes)
    assert back.names == ["p", "q", "r"] and back.meta["seed"] == 1


def test_file_on_disk_has_the_documented_schema_and_ignores_row_order(tmp_path):
    first, second = Storage(str(tmp_path / "1")), Storage(str(tmp_path / "2"))
    write_manifest(first, Manifest(_rows(), ["p", "q", "r"], {}))
    write_manifest(second, Manifest(_rows()[::-1], ["p", "q", "r"], {}))
    assert read_table(first, "manifest.parquet").schema.equals(SCHEMA)
    assert SCHEMA.field("boxes").type.value_type.field("cls").type == pa.int16()
    assert first.digest("manifest.parquet") == second.digest("manifest.parquet")


def test_unknown_version_is_refused(tmp_path):
    store = Storage(str(tmp_path))
    write_table(store, "manifest.parquet", pa.table({"x": [1]}))
    with pytest.raises(DfssdError, match="format version"):
        read_manifest(store)


def test_pseudo_round_trip_leaves_unreadable_images_out(tmp_path):
    store = Storage(str(tmp_path))
    boxes = np.array([[1, 0.5, 0.5, 0.2, 0.2, 0.7, 1.0]], np.float32)
    write_table(store, "shard-00000.parquet", pseudo_table(["a", "b", "c"], "t", [boxes, None, boxes[:0]]))
    back = read_pseudo(store)
    assert set(back) == {"a", "c"}
    np.testing.assert_array_equal(back["a"], boxes)
    assert back["c"].shape == (0, 7)
