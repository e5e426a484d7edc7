"""Which images make up which step: a pure function of (seed, stream, step).

A stream (labelled or unlabelled) is an endless row of positions; epoch e covers the positions e*n .. (e+1)*n-1 in an
order drawn from (seed, stream, e). Step s uses the positions s*B .. (s+1)*B-1. World size only slices a step's positions,
and a resumed run needs nothing but the step it stopped at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One sample to make: image number `image` of `stream`, with augmentations seeded by `seed`."""

    stream: str
    image: int
    seed: int
    mosaic: bool


@lru_cache(maxsize=8)
def permutation(seed: int, stream: str, epoch: int, n: int) -> np.ndarray:
    """Order of the n images of a stream in one epoch."""
    return np.random.default_rng(stable_seed(seed, stream, epoch)).permutation(n)


def stable_seed(*parts: object) -> int:
    """32-bit seed from any values; equal on every machine and Python version (unlike hash())."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def draw(seed: int, stream: str, position: int, n: int, mosaic: bool) -> Draw:
    """The sample at a position of a stream of n images."""
    order = permutation(seed, stream, position // n, n)
    return Draw(stream, int(order[position % n]), stable_seed(seed, stream, "augment", position), mosaic)


class StepSampler:
    """Yields, step by step, the samples of one rank: labelled ones first.

    Args:
        sizes: images in each stream, e.g. {"labelled": 325, "unlabelled": 2938}.
        per_step: images of each stream in a global batch.
        steps: range of steps to yield, `first` to `last` (exclusive).
        plain_from: first step without mosaic.
        rank, world: which slice of each step's samples.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        per_step: dict[str, int],
        seed: int,
        first: int,
        last: int,
        plain_from: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sizes, self.per_step, self.seed = sizes, per_step, seed
        self.first, self.last, self.plain_from = first, last, plain_from
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first, self.last):
            yield self.at(step)

    def at(self, step: int) -> list[Draw]:
        """Samples of this rank at one step."""
        return [
            draw(self.seed, stream, position, self.sizes[stream], step < self.plain_from)
            for stream, count in self.per_step.items()
            for position in range(step * count + self.rank, (step + 1) * count, self.world)
        ]
