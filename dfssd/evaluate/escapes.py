"""Per picture: escape (defective, nothing found) against overkill (clean, something found), and where to set the score.

What a line decides about is the part, not the box: a picture is rejected where any class has a box at or above its
threshold. Thresholds are chosen on the val split for a stated escape rate and confirmed on test.

Legend: P pictures, C classes. Records are those of `dfssd.evaluate.validation.collect`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dfssd.evaluate.intervals import rate_interval, rate_of_new

FLOOR = 0.01  # lowest score that is offered as an operating point: below it nearly everything is a detection
CLASS_PICTURES = 10  # val pictures that must show a class before it gets a threshold of its own
FOLDS = 5
CURVE = np.concatenate([[0.01, 0.02, 0.03, 0.04], np.arange(1, 20) / 20, [0.97, 0.99]])


@dataclass(frozen=True)
class Pictures:
    """What one model says of each picture, as far as a decision about the picture needs it.

    Args:
        best: (P,C) highest score of each class; 0 where there is no box of it.
        shows: (P,C) bool, does the picture show a defect of the class?
        groups: (P,) near-duplicate group.
        false_scores: by class, scores of boxes that hit nothing at IoU 0.5, rising.
        false_in: by class, the pictures (index) that these boxes are in.
    """

    best: np.ndarray
    shows: np.ndarray
    groups: np.ndarray
    false_scores: tuple[np.ndarray, ...]
    false_in: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], classes: int) -> Pictures:
        """From matches of each picture."""
        best = np.zeros((len(records), classes))
        shows = np.zeros((len(records), classes), bool)
        for k, one in enumerate(records):
            np.maximum.at(best[k], one["pred_cls"].astype(int), one["conf"])
            shows[k, one["target_cls"].astype(int)] = True
        wrong = [~one["tp"][:, 0] for one in records]
        empty = np.zeros(0)
        cls_n = np.concatenate([one["pred_cls"][w] for one, w in zip(records, wrong, strict=True)] or [empty])
        conf_n = np.concatenate([one["conf"][w] for one, w in zip(records, wrong, strict=True)] or [empty])
        picture_n = np.repeat(np.arange(len(records)), [w.sum() for w in wrong])
        groups = np.array([one.get("group", k) for k, one in enumerate(records)])
        return cls._sorted(best, shows, groups, [(conf_n[cls_n == c], picture_n[cls_n == c]) for c in range(classes)])

    @classmethod
    def _sorted(
        cls, best: np.ndarray, shows: np.ndarray, groups: np.ndarray, false: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Pictures:
        order = [np.argsort(conf, kind="stable") for conf, _ in false]
        scores = tuple(conf[o] for (conf, _), o in zip(false, order, strict=True))
        return cls(best, shows, groups, scores, tuple(index[o] for (_, index), o in zip(false, order, strict=True)))

    def take(self, index: np.ndarray) -> Pictures:
        """Some of the pictures, each at most once."""
        place = np.full(len(self.best), -1)
        place[index] = np.arange(len(index))
        false = [(conf, place[k]) for conf, k in zip(self.false_scores, self.false_in, strict=True)]
        kept = [(conf[k >= 0], k[k >= 0]) for conf, k in false]
        return self._sorted(self.best[index], self.shows[index], self.groups[index], kept)

    @property
    def defective(self) -> np.ndarray:
        """(P,) bool: is there any defect?"""
        return np.asarray(self.shows.any(1))

    def rejected(self, tau_c: np.ndarray) -> np.ndarray:
        """(P,) bool: has any class a box at or above its threshold?"""
        return np.asarray((self.best >= tau_c).any(1))

    def false_boxes(self, tau_c: np.ndarray) -> int:
        """Boxes at or above their class's threshold that hit nothing."""
        return sum(len(s) - int(np.searchsorted(s, t)) for s, t in zip(self.false_scores, tau_c, strict=True))


