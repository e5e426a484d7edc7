"""A made-up strip-steel data set: brushed metal under uneven light, with three kinds of defects and exact boxes.

For the demo and the tests; a function of its seed. `python -m dfssd.data.synthetic --out FOLDER --images 400`.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tyro

NAMES = ("pit", "scratch", "patch")


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side,side) float32 grey image: rolling texture along x, smooth shading, noise."""
    rows = cv2.GaussianBlur(rng.normal(0, 1, (side, 1)).astype(np.float32), (1, 5), 0) * 6
    streaks = cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (31, 1), 0) * 14
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    light = rng.uniform(-35, 35) * (x - 0.5) + rng.uniform(-35, 35) * (y - 0.5)
    return np.asarray(rng.uniform(95, 160) + rows + streaks + light + rng.normal(0, 3, (side, side)), np.float32)


def add_pit(rng: np.random.Generator, image: np.ndarray) -> tuple[float, float, float, float]:
    """A dark round spot with a bright rim; returns its box x1, y1, x2, y2 (px)."""
    side = image.shape[0]
    a, b = rng.uniform(0.035, 0.07, 2) * side
    x, y = rng.uniform(a + 2, side - a - 2), rng.uniform(b + 2, side - b - 2)
    depth = rng.uniform(25, 70)
    centre, axes = (round(x), round(y)), (round(a), round(b))
    mask = np.zeros_like(image)
    cv2.ellipse(mask, centre, axes, 0, 0, 360, 1.0, -1)
    mask = cv2.GaussianBlur(mask, (3, 3), 0)
    image -= depth * mask
    rim = np.zeros_like(image)
    cv2.ellipse(rim, centre, axes, 0, 200, 320, 1.0, 1)
    image += depth * 0.8 * rim
    return centre[0] - axes[0] - 0.5, centre[1] - axes[1] - 0.5, centre[0] + axes[0] + 0.5, centre[1] + axes[1] + 0.5


def add_scratch(rng: np.random.Generator, image: np.ndarray) -> tuple[float, float, float, float]:
    """A thin line, bright or dark, slightly bent; returns its box."""
    side = image.shape[0]
    length, angle = rng.uniform(0.2, 0.5) * side, rng.uniform(0, np.pi)
    reach = length / 2 + 3
    x, y = rng.uniform(reach, side - reach, 2)
    t = np.linspace(-0.5, 0.5, 12)
    bend = rng.uniform(-0.12, 0.12) * length * (0.25 - t**2) * 4
    xs = x + length * t * np.cos(angle) - bend * np.sin(angle)
    ys = y + length * t * np.sin(angle) + bend * np.cos(angle)
    points = np.stack([xs, ys], 1).round().astype(np.int32)
    mask = np.zeros_like(image)
    cv2.polylines(mask, [points], False, 1.0, int(rng.integers(1, 3)), cv2.LINE_AA)
    image += rng.choice([-1, 1]) * rng.uniform(25, 60) * mask
    return (*(points.min(0) - 1.0), *(points.max(0) + 2.0))


def add_patch(rng: np.random.Generator, image: np.ndarray) -> tuple[float, float, float, float]:
    """A blotch of rough, dull surface with an irregular edge; returns its box."""
    side = image.shape[0]
    radius = rng.uniform(0.08, 0.16) * side
    x, y = rng.uniform(radius * 1.3 + 1, side - radius * 1.3 - 1, 2)
    turns = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    reach = radius * rng.uniform(0.75, 1.25, 14)
    points = np.stack([x + reach * np.cos(turns), y + reach * np.sin(turns)], 1).round().astype(np.int32)
    mask = np.zeros_like(image)
    cv2.fillPoly(mask, [points], 1.0)
    mask = cv2.GaussianBlur(mask, (5, 5), 0)
    rough = rng.normal(0, 1, image.shape).astype(np.float32)
    image += mask * (rng.choice([-1, 1]) * rng.uniform(8, 22) + rough * rng.uniform(8, 16))
    return (*(points.min(0).astype(float)), *(points.max(0) + 1.0))


MAKERS = (add_pit, add_scratch, add_patch)


def make_image(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One image and its boxes: (side,side) uint8, (n,5) [class, cx, cy, w, h] 0..1; one in twelve is defect-free."""
    image = background(rng, side)
    count = 0 if rng.random() < 1 / 12 else int(rng.integers(1, 4))
    boxes = []
    for _ in range(count):
        c = int(rng.integers(len(MAKERS)))
        x1, y1, x2, y2 = np.clip(MAKERS[c](rng, image), 0, side)
        boxes.append([c, (x1 + x2) / 2 / side, (y1 + y2) / 2 / side, (x2 - x1) / side, (y2 - y1) / side])
    return image.clip(0, 255).astype(np.uint8), np.array(boxes, np.float64).reshape(-1, 5)


def make_dataset(out: Path, images: int = 400, side: int = 128, seed: int = 0) -> None:
    """Write images/, labels/ and data.yaml (Ultralytics layout, no split).

    Args:
        out: folder to write to.
        images: how many.
        side: px.
        seed: another seed, another data set.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "labels").mkdir(exist_ok=True)
    for k in range(images):
        image, boxes = make_image(np.random.default_rng([seed, k]), side)
        cv2.imwrite(str(out / "images" / f"strip_{k:05d}.png"), image)
        lines = [f"{int(b[0])} " + " ".join(f"{v:.6f}" for v in b[1:]) for b in boxes]
        (out / "labels" / f"strip_{k:05d}.txt").write_text("\n".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    (out / "data.yaml").write_text(f"path: .\nnames:\n{names}")
    print(f"{images} images of {side} px in {out}")


if __name__ == "__main__":
    tyro.cli(make_dataset)
