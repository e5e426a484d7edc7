"""A wall clock that jumps, by hours and back: nothing that waits, expires or counts goes by it."""

import time

import pytest
import torch
from small import make_job, tiny_config

from dfssd.models.yolo.detector import read_detector
from dfssd.runtime import lease as lease_module
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import ArtefactName
from dfssd.runtime.lease import Lease
from dfssd.runtime.storage import Storage
from dfssd.train import checkpoint
from dfssd.train.in_process import train_in_process


@pytest.fixture
def jumping(monkeypatch):
    """`time.time` an hour ahead and a day behind by turns."""
    real, calls = time.time, []

    def jump():
        calls.append(1)
        return real() + (3600.0 if len(calls) % 2 else -86400.0)

    monkeypatch.setattr(time, "time", jump)
    return calls


def test_a_training_is_the_same_and_lasts_no_negative_time(prepared, tmp_path_factory, jumping, monkeypatch):
    import shutil

    other = tmp_path_factory.mktemp("other")
    shutil.copytree(prepared / "r", other / "r")
    with pytest.MonkeyPatch.context() as still:
        still.setattr(time, "time", lambda: 1.7e9)
        whole = make_job("label_only", str(other / "r"), tiny_config(other, steps=4, val_every=4))
        train_in_process(whole)
    kept, real = [], checkpoint.store_newest
    monkeypatch.setattr(
        checkpoint, "store_newest", lambda store, step, *more: (kept.append(step), real(store, step, *more))
    )
    config = tiny_config(prepared, steps=4, val_every=4, checkpoint_min=30.0)
    job = make_job("label_only", str(prepared / "r"), config)
    result = train_in_process(job)
    assert kept == [4], "no half hour has passed: none by the clock"
    assert jumping and result["before_s"] >= 0 and result["seconds_per_step"] > 0
    a, b = (read_detector(j.store.read("last.pt"), "x").state_dict() for j in (whole, job))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_stage_lasts_no_negative_time(tmp_path, jumping):
    run = Storage(str(tmp_path))
    for _ in range(2):
        stage = Stage(run, ArtefactName("teacher"), {})
        stage.begin(True)
        assert stage.finish([], {})["duration_s"] >= 0
        run.delete("teacher/stage.json")


def test_a_lease_is_held_and_expires_by_its_own_time(tmp_path, jumping, monkeypatch):
    monkeypatch.setattr(lease_module, "WATCH_S", 0.8)
    store = Storage(str(tmp_path)).at("leases")
    store.write_json("x.json", {"host": "far", "pid": 7, "machine": "far", "token": "t", "beat": 0})
    begun = time.monotonic()
    with Lease(Storage(str(tmp_path)), "x") as lease:
        assert 0.8 <= time.monotonic() - begun < 60, "not an hour, nor a day"
        lease.check()
