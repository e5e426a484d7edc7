"""Near-duplicate groups: images that must not be separated by a split.

The hash of an image is the band-passed 2-D DCT of its 48 x 48 grey thumbnail. Low frequencies (smooth shading, which
most images of one line share) are removed by a Gaussian high-pass, high ones (noise) are cut. The dot product of two
normalised hashes is the correlation of the two shading-free thumbnails. A mirror image only flips the signs of odd
coefficients, so one comparison covers an image and its three flips (Zauner 2010 describes DCT hashes; the band-pass and
the parity trick are ours).

Up to EXACT_UP_TO images all pairs are compared, block by block: memory is O(n), never O(n^2). That costs n^2 * 576
multiplications: 4,000 images take half a second, 20,000 four seconds. Above, `neighbours` looks where near-duplicates can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dfssd.data.checks import THUMB_SIDE
from dfssd.data.preparation.neighbours import Hashes, Pairs, pairs_by_cells, similarity

BANDS = 24  # DCT coefficients kept per axis
SHADING_SIGMA = 3.0  # px of the thumbnail; structure much wider than this is shading
FLAT_STD = 0.5  # grey levels; below this an image has no structure to be compared by
BLOCK = 2048
EXACT_UP_TO = 20_000  # images; fewer need no search
EXACT_BELOW = 0.85  # correlation below which cells miss too many pairs: all are compared, however many images there are


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


def near_pairs(hashes_n: Hashes, threshold: float) -> Iterator[Pairs]:
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


def find_pairs(hashes_n: Hashes, threshold: float) -> Pairs:
    """(i, j, correlation) of all pairs i < j of near-duplicates."""
    exact = len(hashes_n) <= EXACT_UP_TO or threshold < EXACT_BELOW
    blocks = list((near_pairs if exact else pairs_by_cells)(hashes_n, threshold))
    blocks = blocks or [(np.zeros(0, np.int32),) * 2 + (np.zeros(0),)]
    i, j, value = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return i, j, value


def group_images(thumbs_nhw: np.ndarray, threshold: float, max_share: float) -> tuple[np.ndarray, Pairs]:
    """`group_hashes` of (n,48,48) uint8 thumbnails."""
    return group_hashes(hashes(thumbs_nhw), threshold, max_share)


def group_hashes(hashes_n: Hashes, threshold: float, max_share: float) -> tuple[np.ndarray, Pairs]:
    """Group near-duplicates.

    Pairs above `threshold` are linked. A chain of links can tie thousands of merely similar images together, so a group
    that is larger than `max_share` of all images (and than 20) is cut again with a correlation raised by 0.01 at a time.

    Args:
        hashes_n: (n,4,144), in memory or on disk.
        threshold: correlation from which two images are near-duplicates.
        max_share: largest accepted group as a share of n.

    Returns:
        groups: (n,) int32, numbered from 0 in order of first member.
        pairs: (i, j, correlation), all near-duplicate pairs, also those that a cut separated: what is left of them across
            splits is the leak that the report states.
    """
    n = len(hashes_n)
    i, j, value = find_pairs(hashes_n, threshold)
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
