"""Labels that people corrected after `prepare`: kept with the run, laid over the data's own, with who and when.

`dfssd review --corrected FILE` writes `<run>/corrections/0001.json` and so on: one entry an image, by its image id, so that
neither the labelling program's format nor the image's path matters later. A later correction of an image wins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from dfssd.data.checks import Checked
from dfssd.data.manifest import write_table
from dfssd.errors import DfssdError
from dfssd.runtime.storage import Storage

FOLDER = "corrections"
_CLASSES = f"{FOLDER}/classes.json"


@dataclass
class Correction:
    """The labels of one image after a person looked at it.

    Args:
        image_id: of the manifest.
        boxes: [class name, cx, cy, w, h (0..1)]; none: looked at, and free of defects.
        who: the person, as the labelling program or the command says.
        when: ISO 8601.
        source: file it came from.
    """

    image_id: str
    boxes: list[list[str | float]]
    who: str
    when: str
    source: str


def write_corrections(run: Storage, corrections: list[Correction], new_classes: Sequence[str] = ()) -> str:
    """Keep them, and classes that they add, with the run; returns the file's name."""
    if new_classes:
        run.write_json(_CLASSES, [*added_classes(run), *new_classes])
    numbers = [int(f.rsplit("/", 1)[-1][:4]) for f in _names(run)]
    name = f"{FOLDER}/{max(numbers, default=0) + 1:04d}.json"
    run.write_json(name, [asdict(c) for c in corrections])
    return name


def read_corrections(run: Storage) -> dict[str, Correction]:
    """By image id, the newest of each image."""
    found: dict[str, Correction] = {}
    for name in _names(run):
        found.update({c["image_id"]: Correction(**c) for c in run.read_json(name)})
    return found


def added_classes(run: Storage) -> list[str]:
    """Classes that reviewers have added, in the order in which they came."""
    return list(run.read_json(_CLASSES)) if run.exists(_CLASSES) else []


def with_new_classes(names: Sequence[str], new: Sequence[str]) -> list[str]:
    """Classes with those behind them that they lack: the ids that there are stay what they are."""
    return list(dict.fromkeys([*names, *new]))


def digest_of(corrections: dict[str, Correction]) -> str:
    """'' where there are none."""
    if not corrections:
        return ""
    text = json.dumps({k: corrections[k].boxes for k in sorted(corrections)})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _names(run: Storage) -> list[str]:
    return [f for f in run.files(FOLDER) if f.endswith(".json") and f.rsplit("/", 1)[-1] != "classes.json"]


def as_boxes(correction: Correction, names: list[str]) -> np.ndarray:
    """(n,5) float32.

    Raises:
        DfssdError: a class that the data has not.
    """
    unknown = sorted({str(b[0]) for b in correction.boxes}.difference(names))
    if unknown:
        raise DfssdError(
            f"corrected labels name classes that the data has not: {', '.join(map(repr, unknown))}",
            where=correction.source,
            todo=f"rename them in the labelling program (the classes are {', '.join(names)}), or --add-classes NAME",
        )
    rows = [[names.index(str(b[0])), *map(float, b[1:])] for b in correction.boxes]
    return np.array(rows, np.float32).reshape(-1, 5)


def lay_over(good: list[Checked], names: list[str], corrections: dict[str, Correction]) -> int:
    """Put corrected labels in the place of the data's own; returns how many images have them."""
    changed = 0
    for image in good:
        correction = corrections.get(image.image_id)
        if correction is not None:
            image.boxes = as_boxes(correction, names)
            changed += 1
    return changed


def write_provenance(store: Storage, corrections: dict[str, Correction], used: set[str]) -> None:
    """`corrections.parquet`: who corrected which image when, and how many boxes it has since."""
    rows = [corrections[i] for i in sorted(used.intersection(corrections))]
    table = pa.table(
        {
            "image_id": pa.array([r.image_id for r in rows], pa.string()),
            "who": pa.array([r.who for r in rows], pa.string()),
            "when": pa.array([r.when for r in rows], pa.string()),
            "source": pa.array([r.source for r in rows], pa.string()),
            "boxes": pa.array([len(r.boxes) for r in rows], pa.int32()),
        }
    )
    write_table(store, "corrections.parquet", table)
