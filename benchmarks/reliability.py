"""Break one pipeline many times, see that it ends as one that nobody touched, and write what each fault costs.

Each kind of fault comes equally often, in a shuffled order, at places spread over the pipeline. After each it is measured
how long it takes until the run is further than it was, and how many steps were made again. Storage is an S3 endpoint (moto)
behind a proxy, tracking an MLflow server. At the end weights, histories and MLflow are compared with an undisturbed run's.

    python benchmarks/reliability.py --faults 30 --seed 0 --folder build/reliability --minutes 14 --write docs/reliability.md

After --minutes it ends in order; the same command goes on with the faults that are left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from breakable import BUCKET, servers
from broken_run import FAULTS, ROOT, Fault, Run, with_faults
from places import EVERY, TRAININGS

from dfssd.data.manifest import read_pseudo
from dfssd.data.synthetic import make_dataset
from dfssd.models.yolo.detector import read_detector
from dfssd.runtime.storage import Storage
from dfssd.version import __version__

BEGIN, END = "<!-- made by benchmarks/reliability.py -->", "<!-- end -->"


def tiny_model(folder: Path) -> str:
    """A detector of YOLOv8's layout with few channels, whose checkpoints are small."""
    from ultralytics.utils import ROOT as ULTRALYTICS
    from ultralytics.utils import YAML

    layout = YAML.load(ULTRALYTICS / "cfg/models/v8/yolov8.yaml")
    layout["scales"] = {"n": [0.33, 0.0625, 256]}
    YAML.save(folder / "tiny.yaml", layout)
    return str(folder / "tiny.yaml")


def command(folder: Path, steps: int, storage: str) -> list[str]:
    """A pipeline that is as small as one can be and has every kind of stage; its data and models lie in `folder`."""
    model = tiny_model(folder)
    flags = (
        f"--label-fraction 0.4 --imgsz 64 --batch 4 --steps {steps} --val-every {EVERY} --log-every 1 --num-workers 1"
    )
    flags += f" --cpus-per-worker 1 --gpu never --amp fp32 --teacher-amp fp32 --teacher {model} --student {model}"
    flags += f" --tta none --latency-repeats 3 --sample-images 2 --mean-teacher-steps {steps // 2} --formats"
    place = ["--data", str(folder / "data"), "--storage-path", storage, "--run-name", "c"]
    return [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *place, *flags.split()]


def undisturbed(steps: int, folder: Path, env: dict[str, str]) -> Storage:
    """The run that everything is compared with; one that has ended is taken."""
    folder.mkdir(exist_ok=True)
    if not (folder / "ended").exists():
        run = Run(folder, command(folder.parent, steps, str(folder)), env)
        run.start()
        try:
            assert run.wait(1800) == 0, run.text()[-3000:]
        finally:
            run.stop()
        (folder / "ended").touch()
    return Storage(str(folder)).at("c")


def logged_steps(run: Storage, model: str) -> list[int]:
    """Steps in the history of a training, each of which must be there once."""
    steps = [h["step"] for h in run.read_json(f"{model}/history.json") if "loss/total" in h]
    assert steps and steps == list(range(1, len(steps) + 1)), f"{run}: {model}: {steps}"
    return steps


def compare(whole: Storage, broken: Storage) -> None:
    """Weights and pseudo-labels bit by bit, each step once in each history."""
    for model in TRAININGS:
        for name in ("best.pt", "last.pt"):
            first, second = (read_detector(r.read(f"{model}/{name}"), name).state_dict() for r in (whole, broken))
            assert all(torch.equal(first[k], second[k]) for k in first), f"{model}/{name} differs"
        assert logged_steps(whole, model) == logged_steps(broken, model), model
    first, second = (read_pseudo(r.at("pseudo")) for r in (whole, broken))
    assert first.keys() == second.keys(), "pseudo-labels are of other images"
    assert all(np.array_equal(first[k], second[k]) for k in first), "pseudo-labels differ"


