"""The strong view of a training image: what the network learns from while its teacher labels the weak one.

Same geometry, so boxes found in one view are true in the other (FixMatch, Sohn et al., NeurIPS 2020; for detection:
Unbiased Teacher, Liu et al., ICLR 2021, section 3.1, and Soft Teacher, Xu et al., ICCV 2021). Their colour jitter,
greyscale and solarisation are made for photographs. Defects are a few grey levels of texture or a few pixels wide, so here
the view is mild: contrast, brightness, sensor noise, a blur below a pixel, and a few small grey patches (Cutout, DeVries &
Taylor 2017).
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

CONTRAST = 0.4  # gain of the distance to the image's mean: 1 +/- this
BRIGHTNESS = 30.0  # shift: +/- this (grey levels)
NOISE = 9.0  # largest standard deviation of the noise (grey levels), the same in all channels
BLUR, BLURRED = 0.9, 0.3  # largest sigma (px of the network's input), and share of images that are blurred at all
PATCHES, PATCH_SIDE = 4, (0.03, 0.15)  # most patches, and their side as a share of the image's
GREY = 114  # of Ultralytics' borders
_BANK = 1 << 20  # numbers of noise, drawn once: an image takes a piece, which costs a tenth of drawing anew


def strong_view(image_hwc: np.ndarray, seed: int, strength: float = 1.0) -> np.ndarray:
    """The strong view of a weakly augmented image; equal arguments give an equal view.

    Args:
        image_hwc: (H,W,3) uint8, any order of channels, or (H,W,1).
        strength: 0 leaves the image as it is, 1 is the ranges above; larger values are allowed.

    Returns:
        uint8 of the same shape, a new array.
    """
    if strength <= 0:
        return np.array(image_hwc)
    image = np.ascontiguousarray(image_hwc)
    rng = np.random.default_rng(seed)
    gain = 1 + strength * CONTRAST * rng.uniform(-1, 1)
    shift = strength * BRIGHTNESS * rng.uniform(-1, 1)
    sigma = strength * NOISE * rng.uniform()
    if rng.uniform() < BLURRED:
        image = cv2.GaussianBlur(image, (0, 0), max(0.2, strength * BLUR * rng.uniform(0.3, 1.0))).reshape(image.shape)
    height, width = image.shape[:2]
    mean = float(image.mean())
    strong = image.astype(np.float32) * max(gain, 0.05) + (mean * (1 - max(gain, 0.05)) + shift)
    strong += sigma * _noise(rng, height, width)[..., None]
    view = strong.clip(0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(PATCHES + 1))):
        low, high = PATCH_SIDE
        w, h = (max(1, round(strength * s * rng.uniform(low, high))) for s in (width, height))
        x, y = int(rng.integers(max(1, width - w + 1))), int(rng.integers(max(1, height - h + 1)))
        view[y : y + h, x : x + w] = GREY
    return view


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H,W) float32 standard normal noise."""
    bank, count = _bank(), height * width
    start = int(rng.integers(_BANK))
    return np.asarray(np.resize(bank[start:], count) if start + count > _BANK else bank[start : start + count]).reshape(
        height, width
    )


@lru_cache(maxsize=1)
def _bank() -> np.ndarray:
    return np.asarray(np.random.default_rng(0).standard_normal(_BANK, dtype=np.float32))
