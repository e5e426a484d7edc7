"""What a choice of images is worth before anything is trained on it: a linear probe on frozen features, and its boxes.

    python benchmarks/suggest_probe.py --data runs/small/cr7-det --network ../shared/data/weights/yolov8n-natural.pt \
        --imgsz 128 --steps 600 --seeds 10 --out runs/suggest

Takes the first detector of each seed of `suggest.py` (trains it where it is not there). Each of `--arms` chooses images; a
logistic regression of the classes that an image shows, on the first detector's pooled neck features, learns from the first
labels and the chosen ones, and its mean average precision on the val images is the number. `random` is the mean of
ten draws. Seconds an arm; it knows nothing of boxes, so it can sort rules out, and not replace a training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from long_tail import long_tailed, rare_classes
from semi_data import all_labels
from suggest import ARMS, arguments, first_detector, settings

from dfssd.data.manifest import read_withheld
from dfssd.review.active_learning import look_at
from dfssd.review.network import look
from dfssd.review.suggest import shown
from dfssd.runtime.artefact_names import TEACHER
from dfssd.runtime.storage import Storage

SCALE, DECAY = 4.0, 1e-3  # of the unit vectors, and of the weights
DRAWS = 10


def mean_ap(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over classes of the average precision of (n,C) scores."""
    found = []
    for own, right in zip(scores.T, truth.T, strict=True):
        ranked = right[np.argsort(-own, kind="stable")]
        if ranked.any():
            found.append((np.cumsum(ranked) / np.arange(1, len(ranked) + 1))[ranked > 0].mean())
    return float(np.mean(found))


def probe(features: np.ndarray, shows: np.ndarray, val: np.ndarray, val_shows: np.ndarray) -> float:
    """Mean average precision (0..1) on val of a logistic regression, one output a class."""
    x, y = (torch.tensor(a, dtype=torch.float64) for a in (SCALE * features, shows))
    weights = torch.zeros(x.shape[1] + 1, y.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        logits = x @ weights[1:] + weights[0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y) + DECAY * (weights[1:] ** 2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = weights.detach().numpy()
    return mean_ap(SCALE * val @ found[1:] + found[0], val_shows)


def main() -> None:
    a = arguments(__doc__ or "")
    torch.set_num_threads(1)
    whole = all_labels(a.data, Path(a.out, "data"))
    for seed in a.seeds:
        manifest = long_tailed(whole, a.tail, seed)
        config, first = settings(a, seed, a.first_steps or a.steps), Storage(a.out).at(f"seed{seed}", "start")
        first_detector(a, manifest, seed)
        seen = look_at(config, first, TEACHER, len(manifest.rows))  # all of them
        rows, val = seen.rows, [r for r in seen.state.manifest.of_split("val") if r.boxes is not None]
        known, classes = seen.state.manifest.labelled_rows(), len(manifest.names)
        _, features = look(config, first, "teacher/best.pt", manifest.names, [*rows, *known, *val], "probe looks")
        own, of_known, of_val = np.split(features, [len(rows), len(rows) + len(known)])
        truth, index = read_withheld(first.at("dataset")), {r.image_id: i for i, r in enumerate(rows)}
        shows, known_shows = shown([truth[r.image_id] for r in rows], classes), shown([r.boxes for r in known], classes)
        val_shows = shown([r.boxes for r in val], classes)
        for arm in a.arms:
            found, rare = [], []
            for draw in range(DRAWS if arm == "random" else 1):
                chosen = [index[i] for i in ARMS[arm](seen, a.k or len(known), seed + 1000 * draw)]
                x, y = np.concatenate([of_known, own[chosen]]), np.concatenate([known_shows, shows[chosen]])
                found.append(100 * probe(x, y, of_val, val_shows))
                rare.append(int(shows[chosen][:, rare_classes(classes, a.tail, seed)].any(1).sum()))
            spread = f" ± {np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
            by_class = zip(manifest.names, shows[chosen].sum(0).astype(int), strict=True)
            says = f"{np.mean(rare):.1f} images of rare classes; " if a.tail > 1 else ""
            says += ", ".join(f"{n} {c}" for n, c in by_class) + ("" if len(found) < 2 else " in the last draw")
            print(f"seed {seed} {arm}: {np.mean(found):.1f}{spread} AP of images on val; {says}", flush=True)


if __name__ == "__main__":
    main()
