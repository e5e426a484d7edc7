import json

import pytest
import torch

from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage
from dfssd.train import checkpoint


def _make(tmp_path, *steps):
    for step in steps:
        state = {"step": step, "fingerprint": "f", "w": torch.arange(1000) + step}
        checkpoint.store_newest(Storage(str(tmp_path)), step, state, keep=9)
    return Storage(str(tmp_path))


def test_the_newest_whole_one_is_loaded(tmp_path):
    assert checkpoint.load_newest(Storage(str(tmp_path / "none")), "f") is None
    assert checkpoint.load_newest(_make(tmp_path, 5, 20, 10), "f")["step"] == 20


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "bad manifest", "no state"])
def test_a_damaged_one_is_passed_over_loudly(tmp_path, capsys, damage):
    store = _make(tmp_path, 10, 20)
    state, manifest = (tmp_path / "step_0000020" / n for n in ("state.pt", "MANIFEST.json"))
    data = bytearray(state.read_bytes())
    if damage == "cut":
        state.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "bad manifest":
        manifest.write_text("{")
    else:
        state.unlink()
    assert checkpoint.load_newest(store, "f")["step"] == 10
    assert "damaged" in capsys.readouterr().out
    assert checkpoint.load_newest(store, "f")["step"] == 10  # marked: said once
    assert "damaged" not in capsys.readouterr().out


def test_if_none_is_whole_it_stops_and_never_starts_over(tmp_path):
    store = _make(tmp_path, 10)
    (tmp_path / "step_0000010" / "state.pt").write_bytes(b"x")
    with pytest.raises(DfssdError, match="none of them is whole"):
        checkpoint.load_newest(store, "f")


def test_one_that_was_being_written_does_not_count(tmp_path, capsys):
    store = _make(tmp_path, 10, 20)
    (tmp_path / "step_0000020" / "MANIFEST.json").unlink()
    assert checkpoint.load_newest(store, "f")["step"] == 10
    (tmp_path / "step_0000010" / "MANIFEST.json").unlink()
    assert checkpoint.load_newest(store, "f") is None  # killed during the first one: there is nothing to go on from
    assert "WARNING" not in capsys.readouterr().out


def test_other_settings_are_refused(tmp_path):
    with pytest.raises(DfssdError, match="other settings") as caught:
        checkpoint.load_newest(_make(tmp_path, 10), "g")
    assert "--run-name" in caught.value.todo


def test_a_cut_ray_snapshot_is_set_aside(tmp_path, capsys):
    store = Storage(str(tmp_path))
    store.write("checkpoint_manager_snapshot.json", b'{"a": [1, ')
    checkpoint.mend_ray_snapshot(store)
    assert not store.exists("checkpoint_manager_snapshot.json")
    assert store.read("checkpoint_manager_snapshot.json.corrupt-0") == b'{"a": [1, '
    assert "set aside" in capsys.readouterr().out
    store.write_json("checkpoint_manager_snapshot.json", {"a": 1})
    checkpoint.mend_ray_snapshot(store)
    assert json.loads(store.read("checkpoint_manager_snapshot.json")) == {"a": 1}
