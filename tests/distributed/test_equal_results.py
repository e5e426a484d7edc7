"""Whoever computes which micro-batch: the same numbers."""

import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import give_teacher_and_candidates, make_job, tiny_config
from torch import nn

from dfssd.config import Data
from dfssd.data.preparation.prepare import prepare
from dfssd.models.ghost_norm import GhostNorm
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.loop import train

OWN = {
    "batch": 8,
    "micro_batch": 2,
    "unlabelled_ratio": 0.5,
    "lr": 1e-5,
    "divergence": "hw_js",
    "threshold_policy": "ema",
    "tau_min": 0.2,
    "checkpoint_min": 0,
}


def _note_reads(place):
    """Every process appends to one file which tables it reads from storage."""
    real = Storage.read

    def read(self, name):
        if name.endswith(".parquet"):
            with Path(place, "reads").open("a") as file:
                file.write(f"{self.uri.rsplit('/', 1)[-1]}/{name}\n")
        return real(self, name)

    Storage.read = read


def _worker(rank, workers, place, steps, changes):
    torch.set_num_threads(1)
    if workers > 1:  # in a process of its own
        tempfile.tempdir = str(place)
        _note_reads(place)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{place}/group", rank=rank, world_size=workers)
    config = tiny_config(place, steps=steps, val_every=steps, **{**OWN, **changes})
    job = make_job("student", f"{place}/r", config)
    seen = []

    def keep(metrics, step):
        seen.append({"step": step, **metrics})

    state = {}
    train(job, WorkerGroup(rank, workers), torch.device("cpu"), keep, lambda _, s: state.update(s.state()))
    if rank == 0:
        torch.save({"log": seen, "student": state["student"], "ema": state["ema"]}, f"{place}/result.pt")
    if workers > 1:
        dist.destroy_process_group()


@pytest.fixture
def run(strip, tmp_path):
    """Train with so many workers, in processes joined by gloo, without Ray; its log and its last weights."""

    def one(workers, steps, **changes):
        place = tmp_path / f"{workers}-{time.monotonic_ns()}"
        prepare(Data(data=str(strip), label_fraction=0.5), 0, Storage(str(place)).at("r", "dataset"))
        give_teacher_and_candidates(place)
        for stage in ("dataset", "pseudo"):
            (place / "r" / stage / "stage.json").write_text("{}")
        if workers == 1:
            _worker(0, 1, place, steps, changes)
        else:
            torch.multiprocessing.spawn(_worker, (workers, place, steps, changes), nprocs=workers)
        reads = (place / "reads").read_text().split() if workers > 1 else []
        return {**torch.load(place / "result.pt", weights_only=False), "reads": reads}

    return one


def _losses(result):
    return [h["loss/total"] for h in result["log"] if "loss/total" in h]


def _compare(one, other, steps):
    """The first loss within 1e-6, all within 1e-4, and the running statistics of batch norm too."""
    a, b = _losses(one), _losses(other)
    assert len(a) == len(b) == steps
    assert b[0] == pytest.approx(a[0], rel=1e-6) and b == pytest.approx(a, rel=1e-4)
    for part in ("student", "ema"):
        for name, value in one[part].items():
            if "running" in name:
                torch.testing.assert_close(other[part][name], value, rtol=2e-3, atol=1e-4, msg=f"{part} {name}")
    for key in ("pse/pseudo_labels", "grad/norm"):
        pairs = [(x[key], y[key]) for x, y in zip(one["log"], other["log"], strict=True) if key in x]
        assert all(y == pytest.approx(x, rel=1e-3) for x, y in pairs)
    thresholds = [k for k in one["log"][-2] if k.startswith("threshold/")]
    assert thresholds and all(other["log"][-2][k] == pytest.approx(one["log"][-2][k], rel=1e-5) for k in thresholds)


def test_two_workers_do_what_one_does(run):
    """All terms, balanced, thresholds that move, in fp32: two micro-batches, by one worker one after the other."""
    one, two = (run(workers, 4, micro_batch=4) for workers in (1, 2))
    _compare(one, two, 4)
    assert sorted(two["reads"]) == ["dataset/manifest.parquet", "pseudo/shard-00000.parquet"]  # once a machine
    assert len({h["pse/pseudo_labels"] for h in one["log"] if "pse/pseudo_labels" in h}) > 1  # all terms are at work


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_four_micro_batches_by_several_workers(run, workers):
    """Three of them compute two, one and one. Rounding grows with the learning rate: an assignment may flip."""
    _compare(run(1, 20), run(workers, 20), 20)


def test_the_micro_batch_is_what_decides(run):
    """Other micro-batches are another run: batch norm sees other images."""
    a, b = run(1, 1, micro_batch=4), run(1, 1, micro_batch=8)
    assert _losses(a)[0] != pytest.approx(_losses(b)[0], rel=1e-4)


def test_running_statistics_follow_the_mean_over_micro_batches():
    """Whatever their order."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 3, 4, 4, generator=g) * (k + 1) for k in range(4)]
    norm = nn.BatchNorm2d(3, momentum=0.03)
    norm.running_mean.fill_(2.0)
    ghost = GhostNorm(norm)
    ghost.still()
    norm(batches[0])
    assert (norm.running_mean == 2).all()
    for k, batch in enumerate(batches):
        ghost.turn(k, 4)
        norm(batch)
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.97 * 2 + 0.03 * means)
    torch.testing.assert_close(norm.running_var, 0.97 + 0.03 * variances)
    ghost.turn(0, 1)
    assert norm.momentum == pytest.approx(0.03)
