"""One worker and two: the same numbers."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from small import give_teacher_and_candidates, make_job, tiny_config
from torch import nn

from dfssd.config import Data
from dfssd.data.prepare import prepare
from dfssd.models.batch_norm import GlobalBatchNorm, share_statistics
from dfssd.runtime.cluster import Resources
from dfssd.runtime.storage import Storage
from dfssd.train.in_process import train_in_process
from dfssd.train.worker import fit

ONE_CPU = Resources(cpus=1, threads=1, gpu=False)
SHAPE = (4, 3, 5, 6)


def _case(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=g, dtype=dtype) * torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1, 1) + 2
    return x, torch.randn(SHAPE, generator=g, dtype=dtype)


def _run(norm, x, weight):
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    x = x.clone().requires_grad_(True)
    y = norm.train()(x)
    ((y**3) * weight).sum().backward()
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def _rank(rank, place):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    x, weight = _case()
    found = _run(
        share_statistics(nn.Sequential(nn.BatchNorm2d(3).double()))[0], x.chunk(2)[rank], weight.chunk(2)[rank]
    )
    torch.save(found, f"{place}/{rank}.pt")
    dist.destroy_process_group()


def test_batch_norm_on_two_workers_is_that_of_the_whole_batch():
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_rank, (place,), nprocs=2)
        one, two = (torch.load(f"{place}/{rank}.pt") for rank in (0, 1))
    want = _run(nn.BatchNorm2d(3).double(), *_case())
    got = [torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]]), one[2] + two[2], one[3] + two[3], one[4], one[5]]
    for name, a, b in zip(("y", "dx", "dweight", "dbias", "mean", "variance"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(one[4], two[4])


def test_alone_it_is_the_usual_batch_norm_also_where_the_variance_is_small():
    for offset in (0.0, 100.0):
        x, weight = _case(torch.float32)
        got = _run(GlobalBatchNorm(3), x + offset, weight)
        want = _run(nn.BatchNorm2d(3).double(), (x + offset).double(), weight.double())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-3 if offset else 2e-5, atol=1e-3 if offset else 1e-4)


def test_the_loss_curve_does_not_depend_on_the_number_of_workers(strip, tmp_path, local_ray):
    """All terms, balanced, in fp32. Rounding grows with the learning rate: an assignment to a grid cell may flip."""
    curves = {}
    for workers in (1, 2):
        place = tmp_path / str(workers)
        prepare(Data(data=str(strip), label_fraction=0.5), 0, Storage(str(place)).at("r", "dataset"))
        give_teacher_and_candidates(place)
        own = {"steps": 20, "batch": 16, "val_every": 20, "lr": 1e-5, "unlabelled_ratio": 0.5, "batch_norm": "global"}
        job = make_job("student", str(place / "r"), tiny_config(place, num_workers=workers, **own))
        assert (train_in_process(job) if workers == 1 else fit(job, ONE_CPU))["steps"] == 20
        history = [h for h in job.store.read_json("history.json") if "loss/total" in h]
        curves[workers] = [h["loss/total"] for h in history]
        assert len({h["pse/pseudo_labels"] for h in history}) > 1  # all terms are at work
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    # Of the first step nothing but rounding may differ; the balance magnifies it, by norms of gradients of tiny maps.
    assert curves[2][0] == pytest.approx(curves[1][0], rel=1e-5)
