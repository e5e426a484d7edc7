"""`prepare` on whole folders: nothing is lost uncounted, nothing leaks, order does not matter."""

import shutil

import cv2
import numpy as np
import pytest

from dfssd.config import Data
from dfssd.data.checks import Problem
from dfssd.data.manifest import read_manifest, read_table
from dfssd.data.preparation import check_shards
from dfssd.data.preparation.prepare import prepare
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage


def _run(folder, out, **settings):
    store = Storage(str(out))
    return prepare(Data(data=str(folder), **settings), 0, store), store


def test_boxes_of_unlabelled_images_are_withheld(strip, tmp_path):
    summary, store = _run(strip, tmp_path, label_fraction=0.25)
    manifest = read_manifest(store)
    train = manifest.of_split("train")
    hidden = [r for r in train if not r.labelled]
    assert hidden and all(r.boxes is None for r in hidden)
    withheld = read_table(store, "withheld.parquet")["image_id"].to_pylist()
    assert sorted(withheld) == sorted(r.image_id for r in hidden)
    assert all(r.boxes is not None and not r.labelled for r in manifest.of_split("val") + manifest.of_split("test"))
    assert len(manifest.labelled_rows()) == round(0.25 * len(train)) == summary["labelled_images"]


def test_renaming_and_reordering_files_changes_nothing(strip, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(strip, other)
    for k, path in enumerate(sorted((other / "images").glob("*.png"))):
        new = f"{(k * 37) % 101:03d}x{k}"
        (other / "labels" / f"{path.stem}.txt").rename(other / "labels" / f"{new}.txt")
        path.rename(other / "images" / f"{new}.png")
    (_, a), (_, b) = _run(strip, tmp_path / "a"), _run(other, tmp_path / "b")
    facts = [{r.image_id: (r.split, r.labelled) for r in read_manifest(s).rows} for s in (a, b)]
    assert facts[0] == facts[1]


def test_bad_files_are_counted_by_reason_and_stop_above_the_limit(strip, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(strip, broken)
    (broken / "images" / "strip_00000.png").write_bytes(b"")
    (broken / "labels" / "strip_00001.txt").write_text("0 .5 .5 .2")
    (broken / "labels" / "strip_00002.txt").write_text("9 .5 .5 .2 .2")
    (broken / "labels" / "nowhere.txt").write_text("0 .5 .5 .2 .2")
    with pytest.raises(DfssdError, match=r"files are bad .*the limit is") as caught:
        _run(broken, tmp_path / "stop")
    assert "zero_bytes" in str(caught.value) and "--bad-limit" in caught.value.todo
    assert read_table(Storage(str(tmp_path / "stop")), "bad_files.parquet").num_rows == 4
    summary, store = _run(broken, tmp_path / "go", bad_limit=0.1)
    want = {"zero_bytes": 1, "label_columns": 1, "class_out_of_range": 1, "label_without_image": 1}
    assert summary["bad_files"] == want
    assert summary["images"] + 3 == summary["files"] == 60
    assert sorted(read_table(store, "bad_files.parquet")["reason"].to_pylist()) == sorted(want)


def test_copies_and_mirror_images_stay_in_one_split(strip, tmp_path):
    data = tmp_path / "d"
    shutil.copytree(strip, data)
    for path in sorted((data / "images").glob("*.png")):
        boxes = (data / "labels" / f"{path.stem}.txt").read_text()
        cv2.imwrite(str(data / "images" / f"m_{path.name}"), cv2.imread(str(path), 0)[:, ::-1])
        (data / "labels" / f"m_{path.stem}.txt").write_text("")
        shutil.copy(path, data / "images" / f"c_{path.name}")
        (data / "labels" / f"c_{path.stem}.txt").write_text(boxes)
    summary, store = _run(data, tmp_path / "grouped")
    assert summary["bad_files"] == {"duplicate": 60} and summary["images"] == 120
    assert summary["test_images_with_near_duplicate_in_train"] == 0
    splits = {}
    for row in read_manifest(store).rows:
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(s) == 1 for s in splits.values()) and len(splits) <= 60
    leaking, _ = _run(data, tmp_path / "random", split="random")
    assert leaking["test_images_with_near_duplicate_in_train"] > 3
    assert store.exists("groups.png") and store.exists("split.csv")


def test_unlabelled_folder_joins_but_never_copies_of_test_images(strip, tmp_path):
    _, first = _run(strip, tmp_path / "first")
    test_uri = read_manifest(first).of_split("test")[0].uri
    extra = tmp_path / "extra"
    extra.mkdir()
    rng = np.random.default_rng(0)
    cv2.imwrite(str(extra / "new.png"), rng.integers(0, 255, (64, 64), np.uint8))
    cv2.imwrite(str(extra / "mirror of test.png"), cv2.imread(test_uri, 0)[::-1])
    _, store = _run(strip, tmp_path / "second", unlabelled=(str(extra),))
    rows = {r.uri.rsplit("/", 1)[1]: r for r in read_manifest(store).rows}
    assert rows["new.png"].split == "unlabelled-only" and rows["new.png"].boxes is None
    twin = rows[test_uri.rsplit("/", 1)[1]]
    assert rows["mirror of test.png"].split == ("train" if twin.split == "train" else "left-out")
    trained_on = {r.image_id for r in read_manifest(store).unlabelled_rows()}
    assert (rows["mirror of test.png"].image_id in trained_on) == (twin.split == "train")


def test_labelled_list_and_nesting(strip, tmp_path):
    _, store = _run(strip, tmp_path / "a", label_fraction=0.2)
    few = {r.image_id for r in read_manifest(store).labelled_rows()}
    _, store = _run(strip, tmp_path / "b", label_fraction=0.4)
    assert few < {r.image_id for r in read_manifest(store).labelled_rows()}
    train = read_manifest(store).of_split("train")
    (tmp_path / "list.txt").write_text(f"{train[0].image_id}\n{train[1].uri.rsplit('/', 1)[1]}\n")
    _, store = _run(strip, tmp_path / "c", labelled_list=str(tmp_path / "list.txt"))
    assert {r.image_id for r in read_manifest(store).labelled_rows()} == {train[0].image_id, train[1].image_id}


def test_cr7_det_as_published(cr7, tmp_path):
    summary, _ = _run(cr7, tmp_path)
    assert summary["files"] == 4140 and summary["bad_files"] == {"duplicate": 59} and summary["images"] == 4081
    assert summary["test_images_with_near_duplicate_in_train"] <= 10
    assert summary["largest_group"] <= 0.02 * 4081
    assert 900 < summary["images_with_near_duplicate"] < 1200  # about a quarter
    shares = [summary["splits"][s]["images"] / 4081 for s in ("train", "val", "test")]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=0.01)


