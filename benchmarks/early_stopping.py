"""ASHA against the full grid, over what tune_spaces/loss_weights.py searches: the same weights, for how much less?

    python benchmarks/early_stopping.py --data DIR --storage-path runs/early_stopping

Three sweeps of `jobs/sweep.py` on the same data set, teacher and pseudo-labels: every point of a grid trained to its end;
the same points under ASHA with the shipped space's GRACE and REDUCTION; and the winners of both, and `FIRST`, with further
seeds (another split, other labels, another teacher), whose spread says what a difference means. Type it again to go on.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from ray.tune.schedulers import ASHAScheduler
from scipy.stats import spearmanr

from dfssd.report.tables import render
from dfssd.runtime.storage import Storage
from dfssd.sweep.driver import records, steps_run
from dfssd.sweep.space import load_space

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "tune_spaces" / "loss_weights.py"
LEVELS = {
    "distill.share_p": (0.1, 0.5, 2.0),
    "distill.share_f": (0.1, 0.5, 2.0),
    "distill.lambda_u": (0.5, 2.0),
}
FIRST = {"distill.share_p": 0.5, "distill.share_f": 0.5, "distill.lambda_u": 0.5}  # the config's own values under ASHA
RUNNING, ORDERS = 2, 200  # of the replays: trials at a time, orders of the points


@dataclass
class Settings:
    """What is compared."""

    data: str = "../shared/data/cr7-det"
    storage_path: str = "runs/early_stopping"
    label_fraction: float = 0.1
    imgsz: int = 128
    batch: int = 8
    """Labelled images of a step; as many unlabelled ones come on top."""
    steps: int = 500
    teacher_steps: int = 800
    val_every: int = 50
    seeds: int = 3
    """With which the winners are run; 1: none but the grid's."""


def sweep(s: Settings, name: str, text: str, own: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Run a space under this name, unless it is finished; return its records.

    Args:
        own: the config's own values, by dotted key, beside those that all sweeps share.
    """
    folder = Path(s.storage_path).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    if name != "full" and not (folder / name / "shared").exists():  # data set, teacher and labels are those of the grid
        shutil.copytree(folder / "full" / "shared", folder / name / "shared")
    common = {"--label-fraction": s.label_fraction, "--imgsz": s.imgsz, "--batch": s.batch, "--steps": s.steps}
    common |= {"--teacher-steps": s.teacher_steps, "--val-every": s.val_every, "--data": s.data, "--tta": "none"}
    common |= {f"--{key.rsplit('.', 1)[-1].replace('_', '-')}": value for key, value in (own or {}).items()}
    flags = [str(part) for pair in common.items() for part in pair]
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), str(folder / f"{name}.py"), *flags]
    subprocess.run([*command, "--storage-path", str(folder), "--run-name", name], check=True)
    return records(Storage(str(folder)), name)


def foresight(done: list[dict[str, Any]], metric: str) -> list[list[str]]:
    """Rows of (step, rank correlation over the points of the metric there and at the end)."""
    ends = [record["result"][metric] for record in done]
    curves = [{int(r["step"]): r[metric] for r in record["reports"]} for record in done]
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    return [[str(k), f"{spearmanr([c[k] for c in curves], ends).statistic:.2f}"] for k in steps]


def replay(
    curves: list[list[float]], steps: list[int], order: list[int], grace: float, reduction: int
) -> tuple[int, int]:
    """(steps run, number of the winner) had Ray's ASHA seen these curves in this order, `RUNNING` at a time."""
    end = steps[-1]
    scheduler = ASHAScheduler(
        "step", "metric", "max", max_t=end + 1, grace_period=round(grace * end), reduction_factor=reduction
    )
    waiting, running, ran, ends = list(order), dict[int, int](), 0, dict[int, float]()
    trials = [SimpleNamespace(trial_id=str(k)) for k in range(len(curves))]
    while waiting or running:
        while waiting and len(running) < RUNNING:
            running[waiting[0]] = 0
            scheduler.on_trial_add(None, trials[waiting.pop(0)])
        for k, at in list(running.items()):
            said = scheduler.on_trial_result(None, trials[k], {"step": steps[at], "metric": curves[k][at]})
            running[k] = at + 1
            if steps[at] == end:
                ends[k] = curves[k][at]
            if steps[at] == end or said == scheduler.STOP:
                ran += steps[at]
                del running[k]
    return ran, max(ends, key=lambda k: ends[k])


def replays(done: list[dict[str, Any]], metric: str) -> list[list[str]]:
    """Rows of GRACE, REDUCTION, and means over `ORDERS` orders: share of the steps, points below the best, same winner;
    the same three where the config's own values come first, as they do in a sweep."""
    curves = [[r[metric] for r in record["reports"]] for record in done]
    steps, rows = [int(r["step"]) for r in done[0]["reports"]], []
    ends, rng = [curve[-1] for curve in curves], np.random.default_rng(0)
    orders = [rng.permutation(len(curves)).tolist() for _ in range(ORDERS)]
    own_first = [sorted(order, key=lambda k: done[k]["settings"] != FIRST) for order in orders]
    for grace, reduction in itertools.product((0.1, 0.2, 0.3, 0.4), (2, 3, 4, 6, 8)):
        row = [f"{grace}", f"{reduction}"]
        for some in (orders, own_first):
            ran, won = zip(*(replay(curves, steps, order, grace, reduction) for order in some), strict=True)
            share = np.mean(ran) / (steps[-1] * len(curves))
            lost = np.mean([max(ends) - ends[k] for k in won])
            same = np.mean([ends[k] == max(ends) for k in won])
            row += [f"{share:.0%}", f"{100 * lost:.1f}", f"{same:.0%}"]
        rows.append(row)
    return rows


def picture(done: list[dict[str, Any]], metric: str, grace: float, file: Path) -> None:
    """All curves of the full grid, the best and the worst in colour, and where ASHA may first stop one."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    ranked = sorted(done, key=lambda r: r["result"][metric])
    for k, record in enumerate(ranked):
        colour = {0: "#c0572b", len(ranked) - 1: "#1f4e79"}.get(k)
        x, y = zip(*((r["step"], 100 * r[metric]) for r in record["reports"]), strict=True)
        axes.plot(x, y, color=colour or "#c4c4c4", lw=2 if colour else 1, zorder=2 if colour else 1)
        if colour:
            axes.annotate(record["row"], (x[-1], y[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(grace * ranked[0]["reports"][-1]["step"], color="#888888", ls=":", lw=1)
    axes.set_xlabel("step")
    axes.set_ylabel("val mAP50 (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130, bbox_inches="tight")


def over_seeds(done: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of a point and, for val and test mAP50, mean ± standard deviation and the values by seed."""
    rows = []
    for row in dict.fromkeys(r["row"] for r in done):
        own, cells = sorted((r for r in done if r["row"] == row), key=lambda r: r["seed"]), [row]
        for key in ("val/map50", "test/map50"):
            values = [100 * r["result"][key] for r in own]
            cells += [
                f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}",
                " ".join(f"{v:.1f}" for v in values),
            ]
        rows.append(cells)
    return rows


