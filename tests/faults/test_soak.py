"""A long training: memory, file handles and threads stay as they are."""

import gc
import os
import threading

import psutil
import pytest
from small import give_teacher_and_candidates, make_job, tiny_config

from dfssd.train.in_process import train_in_process

STEPS, EVERY, SETTLED = int(os.environ.get("SOAK_STEPS", "2000")), 100, 500


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_thousand_steps_leave_memory_and_handles_flat(prepared, monkeypatch):
    """A student with its teacher, pseudo-labels, a loading process, checkpoints and MLflow."""
    give_teacher_and_candidates(prepared)
    own = {"imgsz": 32, "batch": 2, "steps": STEPS, "val_every": EVERY, "log_every": 10, "loader_workers": 1}
    job = make_job("student", str(prepared / "r"), tiny_config(prepared, **own))
    process, seen = psutil.Process(), []

    def look(session):
        gc.collect()
        rss = process.memory_info().rss / 2**20
        children = sum(p.memory_info().rss for p in process.children(recursive=True)) / 2**20
        seen.append((session.step, rss, children, process.num_fds(), threading.active_count()))
        print("step {}: {:.0f} MiB, children {:.0f} MiB, {} handles, {} threads".format(*seen[-1]), flush=True)

    train_in_process(job, on_validation=look)
    settled = [row for row in seen if row[0] >= SETTLED]
    first, last = settled[: len(settled) // 3], settled[-(len(settled) // 3) :]

    def grown(column):
        """How far the least of the last third lies above the least of the first third."""
        return min(row[column] for row in last) - min(row[column] for row in first)

    assert grown(1) < 20 and grown(2) < 30, "MiB"
    assert max(row[3] for row in last) <= max(row[3] for row in first) + 2, "handles"
    assert max(row[4] for row in last) <= max(row[4] for row in first), "threads"
