import numpy as np
import pytest

from dfssd.data.sampling import StepSampler, permutation, stable_seed

SIZES, PER_STEP = {"labelled": 37, "unlabelled": 101}, {"labelled": 24, "unlabelled": 24}


def _sampler(first=0, last=12, rank=0, world=1, seed=0):
    return StepSampler(SIZES, PER_STEP, seed, first, last, plain_from=9, rank=rank, world=world)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8])
def test_world_size_only_slices_the_global_batch(world):
    alone = list(_sampler())
    ranks = [list(_sampler(rank=r, world=world)) for r in range(world)]
    for step, want in enumerate(alone):
        together = [d for r in range(world) for d in ranks[r][step]]
        assert sorted(together) == sorted(want)
        assert {len(ranks[r][step]) for r in range(world)} == {48 // world}
        for r in range(world):  # labelled ones first, equally many on every rank
            streams = [d.stream for d in ranks[r][step]]
            assert streams == ["labelled"] * (24 // world) + ["unlabelled"] * (24 // world)


def test_each_image_once_an_epoch():
    draws = [d for batch in _sampler(last=37) for d in batch if d.stream == "labelled"]
    images = [d.image for d in draws]
    for epoch in range(len(images) // 37):
        assert sorted(images[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert images[:37] != images[37:74]


def test_resume_needs_nothing_but_the_step():
    assert list(_sampler(first=5)) == list(_sampler())[5:]


def test_seed_stream_and_close_mosaic():
    assert list(_sampler(seed=1)) != list(_sampler())
    assert [all(d.mosaic for d in b) for b in _sampler()] == [True] * 9 + [False] * 3
    seeds = [d.seed for b in _sampler() for d in b]
    assert len(set(seeds)) == len(seeds)
    assert not np.array_equal(permutation(0, "labelled", 0, 50), permutation(0, "unlabelled", 0, 50))


def test_seeds_are_the_same_on_every_machine():
    assert stable_seed(0, "labelled", 3) == 1968432918
