"""Near-duplicates among many images without comparing all with all.

Every image visits the few *cells* whose centres are nearest to it, and is compared, exactly, with the images that live there.
Cells are the Voronoi cells of k-means centres (an inverted file: Sivic and Zisserman 2003; Jégou et al. 2011), but over the
absolute values of the hash: a mirror image flips only signs, so that an image and its flips lie in the same place, and no two
images are farther apart there than their hashes are under the best flip. The work grows as n, as cells hold as many images
however many there are; finding the cells costs n^2 / 4 multiplications, a thousandth of comparing all with all.

A pair is found if either image visits the other's cell. What that misses is measured by
`benchmarks/prepare.py`.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from scipy.sparse import csr_array

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # i, j, correlation

CELL = 256  # images of a cell, on average
VISITS = 8  # cells that an image visits; its own is one of them
AXES = 64  # principal axes in which centres and distances are computed
SAMPLE = 4096  # images that the axes are found on
A_CELL = 20  # images that a centre is found on
ROUNDS = 6  # of k-means
BLOCK = 2048  # images at a time, whatever is computed: bounds the memory


class Hashes(Protocol):
    """(n,4,144) float32 hashes, in memory or on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray: ...


class HashFile:
    """Hashes of n images in a temporary file (2.3 KB an image): memory holds what is being looked at.

    Args:
        n: rows of the file.
        rows: what it looks like from outside: `rows[k]` is the row of image k; None: all, in order.
    """

    SHAPE = (4, 144)

    def __init__(self, n: int, rows: np.ndarray | None = None) -> None:
        self.rows = np.arange(n) if rows is None else rows
        self._file = tempfile.TemporaryFile(prefix="dfssd-hashes-")  # noqa: SIM115  (lives as long as this object)
        self._file.truncate(max(1, n) * 4 * int(np.prod(self.SHAPE)))
        self._map = mmap.mmap(self._file.fileno(), 0)
        self._all = np.frombuffer(self._map, np.float32).reshape(-1, *self.SHAPE)

    def seen_as(self, rows: np.ndarray) -> HashFile:
        """The same file with other rows, in another order."""
        other = object.__new__(HashFile)
        other.__dict__ |= {**self.__dict__, "rows": rows}
        return other

    def put(self, first: int, hashes: np.ndarray) -> None:
        """Write the rows from `first` on."""
        self._all[first : first + len(hashes)] = hashes
        self._forget()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray, /) -> np.ndarray:
        found = self._all[self.rows[rows]]  # a copy
        self._forget()
        return found

    def _forget(self) -> None:
        """Give the pages back that were looked at. They stay in the system's cache while there is room for it."""
        self._map.madvise(mmap.MADV_DONTNEED)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest correlation over the flips: (n,4,144), (m,4,144) -> (n,m)."""
    ee, eo, oe, oo = (a[:, k] @ b[:, k].T for k in range(4))
    best = oe + eo + oo
    for signs in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        np.maximum(best, signs[0] * oe + signs[1] * eo + signs[2] * oo, out=best)
    return np.asarray(ee + best)


def pairs_by_cells(hashes: Hashes, threshold: float) -> Iterator[Pairs]:
    """Yield (i, j, correlation), i < j, of pairs that correlate at `threshold` or above; each pair once.

    Args:
        hashes: (n,4,144), see `grouping.hashes`.
    """
    visits = _visits(hashes)  # (n,VISITS), the own cell first
    own = visits[:, 0]
    living = np.argsort(own, kind="stable")
    visiting = np.argsort(visits.ravel(), kind="stable")
    cells = int(visits.max(initial=0)) + 1
    lives_from = np.searchsorted(own[living], np.arange(cells + 1))
    visits_from = np.searchsorted(visits.ravel()[visiting], np.arange(cells + 1))
    for cell in range(cells):
        here = living[lives_from[cell] : lives_from[cell + 1]]
        guests = visiting[visits_from[cell] : visits_from[cell + 1]] // visits.shape[1]
        for k in range(0, len(here), BLOCK):
            members = here[k : k + BLOCK]
            hashes_here = hashes[members]
            for g in range(0, len(guests), BLOCK):
                block = similarity(hashes[guests[g : g + BLOCK]], hashes_here)
                a, b = np.nonzero(block >= threshold)
                i, j, value = guests[g : g + BLOCK][a], members[b], block[a, b]
                # Where both visit each other the smaller one's visit counts.
                keep = (i < j) | ((i > j) & ~(visits[j] == own[i][:, None]).any(1))
                low, high = np.minimum(i, j)[keep], np.maximum(i, j)[keep]
                yield low.astype(np.int32), high.astype(np.int32), value[keep]


def _visits(hashes: Hashes) -> np.ndarray:
    """(n,VISITS) int32: the nearest cells of every image, the nearest first."""
    n, rng = len(hashes), np.random.default_rng(0)
    mean, axes = _axes(hashes[np.sort(rng.permutation(n)[:SAMPLE])])

    def placed(rows: np.ndarray) -> Iterator[np.ndarray]:
        for k in range(0, len(rows), BLOCK):
            yield (_unsigned(hashes[rows[k : k + BLOCK]]) - mean) @ axes

    cells = max(VISITS, n // CELL)
    sample = np.concatenate(list(placed(np.sort(rng.permutation(n)[: A_CELL * cells]))))
    centres = _centres(sample, cells, rng)
    found = [_nearest(block, centres, VISITS) for block in placed(np.arange(n))]
    return np.concatenate(found)


def _unsigned(hashes_n: np.ndarray) -> np.ndarray:
    """(n,4,144) -> (n,576): the same for an image and its flips."""
    return np.asarray(np.abs(hashes_n.reshape(len(hashes_n), -1)))


def _axes(hashes_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (576) and principal axes (576,AXES) of unsigned hashes."""
    flat = _unsigned(hashes_n)
    mean = flat.mean(0)
    _, vectors = np.linalg.eigh((flat - mean).T @ (flat - mean))
    return mean, np.ascontiguousarray(vectors[:, ::-1][:, :AXES], np.float32)


def _nearest(points: np.ndarray, centres: np.ndarray, count: int) -> np.ndarray:
    """(n,AXES), (cells,AXES) -> (n,count) int32 indices of the nearest centres, the nearest first."""
    distance = (centres**2).sum(1) - 2 * points @ centres.T
    if count == 1:
        return np.asarray(distance.argmin(1), np.int32)[:, None]
    some = np.argpartition(distance, count - 1, axis=1)[:, :count]
    order = np.take_along_axis(distance, some, 1).argsort(1, kind="stable")
    return np.asarray(np.take_along_axis(some, order, 1), np.int32)


def _centres(sample: np.ndarray, cells: int, rng: np.random.Generator) -> np.ndarray:
    """k-means (Lloyd), a few rounds: the centres need to be no better than that. An empty cell keeps its centre."""
    centres = sample[rng.permutation(len(sample))[:cells]]
    for _ in range(ROUNDS):
        blocks = (sample[k : k + BLOCK] for k in range(0, len(sample), BLOCK))
        own = np.concatenate([_nearest(block, centres, 1)[:, 0] for block in blocks])
        ones = np.ones(len(sample), np.float32)
        member = csr_array((ones, (own, np.arange(len(sample)))), shape=(len(centres), len(sample)))
        counts = np.bincount(own, minlength=len(centres))[:, None]
        centres = np.where(counts > 0, (member @ sample) / np.maximum(counts, 1), centres).astype(np.float32)
    return centres