def main() -> None:
    s, shipped = tyro.cli(Settings, description=__doc__), load_space(str(SHIPPED))
    if set(LEVELS) != set(shipped.axes):
        raise SystemExit(f"LEVELS here and SPACE of {SHIPPED} name different settings")
    grid = f"SPACE = {LEVELS!r}\n"
    stopped_early = f'SCHEDULER = "asha"\nGRACE = {shipped.grace}\nREDUCTION = {shipped.reduction}\n'
    full, asha = sweep(s, "full", grid), sweep(s, "asha", grid + stopped_early, FIRST)
    metric, storage = shipped.metric, Storage(str(Path(s.storage_path).absolute()))
    points = len(full)
    best = {name: max(done, key=lambda r: r["result"][metric]) for name, done in (("full", full), ("asha", asha))}
    ran = {name: steps_run(storage, name, done) for name, done in (("full", full), ("asha", asha))}
    rows = [
        [name, str(points), str(ran[name][1]), str(ran[name][0]), f"{ran[name][0] / ran['full'][0]:.0%}", b["row"]]
        + [f"{100 * b['result'][key]:.1f}" for key in (metric, "test/map50")]
        for name, b in best.items()
    ]
    header = ["sweep", "points", "stopped", "steps", "share", "winner", f"its {metric}", "its test/map50"]
    print(render(f"{s.steps} steps a point", header, rows))
    order = sorted(full, key=lambda r: -r["result"][metric])
    places = [r["row"] for r in order].index(best["asha"]["row"]) + 1
    print(f"the winner under ASHA has place {places} of {points} in the full grid")
    found = {"full": full, "asha": asha, "steps": {k: v[0] for k, v in ran.items()}, "place": places}
    picture(full, metric, shipped.grace, Path(s.storage_path) / "early_stopping.png")
    print(render("how early the order shows", ["step", "rank correlation"], foresight(full, metric)))
    header = ["GRACE", "REDUCTION", *("steps", "points below the best", "same winner") * 2]
    title = f"ASHA replayed on the curves of the full grid: means of {ORDERS} orders, and with the config's own values first"
    print(render(title, header, replays(full, metric)))
    if s.seeds > 1:
        own = next(r for r in full if r["settings"] == FIRST)
        rows_of = {r["row"]: r["settings"] for r in (best["full"], best["asha"], own)}
        seeded = sweep(s, "seeds", f"ROWS = {rows_of!r}\nSEEDS = {tuple(range(1, s.seeds))!r}\n")
        seeded += [r for r in full if r["row"] in rows_of]  # seed 0
        found["seeds"] = seeded
        print(render(f"over {s.seeds} seeds", ["row", metric, "by seed", "test/map50", "by seed"], over_seeds(seeded)))
    (Path(s.storage_path) / "early_stopping.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
