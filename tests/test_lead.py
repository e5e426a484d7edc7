"""A student that has passed its teacher learns from its own average: terms follow the teacher's lead on val."""

import pytest
import torch
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.data.boxes import CANDIDATE_COLUMNS
from dfssd.data.dataset import network_input
from dfssd.pseudo.selection import Rules, or_no_candidate, select
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.best import lead
from dfssd.train.build import build_session
from dfssd.train.in_process import train_in_process
from dfssd.train.step import own_average


def test_the_lead_fades_from_the_teachers_value_on():
    assert lead(0.40, 0.30, 0.02) == 1 and lead(0.40, 0.40, 0.02) == 1
    assert lead(0.40, 0.41, 0.02) == pytest.approx(0.5)
    assert lead(0.40, 0.42, 0.02) == pytest.approx(0) and lead(0.40, 0.9, 0.02) == 0
    assert lead(0.40, 0.9, 0.0) == 1  # switched off


def _train(storage, reached, **changes):
    """Six steps of a student whose teacher has reached so much on val."""
    give_teacher_and_candidates(storage)
    run = Storage(str(storage / "r"))
    run.write_json("teacher/stage.json", {"summary": {"best": {"map50_95": reached}}})
    job = make_job(
        "student", str(storage / "r"), tiny_config(storage, steps=6, val_every=2, student_view=1.0, **changes)
    )
    train_in_process(job)
    return job


def test_terms_of_a_teacher_that_was_passed_are_gone_and_the_own_average_teaches(prepared):
    job = _train(prepared, reached=-1.0)  # any student is a whole point ahead
    history = [h for h in job.store.read_json("history.json") if "loss/total" in h]
    before, after = history[:2], history[2:]
    assert all(h["loss/pred/cls"] > 0 and h["loss/feat/pkd"] > 0 and "loss/pred/cls (own)" not in h for h in before)
    assert all(h["loss/pred/cls"] == 0 and h["loss/pred/loc"] == 0 and h["loss/feat/pkd"] == 0 for h in after)
    assert all(h["loss/pred/cls (own)"] > 0 and h["loss/pred/loc (own)"] > 0 for h in after)
    state = checkpoint.load_newest(job.store.at("train"), job.fingerprint())
    assert state["lead"] == 0
    s = build_session(job, WorkerGroup(), torch.device("cpu"))
    s.load_state(state)
    assert s.criterion.lead == 0
    s.step = 0
    # The average teaches what it sees in the weak view, and decodes again when it is validated.
    weak = network_input(next(iter(s.loader()))["img"], torch.device("cpu"))
    said = own_average(s, weak)
    assert not said.raw["one2many"].scores.requires_grad and isinstance(s.ema.ema(weak[:1]), tuple)


@pytest.mark.parametrize(("reached", "changes"), [(1.0, {}), (-1.0, {"fade": 0.0})], ids=["not passed", "switched off"])
def test_a_better_teacher_keeps_its_terms(prepared, reached, changes):
    history = _train(prepared, reached, **changes).store.read_json("history.json")
    assert all(h["loss/pred/cls"] > 0 and "loss/pred/cls (own)" not in h for h in history if "loss/total" in h)


def test_a_silent_image_says_nothing_or_background():
    empty = or_no_candidate(torch.zeros(0, CANDIDATE_COLUMNS).numpy())
    tau = torch.full((3,), 0.5)
    nothing = select([empty], tau, Rules()).targets
    background = select([empty], tau, Rules(silent_ignored=False)).targets
    assert bool(nothing.silent[0]) and not bool(background.silent[0])
    assert background.ignored_xywh.shape[1] == 0 and not background.valid.any()
