"""What one GPU does a second: training end to end and in parts, labelling, validation; as JSON and Markdown.

    python benchmarks/gpu.py --out gpu-results            # six minutes, largest questions first
    python benchmarks/gpu.py --device cpu --quick         # does it run at all

Needs torch, torchvision, ultralytics, pyarrow, pydantic, numpy and OpenCV (headless), nothing else; makes its own images.
`gpu.json` and `gpu.md` are written again after each section, so that a run that is cut leaves what it has. Many steps are
timed without waiting for the device in between; parts of a step by events on its stream, so that a part includes the time in
which the device waits for the next kernel to be launched.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_report import headline, markdown
from gpu_step import Bench, step_of

from dfssd.config import Config, Pseudo, Run
from dfssd.data.dataset import ManifestDataset
from dfssd.evaluate.validation import validate
from dfssd.models.yolo.detector import load_detector
from dfssd.pseudo.in_process import label_in_process
from dfssd.pseudo.shards import decode_shard, shard_images, shards
from dfssd.pseudo.teachers import load_teachers
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.loop import train


class Enough(Exception):
    """Ends the training loop from its own log."""


def end_to_end(bench: Bench) -> dict[str, Any]:
    """The real training loop, loader and all, and the loader alone."""
    rows: list[dict[str, float]] = []
    every = 1 if bench.o.quick else 20
    config = bench.made.config(bench.imgsz, bench.batch, log_every=every, **loading(bench))
    until = time.monotonic() + (0 if bench.o.quick else 50)

    def log(metrics: dict[str, float], step: int) -> None:
        rows.append({"step": step, **metrics})
        if time.monotonic() > until and len(rows) > 2:
            raise Enough

    begun = time.monotonic()
    try:
        train(bench.made.job(config), WorkerGroup(), bench.device, log, lambda *_: None)
    except Enough:
        bench.sync()
    steady = rows[len(rows) // 2 :]
    step = statistics.median(r["time/step (s)"] for r in steady)
    wait = statistics.mean(r["time/data wait (s)"] for r in steady)
    found: dict[str, Any] = {
        "imgsz": bench.imgsz, "images": f"{bench.batch}+{bench.batch}", "steps": int(rows[-1]["step"]),
        "training (img/s)": 2 * bench.batch / step, "step (ms)": step * 1e3,
        "data wait (share)": wait / statistics.mean(r["time/step (s)"] for r in steady),
        "first steps (img/s)": rows[1]["speed (img/s)"], "seconds in all": time.monotonic() - begun,
        "first step after (s)": rows[0]["time/step (s)"],
        "last numbers": {k: v for k, v in rows[-1].items() if k.startswith(("time", "loss", "memory", "speed"))},
    }  # fmt: skip
    found |= loader_alone(bench)
    return found


def loading(bench: Bench) -> dict[str, Any]:
    return {"loader_workers": 0} if bench.o.quick else {}


def loader_alone(bench: Bench, seconds: float = 8.0) -> dict[str, Any]:
    """Images a second that the loading processes deliver when nothing is trained."""
    s = bench.made.session(bench.imgsz, bench.batch, **loading(bench))
    loader = s.loader()
    batches = iter(loader)
    for _ in range(2 if bench.o.quick else 40):
        next(batches)
    begun, done = time.perf_counter(), 0
    while done < 2 or (not bench.o.quick and time.perf_counter() - begun < seconds):
        next(batches)
        done += 1
    rate = done * 2 * bench.batch / (time.perf_counter() - begun)
    return {"loading processes": loader.num_workers, "loader alone (img/s)": rate}


def headline_step(bench: Bench) -> dict[str, Any]:
    return step_of(bench, bench.imgsz, bench.batch, "auto", stock=True)


def labelling(bench: Bench) -> dict[str, Any]:
    """The networks on decoded shards, and the whole job in this process: decoding, networks, fusing, writing."""
    made, found = bench.made, {"imgsz": bench.imgsz}
    size = 4 if bench.o.quick else shard_images(bench.imgsz)
    part = shards(made.manifest.unlabelled_rows(), "speed", size)[:4]
    begun = time.perf_counter()
    ready = [decode_shard(shard, bench.imgsz) for shard in part]
    found["decoding a core (img/s)"] = len(part) * size / (time.perf_counter() - begun)
    for name, tta in (("labelling", "none"), ("labelling with flips", "flips")):
        config = Config(run=Run(storage_path=str(made.folder)), pseudo=Pseudo(tta=tta),
                        train=made.config(bench.imgsz, bench.batch).train)  # fmt: skip
        teachers = load_teachers(config, made.run, ["teacher/best.pt"], made.manifest.names, bench.device)
        turn = itertools.cycle(ready)
        boxes = len(teachers(next(turn))["found"]) / size / teachers.views
        ms = bench.milliseconds(lambda teachers=teachers, turn=turn: teachers(next(turn)), seconds=5)
        found |= {f"{name} (img/s)": size / ms * 1e3, f"{name}: boxes a view": boxes, f"{name}: type": teachers.dtype}
        for folder in ("first", "again"):
            begun = time.perf_counter()
            label_in_process(
                config, made.run, f"labels-{tta}-{folder}", made.manifest, ["teacher/best.pt"], bench.device
            )
        images = len(made.manifest.rows) - len(made.manifest.labelled_rows())
        found[f"{name}, whole job in one process (img/s)"] = images / (time.perf_counter() - begun)
    return found


def validation(bench: Bench) -> dict[str, Any]:
    rows = bench.made.manifest.of_split("val")
    made = bench.made
    dataset = ManifestDataset(rows, [r.boxes for r in rows], made.manifest.names, bench.imgsz)
    model = load_detector(made.run.read("teacher/best.pt"), "teacher", bench.imgsz).to(bench.device)
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        validate(model, dataset, model.names, WorkerGroup(), bench.device)
        times.append(time.perf_counter() - begun)
    return {"model": made.teacher, "images": len(rows), "first (img/s)": len(rows) / times[0],
            "again (img/s)": len(rows) / times[1]}  # fmt: skip


def grid(bench: Bench) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """The other precisions, sizes and batches, most wanted first, and compiled ones last: name, run, seconds wanted."""
    sizes, batches = ((64,), (2,)) if bench.o.quick else ((640, 320), (32, 16, 64))
    for amp, imgsz, batch in itertools.product(("bf16", "fp16", "fp32"), sizes, batches):
        if bench.o.quick and amp != "fp32":
            continue
        name = f"{imgsz} px, {batch}+{batch}, {amp}"
        yield name, lambda a=amp, i=imgsz, b=batch: step_of(bench, i, b, a), 12
    if not bench.o.quick:
        for imgsz, batch in ((640, 32), (640, 16)):
            name = f"{imgsz} px, {batch}+{batch}, auto, compiled"
            yield name, lambda i=imgsz, b=batch: step_of(bench, i, b, "auto", compile=True), 90


def run_sections(bench: Bench) -> None:
    """One after the other, as far as the time goes; a section that fails is noted and the next one runs."""
    first = [("end to end", lambda: end_to_end(bench), 75.0), ("step", lambda: headline_step(bench), 40.0),
             ("labelling", lambda: labelling(bench), 40.0), ("validation", lambda: validation(bench), 15.0)]  # fmt: skip
    for name, section, wanted in [*first, *grid(bench)]:
        if bench.o.only and not any(part in name for part in bench.o.only):
            continue
        if bench.left() < wanted:
            bench.found["skipped"][name] = f"{bench.left():.0f} s left, {wanted:.0f} wanted"
            write(bench)
            continue
        begun = time.monotonic()
        try:
            result = section()
        except Exception as error:  # whatever it is, the numbers of the other sections are still wanted
            if bench.o.quick:
                raise
            traceback.print_exc()
            bench.found["skipped"][name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            bench.found["sections"][name] = {**result, "took (s)": round(time.monotonic() - begun, 1)}
            print(f"{name}: {json.dumps(result, default=str)}", flush=True)
        write(bench)


def write(bench: Bench) -> None:
    out = Path(bench.o.out)
    out.mkdir(parents=True, exist_ok=True)
    bench.found["headline"] = headline(bench.found)
    bench.found["seconds"] = round(time.monotonic() - bench.began, 1)
    (out / "gpu.json").write_text(json.dumps(bench.found, indent=2, default=str))
    (out / "gpu.md").write_text(markdown(bench.found))


@contextmanager
def quiet() -> Iterator[None]:
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="all in all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--only", nargs="*", default=[], help="sections whose name contains one of these")
    parser.add_argument("--out", default="gpu-results", help="folder for gpu.json and gpu.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfssd-gpu-") as folder, quiet():
        bench = Bench(options, Path(folder))
        run_sections(bench)
    print(markdown(bench.found))


if __name__ == "__main__":
    main()
