"""Interrupt, break and resume the loop itself, in one process."""

import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.data.manifest import read_manifest
from dfssd.data.reading import decode
from dfssd.errors import DfssdError
from dfssd.models.yolo.detector import build_detector, detector_bytes, read_detector
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint, ending, guards, loop
from dfssd.train.build import build_session
from dfssd.train.ending import REQUEST, Watch, ask_for_checkpoint
from dfssd.train.in_process import train_in_process
from dfssd.train.interrupt import Interrupt


class Killed(Exception):
    """Stands for SIGKILL: nothing of the loop runs after it."""


def _run(storage, stage, stop_at=None, monkeypatch=None, begun=0.0, **changes):
    job = replace(make_job(stage, str(storage / "r"), tiny_config(storage, **changes)), begun=begun)
    if stop_at is None:
        return train_in_process(job), job
    lr = loop.learning_rate

    def deadly(config, step, steps):
        if step == stop_at:
            raise Killed
        return lr(config, step, steps)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(loop, "learning_rate", deadly)
        train_in_process(job)
    return None, job


@pytest.mark.parametrize(
    ("stage", "stop_at", "changes"),
    [("label_only", 3, {}), ("label_only", 5, {}), ("student", 4, {}), ("student", 4, {"teacher_mode": "online"})],
    ids=["after a checkpoint", "late", "student", "online teacher"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    prepared, tmp_path_factory, monkeypatch, stage, stop_at, changes
):
    if stage == "student":
        give_teacher_and_candidates(prepared)
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(prepared / "r", other / "r")
    whole, job = _run(prepared, stage, **changes)
    _run(other, stage, stop_at, monkeypatch, **changes)
    assert not (other / "r" / stage / "best.pt").exists()
    resumed, other_job = _run(other, stage, **changes)
    assert resumed["best"] == whole["best"] and resumed["steps"] == 6
    for name in ("best.pt", "last.pt"):
        a, b = (read_detector(j.store.read(name), name).state_dict() for j in (job, other_job))
        assert all(torch.equal(a[k], b[k]) for k in a)
    histories = [
        [
            {k: v for k, v in h.items() if not k.startswith(("grad/", "time/", "speed"))}
            for h in j.store.read_json("history.json")
        ]
        for j in (job, other_job)
    ]
    assert histories[0] == histories[1]  # no step twice, none missing, same losses


def test_the_time_of_earlier_attempts_counts_once(prepared, monkeypatch):
    """What a trial costs is what all its attempts took: each from its beginning to its last checkpoint."""
    now, often = time.time(), {"val_every": 1}
    _run(prepared, "label_only", 2, monkeypatch, begun=now - 1000, **often)
    _run(prepared, "label_only", 4, monkeypatch, begun=now - 200, **often)
    _run(prepared, "label_only", 5, monkeypatch, begun=now - 200, **often)  # only its workers were started again
    result, _ = _run(prepared, "label_only", begun=now, **often)
    assert 1200 <= result["before_s"] <= 1200 + 2 * (time.time() - now)


def test_every_part_of_the_state_matters(prepared):
    """Leaving any part out of a checkpoint must be noticed: each one changes after three steps."""
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=3))
    fresh = build_session(job, WorkerGroup(), torch.device("cpu")).state()
    train_in_process(job)
    trained = checkpoint.load_newest(job.store.at("train"), job.fingerprint())
    assert set(fresh) == set(trained)
    for part in ("student", "ema"):
        assert any(not torch.equal(fresh[part][k], trained[part][k]) for k in fresh[part])
    assert any("projections" in k for k in trained["student"])
    assert not torch.equal(fresh["policy"]["mean"], trained["policy"]["mean"])
    assert trained["optimiser"]["state"] and trained["ema_updates"] == 3 and trained["step"] == 3
    assert trained["best"] and trained["history"]
    session, drawn = build_session(job, WorkerGroup(), torch.device("cpu")), []
    for _ in range(2):
        session.load_state(trained)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[1], "all generators go on from the checkpoint"