def compare_tracking(uri: str, broken: Storage) -> None:
    """One run a stage, finished, each step once; one run of the pipeline."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("dfssd").experiment_id], max_results=1000)
    stages = [name for name in broken.folders() if broken.exists(f"{name}/stage.json")]
    assert len(runs) == len(stages) + 1, [r.info.run_name for r in runs]
    assert {r.info.status for r in runs} == {"FINISHED"}, [(r.info.run_name, r.info.status) for r in runs]
    for model in TRAININGS:
        (own,) = (r for r in runs if r.data.tags.get("stage") == model)
        for name in ("loss/total", "lr"):
            there = sorted(row.step for row in client.get_metric_history(own.info.run_id, name))
            assert there == logged_steps(broken, model), f"{model} {name}: {there}"


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: a value that was measured."""
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def table(faults: Sequence[Fault], steps: int, seed: int, took_s: float, parts: int) -> str:
    """What each kind of fault has cost, for the page."""
    heads = ("fault", "n", "recovery, median (s)", "p95 (s)", "longest (s)", "steps made again, most")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for kind, (_, does) in FAULTS.items():
        own = [f for f in faults if f.kind == kind and "none was there" not in f.note]
        if own:
            times = [f.recovery_s for f in own]
            cells = [len(own), *(f"{v:.0f}" for v in (statistics.median(times), percentile(times, 0.95), max(times)))]
            lines.append("| " + " | ".join(map(str, [does, *cells, max(f.lost for f in own)])) + " |")
    missed = sum("none was there" in f.note for f in faults)
    note = (
        f"{len(faults)} faults (seed {seed}) in one pipeline of {steps} steps a training, a checkpoint each {EVERY} steps, "
        f"64 px, on {os.cpu_count()} CPUs ({platform.machine()}), {took_s / 60:.0f} min in {parts} part(s), dfssd "
        f"{__version__}, {time.strftime('%d %B %Y', time.gmtime())}. Recovery: from the fault until the run was further than "
        "before; where the job had ended, its command was typed again at once, and the time holds the start of Python and "
        "Ray. At the end weights, pseudo-labels, histories and MLflow (one run a stage, each step once) equalled an "
        "undisturbed run's."
    )
    note += f" {missed} kill(s) found no such process and are not counted." if missed else ""
    return "\n".join([*lines, "", *textwrap.wrap(note, 120)])


@contextlib.contextmanager
def environment(more: dict[str, str]) -> Iterator[dict[str, str]]:
    """This process's environment, with what leads to the servers; also for the block itself, which compares."""
    kept = {k: os.environ.get(k) for k in more}
    os.environ.update(more)
    try:
        yield {**os.environ, "PYTHONUNBUFFERED": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    finally:
        for key, value in kept.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


@dataclass
class Outcome:
    """What a broken run has come to: its faults, ends without a sentence, seconds and parts, and whether it has ended."""

    faults: list[Fault] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    took_s: float = 0.0
    parts: int = 0
    ended: bool = False

    def keep(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def take(cls, file: Path) -> Outcome:
        """What an earlier part has left, which ended in order; nothing else can go on."""
        kept = json.loads(file.read_text())
        file.unlink()
        return cls(**{**kept, "faults": [Fault(**{**f, "at": tuple(f["at"])}) for f in kept["faults"]]})


def measure(folder: Path, number: int, seed: int, steps: int, minutes: float = float("inf")) -> Outcome:
    """Break a run, and once it has ended compare it with another.

    Args:
        folder: holds all that is needed to go on, where an earlier part has ended after its minutes.

    Raises:
        AssertionError: it differs, or a fault ended in something else than a sentence.
    """
    until, data, kept = time.monotonic() + 60 * minutes, folder / "data", folder / "outcome.json"
    if not data.exists():
        make_dataset(data, images=60, side=64, seed=3)
    plain = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    whole = undisturbed(steps, folder / "whole", {**plain, "PYTHONUNBUFFERED": "1"})
    if not kept.exists():
        for name in ("broken", "servers"):
            shutil.rmtree(folder / name, ignore_errors=True)
    outcome = Outcome.take(kept) if kept.exists() else Outcome()
    with servers(folder / "servers") as (leads, proxy, tracking), environment(leads) as env:
        (folder / "broken").mkdir(exist_ok=True)
        storage = f"s3://{BUCKET}/runs"
        run = Run(folder / "broken", command(folder, steps, storage), env, proxy, tracking, problems=outcome.problems)
        begun = time.monotonic()
        outcome.ended = with_faults(run, steps, number, seed, outcome.faults, until)
        outcome.took_s, outcome.parts = outcome.took_s + time.monotonic() - begun, outcome.parts + 1
        if outcome.ended:
            broken = Storage(storage).at("c")
            compare(whole, broken)
            compare_tracking(leads["MLFLOW_TRACKING_URI"], broken)
    outcome.keep(kept)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80, help="of each training")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which it ends, to go on later")
    parser.add_argument("--folder", default="", help="where runs, logs and what is needed to go on stay")
    parser.add_argument("--write", default="", help="page whose table is replaced")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfssd-b-") as temporary:
        folder = Path(args.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        outcome = measure(folder, args.faults, args.seed, args.steps, args.minutes)
    if not outcome.ended:
        print(
            f"{len(outcome.faults)} of {args.faults} faults in {outcome.took_s / 60:.0f} min: the same command goes on"
        )
        return
    made = table(outcome.faults, args.steps, args.seed, outcome.took_s, outcome.parts)
    print(made)
    if args.write:
        page = Path(args.write)
        before, _, rest = page.read_text().partition(BEGIN)
        page.write_text(before + BEGIN + "\n" + made + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
