"""The gate: did the unlabelled images pay? Student against label-only student, with an interval that says how sure.

The published comparison is on the val split, never on test: it decides which model is used. The interval is a paired
bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13): both models are measured on the same
draws, so what is hard for both cancels. What is drawn are the manifest's groups of near-duplicates, whole (a cluster
bootstrap: Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8): images of one group are nearly
the same image, and drawn one by one they would make the interval far too narrow. It covers the choice of val images, not
the seeds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ultralytics.utils.metrics import compute_ap

from dfssd.runtime.artefact_names import LABEL_ONLY, STUDENT

RESAMPLES = 300
LEVEL = 95  # percent
# Below it the bootstrap is too narrow to decide (Cameron, Gelbach & Miller, 2008, section I: "5 to 30").
FEW_GROUPS = 20
MEASURES = ("map50", "map50_95")


class Ranked:
    """Predictions of one model, sorted by score within each class, ready to be weighted image by image.

    Args:
        stats: matches of each image, as `dfssd.evaluate.validation.collect` returns them.
    """

    def __init__(self, stats: list[dict[str, Any]]) -> None:
        image = np.repeat(np.arange(len(stats)), [len(s["conf"]) for s in stats])
        conf = np.concatenate([s["conf"] for s in stats])
        cls = np.concatenate([s["pred_cls"] for s in stats])
        hits = np.concatenate([s["tp"] for s in stats])
        classes = np.unique(np.concatenate([s["target_cls"] for s in stats]))
        self.truth = np.array([[(s["target_cls"] == c).sum() for s in stats] for c in classes])  # (C, images)
        self.parts = []
        for c in classes:
            rows = np.flatnonzero(cls == c)
            rows = rows[np.argsort(-conf[rows], kind="stable")]
            self.parts.append((image[rows], hits[rows].astype(np.float32)))

    def map(self, weight: np.ndarray) -> np.ndarray:
        """(2,) mAP50 and mAP50-95 where image i counts weight[i] times; as Ultralytics computes it."""
        aps = []
        for boxes, (image, hits) in zip(self.truth @ weight, self.parts, strict=True):
            if boxes == 0:
                continue  # the class is in none of the images that count
            own = weight[image]
            seen = own > 0
            own, hit = own[seen, None], hits[seen]
            if not len(own):
                aps.append(np.zeros(10))
                continue
            true = (own * hit).cumsum(0, dtype=np.float64)
            precision, recall = true / own.cumsum(0, dtype=np.float64), true / boxes
            aps.append(np.array([compute_ap(recall[:, j], precision[:, j])[0] for j in range(hits.shape[1])]))
        table = np.array(aps)
        return np.array([table[:, 0].mean(), table.mean()])


def compare(base: list[dict[str, Any]], other: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Difference in mAP of two models on the same images, with a 95 % interval.

    Args:
        base, other: matches of each image, images in the same order; "group" is the near-duplicate group of an image, without
            it each is one of its own.

    Returns:
        by measure (map50, map50_95): label_only, student, difference, low, high (all 0..1); and images, groups, resamples.
    """
    assert [s["im_name"] for s in base] == [s["im_name"] for s in other], "both models saw the same images"
    models, images = (Ranked(base), Ranked(other)), len(base)
    points = np.stack([m.map(np.ones(images)) for m in models])
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero([len(s["target_cls"]) for s in base])
    group = np.unique([s.get("group", k) for k, s in enumerate(base)], return_inverse=True)[1]
    groups = int(group.max()) + 1
    draws: list[np.ndarray] = []
    while len(draws) < RESAMPLES:
        weight = np.bincount(rng.integers(groups, size=groups), minlength=groups).astype(np.float64)[group]
        if weight[labelled].any():  # a draw of images without a box measures nothing
            draws.append(models[1].map(weight) - models[0].map(weight))
    low, high = np.percentile(np.stack(draws), [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=0)
    result: dict[str, Any] = {
        name: {
            LABEL_ONLY.role: float(points[0, k]),
            STUDENT.role: float(points[1, k]),
            "difference": float(points[1, k] - points[0, k]),
            "low": float(low[k]),
            "high": float(high[k]),
        }
        for k, name in enumerate(MEASURES)
    }
    return {**result, "images": images, "groups": groups, "resamples": RESAMPLES}


def better(gate: dict[str, Any]) -> str:
    """'student' or 'label_only': which has the higher val mAP50-95, the measure by which weights are chosen."""
    return (STUDENT if gate["map50_95"]["difference"] > 0 else LABEL_ONLY).role


def verdict(gate: dict[str, Any], unlabelled: bool = True) -> str:
    """One line: did the unlabelled images pay? Without any (`unlabelled` False): did the teacher?

    mAP50-95 decides (`better`); where mAP50 points the other way, the line says that instead of an answer.
    """
    one = gate["map50_95"]
    groups = gate.get("groups", gate["images"])
    few = groups < FEW_GROUPS
    said = "paid" if one["low"] > 0 and not few else "did NOT pay" if one["difference"] <= 0 else "may have paid"
    if one["difference"] * gate["map50"]["difference"] < 0:
        up, down = ("mAP50-95", "mAP50") if one["difference"] > 0 else ("mAP50", "mAP50-95")
        said = f"undecided, {up} up, {down} down"
    numbers = ", ".join(
        f"{label} {100 * g['difference']:+.1f} points ({100 * g['low']:+.1f} to {100 * g['high']:+.1f})"
        for label, g in (("mAP50", gate["map50"]), ("mAP50-95", one))
    )
    apart = "" if groups == gate["images"] else f" in {groups} groups of near-duplicates"
    what = "unlabelled images" if unlabelled else "teacher"
    asked = f"Whether the {what} paid is" if "undecided" in said else f"The {what}"
    text = f"{asked} {said}: val {numbers}; 95 % intervals over {gate['images']} images{apart}."
    if said == "did NOT pay":
        look = ", and look at quality/quality.png and doubtful.png" if unlabelled else ""
        text += f" Use label_only/best.pt (dfssd export --publish-best --overwrite puts it in the export){look}."
    elif "undecided" in said:
        chosen = "student/best.pt" if better(gate) == STUDENT.role else "label_only/best.pt"
        text += f" By mAP50-95, which --publish-best goes by, {chosen} is ahead: look at escapes and rejects before choosing."
    elif said == "may have paid" and one["low"] <= 0:
        text += " The interval holds zero: more val images or more seeds would tell."
    if few:
        text += (
            f" {groups} of them cannot say how sure this is: with fewer than {FEW_GROUPS} the intervals are too narrow."
        )
    return text


def published(results: dict[str, Any]) -> str:
    """What `--publish-best` exports, of the report's results, in one line."""
    if "gate" not in results:
        return "publish: there is no label-only student to compare with, so the student is what is exported"
    name = "distilled" if better(results["gate"]) == STUDENT.role else "label-only"
    return f"publish: the {name} student is the better one on val, and is what is exported"
