"""How sure a rate is: intervals over near-duplicate groups, and how many pictures a statement would need.

Pictures of one group are nearly the same picture, so the group is what is drawn (a cluster bootstrap: Davison &
Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). A bootstrap of a handful of events is too narrow, and
of none it has no width at all; the exact interval over as many trials as there are groups (Clopper & Pearson,
Biometrika 26, 1934) is therefore joined with it.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta

RESAMPLES = 1000
LEVEL = 0.95


def rate_interval(events: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the share of pictures with an event.

    Args:
        events: (n,) bool, one a picture.
        groups: (n,) near-duplicate group of each picture.

    Returns:
        (low, high), 0..1; (0, 1) where there is no picture.
    """
    if not len(events):
        return 0.0, 1.0
    _, index = np.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    hits, sizes = np.bincount(index, events.astype(float), count), np.bincount(index, minlength=count)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile((draws @ hits) / (draws @ sizes), [tail, 1 - tail])
    rate = float(events.mean())
    exact = exact_interval(rate * count, count)
    return min(float(low), exact[0]), max(float(high), exact[1])


def exact_interval(events: float, trials: int) -> tuple[float, float]:
    """Clopper-Pearson interval (0..1) of `events` in `trials`; a fraction of an event is allowed."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if events <= 0 else float(beta.ppf(tail, events, trials - events + 1))
    high = 1.0 if events >= trials else float(beta.ppf(1 - tail, events + 1, trials - events))
    return low, high


def trials_needed(rate: float) -> float:
    """Pictures without a single event from which a rate below `rate` can be claimed with 95 % confidence (one-sided);
    infinite for a rate of 0."""
    return math.ceil(math.log(1 - LEVEL) / math.log1p(-rate)) if rate > 0 else math.inf


def rate_of_new(rate: float, trials: int) -> float:
    """Share of new pictures that pass on average at the highest score that lets at most `rate` of `trials` pass.

    Whatever the scores are distributed like: a new one falls into each of the gaps between the known ones equally often
    (Wilks, Annals of Mathematical Statistics 12, 1941).
    """
    return (math.floor(rate * trials + 1e-9) + 1) / (trials + 1)
