"""Are suggested labels worth more than random ones? On a fully labelled set, whose hidden labels answer the question.

    python benchmarks/suggest.py --data ../shared/data/cr7-det --seeds 0 1 2 --out runs/suggest [flags of `dfssd teacher`]

For each seed: a detector learns from `--start` of the labels and looks at the rest; then as many images again get their
labels, once those that `dfssd suggest` chooses and once random ones; the same training on both, measured on the same test
split. Long: per seed three trainings and one labelling. Prints a table, and writes it as JSON to `<out>/suggest.json`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from dfssd.data.manifest import read_manifest
from dfssd.runtime.storage import Storage


def dfssd(*words: str) -> None:
    """Run a command of dfssd in a process of its own."""
    subprocess.run([sys.executable, "-c", "from dfssd.cli import console; console()", *words], check=True)


def trained(options: argparse.Namespace, name: str, seed: int, ids: list[str], flags: list[str]) -> float:
    """Test mAP50-95 of a detector that learnt from these images."""
    place = ["--storage-path", options.out, "--run-name", name]
    listed = Path(options.out) / f"{name}.txt"
    listed.write_text("\n".join(ids) + "\n")
    dfssd("prepare", "--data", options.data, "--labelled-list", str(listed), "--seed", str(seed), *place)
    dfssd("teacher", "--seed", str(seed), *flags, *place)
    dfssd("evaluate", *place)
    return float(Storage(options.out).read_json(f"{name}/report/metrics.json")["teacher"]["test"]["map50_95"])


def one_seed(options: argparse.Namespace, seed: int, flags: list[str]) -> dict[str, float]:
    """Test mAP50-95 with suggested and with random labels."""
    name = f"start-{seed}"
    place = ["--storage-path", options.out, "--run-name", name]
    dfssd("prepare", "--data", options.data, "--label-fraction", str(options.start), "--seed", str(seed), *place)
    dfssd("teacher", "--seed", str(seed), *flags, *place)
    dfssd("pseudo_label", "--seed", str(seed), *place)
    run = Storage(options.out).at(name)
    manifest = read_manifest(run.at("dataset"))
    first = [r.image_id for r in manifest.labelled_rows()]
    dfssd("suggest", "--k", str(len(first)), "--export", "none", *place)
    rows = csv.DictReader(io.StringIO(run.read("suggest/suggest.csv").decode()))
    chosen = [r["image_id"] for r in rows]
    others = [r.image_id for r in manifest.unlabelled_rows()]
    drawn = random.Random(seed).sample(others, len(chosen))
    return {
        "suggested": trained(options, f"suggested-{seed}", seed, first + chosen, flags),
        "random": trained(options, f"random-{seed}", seed, first + drawn, flags),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", type=float, default=0.05, help="share of the train images that is labelled at first")
    options, flags = parser.parse_known_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in options.seeds:
        results[seed] = one_seed(options, seed, flags)
        print(
            f"seed {seed}: suggested {results[seed]['suggested']:.4f}, random {results[seed]['random']:.4f}", flush=True
        )
    gains = [100 * (r["suggested"] - r["random"]) for r in results.values()]
    spread = f" +/- {np.std(gains, ddof=1):.1f}" if len(gains) > 1 else ""
    print(f"suggested minus random: {np.mean(gains):+.1f}{spread} points of test mAP50-95, {len(gains)} seeds")
    (Path(options.out) / "suggest.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
