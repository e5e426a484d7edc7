"""Many files: read side by side, and once for all processes of a machine."""

import threading
import time

import numpy as np
import pytest

from dfssd.data import shared_table
from dfssd.data.manifest import pseudo_table, read_pseudo, write_table
from dfssd.runtime.storage import Storage


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """140 files of two images, of which the second could not be read; and how often files are read."""
    monkeypatch.setattr(shared_table.tempfile, "gettempdir", lambda: str(tmp_path))
    store = Storage(str(tmp_path / "run")).at("pseudo")
    for k in range(140):
        boxes = np.full((k % 3, 7), k / 200, np.float32)
        write_table(store, f"shard-{k:05d}.parquet", pseudo_table([f"{k:04d}", f"{k:04d}x"], "t", [boxes, None]))
    read, running, most = [], [0], [0]
    real = Storage.read

    def slow(self, name):
        if name.endswith(".parquet"):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.002)
            running[0] -= 1
            read.append(name)
        return real(self, name)

    monkeypatch.setattr(Storage, "read", slow)
    return store, read, most


def _check(found):
    assert len(found) == 140
    for k in range(140):
        assert found[f"{k:04d}"].shape == (k % 3, 7) and (found[f"{k:04d}"][:, 1] == np.float32(k / 200)).all()


def test_files_are_read_side_by_side_by_each_where_the_artefact_is_not_finished(shards):
    store, read, most = shards
    _check(read_pseudo(store))
    _check(read_pseudo(store))
    assert len(read) == 280 and most[0] > 2


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


def test_a_disk_that_takes_no_copy_is_no_error(shards, monkeypatch, capsys):
    store, read, _ = shards
    store.write_json("stage.json", {"a": 1})
    monkeypatch.setattr(shared_table.tempfile, "gettempdir", lambda: "/proc")
    _check(read_pseudo(store))
    assert len(read) == 140 and "WARNING" in capsys.readouterr().out
