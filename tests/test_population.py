"""Population based training: who takes over from whom, with which settings, and what a checkpoint carries over."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray import tune
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.sweep.points import make_trial, within
from dfssd.sweep.population import Census, explorer, identity, members, take_over
from dfssd.train import checkpoint
from dfssd.train.build import build_session

ROOT = Path(__file__).parents[1]
AXES = {"distill.share_f": tune.uniform(0.1, 1.0), "distill.share_p": [0.1, 0.5]}


def _point(config, share_f=0.9, member=0):
    trial = make_trial(config, "s", f"m{member}", 0, {"distill.share_f": share_f, "distill.share_p": 0.5})
    return {"point": {"order": member, **identity(trial)}}


def test_a_copy_is_a_trial_of_its_own_inside_the_ranges(tmp_path):
    config = tiny_config(tmp_path)
    explore, copied = explorer(AXES, config, "s"), _point(config)
    copied["point"]["settings"]["distill.share_f"] *= 1.2  # as Ray Tune does: 1.08, outside of the range
    one, two = explore(copied)["point"], explore(copied)["point"]
    assert one["settings"] == two["settings"] == {"distill.share_f": 1.0, "distill.share_p": 0.5}
    assert len({one["id"], two["id"], copied["point"]["id"]}) == 3  # two in one folder would spoil each other
    assert one["origin"].startswith(copied["point"]["id"] + "/")
    again = make_trial(config, "s", one["row"], one["seed"], one["settings"], one["origin"])
    assert again.id == one["id"] and again.config.distill.share_f == 1.0


def test_whole_numbers_stay_whole_and_in_range():
    assert within(tune.randint(1, 5), 6) == 4 and within(tune.uniform(0, 1), 0.4) == 0.4 and within([1, 2], 2) == 2


def test_a_resumed_sweep_goes_on_with_the_population_as_it_was(tmp_path):
    config, storage = tiny_config(tmp_path), Storage(str(tmp_path))
    planned = [_point(config, 0.2, 0)["point"], _point(config, 0.9, 1)["point"]]
    assert members(storage, "s", planned) == planned
    ended = []
    census = Census(storage, "s", planned, SimpleNamespace(end=lambda *a: ended.append(a)))
    for k, point in enumerate(planned):
        census.on_trial_start(0, [], SimpleNamespace(trial_id=f"t{k}", config={"point": point}))
    storage.write_json(f"s/trials/{planned[0]['id']}/student/started.json", {"mlflow_run_id": "abc"})
    fork = explorer(AXES, config, "s")({"point": planned[1]})["point"]
    census.on_trial_start(0, [], SimpleNamespace(trial_id="t0", config={"point": fork}))
    census.on_trial_start(0, [], SimpleNamespace(trial_id="t1", config={"point": planned[1]}))  # from a pause
    assert members(storage, "s", planned) == [fork, planned[1]]
    assert ended == [("abc", "KILLED")]  # its run would stay open for ever


def test_weights_are_taken_over_once_with_settings_of_the_new_trial(prepared):
    config = tiny_config(prepared, steps=6)
    give_teacher_and_candidates(prepared)
    good = make_trial(config, "s", "m", 0, {"distill.share_f": 0.9})
    s = build_session(
        make_job("student", str(prepared / "r"), good.config.model_copy()), WorkerGroup(), torch.device("cpu")
    )
    s.step = 3
    storage = Storage(str(prepared))
    checkpoint.store_newest(storage.at(f"s/trials/{good.id}/student/train"), 3, s.state(), 2)
    fork = make_trial(config, "s", "n", 0, {"distill.share_f": 0.4}, f"{good.id}/0a0a0a")
    own = storage.at(f"s/trials/{fork.id}/student/train")
    take_over(fork, "s")
    job = make_job("student", str(prepared / "r"), fork.config)
    state = checkpoint.load_newest(own, job.fingerprint())  # refuses a checkpoint of other settings
    assert state is not None and state["step"] == 3
    first = next(iter(state["student"]))
    assert torch.equal(state["student"][first], s.student.state_dict()[first])
    checkpoint.store_newest(own, 5, {**state, "step": 5}, 2)
    take_over(fork, "s")  # a restart: its own checkpoint goes before
    assert checkpoint.load_newest(own, job.fingerprint())["step"] == 5


def test_the_optimiser_keeps_the_runs_own_settings(prepared):
    give_teacher_and_candidates(prepared)
    jobs = [
        make_job("student", str(prepared / "r"), tiny_config(prepared, weight_decay=decay)) for decay in (0.01, 0.03)
    ]
    one, two = (build_session(job, WorkerGroup(), torch.device("cpu")) for job in jobs)
    two.load_state(one.state())
    assert {g["weight_decay"] for g in two.optimiser.param_groups} == {0.0, 0.03}


@pytest.mark.parametrize(
    ("swept", "good", "own", "seen"),
    [
        ("tau", 0.3, 0.8, lambda s: s.policy.thresholds().tolist()[0]),
        ("tau_min", 0.3, 0.8, lambda s: s.policy.thresholds().tolist()[0]),
        ("ema_decay", 0.9, 0.99, lambda s: s.ema.decay(10**9)),
        ("weight_decay", 0.01, 0.03, lambda s: max(g["weight_decay"] for g in s.optimiser.param_groups)),
        ("share_f", 0.5, 0.25, lambda s: s.criterion.balance.factors["feat"] * 4),
    ],
)
def test_what_a_space_sweeps_is_not_taken_from_the_origins_checkpoint(prepared, swept, good, own, seen):
    give_teacher_and_candidates(prepared)
    policy = {"threshold_policy": "fixed" if swept == "tau" else "ema"}
    one, two = (
        build_session(
            make_job("student", str(prepared / "r"), tiny_config(prepared, **policy, **{swept: value})),
            WorkerGroup(),
            torch.device("cpu"),
        )
        for value in (good, own)
    )
    one.criterion.balance.factors = {"pred": 3.0, "feat": 0.125}  # as measured with the origin's shares
    two.load_state(one.state())
    assert seen(two) == pytest.approx(own if swept != "share_f" else 0.25)


SPACE = """
from ray import tune
BASE = {"train.imgsz": 64, "train.batch": 4, "train.steps": 12, "train.teacher_steps": 4, "train.val_every": 2,
        "train.log_every": 1, "models.teacher": "yolov8n.yaml", "pseudo.tta": "none", "data.label_fraction": 0.4,
        "evaluate.latency_repeats": 3, "evaluate.sample_images": 2}
