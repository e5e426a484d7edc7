"""`--val-from-labels`: val is a part of the labels that may be used, in whole groups, and test stays what it is."""

import hashlib

import numpy as np
import pytest

from dfssd.config import Data
from dfssd.data.checks import Checked, ImageFacts
from dfssd.data.manifest import LEFT_OUT, read_manifest, read_withheld
from dfssd.data.preparation.assignment import split_images
from dfssd.data.preparation.prepare import prepare
from dfssd.data.preparation.val_from_labels import take_val, without_val
from dfssd.data.preparation.versions import keep_version
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage


def _run(folder, out, **settings):
    store = Storage(str(out))
    summary = prepare(Data(data=str(folder), **settings), 0, store)
    return summary, read_manifest(store), store


def _ids(manifest, split):
    return {r.image_id for r in manifest.of_split(split)}


def test_labels_of_train_and_val_together_are_the_budget(strip, tmp_path):
    _, plain, _ = _run(strip, tmp_path / "a", label_fraction=0.5)
    summary, own, store = _run(strip, tmp_path / "b", label_fraction=0.5, val_from_labels=True)
    assert _ids(own, "test") == _ids(plain, "test")
    pool = _ids(plain, "train") | _ids(plain, "val")
    train, val = {r.image_id for r in own.labelled_rows()}, _ids(own, "val")
    left_out = _ids(own, LEFT_OUT) - _ids(plain, LEFT_OUT)
    assert len(train) + len(val) == round(0.5 * len(pool)) and val and not train & val
    # What else was val is unlabelled now, and its labels are hidden.
    others = _ids(plain, "val") - train - val - left_out
    assert others and others <= {r.image_id for r in own.unlabelled_rows()}
    assert others <= set(read_withheld(store)) and not set(read_withheld(store)) & (train | val)
    counts = np.bincount(np.concatenate([r.boxes[:, 0] for r in own.of_split("val")]).astype(int), minlength=3)
    every = [sum(int((r.boxes[:, 0] == c).sum()) for r in own.rows if r.image_id in train | val) for c in range(3)]
    assert (counts >= np.array(every) // 4).all(), (counts, every)
    assert any("fewer than 5 boxes in val" in n for n in summary["notes"]) == bool((counts < 5).any())
    assert own.meta["val_from_labels"] and any(
        f"{len(train)} train + {len(val)} val = {len(train) + len(val)} images" in n for n in summary["notes"]
    )


def _image(name, boxes, given=""):
    digest = hashlib.sha256(name.encode()).hexdigest()
    facts = ImageFacts.__new__(ImageFacts)
    object.__setattr__(facts, "sha256", digest)
    return Checked(f"/{name}.png", facts, boxes, given)


def _made_up(groups_of=4, groups=30):
    """Images in groups of near-duplicates; the last of each group has no label."""
    images, owner = [], []
    for g in range(groups):
        for k in range(groups_of):
            boxes = np.array([[g % 3, 0.5, 0.5, 0.2, 0.2]], np.float32) if k < groups_of - 1 else None
            images.append(_image(f"{g}-{k}", boxes))
            owner.append(g)
    return images, np.array(owner)


def test_groups_stay_whole_and_near_duplicates_of_val_train_nothing():
    images, groups = _made_up()
    nothing = (np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    config = Data(data="x", val_from_labels=True)

    class Names:
        names = ("a", "b", "c")

    before = split_images(images, groups, nothing, config, 0, Names)
    names = without_val(images, before, groups, config)
    assert "val" not in names
    freed = [k for k, (old, new) in enumerate(zip(before, names, strict=True)) if old == LEFT_OUT != new]
    assert freed and {before[k - 1] for k in freed} == {"val"}, "unlabelled images of what was val may teach again"
    # Of each group one of three labelled images may be used.
    labelled = {i.image_id for k, i in enumerate(images) if k % 4 == 0 and names[k] == "train"}
    after, train = take_val(images, names, labelled, groups, nothing, config, 0, 3)
    for g in range(30):
        own = {after[k] for k in range(4 * g, 4 * g + 4)}
        assert own in ({"train"}, {"val", LEFT_OUT}, {"test", LEFT_OUT}), own
        if "val" in own:
            assert [after[4 * g + k] for k in range(4)] == ["val", LEFT_OUT, LEFT_OUT, LEFT_OUT]
    assert [k for k, n in enumerate(before) if n == "test"] == [k for k, n in enumerate(after) if n == "test"]
    val = {i.image_id for i, n in zip(images, after, strict=True) if n == "val"}
    assert train | val == labelled and 0.15 * len(labelled) < len(val) < 0.35 * len(labelled)


def test_given_splits_leave_out_what_pairs_with_the_new_val():
    images = [_image(f"{k}", np.array([[0, 0.5, 0.5, 0.2, 0.2]], np.float32)) for k in range(40)]
    i, j = np.arange(0, 40, 2), np.arange(1, 40, 2)
    config = Data(data="x", split="given", val_from_labels=True)
    labelled = {i.image_id for i in images[::2]}
    after, _ = take_val(images, ["train"] * 40, labelled, np.arange(40), (i, j, np.ones(20)), config, 0, 1)
    assert after.count("val") >= 4
    for k in range(0, 40, 2):
        assert after[k + 1] == (LEFT_OUT if after[k] == "val" else "train")


def test_too_few_labels_are_a_user_error(strip, tmp_path):
    with pytest.raises(DfssdError, match="5 labelled images are too few") as caught:
        _run(strip, tmp_path, label_fraction=0.1, val_from_labels=True)
    assert "--label-fraction" in caught.value.todo


def test_a_next_version_keeps_val_and_what_was_trained_on(strip, tmp_path):
    settings = {"label_fraction": 0.5, "val_from_labels": True}
    _, first, store = _run(strip, tmp_path, **settings)
    store.write_json("stage.json", {})
    keep_version(store)
    _, second, _ = _run(strip, tmp_path, **{**settings, "label_fraction": 0.8})
    assert _ids(second, "val") >= _ids(first, "val")
    trained = _ids(first, "train")
    assert not trained & (_ids(second, "val") | _ids(second, "test"))
    assert {r.image_id for r in first.labelled_rows()} <= {r.image_id for r in second.labelled_rows()}
