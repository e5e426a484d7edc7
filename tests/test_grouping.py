import numpy as np
import pytest

from dfssd.data.preparation import grouping, neighbours
from dfssd.data.synthetic import make_image


def _thumbs(n, seed=0):
    return np.stack([make_image(np.random.default_rng([seed, k]), 48)[0] for k in range(n)])


def test_blocks_give_what_all_pairs_give(monkeypatch):
    thumbs = np.concatenate([_thumbs(30), _thumbs(30)[:, :, ::-1]])
    h = grouping.hashes(thumbs)
    full = grouping.similarity(h, h)
    want = {(i, j) for i in range(60) for j in range(i + 1, 60) if full[i, j] >= 0.5}
    monkeypatch.setattr(grouping, "BLOCK", 7)
    got = {(int(a), int(b)) for i, j, _ in grouping.near_pairs(h, 0.5) for a, b in zip(i, j, strict=True)}
    assert got == want and len(want) >= 30


def test_similarity_is_the_correlation_of_band_passed_thumbnails():
    """Against a plain float64 reference in the pixel domain."""
    from scipy.fft import idctn

    a, b = _thumbs(2).astype(np.float64)

    def band_passed(x):
        from scipy.fft import dctn

        c = dctn(x, norm="ortho")
        f = np.arange(48) / 96
        keep = 1 - np.exp(-2 * (np.pi * grouping.SHADING_SIGMA) ** 2 * (f[:, None] ** 2 + f**2))
        keep[grouping.BANDS :] = keep[:, grouping.BANDS :] = 0
        y = idctn(c * keep, norm="ortho")
        return y / np.linalg.norm(y)

    flips = [b, b[::-1], b[:, ::-1], b[::-1, ::-1]]
    want = max((band_passed(a) * band_passed(f)).sum() for f in flips)
    h = grouping.hashes(np.stack([a, b]).astype(np.uint8))
    assert grouping.similarity(h[:1], h[1:])[0, 0] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("flip", [np.s_[:, :], np.s_[::-1, :], np.s_[:, ::-1], np.s_[::-1, ::-1]])
def test_mirrored_shaded_and_noisy_copies_are_one_group(flip):
    thumbs = _thumbs(20)
    rng = np.random.default_rng(1)
    shade = np.linspace(-30, 30, 48)[:, None] * 0.7
    copy = (thumbs[4][flip] * 0.9 + shade + rng.normal(0, 1, (48, 48))).clip(0, 255).astype(np.uint8)
    groups, _ = grouping.group_images(np.concatenate([thumbs, copy[None]]), 0.93, 0.02)
    assert groups[20] == groups[4]
    assert len(set(groups.tolist())) == 20


def test_shading_alone_does_not_tie_images_together():
    y, x = np.mgrid[0:48, 0:48]
    rng = np.random.default_rng(0)
    smooth = [(120 + a * x + b * y + rng.normal(0, 2, (48, 48))).clip(0, 255) for a, b in rng.uniform(-1, 1, (40, 2))]
    groups, _ = grouping.group_images(np.stack(smooth).astype(np.uint8), 0.93, 0.02)
    assert len(set(groups.tolist())) == 40


def test_a_chain_is_cut_until_groups_are_small():
    """Each image resembles the next; the ends have nothing in common."""
    a, b = _thumbs(2).astype(float)
    chain = np.stack([(a * (1 - t) + b * t) for t in np.linspace(0, 1, 200)]).clip(0, 255).astype(np.uint8)
    rest = _thumbs(300, seed=5)
    groups, pairs = grouping.group_images(np.concatenate([chain, rest]), 0.93, 0.1)
    assert np.bincount(groups).max() <= 50
    i, j, _ = pairs
    assert (groups[i] != groups[j]).any()  # what the cut left apart is still reported
    uncut, _ = grouping.group_images(np.concatenate([chain, rest]), 0.93, 1.0)
    assert np.bincount(uncut).max() == 200  # without the limit it is one group


@pytest.fixture(scope="module")
def many():
    """2,000 images, and 500 mirrored, noisy or darker copies of some: hashes, and all pairs at 0.93."""
    rng, base = np.random.default_rng(2), _thumbs(2000, seed=9)
    copies = base[rng.permutation(2000)[:500]].astype(np.float32)
    for k in range(4):
        copies[k::4] = copies[k::4, :: 1 - 2 * (k & 1), :: 1 - (k & 2)]
    noise = rng.normal(0, 1, copies.shape) * rng.uniform(0, 4, (500, 1, 1))
    copies = copies * rng.uniform(0.8, 1.1, (500, 1, 1)) + noise
    h = grouping.hashes(np.concatenate([base, copies.clip(0, 255).astype(np.uint8)]))
    return h, _set(grouping.find_pairs(h, 0.93))


def _set(pairs):
    found = list(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))
    assert len(found) == len(set(found)) and all(i < j for i, j in found)
    return set(found)


def test_cells_find_the_pairs_that_comparing_all_finds(many, monkeypatch):
    h, want = many
    assert len(want) >= 400
    monkeypatch.setattr(grouping, "EXACT_UP_TO", 100)
    monkeypatch.setattr(neighbours, "BLOCK", 100)  # cells of more than one block, too
    found = _set(grouping.find_pairs(h, 0.93))
    assert found <= want, "what is found is compared exactly"
    assert len(found) >= 0.999 * len(want)


def test_too_few_visits_lose_pairs(many, monkeypatch):
    """Else the test above would say nothing."""
    h, want = many
    monkeypatch.setattr(neighbours, "CELL", 16)
    monkeypatch.setattr(neighbours, "VISITS", 1)
    pairs = [np.concatenate(parts) for parts in zip(*neighbours.pairs_by_cells(h, 0.93), strict=True)]
    assert len(_set(pairs)) < 0.999 * len(want)


def test_hashes_on_disk_group_as_those_in_memory(many, monkeypatch):
    h, _ = many
    order = np.random.default_rng(0).permutation(len(h))
    on_disk = neighbours.HashFile(len(h))
    for k in range(0, len(h), 300):
        on_disk.put(k, h[k : k + 300])
    for most in (100, 10_000):  # by cells, and all pairs
        monkeypatch.setattr(grouping, "EXACT_UP_TO", most)
        a, _ = grouping.group_hashes(h[order], 0.93, 0.1)
        b, _ = grouping.group_hashes(on_disk.seen_as(order), 0.93, 0.1)
        np.testing.assert_array_equal(a, b)