SPACE = {"distill.share_f": tune.loguniform(0.05, 2.0), "distill.lambda_u": tune.uniform(0.2, 2.0)}
SEARCH, TRIALS, SCHEDULER, PERTURB = "random", 3, "pbt", 0.3
"""


@pytest.mark.slow
def test_a_population_trains_on(strip, tmp_path):
    (tmp_path / "own.py").write_text(SPACE)
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), str(tmp_path / "own.py"), "--data", str(strip)]
    command += ["--storage-path", str(tmp_path), "--run-name", "s", "--gpu", "never"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    place = Storage(str(tmp_path)).at("s/trials")
    found = [place.read_json(f"{n}/result.json") for n in place.folders() if place.exists(f"{n}/result.json")]
    forks = [r for r in found if r["origin"]]
    assert len(found) == 3 and forks and "goes on as" in done.stdout
    for record in forks:
        origin = record["origin"].split("/")[0]
        own, other = (
            json.loads(place.read(f"{name}/student/history.json"))
            if place.exists(f"{name}/student/history.json")
            else None
            for name in (record["trial"], origin)
        )
        assert (
            own is not None and own[0]["step"] == 1 and own[-1]["step"] == 12
        )  # one curve, the origin's at its beginning
        if other is not None:
            assert own[0] == other[0]
