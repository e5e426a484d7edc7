"""A choice that covers what is there: greedy facility location, class by class.

The value of a set S beside the labelled images L is

    F(S) = sum over classes c of w_c * sum over images i of p_ic * max over j in L or S of p_jc * s_ij

with p the probability that an image shows a class (1 or 0 where it is labelled), s the likeness of two images (squared
positive cosine of their features) and w_c = 1 / sum_i p_ic. F is monotone and submodular: the greedy choice reaches at least
1 - 1/e of the best value (Nemhauser et al. 1978), and gains only fall, so that few have to be computed anew (Minoux 1978; for
data subsets Wei, Iyer and Bilmes, ICML 2015).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np

SHARPNESS = 2.0  # power of the cosine: only what is really alike is covered
LEAST = 0.01  # probability below which an image does not show a class
BLOCK = 512


@dataclass
class Coverage:
    """What labelled and chosen images cover of n unlabelled ones.

    Args:
        features: (n,d) unit vectors; known: (m,d) those of labelled images.
        shows: (n,C) probability that an image shows a class; known_shows: (m,C).
        weights: (C,) how much each class counts.
    """

    features: np.ndarray
    shows: np.ndarray
    known: np.ndarray
    known_shows: np.ndarray
    weights: np.ndarray
    _members: list[np.ndarray] = field(default_factory=list)  # by class: images that may show it
    _covered: list[np.ndarray] = field(default_factory=list)  # by class: how well each member is covered, 0..1
    _asks: list[np.ndarray] = field(default_factory=list)  # by class: what each member asks for

    def __post_init__(self) -> None:
        self.features = self.features.astype(np.float32)
        self.known = self.known.astype(np.float32)
        for c, weight in enumerate(self.weights):
            members = np.flatnonzero((self.shows[:, c] >= LEAST) & (weight > 0))
            showing = np.flatnonzero(self.known_shows[:, c] >= LEAST)
            covered = np.zeros(len(members), np.float32)
            for first in range(0, len(showing), BLOCK):
                rows = showing[first : first + BLOCK]
                likeness = _likeness(self.features[members], self.known[rows]) * self.known_shows[rows, c]
                covered = np.maximum(covered, likeness.max(1))
            self._members.append(members)
            self._covered.append(covered)
            self._asks.append((weight * self.shows[members, c]).astype(np.float32))

    def gains(self) -> np.ndarray:
        """(n,) what each image would add."""
        found = np.zeros(len(self.features))
        for c, members in enumerate(self._members):
            for first in range(0, len(members), BLOCK):
                own = members[first : first + BLOCK]
                found[own] += self._gain(c, own)
        return found

    def gain(self, row: int) -> float:
        """What one image would add."""
        classes = [c for c in range(len(self._members)) if self.shows[row, c] >= LEAST]
        return float(sum(self._gain(c, np.array([row]))[0] for c in classes))

    def _gain(self, c: int, rows: np.ndarray) -> np.ndarray:
        covers = _likeness(self.features[self._members[c]], self.features[rows]) * self.shows[rows, c]
        better = np.maximum(covers.astype(np.float32) - self._covered[c][:, None], 0)
        return np.asarray(self._asks[c] @ better)

    def add(self, row: int) -> None:
        """Take an image into the choice."""
        for c, members in enumerate(self._members):
            if self.shows[row, c] >= LEAST:
                covers = _likeness(self.features[members], self.features[[row]])[:, 0] * self.shows[row, c]
                self._covered[c] = np.maximum(self._covered[c], covers.astype(np.float32))


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a @ b.T).clip(0, 1) ** SHARPNESS)


def choose(
    coverage: Coverage, worth: np.ndarray, groups: np.ndarray, taken: set[int], k: int
) -> tuple[list[int], np.ndarray]:
    """Greedy choice of k images, one of each group.

    Args:
        worth: (n,) factor of each image's gain.
        groups: (n,) near-duplicate groups; taken: those with a labelled image.

    Returns:
        rows in the order of choice; (n,) gain when chosen, or what is left of it at the end, as a share of the first one's.
    """
    free = ~np.isin(groups, list(taken))
    if not free.any():  # everything resembles something labelled: better that than nothing
        free[:] = True
    worth = worth + 1e-9  # an image that shows nothing comes last, and still comes
    gains = (coverage.gains() + 1e-12) * worth
    heap = [(-gains[row], row) for row in np.flatnonzero(free).tolist()]
    heapq.heapify(heap)
    chosen: list[int] = []
    at_choice: dict[int, float] = {}
    used: set[int] = set()
    while heap and len(chosen) < k:
        _, row = heapq.heappop(heap)
        if int(groups[row]) in used:
            continue
        gain = (coverage.gain(row) + 1e-12) * worth[row]
        if heap and gain < -heap[0][0]:  # the bound was too high: others may be better
            heapq.heappush(heap, (-gain, row))
            continue
        chosen.append(row)
        at_choice[row] = gain
        used.add(int(groups[row]))
        coverage.add(row)
    left = coverage.gains() * worth
    left[list(at_choice)] = list(at_choice.values())
    first = at_choice[chosen[0]] if chosen else 1.0
    return chosen, np.asarray(left / max(first, 1e-12)).clip(0, 1)
