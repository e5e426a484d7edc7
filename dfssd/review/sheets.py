"""Contact sheets whose pictures carry their file names, and the tables beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dfssd.report.pictures import SIDE, png

CAPTION = 34  # px below each picture
GAP = 8


def captioned(pictures: Sequence[tuple[Image.Image, str]], columns: int = 6) -> bytes:
    """PNG: pictures in rows, best first, each with up to two lines of text below it (split at a line break)."""
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (SIDE + GAP), max(1, rows) * (SIDE + CAPTION + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for k, (picture, caption) in enumerate(pictures):
        x, y = k % columns * (SIDE + GAP), k // columns * (SIDE + CAPTION + GAP)
        canvas.paste(picture, (x, y))
        for line, text in enumerate(caption.split("\n")[:2]):
            pen.text((x, y + SIDE + 2 + 15 * line), _shortened(pen, text, font), fill="black", font=font)
    return png(canvas)


def _shortened(pen: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    """The text, or its end where it is wider than a picture: file names differ at their ends."""
    try:
        while pen.textlength(text, font=font) > SIDE and len(text) > 4:
            text = "..." + text[4:]
        return text
    except UnicodeEncodeError:  # a font without these letters
        return text.encode("ascii", "replace").decode()


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """CSV; numbers with four digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{v:.4f}" if isinstance(v, float) else v for v in row] for row in rows])
    return text.getvalue().encode()
