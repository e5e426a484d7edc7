"""Near-duplicate groups: images that must not be separated by a split.

The hash of an image is the band-passed 2-D DCT of its 48 x 48 grey thumbnail. Low frequencies (smooth shading, which
most images of one line share) are removed by a Gaussian high-pass, high ones (noise) are cut. The dot product of two
normalised hashes is the correlation of the two shading-free thumbnails. A mirror image only flips the signs of odd
coefficients, so one comparison covers an image and its three flips (Zauner 2010 describes DCT hashes; the band-pass and
the parity trick are ours).

The neighbour search is exact and runs block by block: memory is O(n), never O(n^2). It costs n^2 * 576 multiplications:
4,000 images take a second, 100,000 some minutes on two cores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dfssd.data.checks import THUMB_SIDE

BANDS = 24  # DCT coefficients kept per axis
SHADING_SIGMA = 3.0  # px of the thumbnail; structure much wider than this is shading
FLAT_STD = 0.5  # grey levels; below this an image has no structure to be compared by
BLOCK = 2048


def hashes(thumbs_nhw: np.ndarray) -> np.ndarray:
    """(n,48,48) uint8 thumbnails -> (n,4,144) float32 unit vectors, one row per parity of the two frequencies."""
    coefficients = dctn(thumbs_nhw.astype(np.float32), axes=(1, 2), norm="ortho")[:, :BANDS, :BANDS]
    frequency = np.arange(BANDS) / (2 * THUMB_SIDE)
    squared = frequency[:, None] ** 2 + frequency[None, :] ** 2
    banded = coefficients * (1 - np.exp(-2 * (np.pi * SHADING_SIGMA) ** 2 * squared))
    norm = np.sqrt((banded**2).sum((1, 2)))
    banded /= np.maximum(norm, FLAT_STD * THUMB_SIDE)[:, None, None]
    parts = [banded[:, u::2, v::2].reshape(len(banded), -1) for u in (0, 1) for v in (0, 1)]
    return np.stack(parts, 1).astype(np.float32)


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest correlation over the flips: (n,4,144), (m,4,144) -> (n,m)."""
    ee, eo, oe, oo = (a[:, k] @ b[:, k].T for k in range(4))
    best = oe + eo + oo
    for signs in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        np.maximum(best, signs[0] * oe + signs[1] * eo + signs[2] * oo, out=best)
    return np.asarray(ee + best)


def near_pairs(hashes_n: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of (i, j, correlation) for all pairs i < j that correlate at `threshold` or above."""
    n = len(hashes_n)
    for i in range(0, n, BLOCK):
        for j in range(i, n, BLOCK):
            block = similarity(hashes_n[i : i + BLOCK], hashes_n[j : j + BLOCK])
            rows, columns = np.nonzero(block >= threshold)
            values = block[rows, columns]
            keep = rows + i < columns + j
            yield (rows + i)[keep].astype(np.int32), (columns + j)[keep].astype(np.int32), values[keep]


def components(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Connected components of n nodes with edges (i, j); labels are the smallest member's index."""
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(n, n))
    _, labels = connected_components(graph, directed=False)
    first = np.full(labels.max(initial=0) + 1, n)
    np.minimum.at(first, labels, np.arange(n))
    return np.asarray(first[labels], np.int64)


def group_images(
    thumbs_nhw: np.ndarray, threshold: float, max_share: float
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Group near-duplicates.

    Pairs above `threshold` are linked. A chain of links can tie thousands of merely similar images together, so a group
    that is larger than `max_share` of all images (and than 20) is cut again with a correlation raised by 0.01 at a time.

    Args:
        thumbs_nhw: (n,48,48) uint8.
        threshold: correlation from which two images are near-duplicates.
        max_share: largest accepted group as a share of n.

    Returns:
        groups: (n,) int32, numbered from 0 in order of first member.
        pairs: (i, j, correlation), all near-duplicate pairs, also those that a cut separated: what is left of them across
            splits is the leak that the report states.
    """
    n = len(thumbs_nhw)
    blocks = list(near_pairs(hashes(thumbs_nhw), threshold)) or [(np.zeros(0, np.int32),) * 2 + (np.zeros(0),)]
    i, j, value = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    labels = components(n, i, j)
    limit, level, keep = max(20, int(max_share * n)), threshold, np.ones(len(i), bool)
    while level < 0.995:
        large = [label for label, size in Counter(labels.tolist()).items() if size > limit]
        if not large:
            break
        level += 0.01
        keep &= (value >= level) | ~np.isin(labels[i], large)
        labels = components(n, i[keep], j[keep])
    _, groups = np.unique(labels, return_inverse=True)
    return groups.astype(np.int32), (i, j, value)