@pytest.mark.parametrize(
    ("images", "remote", "there"),
    [(4_140, False, False), (19_999, False, False), (20_000, False, True), (1_999, True, False), (2_000, True, True)],
)
def test_where_a_set_is_checked(images, remote, there):
    place, why = check_shards.on_cluster(images, remote)
    assert place is there and str(images) in why and ("all nodes" if there else "in this process") in why


def test_a_shard_says_what_its_images_are_and_is_made_again_where_it_must(strip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_shards, "SHARD", 8)
    folder = tmp_path / "images"
    shutil.copytree(strip / "images", folder)
    uris = [str(p) for p in sorted(folder.iterdir())][:20]
    (folder / "strip_00001.png").write_bytes(b"")
    store = Storage(str(tmp_path / "o"))
    shards = check_shards.cut(uris, 4096)
    assert [len(s.uris) for s in shards] == [8, 8, 4] and shards == check_shards.cut(uris, 4096)
    assert not {s.file for s in shards} & {s.file for s in check_shards.cut(uris, 64)}, "another limit, other files"
    assert check_shards.read_if_good(store, shards[0]) is None
    assert check_shards.check_shard(shards[0], store.uri) == (8, 1)
    seen, thumbs = check_shards.read_if_good(store, shards[0])
    assert seen[1] == Problem("zero_bytes") and not thumbs[1].any()
    for k in (0, 2, 7):
        want = check_shards.look(uris[k], 4096)
        np.testing.assert_array_equal(thumbs[k], want.thumb_hw)
        assert all(getattr(seen[k], f) == getattr(want, f) for f in ("sha256", "width", "height", "grey", "top"))
    (folder / "strip_00002.png").unlink()  # a network drive that was away for a moment
    check_shards.check_shard(shards[0], store.uri)
    assert check_shards.read_if_good(store, shards[0]) is None
    store.write(shards[1].file, b"PAR1 cut")
    assert check_shards.read_if_good(store, shards[1]) is None and "is damaged" in capsys.readouterr().out
    shutil.rmtree(folder)
    with pytest.raises(DfssdError, match="does not see the data"):
        check_shards.check_shard(shards[2], store.uri)
