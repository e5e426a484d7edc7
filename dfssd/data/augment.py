"""Training samples: mosaic, scale and shift, mixup, colour, flips; what is drawn, then what is painted.

Same distribution as Ultralytics' `v8_transforms`, and the same draws for the same seed in the same order, so that tests hold
one against the other: boxes are equal, pixels as equal as two ways to interpolate are. Not equal is the cost. As nothing is
rotated or sheared, the part of each tile that will be seen is cut out and resized straight into the sample, where
Ultralytics fills a canvas of twice the side and warps it; and grey images stay one channel wide, for which the change of
colour is a table of 256 values.

Legend: side of the sample (px) is `side`; a mosaic's canvas has twice that; boxes are (n,5) or (n,7) [cls, cx, cy, w, h,
score, agreement], 0..1 of their image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import floor
from typing import NamedTuple

import cv2
import numpy as np

from dfssd.data.boxes import CLS, LABEL_COLUMNS, WH, XY
from dfssd.data.scratch import Scratch

GREY = 114  # what lies outside of all images
SMALLEST_PX, SMALLEST_SHARE, LONGEST = (
    2,
    0.1,
    100,
)  # sides, share of the area that is left, ratio of sides: what stays a box
BETA = 32.0  # of mixup's weight


class Recipe(NamedTuple):
    """Probabilities and ranges, as in the settings of the same names."""

    mosaic: float
    mixup: float
    scale: float
    translate: float
    fliplr: float
    flipud: float
    hsv: tuple[float, float, float]


class Scene(NamedTuple):
    """One image, or four round a point, scaled and moved."""

    images: tuple[int, ...]
    corner: tuple[int, int]  # where four images meet, x, y (px of the canvas)
    scale: float
    shift: tuple[float, float]  # where the middle of the canvas comes to lie, x, y (share of the side)


class Plan(NamedTuple):
    """All that is random in a sample, before any image is loaded."""

    scenes: tuple[Scene, ...]  # two where one is mixed into the other
    weight: float  # of the first
    gains: tuple[float, float, float]  # of hue, saturation, value: -1..1 times the ranges
    flipud: bool
    fliplr: bool

    @property
    def images(self) -> list[int]:
        """Every image that is needed."""
        return [i for scene in self.scenes for i in scene.images]


class Tile(NamedTuple):
    """Where an image lies on the canvas, what of it can be seen there, and its size (px)."""

    canvas: tuple[int, int, int, int]  # x1, y1, x2, y2
    offset: tuple[int, int]  # canvas px minus image px
    size: tuple[int, int]


def draw_plan(index: int, count: int, seed: int, side: int, recipe: Recipe, mosaic: bool) -> Plan:
    """What becomes of image `index` of `count` under a seed; equal arguments give an equal plan.

    Args:
        mosaic: are mosaic and mixup allowed.
    """
    rng, other = random.Random(seed), _scratch.generator
    other.seed(seed)
    scenes = [_draw_scene(rng, index, count, side, recipe, mosaic)]
    weight = 1.0
    if _happens(rng, recipe.mixup if mosaic else 0.0):
        scenes.append(_draw_scene(rng, rng.randint(0, count - 1), count, side, recipe, mosaic))
        weight = float(other.beta(BETA, BETA))
    rng.uniform(0, 1)  # Ultralytics' cutmix, which is off
    gains = other.uniform(-1, 1, 3) * recipe.hsv if any(recipe.hsv) else np.zeros(3)
    return Plan(
        tuple(scenes), weight, tuple(gains.tolist()), rng.random() < recipe.flipud, rng.random() < recipe.fliplr
    )


_scratch = Scratch()


def _happens(rng: random.Random, probability: float) -> bool:
    return rng.uniform(0, 1) <= probability and probability > 0


def _draw_scene(rng: random.Random, index: int, count: int, side: int, recipe: Recipe, mosaic: bool) -> Scene:
    images: tuple[int, ...] = (index,)
    corner = (0, 0)
    if _happens(rng, recipe.mosaic if mosaic else 0.0):
        images += tuple(rng.randint(0, count - 1) for _ in range(3))
        y, x = (int(rng.uniform(side // 2, 2 * side - side // 2)) for _ in range(2))
        corner = (x, y)
    for _ in range(3):
        rng.uniform(0, 0)  # perspective and rotation, which are off
    scale = rng.uniform(1 - recipe.scale, 1 + recipe.scale)
    for _ in range(2):
        rng.uniform(0, 0)  # shear
    x_shift, y_shift = (rng.uniform(0.5 - recipe.translate, 0.5 + recipe.translate) for _ in range(2))
    return Scene(images, corner, scale, (x_shift, y_shift))


def tiles(scene: Scene, sizes_wh: Sequence[tuple[int, int]], side: int) -> tuple[list[Tile], tuple[int, int]]:
    """Where the images of a scene lie, and the canvas's width and height (px)."""
    if len(scene.images) == 1:
        (w, h) = sizes_wh[0]
        return [Tile((0, 0, w, h), (0, 0), (w, h))], (w, h)
    (x, y), whole, placed = scene.corner, 2 * side, []
    for k, (w, h) in enumerate(sizes_wh):
        left, top = (x - w if k % 2 == 0 else x), (y - h if k < 2 else y)
        seen = (max(left, 0), max(top, 0), min(left + w, whole), min(top + h, whole))
        placed.append(Tile(seen, (left, top), (w, h)))
    return placed, (whole, whole)


