"""What `dfssd predict` leaves: one line of JSON a picture, written as it comes, and from these CSV, JSON and COCO.

The lines are the memory of a watched folder too: a picture that has a line is done, whatever was killed in between. A
picture that is labelled again has one line, the newest: an older one is taken out at the end, or at the next start.
"""

from __future__ import annotations

import csv
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dfssd.data.boxes import DET_CLS, DET_SCORE, XYXY
from dfssd.errors import DfssdError

LINES = "pictures.jsonl"
_KEYS = {"file", "stamp", "width", "height", "verdict", "boxes"}  # of a line; earlier versions wrote no model
LOCK = ".lock"  # who holds it alone writes lines


class Results:
    """Lines of a folder; an unfinished last one (a killed process) is cut off, and any that cannot be read (a power cut)
    taken out: their pictures count as not labelled.

    Args:
        out: folder, made where it is missing. names: class names.
        model: what finds the boxes, as each line says: the beginning of its weights' sha256; '' where that is not known.

    Attributes:
        damaged: lines that could not be read.

    Raises:
        DfssdError: nothing can be written into the folder.
    """

    def __init__(self, out: Path, names: Sequence[str], model: str = "") -> None:
        self.out, self.names, self.model = out, list(names), model
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / LOCK).touch()
        except OSError as error:
            what = f"results cannot be written there: {error.strerror}"
            raise DfssdError(what, where=str(out), todo="give another --out") from error
        self.file = out / LINES
        self.done: dict[str, str] = {}
        self.damaged = 0
        if self.file.exists():
            with self._alone():
                data = self.file.read_bytes()
                whole = data[: data.rfind(b"\n") + 1]
                if len(whole) < len(data):
                    self.file.write_bytes(whole)
                self.damaged = sum(_line(text) is None for text in whole.decode(errors="replace").splitlines())
                self._tidy()
            self.done = {one["file"]: one["stamp"] for one in self.lines()}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process appends to the lines or replaces their file: another `dfssd predict` may write here, too."""
        with (self.out / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, or its process is killed
            yield

    def lines(self) -> Iterator[dict[str, Any]]:
        """All pictures so far; a picture that was labelled again counts once, as it was last."""
        if self.file.exists():
            with self._alone():
                newest = self._newest()
            yield from newest.values()

    def _newest(self) -> dict[str, dict[str, Any]]:
        with self.file.open(encoding="utf-8", errors="replace") as stream:
            return {one["file"]: one for one in map(_line, stream) if one}

    def _tidy(self) -> None:
        """Take out lines that a newer one of the same picture has replaced; a kill leaves the old file or the new one."""
        newest = self._newest()
        with self.file.open("rb") as stream:
            if sum(1 for _ in stream) == len(newest):
                return
        other = self.file.with_suffix(".new")
        other.write_text("".join(json.dumps(one) + "\n" for one in newest.values()), encoding="utf-8")
        other.replace(self.file)

    def known(self, file: Path, stamp: str) -> bool:
        """Was this very content of the file labelled already?"""
        return self.done.get(str(file)) == stamp

    def add(self, file: Path, stamp: str, size_wh: tuple[int, int], boxes: np.ndarray) -> dict[str, Any]:
        """Append one picture."""
        found = [
            {
                "name": self.names[int(box[DET_CLS])],
                "score": round(float(box[DET_SCORE]), 4),
                "box": [round(float(v), 2) for v in box[XYXY]],
            }
            for box in boxes
        ]
        one = {
            "file": str(file),
            "stamp": stamp,
            "model": self.model,
            "width": size_wh[0],
            "height": size_wh[1],
            "verdict": "reject" if found else "pass",
            "boxes": found,
        }
        with self._alone(), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(one) + "\n")
        self.done[str(file)] = stamp
        return one

    def finish(self) -> list[Path]:
        """Write boxes.csv, boxes.json and coco.json from the lines."""
        places = [self.out / name for name in ("boxes.csv", "boxes.json", "coco.json")]
        with self._alone():  # to the end: an older list must not be written over the newer one of another process
            if self.file.exists():
                self._tidy()
            self._write(list(self._newest().values()) if self.file.exists() else [], places)
        return places

    def _write(self, pictures: Sequence[Mapping[str, Any]], places: Sequence[Path]) -> None:
        with places[0].open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["file", "verdict", "name", "score", "x1", "y1", "x2", "y2"])
            for one in pictures:
                rows = [[b["name"], b["score"], *b["box"]] for b in one["boxes"]] or [["", "", "", "", "", ""]]
                table.writerows([one["file"], one["verdict"], *row] for row in rows)
        places[1].write_text(json.dumps(pictures, indent=1), encoding="utf-8")
        places[2].write_text(json.dumps(coco(pictures, self.names)), encoding="utf-8")


def _line(text: str) -> dict[str, Any] | None:
    """One picture as it was written; None of a line that is not whole."""
    try:
        one = json.loads(text)
    except ValueError:
        return None
    return one if isinstance(one, dict) and one.keys() >= _KEYS else None


def coco(pictures: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """COCO annotations (with scores) of all pictures, boxes as x, y, width, height (px).

    Args:
        names: classes of the model; those that an earlier one found in the same folder come after them.
    """
    boxes: list[dict[str, Any]] = []
    names = list(dict.fromkeys([*names, *(found["name"] for one in pictures for found in one["boxes"])]))
    for k, one in enumerate(pictures, 1):
        for found in one["boxes"]:
            x1, y1, x2, y2 = found["box"]
            size = round(x2 - x1, 2), round(y2 - y1, 2)
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": k,
                    "category_id": names.index(found["name"]) + 1,
                    "bbox": [x1, y1, *size],
                    "area": round(size[0] * size[1], 2),
                    "score": found["score"],
                    "iscrowd": 0,
                }
            )
    return {
        "images": [
            {"id": k, "file_name": o["file"], "width": o["width"], "height": o["height"]}
            for k, o in enumerate(pictures, 1)
        ],
        "annotations": boxes,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
    }
