"""Many files: read side by side, and once for all processes of a machine."""

import os
import threading
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from held import Crowd

from dfssd.data import shared_table
from dfssd.data.manifest import Manifest, Row, pseudo_table, read_manifest, read_pseudo, write_manifest, write_table
from dfssd.runtime.storage import Storage


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """140 files of two images, of which the second could not be read; and how often files are read."""
    monkeypatch.setattr(shared_table.tempfile, "gettempdir", lambda: str(tmp_path))
    store = Storage(str(tmp_path / "run")).at("pseudo")
    for k in range(140):
        boxes = np.full((k % 3, 7), k / 200, np.float32)
        write_table(store, f"shard-{k:05d}.parquet", pseudo_table([f"{k:04d}", f"{k:04d}x"], "t", [boxes, None]))
    read, readers, real = [], Crowd(3), Storage.read

    def slow(self, name):
        """Answers nobody before it was asked for three at a time."""
        if name.endswith(".parquet"):
            readers.join()
            read.append(name)
        return real(self, name)

    monkeypatch.setattr(Storage, "read", slow)
    return store, read, readers


def _check(found):
    assert len(found) == 140
    for k in range(140):
        assert found[f"{k:04d}"].shape == (k % 3, 7) and (found[f"{k:04d}"][:, 1] == np.float32(k / 200)).all()


def test_files_are_read_side_by_side_by_each_where_the_artefact_is_not_finished(shards):
    store, read, readers = shards
    _check(read_pseudo(store))
    _check(read_pseudo(store))
    assert len(read) == 280 and readers.most >= 3


def test_files_of_a_finished_artefact_are_read_once_for_all_processes(shards):
    store, read, _ = shards
    store.write_json("stage.json", {"a": 1})
    found = []
    threads = [threading.Thread(target=lambda: found.append(read_pseudo(store))) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(found) == 4 and len(read) == 140
    for one in found:
        _check(one)
    store.write_json("stage.json", {"a": 2})  # made anew: what is kept is another artefact's
    _check(read_pseudo(store))
    assert (
        len(read) == 280 and len(list((shared_table.Path(shared_table.tempfile.gettempdir())).glob("*/*.arrow"))) == 1
    )


@pytest.mark.parametrize("content", [b"", bytes(4096)], ids=["empty", "zeros"])
def test_a_copy_that_a_power_cut_has_emptied_is_made_again(shards, content):
    store, read, _ = shards
    store.write_json("stage.json", {"a": 1})
    read_pseudo(store)
    (kept,) = shared_table.Path(shared_table.tempfile.gettempdir()).glob("*/*.arrow")
    kept.write_bytes(content)
    for times in (2, 3, 3):
        _check(read_pseudo(store))
        assert len(read) == 140 * times


def test_a_disk_that_takes_no_copy_is_no_error(shards, monkeypatch, capsys):
    store, read, _ = shards
    store.write_json("stage.json", {"a": 1})
    monkeypatch.setattr(shared_table.tempfile, "gettempdir", lambda: "/proc")
    _check(read_pseudo(store))
    assert len(read) == 140 and "WARNING" in capsys.readouterr().out


def test_a_manifest_is_read_once_with_all_that_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_table.tempfile, "gettempdir", lambda: str(tmp_path))
    store, read = Storage(str(tmp_path / "run")).at("dataset"), []
    rows = [
        Row(f"{k:04d}", f"{k}.png", 8, 6, ("train", "val", "test")[k // 4 % 3], k % 2 == 0, k,
            None if k % 3 else np.full((k % 4, 5), k, np.float32), 0.0)
        for k in range(40)
    ]  # fmt: skip
    write_manifest(store, Manifest(rows, ["a", "b"], {"more": 1}))
    table = pq.read_table(tmp_path / "run/dataset/manifest.parquet")
    pq.write_table(table, tmp_path / "run/dataset/manifest.parquet", row_group_size=7)  # with a dictionary each
    store.write_json("stage.json", {})
    plain, real = read_manifest(store), Storage.read
    monkeypatch.setattr(Storage, "read", lambda self, name: (read.append(name), real(self, name))[1])
    for _ in range(3):
        found = read_manifest(store, shared=True)
        assert found.names == plain.names and found.meta == plain.meta and len(found.rows) == 40
        for one, other in zip(found.rows, plain.rows, strict=True):
            assert replace(one, boxes=None) == replace(other, boxes=None)
            assert (one.boxes is None) == (other.boxes is None)
            assert one.boxes is None or np.array_equal(one.boxes, other.boxes)
    assert read.count("manifest.parquet") == 1


def test_a_machine_keeps_the_tables_that_were_asked_for_last(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_table.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shared_table, "KEPT", 2)
    stores = [Storage(str(tmp_path / str(k))).at("pseudo") for k in range(3)]
    for store in stores:
        write_table(store, "shard-0.parquet", pseudo_table(["a"], "t", [None]))
        store.write_json("stage.json", {})
    kept = []
    for store in (stores[0], stores[1], stores[0], stores[2]):
        # The clock of a file system may be too coarse to tell two apart.
        for file in tmp_path.glob("dfssd-tables-*/*.arrow"):
            os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns - 10**12))
        read_pseudo(store, shared=True)
        kept.append({p.name for p in tmp_path.glob("dfssd-tables-*/*.arrow")})
    assert [len(k) for k in kept] == [1, 2, 2, 2] and kept[0] < kept[3]  # of the three the second is gone