def _transform(scene: Scene, canvas_wh: tuple[int, int], side: int) -> tuple[float, tuple[float, float]]:
    """Sample px = canvas px * scale + shift: the scale, and the shift in x and y."""
    x, y = (s * side - scene.scale * length / 2 for s, length in zip(scene.shift, canvas_wh, strict=True))
    return scene.scale, (x, y)


def paint(
    scene: Scene,
    placed: Sequence[Tile],
    canvas_wh: tuple[int, int],
    images: Sequence[np.ndarray],
    side: int,
    colours: Colours | None = None,
    name: str = "first",
) -> np.ndarray:
    """(side,side,3) or, where all images are grey, (side,side) uint8; the next call with this name paints over it.

    Args:
        colours: changed in each tile where it has fewer px, before or after it is resized, and not outside of the images.
    """
    grey = all(image.ndim == 2 for image in images)
    out = _scratch.array(name, (side, side) if grey else (side, side, 3))
    out.fill(colours.value[GREY] if colours else GREY)
    scale, shift = _transform(scene, canvas_wh, side)
    for tile, image in zip(placed, images, strict=True):
        spans = [_span(tile, axis, scale, shift[axis], side) for axis in (0, 1)]
        if spans[0] is None or spans[1] is None:
            continue
        (x1, x2, u1, u2), (y1, y2, v1, v2) = spans[0], spans[1]
        part, place = image[v1:v2, u1:u2], out[y1:y2, x1:x2]
        if not grey and part.ndim == 2:
            part = cv2.cvtColor(part, cv2.COLOR_GRAY2RGB)
        before = part.size < place.size
        if colours and before:
            part = colours.change(part, _scratch.array("part", part.shape))
        cv2.resize(part, (x2 - x1, y2 - y1), dst=place, interpolation=cv2.INTER_LINEAR)
        if colours and not before:
            colours.change(place, place)
    return out


def _span(tile: Tile, axis: int, scale: float, shift: float, side: int) -> tuple[int, int, int, int] | None:
    """Along one axis: first and last px (exclusive) of the sample, and of the image that is resized into them.

    Both are rounded to whole px, neighbours to the same one; what is seen is off by less than one.
    """
    first, last = (tile.canvas[axis] * scale + shift, tile.canvas[axis + 2] * scale + shift)
    a, b = floor(max(first, 0) + 0.5), floor(min(last, side) + 0.5)
    if b <= a or tile.canvas[axis + 2] <= tile.canvas[axis]:
        return None
    low, high = tile.canvas[axis] - tile.offset[axis], tile.canvas[axis + 2] - tile.offset[axis]
    u, v = (floor((edge - shift) / scale - tile.offset[axis] + 0.5) for edge in (a, b))
    u = low if first >= 0 else min(max(u, low), high - 1)  # what is not cut off is there to its edge
    return a, b, u, high if last <= side else min(max(v, u + 1), high)


