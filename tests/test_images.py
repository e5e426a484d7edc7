"""What `prepare` accepts is what training sees: one function opens pictures for both."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc

import cv2
import numpy as np
import pytest
from layouts import put
from PIL import Image, ImageCms

from dfssd.config import Data
from dfssd.data import images, large, reading
from dfssd.data.checks import ImageFacts, Problem, check_image
from dfssd.data.images import (
    BadImage,
    decode_raw,
    memory_to_open,
    open_image,
    size_of,
    to_uint8,
    top_value,
    white_level,
)
from dfssd.data.manifest import Row, read_manifest
from dfssd.data.preparation.checking import _percent
from dfssd.data.preparation.prepare import prepare
from dfssd.errors import DfssdError
from dfssd.pseudo.shards import decode_shard, decoding_memory, shards
from dfssd.runtime.free_memory import free_memory
from dfssd.runtime.storage import Storage

GREY = np.random.default_rng(0).integers(0, 256, (40, 56), np.uint8)
COLOUR = np.dstack([GREY, GREY // 2, 255 - GREY])


def encoded(array, suffix):
    return bytes(cv2.imencode(suffix, array)[1])


def tiff(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".jpg", ".webp"])
@pytest.mark.parametrize("array", [GREY, COLOUR], ids=["grey", "colour"])
def test_plain_pictures_are_what_opencv_makes_of_them(suffix, array):
    data = encoded(array, ".pgm" if suffix == ".ppm" and array.ndim == 2 else suffix)
    want = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(open_image(data), want) and size_of(data) == (56, 40)
    facts = check_image(data, 100)
    assert isinstance(facts, ImageFacts) and facts.grey == (array.ndim == 2) and facts.top == 0


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize(("bits", "white"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
def test_deep_pictures_keep_their_grey_levels(suffix, bits, white):
    deep = (GREY.astype(np.uint16) << (bits - 8)) + (1 if bits > 8 else 0)
    data = encoded(deep, suffix)
    top = top_value(decode_raw(data))
    assert white_level(top, False) == white
    assert np.array_equal(open_image(data, white)[:, :, 1], GREY)  # all 256 levels, whatever the camera
    if bits == 16:
        assert np.array_equal(open_image(data), open_image(data, white))
    if bits == 12:
        assert len(np.unique(open_image(data))) <= 16  # what a plain conversion leaves


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("white", [1, 255, 4095])
def test_float_tiffs(kind, white):
    data = encoded((COLOUR / 255 * white).astype(kind), ".tif")
    raw = decode_raw(data)
    assert white_level(top_value(raw), True) == white
    assert np.array_equal(to_uint8(raw, white), COLOUR)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1e9])
def test_values_that_are_no_grey_levels_are_refused(value):
    image = (GREY / 255).astype(np.float32)
    image[3, 4] = value
    problem = check_image(encoded(image, ".tif"), 100)
    assert isinstance(problem, Problem) and problem.reason == "unreadable"


def test_lab_cmyk_palette_bilevel_transparent_and_paged_tiffs():
    image = Image.fromarray(COLOUR)
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    grey = Image.fromarray(GREY).convert("RGB")
    neutral = ImageCms.profileToProfile(
        grey, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(open_image(tiff(neutral))[:, :, ::-1].astype(int) - np.asarray(grey)).max() <= 3
    assert open_image(tiff(lab)).shape == (40, 56, 3)
    for mode in ("1", "P", "CMYK", "RGBA", "LA"):
        converted = image.convert(mode)
        seen = open_image(tiff(converted))[:, :, ::-1].astype(int)
        assert np.abs(seen - np.asarray(converted.convert("RGB"))).max() <= 2, mode
    paged = check_image(tiff(image, save_all=True, append_images=[image]), 100)
    assert isinstance(paged, ImageFacts) and paged.pages == 2


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".jpg", ".webp"])
def test_cut_pictures_are_refused_with_a_reason(suffix):
    data = encoded(COLOUR, suffix)
    for part in (1, 12, len(data) // 3, len(data) * 9 // 10):
        problem = check_image(data[:part], 100)
        assert isinstance(problem, Problem) and problem.reason in ("truncated", "unreadable", "wrong_type"), part
    rng = np.random.default_rng(1)
    for _ in range(20):  # damage anywhere: opened or refused, never another error
        broken = bytearray(data)
        for k in rng.integers(0, len(data), 8):
            broken[k] = int(rng.integers(256))
        assert isinstance(check_image(bytes(broken), 100), ImageFacts | Problem)
        with contextlib.suppress(BadImage):
            assert memory_to_open(bytes(broken)) >= 0


def test_a_jpeg_that_opencv_would_fill_with_grey_is_cut(monkeypatch):
    data = encoded(COLOUR, ".jpg")
    monkeypatch.setattr(images.cv2, "imdecode", lambda *_: COLOUR)  # as OpenCV 4 does, with a warning that nobody sees
    assert open_image(data).shape == (40, 56, 3)
    with pytest.raises(BadImage, match="truncated"):
        open_image(data[: len(data) // 2])


def test_exif_turns_a_picture_for_both():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "JPEG", exif=exif)
    facts = check_image(buffer.getvalue(), 100)
    assert isinstance(facts, ImageFacts) and (facts.width, facts.height) == (40, 56)
    assert open_image(buffer.getvalue()).shape == (56, 40, 3)


def test_a_strip_is_within_all_limits_and_a_bomb_is_not():
    strip = np.zeros((50_000, 4096), np.uint8)  # 205 million pixels: beyond Pillow's limit
    strip[::9] = 80
    facts = check_image(encoded(strip, ".bmp"), Data().max_side)
    assert isinstance(facts, ImageFacts) and (facts.width, facts.height) == (4096, 50_000)
    head = bytearray(encoded(np.zeros((8, 8), np.uint8), ".bmp"))
    head[18:26] = (60_000).to_bytes(4, "little") * 2  # 3.6 billion pixels, as its header says; nothing is decoded
    problem = check_image(bytes(head), Data().max_side)
    assert isinstance(problem, Problem) and problem.reason == "absurd_size"


@pytest.mark.parametrize(
    ("array", "suffix"),
    [(GREY, ".jpg"), (COLOUR, ".jpg"), (GREY, ".tif"), (COLOUR, ".png"), (GREY.astype(np.uint16) * 16, ".tif"),
     (COLOUR.astype(np.uint16) * 16, ".png"), (GREY.astype(np.float32) / 255, ".tif")],
    ids=["grey jpg", "colour jpg", "grey tiff", "colour png", "16 bits", "16 bits, colour", "float"],
)  # fmt: skip
def test_a_large_picture_takes_no_more_memory_than_is_said(array, suffix, monkeypatch):
    """Scaled up 30 times, in pieces of few rows: what small ones give in one piece, and never more than its header says."""
    scaled = np.repeat(np.repeat(array, 30, 0), 30, 1)
    data = encoded(scaled, suffix)
    whole = decode_raw(data)
    if whole.dtype == np.uint8:
        flat = Image.fromarray(whole[:, :, ::-1]).convert("L") if array.ndim == 3 else Image.fromarray(whole[:, :, 0])
    elif whole.dtype == np.uint16:
        want = (whole.astype(np.float32) * (256 / 4096)).astype(np.uint8)
        assert np.array_equal(to_uint8(whole, 4095), want if want.ndim == 3 else np.dstack([want] * 3))
    monkeypatch.setattr(images, "_BLOCK", 50_000)
    tracemalloc.start()
    try:
        facts = check_image(data, Data().max_side)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(facts, ImageFacts) and facts.grey == (array.ndim == 2)
    if whole.dtype == np.uint8:
        assert np.array_equal(facts.thumb_hw, flat.resize((48, 48), Image.Resampling.BOX))
    most = memory_to_open(data)
    assert 0.3 * most < peak < most + 2**20, (peak / 56 / 40 / 900, most / 56 / 40 / 900)


def test_a_picture_that_memory_does_not_hold_is_named_before_it_is_opened(tmp_path, monkeypatch):
    put(tmp_path / "d" / "classes.txt", "a\n")
    for name, side in [("large", 400), *((f"{k:02d}", 40) for k in range(12))]:
        picture = np.random.default_rng(len(name) * side).integers(0, 255, (side, side), np.uint8)
        picture[: int(name) if side < 100 else 0] = 0
        put(tmp_path / "d" / "images" / f"{name}.png", encoded(picture, ".png"))
        put(tmp_path / "d" / "labels" / f"{name}.txt", "0 .5 .5 .2 .2")
    monkeypatch.setattr("dfssd.data.preparation.checking.LARGE", 100_000)
    monkeypatch.setattr("dfssd.data.preparation.checking.free_memory", lambda: 500_000)
    config = Data(data=str(tmp_path / "d"))
    with pytest.raises(DfssdError, match=r"(?s)400 x 400 px takes up to .*large\.png.*--max-side 399"):
        prepare(config, 0, Storage(str(tmp_path / "out")))
    left_out = config.model_copy(update={"max_side": 399, "bad_limit": 0.5})
    assert prepare(left_out, 0, Storage(str(tmp_path / "out")))["bad_files"] == {"absurd_size": 1}


@pytest.mark.parametrize("is_large", [True, False])
def test_large_pictures_wait_where_memory_does_not_hold_one_for_each_core(is_large, monkeypatch, tmp_path):
    """Sixteen are fetched from a store at a time, for a batch or a shard; of 20,000 x 20,000 px they are 19 GB."""
    now, most, changed, cores = [0], [0], threading.Condition(), os.cpu_count()

    def decode(*_):
        with changed:
            now[0] += 1
            most[0] = max(most[0], now[0])
            changed.notify_all()
            # One that has to be alone gives others time to come; else it waits for the second, on however slow a machine.
            changed.wait_for(lambda: most[0] > 1, timeout=0.005 if wanted_alone[0] else 120)
            now[0] -= 1
        return COLOUR

    need = images.memory_of(COLOUR[..., 0].size, 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(reading, "decode", decode)
    monkeypatch.setattr("dfssd.data.large.LARGE", COLOUR[..., 0].size + (0 if is_large else 1))
    rows = [Row(f"{k}", f"s3://b/{k}.png", 56, 40, "train", False, k, None) for k in range(16)]
    wanted_alone = [False]
    both = [lambda: reading.Images(rows, 32).fetch(range(16)), lambda: decode_shard(shards(rows, "shard")[0], 32)]
    for free, alone in ((need * cores - 1, is_large), (need * cores, False)):
        monkeypatch.setattr("dfssd.data.large.free_memory", lambda free=free: free)
        for fetch in both:
            most[0], wanted_alone[0] = 0, alone
            fetch()
            assert (most[0] == 1) == alone, (free, most)


def test_a_large_picture_of_another_process_is_waited_for_but_not_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(large, "free_memory", lambda: 0)
    holds = "import sys, time; from dfssd.data import large; large.free_memory = lambda: 0\n"
    holds += "with large.turn(large.LARGE, 1): print('mine', flush=True); time.sleep(600)"
    other = subprocess.Popen(
        [sys.executable, "-c", holds], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        assert other.stdout.readline() == b"mine\n"
        monkeypatch.setattr(large, "PATIENCE_S", 0.3)
        begun = time.monotonic()
        with large.turn(large.LARGE, 1):
            assert time.monotonic() - begun >= 0.3, "it waits"
        monkeypatch.setattr(large, "PATIENCE_S", 300.0)
        begun = time.monotonic()
        with large.turn(large.LARGE - 1, 1):
            assert time.monotonic() - begun < 150, "a picture that is not large has no need to"
        begun = time.monotonic()
        threading.Timer(0.3, other.kill).start()
        with large.turn(large.LARGE, 1):
            assert 0.3 <= time.monotonic() - begun < 150, "a process that died holds nothing"
    finally:
        other.kill()
        other.wait()


def test_a_task_that_decodes_asks_for_the_memory_of_its_largest_picture():
    sides = (1000, 20_000, 500)
    todo = shards([Row(f"{s}", f"{s}.png", s, s, "train", False, s, None) for s in sides], "shard", 2)
    deep = shards([Row("a", "a.png", 20_000, 20_000, "train", False, 0, None, 4095.0)], "shard")
    assert decoding_memory(deep, 640) - decoding_memory(todo[1:], 640) == images.DEEP_BYTES_A_PIXEL * 20_000**2
    assert decoding_memory(todo, 640) - decoding_memory(todo[1:], 640) == images.BYTES_A_PIXEL * 20_000**2
    assert decoding_memory(todo[1:], 640) == 2 * 64 * 640**2 * 3


def test_free_memory_is_that_of_the_container_where_it_has_less(tmp_path):
    put(tmp_path / "meminfo", "MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    host, box = str(tmp_path / "meminfo"), str(tmp_path)
    assert free_memory(host, box) == 50 * 1024 and free_memory(str(tmp_path / "none"), box) > 2**60
    put(tmp_path / "memory" / "memory.limit_in_bytes", str(2**63 - 4096))  # cgroup 1 without a limit
    put(tmp_path / "memory" / "memory.usage_in_bytes", "1000")
    put(tmp_path / "memory" / "memory.stat", "total_inactive_file 10\n")
    assert free_memory(host, box) == 50 * 1024
    put(tmp_path / "memory.max", "3000")
    put(tmp_path / "memory.current", "2500")
    put(tmp_path / "memory.stat", "anon 1\ninactive_file 400\n")
    assert free_memory(host, box) == 900
    put(tmp_path / "memory.max", "max")
    assert free_memory(host, box) == 50 * 1024
    assert 2**20 < free_memory() < 2**50  # of this machine


def test_the_white_level_of_a_set_is_found_said_and_kept(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(20):
        put(
            tmp_path / "d" / "images" / f"{k}.png",
            encoded(rng.integers(0, 4096 if k else 300, (40, 56), np.uint16), ".png"),
        )
        put(tmp_path / "d" / "labels" / f"{k}.txt", f"{k % 2} .5 .5 .2 .2")
    put(tmp_path / "d" / "classes.txt", "a\nb\n")
    store = Storage(str(tmp_path / "out"))
    summary = prepare(Data(data=str(tmp_path / "d")), 0, store)
    assert any("4095 becomes white" in note and "16 grey levels" in note for note in summary["notes"])
    assert {r.white for r in read_manifest(store).rows} == {4095.0}  # also that of the dark picture
    store = Storage(str(tmp_path / "given"))
    prepare(Data(data=str(tmp_path / "d"), white_level=2047), 0, store)
    assert {r.white for r in read_manifest(store).rows} == {2047.0}


def test_a_share_never_looks_equal_to_its_limit():
    assert _percent(0.0104, 0.01) == "1.04 %" and _percent(0.0101, 0.01) == "1.01 %" and _percent(0.2, 0.01) == "20.0 %"


def test_not_one_usable_picture_is_said_in_words(tmp_path):
    put(tmp_path / "d" / "images" / "a.png", b"")
    put(tmp_path / "d" / "labels" / "a.txt", "")
    put(tmp_path / "d" / "classes.txt", "x")
    with pytest.raises(DfssdError, match="not one usable image") as caught:
        prepare(Data(data=str(tmp_path / "d")), 0, Storage(str(tmp_path / "o")))
    assert "zero_bytes" in caught.value.todo and "(" not in caught.value.todo.split("zero_bytes")[0]
