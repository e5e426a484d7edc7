"""Boxes drawn on images: what people trust more than a number."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dfssd.config import Config
from dfssd.data.boxes import CLS, DET_CLS, DET_SCORE, HIT, SCORE, X1, X2, XYWH, detections_above
from dfssd.data.dataset import decode, shrink
from dfssd.data.manifest import Boxes, Manifest, Row, read_manifest
from dfssd.errors import DfssdError
from dfssd.evaluate.detections import Found, read_detections
from dfssd.evaluate.escapes import thresholds_of
from dfssd.runtime.storage import Storage

SIDE = 240  # px of one picture
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")
LARGE = 420  # px of a picture that shows a single case
GAP, HEAD = 6, 24  # px between the tiles of a sheet, and of their titles
TRUTH = "#ffffff"


def sample_rows(manifest: Manifest, count: int) -> list[Row]:
    """Test images with defects, spread over the classes, always the same ones."""
    rows = sorted(
        (r for r in manifest.of_split("test") if r.boxes is not None and len(r.boxes)), key=lambda r: r.image_id
    )
    chosen: list[Row] = []
    while rows and len(chosen) < count:
        for c in range(len(manifest.names)):
            match = next((r for r in rows if r.boxes is not None and (r.boxes[:, CLS] == c).any()), None)
            if match is not None and len(chosen) < count:
                chosen.append(match)
                rows.remove(match)
    return chosen


def draw(
    row: Row,
    boxes: Boxes | None,
    names: list[str],
    uncertain_below: np.ndarray | None = None,
    side: int = SIDE,
    truth: Boxes | None = None,
) -> Image.Image:
    """One picture with boxes; candidates below their class threshold are drawn thin and yellow, the truth white.

    Args:
        boxes, truth: (n,5) or more [cls, cx, cy, w, h (0..1), score].
        side: longer side (px) of what is drawn; smaller pictures are enlarged, so that names and lines stay readable.
    """
    try:
        picture = _sized(Image.fromarray(shrink(decode(row.uri, white=row.white), side)[..., ::-1].copy()), side)
    except DfssdError:
        return Image.new("RGB", (side, side), "#888")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(11, side // 28))

    def write(text: str, place: tuple[float, float], fill: str, ink: str) -> None:
        left, top, right, bottom = pen.textbbox(place, text, font=font)
        shift = min(0.0, picture.width - 1 - right), min(0.0, picture.height - 1 - bottom)  # stay inside
        place = max(0.0, place[0] + shift[0]), max(0.0, place[1] + shift[1])
        left, top, right, bottom = pen.textbbox(place, text, font=font)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=fill)
        pen.text(place, text, fill=ink, font=font)

    for box in np.zeros((0, 5)) if truth is None else truth:
        x1, y1, x2, y2 = _edges(box, picture.size)
        pen.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=TRUTH, width=1)
        write(names[int(box[CLS])], (x1, y2 + 3), TRUTH, "black")
    boxes = np.zeros((0, 7)) if boxes is None else boxes
    if boxes.shape[1] > SCORE:
        boxes = boxes[np.argsort(boxes[:, SCORE], kind="stable")]  # the strongest lies on top, with its name
    names_last = []
    for box in boxes:
        c = int(box[CLS])
        x1, y1, x2, y2 = _edges(box, picture.size)
        score = float(box[SCORE]) if len(box) > SCORE else None
        faint = uncertain_below is not None and score is not None and score < uncertain_below[c]
        colour = "#ffd60a" if faint else COLOURS[c % len(COLOURS)]
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=1 if faint else 2)
        if not faint:
            text = names[c] if score is None else f"{names[c]} {score:.2f}"
            names_last.append((text, (x1, y1 - max(13, side // 24)), colour))
    for text, place, colour in names_last:
        write(text, place, colour, "white")
    return picture


def _sized(picture: Image.Image, side: int) -> Image.Image:
    """A picture whose longer side has at least so many px."""
    ratio = side / max(picture.size)
    size = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
    return picture.resize(size, Image.Resampling.BICUBIC) if ratio > 1 else picture


def _edges(box: np.ndarray, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 (px of the drawn picture), in order and inside it."""
    cx, cy, w, h = box[XYWH] * np.tile(size, 2)
    x1, y1 = float(np.clip(cx - w / 2, 0, size[0] - 1)), float(np.clip(cy - h / 2, 0, size[1] - 1))
    return x1, y1, float(np.clip(cx + w / 2, x1, size[0] - 1)), float(np.clip(cy + h / 2, y1, size[1] - 1))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def jpeg(picture: Image.Image) -> bytes:
    """For photographs in a report: a tenth of the size of a PNG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def sheet(columns: dict[str, list[Image.Image]], side: int = SIDE) -> bytes:
    """PNG with one titled column of pictures for each entry; titles that are too long are set smaller."""
    height = max((len(c) for c in columns.values()), default=0)
    canvas = Image.new("RGB", (max(1, len(columns)) * (side + GAP), height * (side + GAP) + HEAD), "white")
    pen = ImageDraw.Draw(canvas)
    for x, (title, pictures) in enumerate(columns.items()):
        size = 15
        while size > 8 and pen.textlength(title, font=ImageFont.load_default(size=size)) > side - 4:
            size -= 1
        pen.text((x * (side + GAP) + 4, 4), title, fill="black", font=ImageFont.load_default(size=size))
        for y, picture in enumerate(pictures):
            canvas.paste(picture, (x * (side + GAP), y * (side + GAP) + HEAD))
    return png(canvas)


def as_candidates(found: np.ndarray | None, row: Row, tau_c: np.ndarray | None = None) -> Boxes:
    """(n,7) [x1, y1, x2, y2 px, score, cls, hit] as [cls, cx, cy, w, h (0..1), score, hit]; tau_c: without lower scores."""
    if found is None or not len(found):
        return np.zeros((0, 7), np.float32)
    if tau_c is not None:
        found = detections_above(found, tau_c)
    size = np.array([row.width, row.height], np.float32)
    low, high = (found[:, k : k + 2].clip(0, size) / size for k in (X1, X2))
    cls, score, hit = (found[:, k, None] for k in (DET_CLS, DET_SCORE, HIT))
    return np.concatenate([cls, (low + high) / 2, high - low, score, hit], 1)


def detection_sheet(
    manifest: Manifest,
    detections: dict[tuple[str, str], Found],
    results: dict[str, Any],
    models: dict[str, str],
    count: int,
) -> bytes:
    """Labels beside what each model finds at its operating point, on sample test images."""
    rows = sample_rows(manifest, count)
    columns = {"labels (test split)": [draw(r, r.boxes, manifest.names) for r in rows]}
    for name, title in models.items():
        tau_c = thresholds_of(results[name]["operating_point"], manifest.names)
        found = detections.get((name, "test"), {})
        columns[title] = [draw(r, as_candidates(found.get(r.image_id), r, tau_c), manifest.names) for r in rows]
    return sheet(columns)


def write_detection_sheet(config: Config, run: Storage, results: dict[str, Any], models: dict[str, str]) -> None:
    """Write `report/detections.png` from `report/detections.parquet`."""
    manifest, detections = read_manifest(run.at("dataset")), read_detections(run.at("report"))
    picture = detection_sheet(manifest, detections, results, models, config.evaluate.sample_images)
    run.write("report/detections.png", picture)
