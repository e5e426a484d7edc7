"""Our samples against Ultralytics': the same draws, equal boxes, pixels as near as two ways to interpolate are."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dfssd.config import Train
from dfssd.data.augment import GREY, Colours, Recipe, draw_plan
from dfssd.data.dataset import ManifestDataset, TrainingSet, collate
from dfssd.data.manifest import Row

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from stock_samples import StockSet

SHAPES = ((96, 128), (128, 96), (128, 128), (60, 200), (230, 64), (300, 260))  # height, width
EVERYTHING = {"mixup": 0.4, "mosaic": 0.7, "flipud": 0.3}


def _rows(folder, grey=False, count=18):
    """Smooth images (so that interpolation matters little) with boxes, some of them slivers at the edge."""
    rng, rows, boxes = np.random.default_rng(5), [], []
    for k in range(count):
        height, width = SHAPES[k % len(SHAPES)]
        image = cv2.resize(rng.integers(0, 255, (5, 6, 1 if grey else 3), np.uint8), (width, height))
        image = image.reshape(height, width, -1) if not grey else np.repeat(image[..., None], 3, 2)
        path = folder / f"{k}.png"
        cv2.imwrite(str(path), image)
        own = rng.uniform(0.05, 0.95, (rng.integers(0, 6), 5)).astype(np.float32)
        own[:, 3:] = (own[:, 3:] * 0.6).clip(0.005)
        own[:, 3:] = np.minimum(own[:, 3:], 2 * np.minimum(own[:, 1:3], 1 - own[:, 1:3]))
        own[:, 0] = rng.integers(0, 3, len(own))
        rows.append(Row(f"made-up-{k}", str(path), width, height, "train", True, k, own))
        boxes.append(own)
    return rows, boxes


def _pair(folder, grey=False, **settings):
    rows, boxes = _rows(folder, grey)
    train = Train(imgsz=128, **settings)
    return TrainingSet(rows, boxes, train), StockSet(rows, boxes, ["a", "b", "c"], 128, train)


def _together(ours, stock, seeds):
    for seed in seeds:
        yield ours.augmented(seed % len(ours), seed, True), stock.seeded(seed % len(ours), seed)


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {"mosaic": 0.0}, {"scale": 0.9, "translate": 0.4}])
def test_equal_draws_give_equal_boxes(tmp_path, settings):
    ours, stock = _pair(tmp_path, **settings)
    count = 0
    for own, theirs in _together(ours, stock, range(80)):
        assert len(own["bboxes"]) == len(theirs["bboxes"])
        torch.testing.assert_close(own["bboxes"], theirs["bboxes"].reshape(-1, 4), atol=2e-6, rtol=0)
        assert torch.equal(own["cls"][:, 0], theirs["cls"].reshape(-1).float())
        count += len(own["bboxes"])
    assert count > 80


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_equal_draws_give_nearly_equal_pixels(tmp_path, settings, grey):
    """Whole px of shift show on edges alone; the smooth insides of images and all colours must agree."""
    ours, stock = _pair(tmp_path, grey, **settings)
    for own, theirs in _together(ours, stock, range(40)):
        assert len(own["img"]) == (1 if grey else 3)
        difference = (own["img"].int() - theirs["img"].int()).abs()
        assert difference.float().median() <= 3 and (difference > 24).float().mean() < 0.04


def test_one_channel_gives_what_three_give(tmp_path):
    """A grey image has no saturation: the change of colour leaves it grey and maps its value alone."""
    grey, _ = _pair(tmp_path, grey=True, **EVERYTHING)
    wide, _ = _pair(tmp_path, grey=True, **EVERYTHING)
    load = wide.images.load
    wide.images.load = lambda i: cv2.cvtColor(load(i), cv2.COLOR_GRAY2RGB)
    for seed in range(30):
        one, three = (s.augmented(seed % 18, seed, True)["img"] for s in (grey, wide))
        assert len(one) == 1 and len(three) == 3 and (one.int() - three.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "gains", [(0.014, 0.6, -0.3), (-0.014, -0.4, 0.37), (0.002, 0.1, 0.4), (-0.006, 0.3, 0.2), (0.0, 0.0, 0.2)]
)
def test_colours_change_as_in_ultralytics(gains):
    from ultralytics.data.augment import RandomHSV

    image = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    image[:4] = image[:4, :, :1]  # grey ones among them
    other = image[..., ::-1].copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "uniform", lambda *_: np.array(gains))
        RandomHSV(1.0, 1.0, 1.0).apply_image({"img": other})
    ours = Colours.of(gains).change(image.copy(), image)[..., ::-1].astype(int)
    assert (
        np.abs(ours - other).max() <= 10 and np.abs(ours - other).mean() < 0.5
    )  # of 255: a step of hue, rounded in HSV
    assert np.abs(ours - other)[:4].max() <= 1


@pytest.mark.parametrize("grey", [False, True])
def test_a_sample_keeps_its_pixels_and_gives_its_memory_back(tmp_path, grey):
    ours, _ = _pair(tmp_path, grey)
    held = [ours.augmented(k % 18, k, True)["img"] for k in range(20)]
    copies = [one.clone() for one in held]
    part = held[3][:, 5:9]
    places = {one.data_ptr() for one in held}
    assert len(places) == 20
    del held[:10]
    for k in range(40):
        again = ours.augmented(k % 18, 100 + k, True)["img"]
        assert again.data_ptr() in places and again.data_ptr() not in {one.data_ptr() for one in held}
    assert all(torch.equal(a, b) for a, b in zip(held, copies[10:], strict=True))
    assert torch.equal(part, copies[3][:, 5:9])


def test_a_batch_of_grey_and_colour_is_colour(tmp_path):
    for name in ("g", "c"):
        (tmp_path / name).mkdir()
    grey, _ = _pair(tmp_path / "g", grey=True)
    colour, _ = _pair(tmp_path / "c")
    samples = [grey.augmented(0, 0, True), colour.augmented(0, 0, True)]
    assert collate(samples[:1])["img"].shape == (1, 1, 128, 128)
    batch = collate(samples)["img"]
    assert batch.shape == (2, 3, 128, 128) and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch[0], samples[0]["img"].expand(3, -1, -1)) and torch.equal(batch[1], samples[1]["img"])


def test_what_is_drawn_has_the_distribution_that_the_settings_say():
    recipe = Recipe(mosaic=0.8, mixup=0.25, scale=0.5, translate=0.1, fliplr=0.5, flipud=0.1, hsv=(0.015, 0.7, 0.4))
    plans = [draw_plan(3, 50, seed, 640, recipe, True) for seed in range(4000)]
    scenes = [s for p in plans for s in p.scenes]
    scales, shifts = np.array([s.scale for s in scenes]), np.array([s.shift for s in scenes])
    mixed = np.array([len(p.scenes) == 2 for p in plans])
    assert np.mean([len(s.images) == 4 for s in scenes]) == pytest.approx(0.8, abs=0.03)
    assert mixed.mean() == pytest.approx(0.25, abs=0.03)
    assert np.mean([p.fliplr for p in plans]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([p.flipud for p in plans]) == pytest.approx(0.1, abs=0.02)
    assert (
        0.5 <= scales.min() < 0.51
        and 1.49 < scales.max() <= 1.5
        and scales.std() == pytest.approx(1 / 12**0.5, rel=0.03)
    )
    assert shifts.min() >= 0.4 and shifts.max() <= 0.6 and np.corrcoef(shifts.T)[0, 1] == pytest.approx(0, abs=0.05)
    gains = np.array([p.gains for p in plans])
    np.testing.assert_allclose(np.abs(gains).max(0), recipe.hsv, rtol=0.01)
    partners = np.bincount([i for s in scenes for i in s.images[1:]], minlength=50)
    assert partners.min() > 0.7 * partners.mean() and all(p.images[0] == 3 for p in plans)
    weights = np.array([p.weight for p in plans])[mixed]
    assert weights.mean() == pytest.approx(0.5, abs=0.01) and weights.std() == pytest.approx(0.062, abs=0.006)
    assert draw_plan(3, 50, 1, 640, recipe, False).images == [3]


def test_outside_of_all_images_is_grey_and_colour_off_changes_nothing(tmp_path):
    ours, _ = _pair(tmp_path, hsv=(0.0, 0.0, 0.0), scale=0.0, translate=0.0, fliplr=0.0)
    sample = ours.augmented(3, 0, False)  # 60 x 200 px, so 39 x 128 in the middle
    assert (sample["img"][:, :45] == GREY).all() and (sample["img"][:, 84:] == GREY).all()
    assert torch.equal(sample["img"][:, 45:84].permute(1, 2, 0), torch.from_numpy(ours.images.load(3).copy()))
    assert Colours.of((0.0, 0.0, 0.0)) is None


def test_validation_samples_are_those_of_yolo_val(tmp_path):
    rows, boxes = _rows(tmp_path, count=40)
    ours, stock = ManifestDataset(rows, boxes, ["a", "b", "c"], 128), StockSet(rows, boxes, ["a", "b", "c"], 128)
    for k in range(len(rows)):
        own, theirs = ours[k], stock[k]
        assert own["im_file"] == theirs["im_file"] and torch.equal(own["img"], theirs["img"])
        torch.testing.assert_close(own["bboxes"], theirs["bboxes"].reshape(-1, 4), atol=1e-6, rtol=0)