def move_boxes(
    scene: Scene, placed: Sequence[Tile], canvas_wh: tuple[int, int], boxes: Sequence[np.ndarray], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of a scene's images on its sample.

    Returns:
        (n,4) x1, y1, x2, y2 (px of the sample), and (n,k) their other columns; boxes of which too little is left are gone.
    """
    counts = [len(own) for own in boxes]
    own = np.concatenate(boxes)
    rest = own[:, [CLS, *range(LABEL_COLUMNS, own.shape[1])]]
    if not len(own):
        return np.zeros((0, 4), np.float32), rest
    sizes = np.array([tile.size for tile in placed], np.float32).repeat(counts, 0)
    offsets = np.array([tile.offset for tile in placed], np.float32).repeat(counts, 0)
    half = own[:, WH] / 2
    before = np.concatenate([(own[:, XY] - half) * sizes + offsets, (own[:, XY] + half) * sizes + offsets], 1)
    if len(placed) > 1:
        before = before.clip(0, canvas_wh[0])
        real = ((before[:, 2:] - before[:, :2]) > 0).all(1)
        before, rest = before[real], rest[real]
    scale, shift = _transform(scene, canvas_wh, side)
    after = (before * np.float32(scale) + np.array(shift * 2, np.float32)).clip(0, side)
    was, now = (before[:, 2:] - before[:, :2]) * scale, after[:, 2:] - after[:, :2]
    ratio = np.maximum(now[:, 0] / (now[:, 1] + 1e-16), now[:, 1] / (now[:, 0] + 1e-16))
    left = now.prod(1) / (was.prod(1) + 1e-16) > SMALLEST_SHARE
    stays = (now > SMALLEST_PX).all(1) & left & (ratio < LONGEST)
    return after[stays], rest[stays]


class Colours(NamedTuple):
    """A change of colour."""

    hue: int  # steps of 2 degrees
    factors: tuple[float, float]  # of saturation and value
    value: np.ndarray  # as a table of 256

    @staticmethod
    def of(gains: tuple[float, float, float]) -> Colours | None:
        """Hue shifted, saturation and value multiplied, as in Ultralytics' `RandomHSV`; None where nothing changes."""
        if not any(gains):
            return None
        value = np.clip(np.arange(256) * (gains[2] + 1), 0, 255).astype(np.uint8)
        return Colours(floor(gains[0] * 180), (gains[1] + 1, gains[2] + 1), value)

    def change(self, image: np.ndarray, out: np.ndarray) -> np.ndarray:
        """(H,W,3) RGB, or a grey image (H,W), which has only its value to change; `out` may be `image`.

        Instead of Ultralytics' table of 256 x 3 values one multiplication with a matrix, in a sixth of the time. OpenCV takes
        hues above 180 round the circle but has none below 0: a shift back is one forth with red and blue exchanged.
        """
        if image.ndim == 2:
            return np.asarray(cv2.LUT(image, self.value, dst=out))
        there, back = cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB
        if self.hue < 0:
            there, back = cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR
        hsv = cv2.cvtColor(image, there, dst=_scratch.array("hsv", image.shape))
        down, (saturation, value) = -0.4999, self.factors  # products are cut down to whole numbers, as in a table
        matrix = [[1, 0, 0, abs(self.hue)], [0, saturation, 0, down], [0, 0, value, down]]
        cv2.transform(hsv, np.array(matrix, np.float32), dst=hsv)
        return np.asarray(cv2.cvtColor(hsv, back, dst=out))


def make_sample(
    plan: Plan, side: int, size: Callable[[int], tuple[int, int]], load: Callable[[int], np.ndarray],
    boxes: Callable[[int], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Carry out a plan.

    Args:
        size: width and height of an image (px), `load`: its pixels, `boxes`: its (n,k) boxes.

    Returns:
        image: (side,side,3) RGB or (side,side) uint8. boxes: (n,k) of it.
    """
    pictures, edges, rest, colours = [], [], [], Colours.of(plan.gains)
    mixed = len(plan.scenes) == 2
    for scene, name in zip(plan.scenes, ("first", "second"), strict=False):
        placed, canvas = tiles(scene, [size(i) for i in scene.images], side)
        images = [load(i) for i in scene.images]
        pictures.append(paint(scene, placed, canvas, images, side, None if mixed else colours, name))
        own, other = move_boxes(scene, placed, canvas, [boxes(i) for i in scene.images], side)
        edges.append(own)
        rest.append(other)
    image, xyxy, columns = pictures[0], np.concatenate(edges), np.concatenate(rest)
    if mixed:
        image = _mix(pictures[0], pictures[1], plan.weight)
        image = colours.change(image, image) if colours else image
    centre, wh = (xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]
    for axis, on in ((1, plan.flipud), (0, plan.fliplr)):
        if on:
            centre[:, axis] = side - centre[:, axis]
    turns = {(True, True): -1, (True, False): 0, (False, True): 1}
    code = turns.get((plan.flipud, plan.fliplr))
    out = _scratch.lasting(image.shape)
    if code is None:
        np.copyto(out, image)
    else:
        cv2.flip(image, code, dst=out)
    return out, np.concatenate([columns[:, :1], centre / side, wh / side, columns[:, 1:]], 1).astype(np.float32)


def _mix(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    if first.ndim != second.ndim:
        first, second = (i if i.ndim == 3 else cv2.cvtColor(i, cv2.COLOR_GRAY2RGB) for i in (first, second))
    return np.asarray((first * weight + second * (1 - weight)).astype(np.uint8))
