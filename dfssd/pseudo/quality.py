"""How good are the pseudo-labels? Measured before any training on them, for every policy at once.

Against the val split always, and against the withheld boxes where they exist (boxes of images that are treated as
unlabelled; nothing that trains may open them).

Legend: C classes; candidates are (n,7) arrays [cls, cx, cy, w, h, score, agreement].
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dfssd.config import Config, Pseudo, Thresholds
from dfssd.config.choices import POLICIES
from dfssd.data.boxes import AGREEMENT, CLS, SCORE
from dfssd.data.manifest import Boxes, Manifest, read_manifest, read_withheld
from dfssd.pseudo.evidence import Evidence
from dfssd.pseudo.scores import NEVER
from dfssd.pseudo.shards import read_shards
from dfssd.pseudo.thresholds import MANY, ScoreCounts, labelled_rates, policy_thresholds
from dfssd.runtime.storage import Storage

DOUBTFUL = 24  # images drawn
NEAR = 0.005  # distance (score) at which a threshold is said to be that of a flag
DOUBT_WIDTH = 0.2  # distance to the threshold (score) at which a candidate is no longer doubtful
FEW = 0.1  # share of the labelled rate below which a class is warned about, as it is above MANY


@dataclass
class Quality:
    """What the report is drawn from.

    Args:
        names: class names.
        scores: scores of all candidates on unlabelled images.
        rate_c: (C,) labelled boxes an image.
        tau: by policy (C,) thresholds.
        evidence: by source ('val', 'withheld') what the candidates are worth.
        doubtful: (image_id, candidates) of the most doubtful unlabelled images, worst first.
        thresholds: the settings behind `tau[chosen]`. floor: score below which no candidate is kept.
    """

    names: list[str]
    scores: ScoreCounts
    rate_c: np.ndarray
    chosen: str
    tau: dict[str, np.ndarray]
    evidence: dict[str, Evidence]
    doubtful: list[tuple[str, Boxes]] = field(default_factory=list)
    thresholds: Thresholds = field(default_factory=Thresholds)
    floor: float = Pseudo().floor

    def numbers(self) -> dict[str, Any]:
        """JSON-ready: by policy and class threshold, pseudo-labels an image, precision, recall, mean IoU; warnings."""
        policies: dict[str, Any] = {}
        for policy, tau in self.tau.items():
            rate = self.scores.per_image(tau)
            columns = {"tau": np.append(tau, np.nan), "per_image": np.append(rate, rate.sum())}
            for source, evidence in self.evidence.items():
                columns |= {f"{source}_{k}": v for k, v in evidence.at(tau).items()}
            policies[policy] = {
                name: {k: _number(v[c]) for k, v in columns.items()} for c, name in enumerate([*self.names, "all"])
            }
        return {
            "chosen": self.chosen,
            "policies": policies,
            "labelled_rate": dict(zip(self.names, self.rate_c.round(4).tolist(), strict=True)),
            "candidates_ap50": {s: _number(np.nanmean(e.ap50())) for s, e in self.evidence.items() if e.boxes.sum()},
            "warnings": warnings(self),
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def val_evidence(store: Storage, manifest: Manifest) -> Evidence:
    """Candidates on the val split, as a labelling stage left them, against its labels."""
    evidence = Evidence.empty(len(manifest.names))
    val = {r.image_id: r.boxes for r in manifest.of_split("val")}
    for image_id, boxes in read_shards(store, "val"):
        truth = val.get(image_id)
        if boxes is not None and truth is not None:
            evidence.add(boxes, truth)
    return evidence


def measure(config: Config, run: Storage, folder: str) -> Quality:
    """Compare the candidates of a labelling stage with everything that is known.

    Args:
        folder: artefact of the labelling stage, e.g. "pseudo".
    """
    manifest, store = read_manifest(run.at("dataset")), run.at(folder)
    classes, withheld = len(manifest.names), read_withheld(run.at("dataset"))
    scores, evidence = ScoreCounts.empty(classes), {"val": val_evidence(store, manifest)}
    hidden = Evidence.empty(classes)
    for image_id, boxes in read_shards(store, "shard"):
        if boxes is None:
            continue
        scores.add(boxes)
        if image_id in withheld:
            hidden.add(boxes, withheld[image_id])
    if hidden.images:
        evidence["withheld"] = hidden
    scores.val = evidence["val"]
    rate = labelled_rates(manifest.labelled_rows(), classes)
    tau = {p: policy_thresholds(config.thresholds, p, scores, rate, config.train.steps) for p in POLICIES}
    quality = Quality(manifest.names, scores, rate, config.thresholds.threshold_policy, tau, evidence)
    quality.thresholds, quality.floor = config.thresholds, config.pseudo.floor
    quality.doubtful = _most_doubtful(store, tau[quality.chosen])
    return quality


def doubt(boxes: Boxes, tau_c: np.ndarray) -> float:
    """How doubtful an image is: candidates near their threshold, and pseudo-labels that moved under flips, add up."""
    score, tau = boxes[:, SCORE], tau_c[boxes[:, CLS].astype(int)]
    distance = np.abs(score - tau)
    moved = (1 - boxes[:, AGREEMENT]) * (score >= tau)
    return float((1 - distance / DOUBT_WIDTH).clip(0).sum() + moved.sum())


def _most_doubtful(store: Storage, tau_c: np.ndarray) -> list[tuple[str, Boxes]]:
    worst = heapq.nlargest(
        DOUBTFUL,
        ((doubt(b, tau_c), image_id, b) for image_id, b in read_shards(store, "shard") if b is not None and len(b)),
        key=lambda entry: (entry[0], entry[1]),
    )
    return [(image_id, boxes) for _, image_id, boxes in worst]


def warnings(quality: Quality) -> list[str]:
    """What is likely to go wrong with the chosen thresholds, in plain words."""
    tau, notes = quality.tau[quality.chosen], []
    rate = quality.scores.per_image(tau)
    precision = quality.evidence["val"].at(tau)["precision"]
    for c, name in enumerate(quality.names):
        own, usual = rate[c], quality.rate_c[c]
        numbers = f"{own:.3f} pseudo-labels an image at threshold {tau[c]:.2f}; labelled images have {usual:.3f}"
        if tau[c] >= NEVER:
            held = int(quality.evidence["val"].found[c].sum())
            notes.append(
                f"class '{name}' gets no pseudo-labels: its {held} candidates on val do not show what "
                f"policy '{quality.chosen}' asks for; the teacher's soft scores still teach it"
            )
        elif usual == 0:
            notes.append(f"class '{name}' has no labelled box: its pseudo-labels cannot be trusted")
        elif own < FEW * usual:
            notes.append(f"class '{name}' gets almost no pseudo-labels ({numbers}){_lower(quality, tau[c])}")
        elif own > MANY * usual:
            notes.append(f"class '{name}' gets far too many pseudo-labels ({numbers}){_raise(quality, tau[c])}")
        if precision[c] < 0.5:
            notes.append(f"class '{name}': {1 - precision[c]:.0%} of its pseudo-labels on the val split are wrong")
    return notes


def _lower(quality: Quality, tau: float) -> str:
    """'; lower ...': the flag that holds a class's threshold where it is, and its value; '' where none can lower it."""
    uses, own = POLICIES[quality.chosen].uses, quality.thresholds
    least = own.lowest(quality.chosen)
    if "tau_min" in uses and tau <= least + NEAR:
        return f"; give a --tau-min below {least:g}" if least > quality.floor else ""
    if "tau" in uses and abs(tau - own.tau) < NEAR:
        return f"; lower --tau, which is {own.tau:g}"
    if "tau_max" in uses:
        return f"; give a --tau-max below {tau:.2f}, or another --threshold-policy"
    return f"; lower --precision, which is {own.precision:g}" if "precision" in uses else ""


def _raise(quality: Quality, tau: float) -> str:
    """'; raise ...': the flag that makes the policy stricter than this threshold."""
    uses, own = POLICIES[quality.chosen].uses, quality.thresholds
    if "tau_min" in uses:
        return f"; give a --tau-min above {tau:.2f}"
    if "tau" in uses:
        return f"; raise --tau, which is {own.tau:g}"
    return f"; raise --precision, which is {own.precision:g}" if "precision" in uses else ""