def test_training_changes_only_what_it_should(prepared):
    give_teacher_and_candidates(prepared)
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, steps=2))
    teacher = read_detector(Storage(str(prepared / "r")).read("teacher/best.pt"), "t").state_dict()
    before = build_session(job, WorkerGroup(), torch.device("cpu"))
    start = {k: v.clone() for k, v in before.student.state_dict().items()}
    train_in_process(job)
    after = read_detector(job.store.read("last.pt"), "x").state_dict()
    assert not any("projection" in k for k in after)  # the saved student is a plain detector
    moved = [k for k in after if not torch.equal(after[k], start[f"detector.{k}"].half().float())]
    assert any(k.startswith("model.0.conv") for k in moved)
    again = read_detector(Storage(str(prepared / "r")).read("teacher/best.pt"), "t").state_dict()
    assert all(torch.equal(teacher[k], again[k]) for k in teacher)


def test_label_only_and_student_start_from_the_same_weights(prepared):
    give_teacher_and_candidates(prepared)
    sessions = [
        build_session(make_job(s, str(prepared / "r"), tiny_config(prepared)), WorkerGroup(), torch.device("cpu"))
        for s in ("label_only", "student")
    ]
    a, b = (s.student.detector.state_dict() for s in sessions)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "log_every", [1, 10]
)  # looked at in every step, and asked for after the gradient was not finite
def test_nan_stops_before_the_update(prepared, monkeypatch, log_every):
    give_teacher_and_candidates(prepared)
    import dfssd.distill.criterion as criterion

    layer_terms, calls, weights = criterion.layer_terms, [], []

    def poisoned(*args):
        calls.append(1)
        sums, images = layer_terms(*args)
        return sums * float("nan") if len(calls) == 3 else sums, images

    monkeypatch.setattr(criterion, "layer_terms", poisoned)
    step = torch.optim.AdamW.step

    def watched(self, *args):
        step(self, *args)
        weights.append([p.detach().clone() for g in self.param_groups for p in g["params"]])

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    with pytest.raises(DfssdError, match=r"feat/\w+ is not finite at step 2; nothing was updated"):
        _run(prepared, "student", steps=6, log_every=log_every)
    # Where nobody waits for the flag, the optimiser itself leaves the weights as they are.
    assert len(weights) == (2 if log_every == 1 else 3)
    assert all(torch.equal(a, b) for later in weights[2:3] for a, b in zip(later, weights[1], strict=True))


def test_other_settings_do_not_resume(prepared, monkeypatch):
    _run(prepared, "label_only", 4, monkeypatch)
    with pytest.raises(DfssdError, match="other settings"):
        _run(prepared, "label_only", lr=0.01)


def test_speed_settings_may_change_on_resume(prepared, monkeypatch):
    _run(prepared, "label_only", 4, monkeypatch)
    result, _ = _run(prepared, "label_only", loader_workers=1, log_every=2)
    assert result["steps"] == 6


def test_teacher_of_other_classes_is_refused(prepared):
    give_teacher_and_candidates(prepared)
    run = Storage(str(prepared / "r"))
    run.write("teacher/best.pt", detector_bytes(build_detector("yolov8n.yaml", ["x", "y", "z"], 64), {}))
    with pytest.raises(DfssdError, match="teacher knows the classes"):
        _run(prepared, "student")


def test_a_vanished_image_is_a_user_error(prepared, tmp_path):
    manifest = read_manifest(Storage(str(prepared / "r" / "dataset")))
    from dfssd.data.manifest import write_manifest

    for row in manifest.rows:
        row.uri = row.uri.replace(".png", ".gone")
    write_manifest(Storage(str(prepared / "r" / "dataset")), manifest)
    with pytest.raises(DfssdError, match="cannot be read"):
        _run(prepared, "label_only", cache_gib=0)  # what is kept decoded needs no file
    assert guards.REMEDY


@pytest.mark.parametrize("loaders", [0, 1])
def test_an_image_that_was_replaced_is_a_user_error(prepared, loaders):
    """Another picture of the same size under the old name would be trained on with the old boxes."""
    rows = read_manifest(Storage(str(prepared / "r" / "dataset"))).labelled_rows()
    kept = {row.uri: Path(row.uri).read_bytes() for row in rows}
    try:
        for row in rows:
            cv2.imwrite(row.uri, np.full((row.height, row.width, 3), 255, np.uint8))
        with pytest.raises(DfssdError, match="another image lies where this one was") as caught:
            _run(prepared, "label_only", loader_workers=loaders, cache_gib=0)
        assert any(uri in str(caught.value) for uri in kept) and "prepare again" in str(caught.value)
    finally:
        for uri, data in kept.items():
            Path(uri).write_bytes(data)
    Path(rows[0].uri).write_bytes(kept[rows[0].uri])
    assert decode(rows[0].uri, image_id=rows[0].image_id).shape[:2] == (rows[0].height, rows[0].width)


