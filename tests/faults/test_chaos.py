"""Faults at moments drawn from a seed, over one pipeline on S3 and an MLflow server: see benchmarks/reliability.py.

CHAOS_FAULTS (30), CHAOS_SEED (0) and CHAOS_STEPS (60, of each training) choose what is done.
"""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import broken_run
import reliability


def _asked(name, default):
    return int(os.environ.get(f"CHAOS_{name}", default))


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(3 * 3600)
def test_a_pipeline_that_is_broken_again_and_again_ends_as_one_that_nobody_touched(tmp_path):
    number, seed, steps = _asked("FAULTS", "30"), _asked("SEED", "0"), _asked("STEPS", "60")
    faults, took_s = reliability.measure(tmp_path, number, seed, steps)
    print(reliability.table(faults, steps, seed, took_s))
    assert len(faults) == number, "the run ended before all faults: raise CHAOS_STEPS"


def test_faults_are_spread_over_the_whole_pipeline_and_come_equally_often():
    for seed in range(5):
        places = broken_run.places(60, 30, random.Random(seed))
        assert len(places) == 30 and places == sorted(places)
        reached = {broken_run.STAGES[k] for k, _ in places}
        assert reached >= set(broken_run.TRAININGS) and len(reached) > len(broken_run.TRAININGS)


def test_how_far_a_log_got():
    log = "dataset: finished in 3 s\n(RayTrainWorker pid=7) teacher: step 4/60 (7 %)  loss\nteacher: step 5  val mAP50 0.1\n"
    assert broken_run.position(log) == (1, 4)
    assert broken_run.position(log + "teacher: finished in 9 s\n") == (2, 0)
    assert (
        reliability.percentile([3.0, 1.0, 2.0], 0.95) == 3.0 and reliability.percentile([1.0] * 19 + [9.0], 0.95) == 1.0
    )