def measure(pictures: Pictures, tau_c: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Escapes and overkill at class thresholds, with 95 % intervals over groups; JSON-ready."""
    rejected, defective = pictures.rejected(tau_c), pictures.defective
    by_class = {
        name: _rate(~rejected[pictures.shows[:, c]], pictures.groups[pictures.shows[:, c]])
        | {"not_named": int((pictures.best[pictures.shows[:, c], c] < tau_c[c]).sum())}
        for c, name in enumerate(names)
    }
    return {
        "escape": _rate(~rejected[defective], pictures.groups[defective]),
        "overkill": _rate(rejected[~defective], pictures.groups[~defective]),
        "false_boxes": round(pictures.false_boxes(tau_c) / max(1, len(rejected)), 4),
        "escape_by_class": by_class,
    }


def _rate(events: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    low, high = rate_interval(events, groups)
    count = len(events)
    return {
        "pictures": count,
        "groups": len(set(groups.tolist())),
        "count": int(events.sum()),
        "rate": round(float(events.mean()), 4) if count else None,
        "low": round(low, 4),
        "high": round(high, 4),
    }


def curve(pictures: Pictures, names: Sequence[str]) -> dict[str, Any]:
    """Escape rate, overkill rate and false boxes a picture over one score for all classes; escape by class too.

    Lists over `score`; None where there is no such picture.
    """
    defective, classes = pictures.defective, pictures.best.shape[1]
    rejected = np.stack([pictures.rejected(np.full(classes, t)) for t in CURVE])

    def rates(part: np.ndarray, events: np.ndarray) -> list[float | None]:
        return [round(float(e), 4) for e in events[:, part].mean(1)] if part.any() else [None] * len(CURVE)

    return {
        "score": CURVE.round(3).tolist(),
        "escape": rates(defective, ~rejected),
        "overkill": rates(~defective, rejected),
        "false_boxes": [round(pictures.false_boxes(np.full(classes, t)) / len(defective), 4) for t in CURVE],
        "escape_by_class": {n: rates(pictures.shows[:, c], ~rejected) for c, n in enumerate(names)},
    }


def single_threshold(pictures: Pictures, max_escape: float) -> tuple[float, bool]:
    """The highest score at which at most `max_escape` of the defective pictures pass, and whether there is one.

    Rounded down to thousandths, and never below FLOOR.
    """
    scores = np.sort(pictures.best.max(1, initial=0.0)[pictures.defective])
    if not len(scores):
        return FLOOR, False
    allowed = int(np.floor(max_escape * len(scores) + 1e-9))
    tau = float(np.floor(scores[min(allowed, len(scores) - 1)] * 1000) / 1000)
    return max(tau, FLOOR), tau >= FLOOR


def class_thresholds(pictures: Pictures, max_escape: float) -> tuple[np.ndarray, bool]:
    """(C,) thresholds that spare clean pictures and false boxes at no more escapes than the common score; and whether they
    differ from it.

    They are kept where they hold for pictures that they were not chosen on: cross-validation over groups of near-duplicates,
    against the common score chosen on the same pictures (Stone, JRSS B 1974). Chosen freely on a few dozen pictures they
    let more defective ones of the test split pass, and spared no clean one.
    """
    tau, _ = single_threshold(pictures, max_escape)
    common = np.full(pictures.best.shape[1], tau)
    raised = _thresholds(pictures, max_escape)
    if (raised == common).all():
        return common, False
    rng, ids = np.random.default_rng(0), np.unique(pictures.groups)
    fold_of = dict(zip(ids.tolist(), (rng.permutation(len(ids)) % FOLDS).tolist(), strict=True))
    fold = np.array([fold_of[g] for g in pictures.groups.tolist()])
    ours = theirs = (0, 0, 0)
    for k in range(FOLDS):
        chosen_on, seen = pictures.take(np.flatnonzero(fold != k)), pictures.take(np.flatnonzero(fold == k))
        single = np.full(len(common), single_threshold(chosen_on, max_escape)[0])
        ours = _plus(ours, _errors(seen, _thresholds(chosen_on, max_escape)))
        theirs = _plus(theirs, _errors(seen, single))
    holds = ours[0] <= theirs[0] and ours[1:] < theirs[1:]
    return (raised, True) if holds else (common, False)


def _errors(pictures: Pictures, tau_c: np.ndarray) -> tuple[int, int, int]:
    """Defective pictures that pass, clean pictures rejected, false boxes."""
    return (int((~pictures.rejected(tau_c))[pictures.defective].sum()), *_cost(pictures, tau_c))


def _plus(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def _thresholds(pictures: Pictures, max_escape: float) -> np.ndarray:
    """(C,) thresholds at which on these pictures no more escape than at the common score, and fewer clean ones are rejected.

    From common scores at and below the single one, the thresholds of well-shown classes rise; each step takes the rise that
    spares the most clean pictures, and among equals the most false boxes. A lower start lets one class rise at the cost of
    the others.
    """
    tau, _ = single_threshold(pictures, max_escape)
    classes, defective = pictures.best.shape[1], pictures.defective
    escaped = int((~pictures.rejected(np.full(classes, tau)))[defective].sum())
    allowed = max(escaped, int(max_escape * defective.sum() + 1e-9))
    starts = {tau, *(single_threshold(pictures, max_escape * part)[0] for part in (0.0, 0.5)), max(FLOOR, tau / 2)}
    free = pictures.shows.sum(0) >= CLASS_PICTURES
    ends = [_raised(pictures, np.where(free, start, tau), free, allowed) for start in sorted(starts, reverse=True)]
    return min(ends, key=lambda end: _cost(pictures, end))


def _cost(pictures: Pictures, tau_c: np.ndarray) -> tuple[int, int]:
    """Clean pictures rejected, false boxes."""
    return int(pictures.rejected(tau_c)[~pictures.defective].sum()), pictures.false_boxes(tau_c)


def _raised(pictures: Pictures, tau_c: np.ndarray, free: np.ndarray, allowed: int) -> np.ndarray:
    """Thresholds of the `free` classes raised step by step as long as at most `allowed` defective pictures pass."""
    best = _cost(pictures, tau_c)
    while True:
        tried = []
        for c in np.flatnonzero(free).tolist():
            for value in _steps(pictures, c, tau_c[c]):
                candidate = tau_c.copy()
                candidate[c] = value
                if (~pictures.rejected(candidate))[pictures.defective].sum() <= allowed:
                    tried.append((_cost(pictures, candidate), value, c, candidate))
        if not tried or min(tried, key=lambda t: t[:3])[0] >= best:
            return tau_c
        best, _, _, tau_c = min(tried, key=lambda t: t[:3])


def _steps(pictures: Pictures, c: int, above: float) -> np.ndarray:
    """Scores just above which false boxes of the class lie, thinned to at most 24."""
    scores = pictures.false_scores[c]
    scores = np.unique(np.ceil(scores[scores >= above] * 1000 + 1) / 1000)
    scores = scores[scores <= 0.99]
    return scores[np.linspace(0, len(scores) - 1, min(24, len(scores))).astype(int)] if len(scores) else scores


def operating_point(val: Pictures, names: Sequence[str], max_escape: float, split: str = "val") -> dict[str, Any]:
    """Thresholds chosen on val for at most `max_escape` of the defective pictures; JSON-ready.

    Args:
        split: what its pictures are called in the notes; '' where they are of none.

    Returns:
        max_escape, chosen_on, score (one for all classes), thresholds (by class), reachable, notes (plain sentences).
    """
    score, reachable = single_threshold(val, max_escape)
    tau_c, by_class = class_thresholds(val, max_escape)
    point = {
        "max_escape": max_escape,
        "chosen_on": "val",
        "score": round(score, 3),
        "thresholds": {n: round(float(t), 3) for n, t in zip(names, tau_c, strict=True)},
        "reachable": reachable,
    }
    return {**point, "notes": _notes(val, names, point, by_class, f"{split} pictures".strip())}


def _notes(val: Pictures, names: Sequence[str], point: Mapping[str, Any], by_class: bool, pictures: str) -> list[str]:
    """What has to be known of an operating point, in sentences."""
    defective, max_escape = int(val.defective.sum()), point["max_escape"]
    if not defective:
        return [f"no defective picture among the {pictures}: no operating point can be chosen"]
    notes = []
    if not point["reachable"]:
        escaped = int((~val.rejected(thresholds_of(point, names)))[val.defective].sum())
        notes.append(
            f"an escape rate of {max_escape:.1%} cannot be reached: at the lowest usable score of {FLOOR}, "
            f"{escaped} of {defective} defective {pictures} still pass"
        )
    else:
        notes += _too_few_to_choose(val, max_escape, pictures)
    few = [n for c, n in enumerate(names) if val.shows[:, c].sum() < CLASS_PICTURES]
    if few and (by_class or len(few) == len(names) > 1):
        notes.append(f"fewer than {CLASS_PICTURES} {pictures} show {', '.join(few)}: the common score is used there")
    elif not by_class and len(names) > 1:
        notes.append("thresholds by class were no better in cross-validation: the common score is used for all")
    return notes


def _too_few_to_choose(val: Pictures, max_escape: float, pictures: str) -> list[str]:
    """A sentence where a score chosen on so few pictures lets twice as many new ones pass as was asked for."""
    groups = len(set(val.groups[val.defective].tolist()))
    new = rate_of_new(max_escape, groups)
    if new <= 2 * max_escape:
        return []
    who = pictures.removesuffix("s") if groups == 1 else pictures
    enough = f"; {math.ceil(1 / max_escape) - 1} would do" if max_escape > 0 else ""
    return [
        f"{groups} defective {who} cannot choose a score for an escape rate of {max_escape:.1%}: one chosen on so few "
        f"lets {new:.1%} of new ones pass on average{enough}"
    ]


def thresholds_of(point: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """(C,) thresholds of an operating point in the order of `names`; the common score for a class it does not know."""
    return np.array([point["thresholds"].get(name, point["score"]) for name in names], np.float64)
