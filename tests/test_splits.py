import numpy as np

from dfssd.data.preparation.splits import assign_splits, class_counts, labelling_order, take_per_class


def _data(n=900, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    ids = [f"{k:016x}" for k in rng.permutation(10**6)[:n]]
    groups = np.sort(rng.integers(0, n // 2, n))
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    boxes = [
        np.stack([[c, 0.5, 0.5, 0.1, 0.1] for c in rng.choice(classes, rng.integers(1, 4), p=weights)])
        for _ in range(n)
    ]
    boxes[0] = None
    return ids, groups, class_counts(boxes, classes)


def test_groups_stay_whole_and_shares_are_met():
    ids, groups, counts = _data()
    split = assign_splits(ids, groups, counts, (0.8, 0.1, 0.1), 0)
    for group in set(groups.tolist()):
        assert len(set(split[groups == group].tolist())) == 1
    for k, share in enumerate((0.8, 0.1, 0.1)):
        assert abs((split == k).mean() - share) < 0.02
        per_class = counts[split == k].sum(0)[:4] / counts.sum(0)[:4]
        assert (abs(per_class - share) < 0.04).all(), per_class


def test_split_ignores_file_order_and_follows_the_seed():
    ids, groups, counts = _data()
    split = dict(zip(ids, assign_splits(ids, groups, counts, (0.8, 0.1, 0.1), 7).tolist(), strict=True))
    order = np.random.default_rng(5).permutation(len(ids))
    renamed = {g: k for k, g in enumerate(np.random.default_rng(6).permutation(np.unique(groups)).tolist())}
    other = assign_splits(
        [ids[k] for k in order],
        np.array([renamed[g] for g in groups[order].tolist()]),
        counts[order],
        (0.8, 0.1, 0.1),
        7,
    )
    assert split == {ids[k]: s for k, s in zip(order, other.tolist(), strict=True)}
    assert assign_splits(ids, groups, counts, (0.8, 0.1, 0.1), 8).tolist() != list(split.values())


def test_labelled_subsets_are_nested_and_stratified():
    ids, _, counts = _data()
    order = labelling_order(ids, counts, 0)
    assert sorted(order) == list(range(len(ids)))
    five = counts[order[:45]].sum(0)[:4] / 45
    everything = counts.sum(0)[:4] / len(ids)
    assert (abs(five - everything) < 0.12).all() and (five > 0).all()
    shuffled = np.random.default_rng(2).permutation(len(ids))
    again = labelling_order([ids[k] for k in shuffled], counts[shuffled], 0)
    assert [ids[k] for k in order] == [ids[shuffled[k]] for k in again]


def test_labels_per_class_are_enough_and_nested():
    ids, _, counts = _data()
    order = labelling_order(ids, counts, 0)
    before: set[int] = set()
    for per_class in (1, 2, 5, 10, 30):
        taken = set(take_per_class(order, counts, per_class))
        assert before <= taken
        assert (counts[list(taken)].sum(0)[:4] >= np.minimum(per_class, counts.sum(0)[:4])).all()
        before = taken
