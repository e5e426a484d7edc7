"""How often a score is right, by class, measured on the val split, and the threshold from which pseudo-labels can be trusted.

A detector's score is no probability: on 143 labelled images two of six classes of a steel data set were right in 20 and
29 % of what a mixture model let through. So scores are calibrated against the val split by isotonic regression (Zadrozny &
Elkan, KDD 2002; for detectors Küppers et al., CVPR-W 2020), each class for itself, and a threshold is asked for a
precision.

Legend: C classes; histograms are (C, BINS) over scores in thousandths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dfssd.pseudo.scores import BINS, NEVER

FEWEST = 20  # candidates of a class on val from which its calibration is believed
ONE_SIDED_95 = 1.645  # standard normal quantile of the lower confidence bound


@dataclass(frozen=True)
class Calibration:
    """What scores are worth.

    Args:
        right_cb: (C, BINS) share (0..1) of candidates with this score that hit a box, rising with the score.
        found_cb: (C, BINS) candidates on val that it rests on.
    """

    right_cb: np.ndarray
    found_cb: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """(C,) candidates on val by class."""
        return np.asarray(self.found_cb.sum(1))

    def precision(self, counts_cb: np.ndarray, tau_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C,) expected precision of the candidates counted in `counts_cb` (C, BINS) from tau_c on, and its lower 95 % bound.

        NaN where there is no such candidate. The bound is Wilson's, for as many candidates as val has from tau_c on.
        """
        expected, bound = self._curves(counts_cb)
        index = np.minimum((tau_c * BINS + 1e-4).astype(int), BINS)
        padded = [np.pad(x, ((0, 0), (0, 1)), constant_values=np.nan) for x in (expected, bound)]
        return padded[0][np.arange(len(index)), index], padded[1][np.arange(len(index)), index]

    def thresholds(self, counts_cb: np.ndarray, wanted: float) -> np.ndarray:
        """(C,) lowest thresholds from which the lower bound of the precision on `counts_cb` (C, BINS) reaches `wanted`.

        A class that never reaches it, or has fewer than FEWEST candidates on val, gets `NEVER`: no boxes.
        """
        _, bound = self._curves(counts_cb)
        good = np.nan_to_num(bound, nan=-1.0) >= wanted
        good &= (self.counts >= FEWEST)[:, None]
        first = good.argmax(1)
        return np.asarray(np.where(good.any(1), first / BINS, NEVER))

    def _curves(self, counts_cb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(C, BINS) expected precision at threshold k/BINS and its lower bound; NaN where there is no candidate."""
        above = counts_cb[:, ::-1].cumsum(1)[:, ::-1].astype(np.float64)
        right = (counts_cb * self.right_cb)[:, ::-1].cumsum(1)[:, ::-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = right / above
        return expected, wilson_lower(expected, self.found_cb[:, ::-1].cumsum(1)[:, ::-1])


def calibrate(found_cb: np.ndarray, hits_cb: np.ndarray) -> Calibration:
    """Isotonic regression of hits on score, by class, weighted by counts.

    Args:
        found_cb, hits_cb: (C, BINS) candidates on val, and those of them that hit a box (`Evidence`).
    """
    return Calibration(np.stack([isotonic(h, n) for h, n in zip(hits_cb, found_cb, strict=True)]), found_cb)


def isotonic(hits_b: np.ndarray, found_b: np.ndarray) -> np.ndarray:
    """(B,) rising share of hits: pool adjacent violators (Ayer et al. 1955). Empty bins take the pool to their left.

    Scores below the first candidate take that one's share; without any candidate all are 0.
    """
    filled = np.flatnonzero(found_b)
    if not len(filled):
        return np.zeros(len(found_b))
    pools: list[list[float]] = []  # [hits, found, first bin]
    for b in filled.tolist():
        pools.append([float(hits_b[b]), float(found_b[b]), b])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] >= pools[-1][0] * pools[-2][1]:
            hits, found, _ = pools.pop()
            pools[-1][0] += hits
            pools[-1][1] += found
    share = np.zeros(len(found_b))
    for k, (hits, found, first) in enumerate(pools):
        last = pools[k + 1][2] if k + 1 < len(pools) else len(found_b)
        share[int(first) if k else 0 : int(last)] = hits / found
    return share


def wilson_lower(share: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Lower end of the one-sided 95 % interval of a share that was seen in `count` cases (Wilson 1927); NaN for none."""
    z, n = ONE_SIDED_95, np.maximum(count.astype(np.float64), 1e-12)
    with np.errstate(invalid="ignore"):
        root = np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        low = (share + z**2 / (2 * n) - z * root) / (1 + z**2 / n)
    return np.where(count > 0, low, np.nan)
