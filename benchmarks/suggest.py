"""Are suggested labels worth more than random ones? On a fully labelled set, whose hidden labels answer the question.

    python benchmarks/suggest.py --data ../shared/data/cr7-det --network ../shared/data/weights/yolov8n-natural.pt \
        --imgsz 128 --steps 250 --seeds 0 1 2 --out runs/suggest

For each seed: a detector learns from `--start` of the labels and looks at the rest; then as many images again (or `--k`) get
their labels, once those that `dfssd suggest` chooses (the same function) and once random ones; the same training from the
same weights on both, the last weights measured on test and on val. Further `--arms`: `uncertainty` takes the images that the
first detector is most unsure of, `coverage` covers the feature space whatever the classes, `random3` labels three times as
many at random, `none` no more at all. `--tail 10` makes the train images long-tailed first (`long_tail.py`): the table then
says what the rare classes gain. What is finished is not done again. Leaves `<out>/suggest.json` and the table as
`suggest.md`; no Ray, no MLflow.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from long_tail import long_tailed, rare_classes
from scipy import stats
from semi_data import all_labels, hide, subset
from semi_rows import measured, parse_row, train_row

from dfssd.config import Config, Models, Run, Train
from dfssd.data.manifest import Manifest, read_manifest
from dfssd.pseudo.in_process import label_in_process
from dfssd.review.active_learning import Looked, look_at
from dfssd.review.coverage import Coverage, choose
from dfssd.review.suggest import shown
from dfssd.runtime.artefact_names import TEACHER
from dfssd.runtime.storage import Storage

ROW = parse_row("teacher")
MEASURES = ("map50", "map50_95")
TITLES = {"map50": "mAP50", "map50_95": "mAP50-95", "rare": "AP50 of rare classes"}


def arguments(about: str) -> argparse.Namespace:
    a = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--data", required=True, help="a data set, or a copy that semi_supervised.py --export made")
    a.add_argument("--network", default="yolov8n.pt", help="weights to start from, or a layout")
    a.add_argument("--out", default="runs/suggest")
    a.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    a.add_argument("--start", type=float, default=0.05, help="share of the train images that is labelled at first")
    a.add_argument("--k", type=int, default=0, help="images that get labels then (default: as many as at first)")
    a.add_argument(
        "--tail", type=float, default=1, help="the most frequent class over the rarest (1: the set as it is)"
    )
    a.add_argument("--arms", nargs="*", default=["suggested", "random"], choices=[*ARMS])
    a.add_argument("--imgsz", type=int, default=128)
    a.add_argument("--steps", type=int, default=250)
    a.add_argument("--first-steps", type=int, default=0, help="of the first detector, which chooses (default --steps)")
    a.add_argument("--splits", nargs="+", default=["val", "test"], choices=["val", "test"], help="measured on these")
    a.add_argument("--tta", default="flips", choices=["flips", "none"], help="views of the first detector's labelling")
    a.add_argument("--device", default="cpu")
    return a.parse_args()


def settings(a: argparse.Namespace, seed: int, steps: int) -> Config:
    config = Config(
        run=Run(seed=seed, gpu="never" if a.device == "cpu" else "auto"),
        models=Models(teacher=a.network, student=a.network),
        train=Train(imgsz=a.imgsz, steps=steps, loader_workers=0, val_every=steps, log_every=25),
    )
    return config.model_copy(update={"pseudo": config.pseudo.model_copy(update={"tta": a.tta})})


def random_rows(seen: Looked, k: int, seed: int) -> list[str]:
    return random.Random(seed).sample(sorted(r.image_id for r in seen.state.manifest.unlabelled_rows()), k)


def by(seen: Looked, k: int) -> list[str]:
    return [seen.rows[i].image_id for i in seen.choose(k)[0]]


def uncertain_rows(seen: Looked, k: int, seed: int) -> list[str]:
    """The images that the teacher is most unsure of, one of each group of near-duplicates: the usual choice."""
    of_group: dict[int, int] = {}
    for i in np.argsort(-seen.scores.uncertainty, kind="stable").tolist():
        if int(seen.groups[i]) not in seen.taken:
            of_group.setdefault(int(seen.groups[i]), i)
    return [seen.rows[i].image_id for i in list(of_group.values())[:k]]


def covering_rows(seen: Looked, k: int, seed: int) -> list[str]:
    """Covers the feature space, whatever the classes."""
    every, known = np.ones((len(seen.rows), 1)), np.ones((len(seen.known), 1))
    coverage = Coverage(seen.features, every, seen.known, known, np.ones(1))
    return [seen.rows[i].image_id for i in choose(coverage, np.ones(len(seen.rows)), seen.groups, seen.taken, k)[0]]


ARMS = {  # how k image ids are chosen
    "suggested": lambda seen, k, seed: by(seen, k),
    "random": random_rows,
    "random3": lambda seen, k, seed: random_rows(seen, 3 * k, seed),  # what far more labels would give
    "none": lambda seen, k, seed: [],  # as many steps on the first labels alone
    "uncertainty": uncertain_rows,
    "coverage": covering_rows,
}


def trained(run: Storage, config: Config, device: torch.device, splits: Sequence[str]) -> dict[str, Any]:
    """Train on what `<run>/dataset` labels, and measure the last weights; what is there is read."""
    if not run.exists("result.json"):
        begun = time.monotonic()
        result = train_row(ROW, config, run, "", device)
        result |= {"last": measured(config, run, "teacher", device, ("last",), splits)["last"]}
        run.write_json("result.json", {**result, "seconds": round(time.monotonic() - begun)})
    found = run.read_json("result.json")
    assert isinstance(found, dict)
    return found


def first_detector(a: argparse.Namespace, manifest: Manifest, seed: int) -> dict[str, Any]:
    """Result of the detector that chooses, trained on the first labels; it has looked at the other images."""
    first, device = Storage(a.out).at(f"seed{seed}", "start"), torch.device(a.device)
    config = settings(a, seed, a.first_steps or a.steps)
    if not first.exists("dataset/manifest.parquet"):
        subset(manifest, a.start, seed, first.at("dataset"))
    result = trained(first, config, device, a.splits)
    if not first.exists("pseudo/stage.json"):
        start = read_manifest(first.at("dataset"))
        label_in_process(config, first, "pseudo", start, ["teacher/best.pt"], device, cores=1)
        first.write_json("pseudo/stage.json", {})
    return result


def one_seed(a: argparse.Namespace, manifest: Manifest, seed: int) -> dict[str, dict[str, Any]]:
    """Results by arm, and of the first detector ("start")."""
    config, device, out = settings(a, seed, a.steps), torch.device(a.device), Storage(a.out).at(f"seed{seed}")
    manifest = long_tailed(manifest, a.tail, seed)
    rare = rare_classes(len(manifest.names), a.tail, seed)
    first = out.at("start")
    results = {"start": with_rare(first_detector(a, manifest, seed), manifest.names, rare)}
    started = {r.image_id for r in read_manifest(first.at("dataset")).labelled_rows()}
    seen: Looked | None = None
    for arm in a.arms:
        run = out.at(arm)
        if not run.exists("dataset/manifest.parquet"):
            seen = seen or look_at(config, first, TEACHER, len(started))
            chosen = ARMS[arm](seen, a.k or len(started), seed)
            assert len(set(chosen)) == len(chosen) and not started.intersection(chosen)
            hide(manifest, started.union(chosen), run.at("dataset"), seed=seed)
        found = with_rare(trained(run, config, device, a.splits), manifest.names, rare)
        results[arm] = {**found, **cost(manifest, run, started, rare)}
        says = ", ".join(f"{100 * results[arm]['last'][a.splits[-1]][m]:.1f}" for m in MEASURES)
        print(f"seed {seed} {arm}: {a.splits[-1]} {says}; {results[arm]['new_boxes']} new boxes", flush=True)
    return results


def with_rare(result: dict[str, Any], names: Sequence[str], rare: Sequence[int]) -> dict[str, Any]:
    """A result whose measures know the mean AP50 of the rare classes, NaN where there are none."""
    for found in result["last"].values():
        found["rare"] = float(np.mean([found["by_class"][names[c]] for c in rare])) if rare else float("nan")
    return result


def cost(manifest: Manifest, run: Storage, started: set[str], rare: Sequence[int]) -> dict[str, Any]:
    """Boxes that were drawn for the new labels, how many images show each class, and how many a rare one."""
    rows = [r for r in read_manifest(run.at("dataset")).labelled_rows() if r.image_id not in started]
    boxes = [r.boxes for r in rows if r.boxes is not None]
    shows = shown(boxes, len(manifest.names))
    return {
        "new_images": len(rows),
        "new_boxes": sum(map(len, boxes)),
        "new_rare": int(shows[:, rare].any(1).sum()),
        "images_of_class": shows.sum(0).astype(int).tolist(),
    }


def table(results: dict[int, dict[str, dict[str, Any]]], arms: list[str], splits: Sequence[str], rare: bool) -> str:
    """Markdown: mean and deviation over seeds, and what an arm gains over random labels with its 95 % interval (t).

    Args:
        rare: the set is long-tailed, and the rare classes have columns of their own.
    """
    ordered = splits[::-1]  # test first
    measures = (*MEASURES, "rare") if rare else MEASURES
    titles = ["labels", "new boxes", *(["new images of rare classes"] if rare else [])]
    titles += [f"{s} {TITLES[m]}" for s in ordered for m in measures]
    titles += [f"over random, {ordered[0]} {TITLES[m]}" for m in measures]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]

    def values(arm: str, split: str, measure: str) -> np.ndarray:
        return np.array([100 * r[arm]["last"][split][measure] for r in results.values()])

    for arm in ["start", *arms]:
        counts = ["new_boxes", *(["new_rare"] if rare else [])]
        cells = ["" if arm == "start" else f"{np.mean([r[arm][c] for r in results.values()]):.0f}" for c in counts]
        cells += [spread(values(arm, split, m)) for split in ordered for m in measures]
        gains = [""] * len(measures)
        if arm not in ("start", "random") and "random" in arms:
            gains = [interval(values(arm, ordered[0], m) - values("random", ordered[0], m)) for m in measures]
        lines.append(f"| {' | '.join([arm, *cells, *gains])} |")
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def interval(gains: np.ndarray) -> str:
    if len(gains) < 2:
        return f"{gains.mean():+.1f}"
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{gains.mean():+.1f} ({gains.mean() - half:+.1f} to {gains.mean() + half:+.1f})"


def main() -> None:
    a = arguments(__doc__ or "")
    torch.set_num_threads(1)
    out = Path(a.out)
    manifest = all_labels(a.data, out / "data")
    results = {}
    for seed in a.seeds:
        results[seed] = one_seed(a, manifest, seed)
        (out / "suggest.json").write_text(json.dumps(results, indent=1))
        text = table(results, a.arms, a.splits, a.tail > 1)
        (out / "suggest.md").write_text(text + "\n")
        print(f"{len(results)} seed(s)\n{text}", flush=True)


if __name__ == "__main__":
    main()
