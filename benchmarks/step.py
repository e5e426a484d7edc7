"""What a training step costs: ours against its floor, against Ultralytics' distillation and against the published code.

    python benchmarks/step.py --imgsz 224 --batch 16

All steps run on the same images in one process with the same number of threads, interleaved: every repeat times each of
them once, a ratio is taken within a repeat, and the table shows medians. The floor is a forward pass of the teacher (fused,
raw head output) and forward and backward passes of the student, channels last, nothing else. Our distillation step is the
whole of it: half of the images unlabelled with pseudo-labels, features, class and localisation term, guards, clipping,
optimiser, weight average. The student is in fp32 unless a row says bf16; the teacher is as `--teacher-amp auto` has it, bf16
where the hardware computes it, but for the row "teacher fp32". Over the floor goes the step that is in fp32 like the floor.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from published import PublishedStep
from torch import Tensor, nn
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Config, Data, Distill, Models, Run, Train
from dfssd.data.dataset import network_input
from dfssd.data.manifest import pseudo_table, read_manifest, write_table
from dfssd.data.preparation.prepare import prepare
from dfssd.data.synthetic import make_dataset
from dfssd.distill.features import KINDS
from dfssd.models.yolo.detector import Teacher, branches, build_detector, detector_bytes
from dfssd.pipeline.training import train_job
from dfssd.report.tables import render
from dfssd.runtime.artefact_names import PSEUDO, STUDENT, TEACHER, ArtefactName
from dfssd.runtime.storage import Storage
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.build import build_session
from dfssd.train.feed import moved
from dfssd.train.loop import clip, update
from dfssd.train.session import Session
from dfssd.train.step import accumulate

ALL_FP32 = "ours, full, teacher fp32"
COMPILED = "ours, full, --compile"
FULL = {"lambda_p": 1.0, "lambda_l": 1.0, "lambda_f": 1.0}


@dataclass
class Settings:
    """What is measured."""

    imgsz: int = 224
    """Side of the network input (px)."""
    batch: int = 16
    """Images in a step; of ours half are unlabelled where it distils."""
    threads: int = 0
    """Threads of all steps; 0: one a core."""
    repeats: int = 9
    """Timings of each step; the first one after two to warm up."""
    teacher: str = "yolov8s.yaml"
    student: str = "yolov8n.yaml"
    divergence: str = Distill().divergence
    """Divergence of the step that the ratios are about."""
    only: tuple[str, ...] = ()
    """Divergences to time beside it; none: all."""
    compile: bool = False
    """Time the full step with --compile too; compiling takes some minutes first."""
    json: bool = False
    """Print JSON instead of a table."""


class Bench:
    """Data set, teacher and candidates made up in a folder, and the steps on them."""

    def __init__(self, s: Settings, folder: Path, device: torch.device) -> None:
        self.s, self.folder, self.device = s, folder, device
        make_dataset(folder / "data", images=120, side=s.imgsz, seed=0)
        self.run = Storage(str(folder)).at("r")
        prepare(Data(data=str(folder / "data"), label_fraction=0.3), 0, self.run.at("dataset"))
        self.manifest = read_manifest(self.run.at("dataset"))
        torch.manual_seed(0)
        self.teacher_bytes = detector_bytes(build_detector(s.teacher, self.manifest.names, s.imgsz), {})
        self.run.write("teacher/best.pt", self.teacher_bytes)
        rng, rows = np.random.default_rng(0), self.manifest.unlabelled_rows()
        boxes = [rng.uniform([0, 0.3, 0.3, 0.1, 0.1, 0.3, 1], [3, 0.7, 0.7, 0.5, 0.5, 1, 1], (3, 7)) for _ in rows]
        for one in boxes:
            one[:, 0] = one[:, 0].astype(int)
        table = pseudo_table([r.image_id for r in rows], "t", [b.astype(np.float32) for b in boxes])
        write_table(self.run.at("pseudo"), "shard-00000.parquet", table)

    def session(
        self,
        stage: str,
        amp: str,
        batch: int,
        compiled: bool = False,
        train: dict[str, Any] | None = None,
        **distill: Any,
    ) -> Session:
        """The parts of a training run, as a job would build them; `train` and `distill` are further settings."""
        s, more = self.s, train or {}
        config = Config(
            run=Run(storage_path=str(self.folder), run_name="r"),
            models=Models(teacher=s.teacher, student=s.student),
            train=Train(imgsz=s.imgsz, batch=batch, amp=amp, steps=100_000, compile=compiled, **more),  # type: ignore[arg-type]
            distill=Distill(**distill),
        )
        name = ArtefactName.parse(stage)
        inputs = {"teacher": TEACHER, "pseudo": PSEUDO} if name == STUDENT else {}
        return build_session(train_job(config, self.run, name, **inputs), WorkerGroup(), self.device)

    def model(self, spec: str) -> Any:
        return build_detector(spec, self.manifest.names, self.s.imgsz).to(self.device)


def our_step(s: Session, batch: dict[str, Any]) -> None:
    """One step of `dfssd.train.loop.train`, without its log steps."""
    micro = moved(0, batch, s.targets(batch, s.job.config.train.batch), s.device)
    accumulate(s, [micro], 0.0, False, None)
    update(s, clip(s)[1])


def floor(bench: Bench, amp: bool) -> Callable[[Tensor], None]:
    """Teacher forward, student forward and backward, and nothing else."""
    teacher = Teacher(bench.model(bench.s.teacher), bench.device)
    student = bench.model(bench.s.student).train().to(memory_format=torch.channels_last)

    def run(images: Tensor) -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
            teacher(images)
            raw = branches(student(images))["one2many"]
        (raw.boxes.mean() + raw.scores.mean()).backward()
        student.zero_grad(set_to_none=True)

    return run


def ultralytics_step(bench: Bench, distils: bool) -> Callable[[dict[str, Any]], None]:
    """The step of Ultralytics' trainer: loss, backward, clipping, AdamW, weight average; it has no AMP on a CPU."""
    model: nn.Module = bench.model(bench.s.student).train()
    if distils:
        model = DistillationModel(bench.model(bench.s.teacher), model).to(bench.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser, average = torch.optim.AdamW(trained, lr=0.002), ModelEMA(model)
    half = torch.amp.GradScaler("cuda") if bench.device.type == "cuda" else None

    def run(batch: dict[str, Any]) -> None:
        inputs = {**batch, "img": batch["img"].to(bench.device).expand(-1, 3, -1, -1).float() / 255}
        with torch.autocast("cuda", enabled=half is not None):
            loss = model(inputs)[0].sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        optimiser.zero_grad()
        average.update(model)

    return run


def steps_to_time(bench: Bench) -> dict[str, Callable[[], None]]:
    """Every step by name, each on images of its own kind but equally many."""
    s = bench.s
    half = max(1, s.batch // 2)
    plain = bench.session("label_only", "fp32", s.batch)
    labelled = {k: v.to(bench.device) if isinstance(v, Tensor) else v for k, v in next(iter(plain.loader())).items()}
    mixed_session = bench.session("student", "fp32", half, **FULL, divergence=s.divergence)
    mixed = next(iter(mixed_session.loader()))
    stock_batch = {k: v for k, v in labelled.items() if isinstance(v, Tensor)}
    images = network_input(labelled["img"], bench.device)
    teacher = Teacher(bench.model(s.teacher), bench.device)
    floors = {amp: floor(bench, amp) for amp in (False, True)}
    bf16 = bench.session("student", "bf16", half, **FULL, divergence=s.divergence)
    all_fp32 = bench.session("student", "fp32", half, **FULL, divergence=s.divergence, teacher_amp="fp32")
    published = PublishedStep(bench.model(s.student), bench.model(s.teacher))
    plain_stock, distil_stock = ultralytics_step(bench, False), ultralytics_step(bench, True)
    steps: dict[str, Callable[[], None]] = {
        "teacher forward": lambda: void(teacher(images)),
        "floor": lambda: floors[False](images),
        "floor, bf16": lambda: floors[True](images),
        "ours, labels alone": lambda: our_step(plain, labelled),
        "ours, full": lambda: our_step(mixed_session, mixed),
        ALL_FP32: lambda: our_step(all_fp32, mixed),
        "ours, full, bf16": lambda: our_step(bf16, mixed),
        "Ultralytics, plain": lambda: plain_stock(stock_batch),
        "Ultralytics, distill_model": lambda: distil_stock(stock_batch),
        "published DFSSD": lambda: published({**stock_batch, "img": images.contiguous()}),
    }
    for amp, name in (("fp32", COMPILED), ("bf16", f"{COMPILED}, bf16")) if s.compile else ():
        fast = bench.session("student", amp, half, compiled=True, **FULL, divergence=s.divergence)
        steps[name] = lambda fast=fast: our_step(fast, mixed)  # type: ignore[misc]
    for kind in s.only or KINDS:
        own = bench.session("student", "fp32", half, **FULL, divergence=kind)
        steps[f"ours, full, {kind}"] = lambda own=own: our_step(own, mixed)  # type: ignore[misc]
    return steps


def void(_: Any) -> None:
    """Drop a result."""


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each repeat, all of them once a repeat, in another order each time."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    rng = np.random.default_rng(0)
    for repeat in range(-2, repeats):
        for name in rng.permutation(list(steps)):
            begun = time.perf_counter()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                times[name].append(time.perf_counter() - begun)
    return times


def data_wait(session: Session, images: int, warm: int = 3, steps: int = 12) -> tuple[float, float]:
    """(share of a step that waits for data, images a second) with the loader running.

    Args:
        images: of a step.
        warm: steps before those that count.
    """
    batches, waits, total = iter(session.loader()), 0.0, 0.0
    for k in range(-warm, steps):
        begun = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        our_step(session, batch)
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        if k >= 0:
            waits, total = waits + ready - begun, total + time.perf_counter() - begun
    return waits / total, steps * images / total


def ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over repeats of the time of `a` over that of `b`."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def results(times: dict[str, list[float]], wait: float, speed: float, s: Settings, device: str) -> dict[str, Any]:
    ours, stock = "ours, full", "Ultralytics, distill_model"
    compiled = {"distill_compiled_over_ultralytics": ratio(times, COMPILED, stock)} if s.compile else {}
    return {
        "settings": {"imgsz": s.imgsz, "batch": s.batch, "threads": s.threads, "divergence": s.divergence},
        "device": device,
        "seconds": {k: statistics.median(v) for k, v in times.items()},
        "over_floor": {k: ratio(times, k, "floor") for k in times},
        "data_wait_share": wait,
        "images_per_s": speed,
        "ratios": {
            "distill_over_floor": ratio(times, ALL_FP32, "floor"),
            "distill_bf16_over_floor": ratio(times, f"{ours}, bf16", "floor, bf16"),
            "distill_over_ultralytics": ratio(times, ours, stock),
            "distill_all_fp32_over_ultralytics": ratio(times, ALL_FP32, stock),
            "distill_bf16_over_ultralytics": ratio(times, f"{ours}, bf16", stock),
            "distill_over_published": ratio(times, ours, "published DFSSD"),
            "distill_bf16_over_published": ratio(times, f"{ours}, bf16", "published DFSSD"),
            **compiled,
        },
    }


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    s.threads = s.threads or os.cpu_count() or 1
    torch.set_num_threads(s.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dfssd-step-") as folder, contextlib.redirect_stdout(sys.stderr):
        bench = Bench(s, Path(folder), device)
        times = measure(steps_to_time(bench), s.repeats, device)
        loading = bench.session("student", "auto", max(1, s.batch // 2), **FULL, divergence=s.divergence)
        found = results(times, *data_wait(loading, s.batch), s, str(device))
    if s.json:
        print(json.dumps(found, indent=2))
        return
    rows = [[k, f"{1e3 * v:.0f}", f"{found['over_floor'][k]:.2f}"] for k, v in found["seconds"].items()]
    title = f"{s.batch} images of {s.imgsz} px, {s.teacher} to {s.student}, {s.threads} threads, {device}"
    print(render(f"{title}; medians of {s.repeats}", ["step", "ms", "times the floor"], rows))
    print("\n".join(f"{k}: {v:.2f}" for k, v in found["ratios"].items()))
    print(f"data wait: {100 * found['data_wait_share']:.0f} % of a step, {found['images_per_s']:.0f} img/s")


if __name__ == "__main__":
    main()
