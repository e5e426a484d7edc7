"""What more workers bring, and what they have to exchange: images a second, gradient bytes, time of the all-reduce.

    python benchmarks/scaling.py --imgsz 224 --batch 16

The full distillation step of `benchmarks/step.py` by 1 and by 2 processes of one thread each, joined by gloo over loopback,
with the same global batch; blocks of steps alternate, figures are medians. Two more rows say where the rest goes: the
exchange alone, and two processes that compute half a batch each side by side and exchange nothing, which is what this
machine allows.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from step import FULL, Bench
from step import Settings as StepSettings

from dfssd.config import Config, Distill, Models, Run, Train
from dfssd.pipeline.training import train_job
from dfssd.report.tables import render
from dfssd.runtime.artefact_names import PSEUDO, STUDENT, TEACHER
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session
from dfssd.train.loop import clip, update
from dfssd.train.step import accumulate

APART = "2 processes, half a batch each, nothing exchanged"


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


def session(s: Settings, folder: str, workers: WorkerGroup, micro_batches: int) -> Any:
    config = Config(
        run=Run(storage_path=folder, run_name="r", num_workers=str(micro_batches)),
        models=Models(teacher="yolov8s.yaml", student="yolov8n.yaml"),
        train=Train(imgsz=s.imgsz, batch=s.batch // 2, amp=s.amp, steps=10**5),  # type: ignore[arg-type]
        distill=Distill(**FULL),  # type: ignore[arg-type]
    )
    job = train_job(config, Storage(f"{folder}/r"), STUDENT, teacher=TEACHER, pseudo=PSEUDO)
    return build_session(job, workers, torch.device("cpu"))


def step(s: Any, batches: Any) -> None:
    """One step over this worker's micro-batches."""
    accumulate(s, batches, 0.0, False, None)
    update(s, clip(s)[1])


def seconds(work: Any, times: int) -> tuple[float, float]:
    """Of the clock, and of this process's core, for one call."""
    begun, computed = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times, (time.process_time() - computed) / times


def rank(index: int, s: Settings, folder: str) -> None:
    """One of two processes; process 0 also runs the single worker's blocks, while the other waits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    both = session(s, folder, WorkerGroup(index, 2), 2)
    mine = both.feed().take()
    apart = session(replace(s, batch=s.batch // 2), folder, WorkerGroup(), 1)
    half = apart.feed().take()
    alone = {k: session(s, folder, WorkerGroup(), k) for k in (1, 2)} if index == 0 else {}
    whole = {k: one.feed().take() for k, one in alone.items()}
    gradient = torch.zeros(sum(p.numel() for p in both.student.parameters() if p.requires_grad))
    found: dict[str, list[tuple[float, float]]] = {}

    def block(name: str, work: Any, times: int) -> None:
        dist.barrier()
        took = seconds(work, times)
        found.setdefault(name, []).append(took)

    for repeat in range(s.blocks + 1):
        for count, one in alone.items():
            name = "1 worker" if count == 1 else "1 worker, 2 micro-batches"
            took = seconds(lambda one=one, count=count: step(one, whole[count]), s.steps)
            found.setdefault(name, []).append(took)
        block("2 workers", lambda: step(both, mine), s.steps)
        block(APART, lambda: step(apart, half), s.steps)
        block("all-reduce of the gradient", lambda: dist.all_reduce(gradient), 5)
        if repeat == 0:
            found.clear()  # to warm up
    if index == 0:
        medians = {k: [statistics.median(column) for column in zip(*v, strict=True)] for k, v in found.items()}
        result = {"medians": medians}
        Path(folder, "result.json").write_text(json.dumps({**result, "gradient_bytes": 4 * gradient.numel()}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dfssd-scaling-") as folder:
        Bench(StepSettings(imgsz=s.imgsz), Path(folder), torch.device("cpu"))
        torch.multiprocessing.spawn(rank, (s, folder), nprocs=2)
        found = json.loads(Path(folder, "result.json").read_text())
    medians, (alone, alone_cpu) = found["medians"], found["medians"]["1 worker"]
    rows = []
    for name, (value, cpu) in medians.items():
        whole = "worker" in name or name == APART
        speed = [f"{s.batch / value:.1f}", f"{alone / value:.2f}", f"{alone_cpu / cpu:.2f}"] if whole else ["", "", ""]
        rows.append([name, f"{1e3 * value:.1f}", f"{1e3 * cpu:.1f}", *speed])
    columns = ["", "ms", "ms of a core", "images/s", "times", "times, by cores"]
    print(render(f"{s.batch} images of {s.imgsz} px a step, one thread a worker", columns, rows))
    print(f"gradient: {found['gradient_bytes'] / 2**20:.1f} MiB a step")


if __name__ == "__main__":
    main()