def test_asked_to_end_between_two_validations_it_leaves_a_checkpoint_and_loses_nothing(
    prepared, tmp_path_factory, monkeypatch
):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(prepared / "r", other / "r")
    few = {"val_every": 6, "log_every": 1}
    _, whole = _run(prepared, "label_only", **few)
    job = make_job("label_only", str(other / "r"), tiny_config(other, **few))
    interrupt = Interrupt()
    monkeypatch.setattr(ending, "SEEN_S", 200.0)  # nobody is late, however busy the machine is
    monkeypatch.setattr(ending, "LIMIT_S", 300.0)
    watch, asked = Watch(job.store, interrupt.ask), threading.Thread(target=ask_for_checkpoint, args=(job.store,))
    lr = loop.learning_rate

    def deadly(config, step, steps):
        if step == 2:
            asked.start()
            assert watch.asked.wait(200)
        if step == 5:
            raise Killed
        return lr(config, step, steps)

    def save(metrics, s):
        checkpoint.store_newest(job.store.at("train"), s.step, s.state(), 2)
        watch.stored(s.step)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(loop, "learning_rate", deadly)
        loop.train(job, WorkerGroup(), torch.device("cpu"), lambda m, s: None, save, interrupt)
    watch.close()
    asked.join(200)
    assert not job.store.exists(REQUEST) and job.store.folders("train")[0] in ("step_0000003", "step_0000004")
    train_in_process(job)
    a, b = (read_detector(j.store.read("last.pt"), "x").state_dict() for j in (whole, job))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_request_that_is_met_is_not_taken_for_another_one(tmp_path, monkeypatch):
    """The storage needs a moment to remove it, in which the watch looks many times."""
    store, asked, second = Storage(str(tmp_path)), [], threading.Event()
    monkeypatch.setattr(ending, "LOOK_S", 0.001)
    watch = Watch(store, lambda: asked.append(1) or (len(asked) > 1 and second.set()))
    store.write_json(REQUEST, {"seen": False})
    assert watch.asked.wait(60)
    delete = store.delete
    monkeypatch.setattr(store, "delete", lambda name: (second.wait(0.3), delete(name)))
    watch.stored(7)
    watch.close()
    assert asked == [1] and not store.exists(REQUEST)


@pytest.mark.parametrize("answers", [True, False])
def test_a_signal_asks_for_a_checkpoint_and_then_does_what_it_did(tmp_path, monkeypatch, answers):
    store, done, saved = Storage(str(tmp_path)), threading.Event(), []
    monkeypatch.setattr(ending, "SEEN_S", 0.5 if not answers else 200.0)
    monkeypatch.setattr(ending, "LIMIT_S", 300.0)
    monkeypatch.setattr(ending, "LOOK_S", 0.05)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, lambda number, frame: done.set())
        ending.Signals(store)
        watch = Watch(store, lambda: saved.append(done.is_set())) if answers else None
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 200
        while not done.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
            if watch:
                watch.stored(7)
        assert done.is_set() and saved == ([False] if answers else []) and not store.exists(REQUEST)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_in_the_last_step_ends_the_job_all_the_same(prepared, monkeypatch):
    """The training ends well before anybody has stored or aborted anything: no next stage, and no second interruption."""
    from dfssd.train import worker

    job, late = make_job("label_only", str(prepared / "r"), tiny_config(prepared)), []
    monkeypatch.setattr(ending, "SEEN_S", 0.3)

    class Trainer:
        asked_to_end = worker._Trainer.asked_to_end
        signals = None

        def fit(self):
            self.signals = ending.Signals(job.store)
            os.kill(os.getpid(), signal.SIGTERM)
            return SimpleNamespace(return_value={"steps": 8})

    monkeypatch.setattr(worker, "_trainer", lambda *args: Trainer())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = threading.enumerate()
    try:
        signal.signal(signal.SIGINT, lambda *args: late.append(args))
        with pytest.raises(KeyboardInterrupt):
            worker._until_no_progress(job, None, (), None)
        for thread in (t for t in threading.enumerate() if t not in before):
            thread.join(200)  # it asks in vain, and then does not abort
        assert not late and not job.store.exists(REQUEST)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
