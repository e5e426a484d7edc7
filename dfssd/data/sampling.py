"""Which images make up which step: a pure function of (seed, stream, step).

A stream (labelled or unlabelled) is an endless row of positions; epoch e covers the positions e*n .. (e+1)*n-1 in an
order drawn from (seed, stream, e); with repeat factors n is their sum, and an image comes that often, rounded up or down
anew in each epoch. Step s uses the positions s*B .. (s+1)*B-1. WorkerGroup size only slices a step's positions,
and a resumed run needs nothing but the step it stopped at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dfssd.data.boxes import CLS
from dfssd.data.manifest import Boxes

Repeats = int | tuple[float, ...]  # number of images, each once an epoch; or how often each one comes


class Draw(NamedTuple):
    """One sample to make: image number `image` of `stream`, with augmentations seeded by `seed`."""

    stream: str
    image: int
    seed: int
    mosaic: bool


@lru_cache(maxsize=8)
def epoch_order(seed: int, stream: str, epoch: int, repeats: Repeats) -> np.ndarray:
    """Images of a stream in the order of one epoch.

    Fractions are rounded by systematic sampling: an image with factor 1.4 comes once or twice, in the long run 1.4 times,
    and the length of an epoch never changes, so that a position says in which epoch it lies.
    """
    rng = np.random.default_rng(stable_seed(seed, stream, epoch))
    length = epoch_length(repeats)
    if isinstance(repeats, int):
        return rng.permutation(length)
    shuffled = rng.permutation(len(repeats))  # neighbours share a draw, so they must change
    ends = np.cumsum(np.asarray(repeats)[shuffled])
    marks = (np.arange(length) + rng.random()) * (ends[-1] / length)
    images = shuffled[np.searchsorted(ends, marks, side="right").clip(max=len(repeats) - 1)]
    return np.asarray(images[rng.permutation(length)])


def epoch_length(repeats: Repeats) -> int:
    """Samples in one epoch of a stream."""
    return repeats if isinstance(repeats, int) else round(sum(repeats))


def repeat_factors(boxes: Sequence[Boxes | None], classes: int, threshold: float) -> tuple[float, ...]:
    """How often each image comes in an epoch: max over its classes of max(1, sqrt(threshold / share of images with it)).

    Repeat-factor sampling, Gupta et al., LVIS, CVPR 2019, section B.1. 0 switches it off.
    """
    shown = np.zeros((len(boxes), classes), bool)
    for row, own in zip(shown, boxes, strict=True):
        if own is not None and len(own):
            row[own[:, CLS].astype(int)] = True
    share = shown.mean(0)
    factor = np.sqrt(threshold / np.maximum(share, 1e-12)).clip(min=1)
    return tuple(float(f) for f in np.where(shown, factor, 1.0).max(1, initial=1.0))


def stable_seed(*parts: object) -> int:
    """32-bit seed from any values; equal on every machine and Python version (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def draw(seed: int, stream: str, position: int, repeats: Repeats, mosaic: bool) -> Draw:
    """The sample at a position of a stream."""
    n = epoch_length(repeats)
    order = epoch_order(seed, stream, position // n, repeats)
    return Draw(stream, int(order[position % n]), stable_seed(seed, stream, "augment", position), mosaic)


class StepSampler:
    """Yields, step by step, the micro-batches of one rank: samples of each, labelled ones first.

    Args:
        repeats: for each stream its number of images, or how often each image comes in an epoch.
        per_step: images of each stream in a global batch.
        steps: range of steps to yield, `first` to `last` (exclusive).
        plain_from: first step without mosaic.
        rank, world_size: which of a step's micro-batches: every `world_size`-th, from rank on.
        micro_batches: slices that a step is cut into; 0: one a worker.
    """

    def __init__(
        self,
        repeats: dict[str, Repeats],
        per_step: dict[str, int],
        seed: int,
        first: int,
        last: int,
        plain_from: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 0,
    ) -> None:
        self.micro_batches = micro_batches or world_size
        self.repeats, self.per_step, self.seed = repeats, per_step, seed
        self.first, self.last, self.plain_from = first, last, plain_from
        self.rank, self.world_size = rank, world_size

    @property
    def mine(self) -> range:
        """The micro-batches of a step that this rank computes."""
        return range(self.rank, self.micro_batches, self.world_size)

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.mine)

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first, self.last):
            for index in self.mine:
                yield self.at(step, index)

    def at(self, step: int, index: int) -> list[Draw]:
        """Samples of one micro-batch of a step."""
        return [
            draw(self.seed, stream, position, self.repeats[stream], step < self.plain_from)
            for stream, count in self.per_step.items()
            for position in range(step * count + index, (step + 1) * count, self.micro_batches)
        ]
