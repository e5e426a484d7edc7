"""How good are the pseudo-labels? Measured before any training on them, for every policy at once.

Against the val split always, and against the withheld boxes where they exist (boxes of images that are treated as
unlabelled; nothing that trains may open them).

Legend: C classes; candidates are (n,7) arrays [cls, cx, cy, w, h, score, agreement], truth (m,5) [cls, cx, cy, w, h].
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dfssd.config import Config
from dfssd.config.choices import POLICIES
from dfssd.data.boxes import corners, iou
from dfssd.data.manifest import Boxes, Manifest, read_manifest, read_withheld
from dfssd.pseudo.calibration import calibrate
from dfssd.pseudo.scores import BINS, NEVER, score_bin
from dfssd.pseudo.shards import read_shards
from dfssd.pseudo.thresholds import ScoreCounts, labelled_rates, policy_thresholds
from dfssd.runtime.storage import Storage

HIT_IOU = 0.5
DOUBTFUL = 24  # images drawn
DOUBT_WIDTH = 0.2  # distance to the threshold (score) at which a candidate is no longer doubtful
FEW, MANY = 0.1, 3.0  # share of the labelled rate below or above which a class is warned about


def match(candidates: Boxes, truth: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates hit a box: by falling score, each takes the free box of its class that it overlaps most.

    A candidate never loses its box to a lower one, so precision and recall at any threshold follow from one matching.

    Returns:
        (n,) bool hits at IoU 0.5 or more; (n,) IoU with the box hit, 0 where there is none.
    """
    hit, overlap = np.zeros(len(candidates), bool), np.zeros(len(candidates))
    free = np.ones(len(truth), bool)
    table = iou(corners(candidates), corners(truth)) * (candidates[:, :1] == truth[None, :, 0])
    for k in np.argsort(-candidates[:, 5], kind="stable"):
        row = table[k] * free
        if len(row) and row.max() >= HIT_IOU:
            best = int(row.argmax())
            hit[k], overlap[k], free[best] = True, row[best], False
    return hit, overlap


@dataclass
class Evidence:
    """Candidates against truth, as histograms over score: bounded memory, every threshold at once.

    Args:
        found, hits, iou: (C, BINS) candidates, those that hit a box, and the sum of their IoU.
        boxes: (C,) boxes that are there.
        images: images compared.
    """

    found: np.ndarray
    hits: np.ndarray
    iou: np.ndarray
    boxes: np.ndarray
    images: int = 0

    @classmethod
    def empty(cls, classes: int) -> Evidence:
        shape = (classes, BINS)
        return cls(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape), np.zeros(classes, np.int64))

    def add(self, candidates: Boxes, truth: Boxes) -> None:
        """Take in one image."""
        hit, overlap = match(candidates, truth)
        index = candidates[:, 0].astype(int), score_bin(candidates[:, 5])
        np.add.at(self.found, index, 1)
        np.add.at(self.hits, index, hit)
        np.add.at(self.iou, index, overlap)
        self.boxes += np.bincount(truth[:, 0].astype(int), minlength=len(self.boxes))
        self.images += 1

    def at(self, tau_c: np.ndarray) -> dict[str, np.ndarray]:
        """(C+1,) precision, recall and mean IoU of hits at thresholds tau_c; the last entry is over all classes.

        NaN where there is nothing to measure (no pseudo-label, no box).
        """
        sums = [
            np.array([h[c, score_bin(t) :].sum() for c, t in enumerate(tau_c)])
            for h in (self.found, self.hits, self.iou)
        ]
        found, hits, overlap, boxes = (np.append(x, x.sum()) for x in (*sums, self.boxes))
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"precision": hits / found, "recall": hits / boxes, "iou": overlap / hits}

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, BINS) precision and recall at threshold k/BINS; NaN where there is nothing to measure."""
        found, hits = (h[:, ::-1].cumsum(1)[:, ::-1] for h in (self.found, self.hits))
        with np.errstate(invalid="ignore", divide="ignore"):
            return hits / found, hits / self.boxes[:, None]

    def ap50(self) -> np.ndarray:
        """(C,) average precision at IoU 0.5 of all candidates (area under the envelope); NaN without a box."""
        precision, recall = (np.nan_to_num(c[:, ::-1]) for c in self.curves())
        envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        area = (np.diff(recall, prepend=0.0, axis=1) * envelope).sum(1)
        return np.asarray(np.where(self.boxes > 0, area, np.nan))


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
    """

    names: list[str]
    scores: ScoreCounts
    rate_c: np.ndarray
    chosen: str
    tau: dict[str, np.ndarray]
    evidence: dict[str, Evidence]
    doubtful: list[tuple[str, Boxes]] = field(default_factory=list)

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
    scores.calibration = calibrate(evidence["val"].found, evidence["val"].hits)
    rate = labelled_rates(manifest.labelled_rows(), classes)
    tau = {p: policy_thresholds(config.thresholds, p, scores, rate, config.train.steps) for p in POLICIES}
    quality = Quality(manifest.names, scores, rate, config.thresholds.threshold_policy, tau, evidence)
    quality.doubtful = _most_doubtful(store, tau[quality.chosen])
    return quality


def doubt(boxes: Boxes, tau_c: np.ndarray) -> float:
    """How doubtful an image is: candidates near their threshold, and pseudo-labels that moved under flips, add up."""
    distance = np.abs(boxes[:, 5] - tau_c[boxes[:, 0].astype(int)])
    moved = (1 - boxes[:, 6]) * (boxes[:, 5] >= tau_c[boxes[:, 0].astype(int)])
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
                f"class '{name}' gets no pseudo-labels: its {held} candidates on val do not show the precision asked for; "
                "the teacher's soft scores still teach it"
            )
        elif usual == 0:
            notes.append(f"class '{name}' has no labelled box: its pseudo-labels cannot be trusted")
        elif own < FEW * usual:
            notes.append(f"class '{name}' gets almost no pseudo-labels ({numbers}); lower --tau or --tau-min")
        elif own > MANY * usual:
            notes.append(f"class '{name}' gets far too many pseudo-labels ({numbers}); raise --tau or --tau-min")
        if precision[c] < 0.5:
            notes.append(f"class '{name}': {1 - precision[c]:.0%} of its pseudo-labels on the val split are wrong")
    return notes
