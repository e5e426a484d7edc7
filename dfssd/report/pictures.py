"""Boxes drawn on images: what people trust more than a number."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageDraw

from dfssd.config import Config
from dfssd.data.dataset import decode, network_input, shrink
from dfssd.data.letterbox import decode_shard, in_shares, out_of_letterbox
from dfssd.data.manifest import Boxes, Manifest, Row
from dfssd.errors import DfssdError
from dfssd.models.predict import NMS_IOU, predict

SIDE = 240  # px of one picture
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")
DRAW_ABOVE = 0.25  # score


def sample_rows(manifest: Manifest, count: int) -> list[Row]:
    """Test images with defects, spread over the classes, always the same ones."""
    rows = sorted(
        (r for r in manifest.of_split("test") if r.boxes is not None and len(r.boxes)), key=lambda r: r.image_id
    )
    chosen: list[Row] = []
    while rows and len(chosen) < count:
        for c in range(len(manifest.names)):
            match = next((r for r in rows if r.boxes is not None and (r.boxes[:, 0] == c).any()), None)
            if match is not None and len(chosen) < count:
                chosen.append(match)
                rows.remove(match)
    return chosen


@torch.no_grad()
def detect_samples(model: torch.nn.Module, manifest: Manifest, config: Config) -> list[Boxes]:
    """(n,7) candidates of a model for each sample image, scores from 0.25."""
    rows = sample_rows(manifest, config.evaluate.sample_images)
    if not rows:
        return []
    side, same = config.train.imgsz, np.arange(len(manifest.names))
    ready = decode_shard({"uris": [r.uri for r in rows]}, side)
    images = network_input(torch.from_numpy(ready["images"].transpose(0, 3, 1, 2).copy()), torch.device("cpu"))
    found = predict(model, images, DRAW_ABOVE, NMS_IOU, 50)
    return [
        out_of_letterbox(in_shares(one, same, side), scale, left, top, size, side)
        if scale
        else np.zeros((0, 7), np.float32)
        for one, (scale, left, top), size in zip(found, ready["geometry"].tolist(), ready["sizes"], strict=True)
    ]


def draw(row: Row, boxes: Boxes | None, names: list[str], uncertain_below: np.ndarray | None = None) -> Image.Image:
    """One picture with boxes; candidates below their class threshold are drawn thin and grey."""
    try:
        picture = Image.fromarray(shrink(decode(row.uri), SIDE)[..., ::-1].copy())
    except DfssdError:
        return Image.new("RGB", (SIDE, SIDE), "#888")
    pen = ImageDraw.Draw(picture)
    for box in np.zeros((0, 7)) if boxes is None else boxes:
        c, (cx, cy, w, h) = int(box[0]), box[1:5] * np.tile(picture.size, 2)
        score = float(box[5]) if len(box) > 5 else None
        faint = uncertain_below is not None and score is not None and score < uncertain_below[c]
        colour = "#999999" if faint else COLOURS[c % len(COLOURS)]
        pen.rectangle((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), outline=colour, width=1 if faint else 2)
        if not faint:
            text = names[c] if score is None else f"{names[c]} {score:.2f}"
            place = (max(0, cx - w / 2), max(0, cy - h / 2 - 11))
            pen.rectangle(pen.textbbox(place, text), fill=colour)
            pen.text(place, text, fill="white")
    return picture


def sheet(columns: dict[str, list[Image.Image]]) -> bytes:
    """PNG with one titled column of pictures for each entry."""
    height = max((len(c) for c in columns.values()), default=0)
    canvas = Image.new("RGB", (max(1, len(columns)) * (SIDE + 4), height * (SIDE + 4) + 18), "white")
    pen = ImageDraw.Draw(canvas)
    for x, (title, pictures) in enumerate(columns.items()):
        pen.text((x * (SIDE + 4) + 4, 3), title, fill="black")
        for y, picture in enumerate(pictures):
            canvas.paste(picture, (x * (SIDE + 4), y * (SIDE + 4) + 18))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def detection_sheet(manifest: Manifest, detections: dict[str, list[Boxes]], config: Config) -> bytes:
    """Labels beside what each model finds, on the sample test images."""
    rows = sample_rows(manifest, config.evaluate.sample_images)
    columns = {"labels (test split)": [draw(r, r.boxes, manifest.names) for r in rows]}
    for name, found in detections.items():
        columns[name] = [draw(r, b, manifest.names) for r, b in zip(rows, found, strict=True)]
    return sheet(columns)
