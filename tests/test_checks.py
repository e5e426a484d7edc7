"""Every reason on the list, each made on purpose."""

import io

import numpy as np
import pytest
from PIL import Image

from dfssd.data.checks import REASONS, ImageFacts, Label, Problem, check_image, check_label
from dfssd.data.dataset import decode
from dfssd.data.formats.yolo import parse_yolo_text


def _bytes(fmt="JPEG", size=(40, 30), **options):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, fmt, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero_bytes"),
        (b"this is text", "wrong_type"),
        (_bytes()[: len(_bytes()) // 2], "truncated"),
        (_bytes("PNG")[: len(_bytes("PNG")) // 2], "truncated"),
        (_bytes(size=(4, 30)), "absurd_size"),
        (_bytes(size=(300, 30)), "absurd_size"),
    ],
)
def test_bad_images(data, reason):
    result = check_image(data, 200)
    assert isinstance(result, Problem) and result.reason == reason and reason in REASONS


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_good_images(fmt):
    facts = check_image(_bytes(fmt), 200)
    assert isinstance(facts, ImageFacts) and (facts.width, facts.height) == (40, 30)


def test_cmyk_and_16_bit_are_images_and_exif_turns_them(tmp_path):
    buffer = io.BytesIO()
    Image.new("CMYK", (40, 30)).save(buffer, "JPEG")
    assert isinstance(check_image(buffer.getvalue(), 200), ImageFacts)
    buffer = io.BytesIO()
    Image.fromarray(np.full((30, 40), 30000, np.uint16)).save(buffer, "PNG")
    assert check_image(buffer.getvalue(), 200).thumb_hw.mean() == pytest.approx(30000 / 257, abs=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _bytes(exif=exif)
    facts = check_image(turned, 200)
    (tmp_path / "t.jpg").write_bytes(turned)
    assert (facts.height, facts.width) == decode(str(tmp_path / "t.jpg")).shape[:2] == (40, 30)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0 .5 .5 .2 .2 .9", "label_columns"),
        ("0 .5 .5 .2", "label_columns"),
        ("0 .5 x .2 .2", "label_unreadable"),
        ("0 .5 nan .2 .2", "label_nan"),
        ("7 .5 .5 .2 .2", "class_out_of_range"),
        ("-1 .5 .5 .2 .2", "class_out_of_range"),
        ("0.5 .5 .5 .2 .2", "class_out_of_range"),
        ("0 .5 1.5 .2 .2", "box_outside_image"),
        ("0 .5 .5 0 .2", "box_empty"),
        ("0 .5 .5 .2 -.2", "box_empty"),
    ],
)
def test_bad_labels(text, reason):
    result = check_label(parse_yolo_text(text), 100, 100, 7)
    assert isinstance(result, Problem) and result.reason == reason and reason in REASONS


def test_good_labels_are_clipped_and_repeats_removed():
    boxes = check_label(parse_yolo_text("3 0.5 0.05 0.2 0.11\n\n3 0.5 0.05 0.2 0.11"), 100, 100, 7)
    assert boxes.shape == (1, 5)
    assert boxes[0, 2] - boxes[0, 4] / 2 == pytest.approx(0, abs=1e-6)
    assert check_label(parse_yolo_text(""), 100, 100, 7).shape == (0, 5)


def test_label_about_another_image():
    label = Label(np.array([[0, 50.0, 50, 10, 10]]), pixels=True, size=(200, 100))
    assert check_label(label, 100, 100, 1).reason == "label_size_mismatch"
    np.testing.assert_allclose(check_label(label, 400, 200, 1), [[0, 0.25, 0.5, 0.05, 0.1]], atol=1e-6)
