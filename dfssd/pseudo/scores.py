"""Scores as bins of a histogram: all that policies and calibration know of them."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 1000  # of a score histogram; thresholds are exact to a thousandth
NEVER = 1.01  # a threshold that no score reaches: the class gets soft scores only, no boxes


def score_bin(score: Any) -> Any:
    """Histogram bin of a score. Half a bin in a million is added, so that 0.3 as a float lands in bin 300."""
    return np.minimum((np.asarray(score, np.float64) * BINS + 1e-4).astype(int), BINS - 1)
