"""What more workers bring, and what they have to exchange: images a second, gradient bytes, time of the all-reduce.

    python benchmarks/scaling.py --imgsz 224 --batch 16

The full distillation step of `benchmarks/step.py` by 1 and by 2 processes of one thread each, joined by gloo over loopback,
with the same global batch; blocks of steps alternate, figures are medians. The first process also times the exchange alone.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from dfssd.models.batch_norm import GlobalBatchNorm
from step import FULL, Bench, our_step
from step import Settings as StepSettings

from dfssd.config import Config, Distill, Models, Run, Train
from dfssd.pipeline.training import train_job
from dfssd.report.tables import render
from dfssd.runtime.artefact_names import PSEUDO, STUDENT, TEACHER
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.session import build_session


@dataclass
class Settings:
    """What is measured."""

    imgsz: int = 224
    batch: int = 16
    """Images of a step over all workers, half of them unlabelled."""
    blocks: int = 5
    steps: int = 4
    """Steps in a block."""
    amp: str = "auto"


def session(s: Settings, folder: str, world: WorkerGroup, batch_norm: str) -> Any:
    config = Config(
        run=Run(storage_path=folder, run_name="r"),
        models=Models(teacher="yolov8s.yaml", student="yolov8n.yaml"),
        train=Train(imgsz=s.imgsz, batch=s.batch // 2, amp=s.amp, steps=10**5, batch_norm=batch_norm),  # type: ignore[arg-type]
        distill=Distill(**FULL),  # type: ignore[arg-type]
    )
    job = train_job(config, Storage(f"{folder}/r"), STUDENT, teacher=TEACHER, pseudo=PSEUDO)
    return build_session(job, world, torch.device("cpu"))


def seconds(work: Any, times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times


def rank(index: int, s: Settings, folder: str) -> None:
    """One of two processes; process 0 also runs the single worker's blocks, while the other waits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    sessions = {k: session(s, folder, WorkerGroup(index, 2), k) for k in ("local", "global")}
    batches = {k: next(iter(one.loader())) for k, one in sessions.items()}
    alone = session(s, folder, WorkerGroup(), "local") if index == 0 else None
    whole = next(iter(alone.loader())) if alone else None
    gradient = torch.zeros(sum(p.numel() for p in sessions["local"].student.parameters() if p.requires_grad))
    moments = torch.zeros(3, 64, dtype=torch.float64)
    found: dict[str, list[float]] = {}

    def block(name: str, work: Any, times: int) -> None:
        dist.barrier()
        took = seconds(work, times)
        found.setdefault(name, []).append(took)

    for repeat in range(s.blocks + 1):
        if alone:
            found.setdefault("1 worker", []).append(seconds(lambda: our_step(alone, whole), s.steps))
        for kind, one in sessions.items():
            block(f"2 workers, {kind} batch norm", lambda one=one, kind=kind: our_step(one, batches[kind]), s.steps)
        block("all-reduce of the gradient", lambda: dist.all_reduce(gradient), 5)
        block("exchange of one batch norm", lambda: dist.all_reduce(moments), 50)
        if repeat == 0:
            found.clear()  # to warm up
    if index == 0:
        norms = sum(isinstance(m, GlobalBatchNorm) for m in sessions["global"].student.modules())
        result = {"medians": {k: statistics.median(v) for k, v in found.items()}}
        Path(folder, "result.json").write_text(
            json.dumps({**result, "gradient_bytes": 4 * gradient.numel(), "norms": norms})
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dfssd-scaling-") as folder:
        Bench(StepSettings(imgsz=s.imgsz), Path(folder), torch.device("cpu"))
        torch.multiprocessing.spawn(rank, (s, folder), nprocs=2)
        found = json.loads(Path(folder, "result.json").read_text())
    medians, alone = found["medians"], found["medians"]["1 worker"]
    rows = [
        [name, f"{1e3 * value:.2f}", f"{s.batch / value:.1f}", f"{alone / value:.2f}"]
        if "worker" in name
        else [name, f"{1e3 * value:.2f}", "", ""]
        for name, value in medians.items()
    ]
    print(
        render(f"{s.batch} images of {s.imgsz} px a step, one thread a worker", ["", "ms", "images/s", "times"], rows)
    )
    print(f"gradient: {found['gradient_bytes'] / 2**20:.1f} MiB a step; {found['norms']} batch norms")


if __name__ == "__main__":
    main()
