"""Data of benchmarks/semi_supervised.py: one split with all labels, subsets of it by seed, reduced copies to carry."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from dfssd.data.dataset import decode, shrink
from dfssd.data.manifest import Manifest, read_manifest, write_manifest, write_withheld
from dfssd.data.preparation.splits import class_counts, labelling_order
from dfssd.runtime.storage import Storage

QUALITY = 80  # of the reduced JPEGs


def all_labels(data: str, out: Path) -> Manifest:
    """The split with the labels of every image, made once (seed 0, grouped), or read from an exported folder.

    Args:
        data: an exported folder (it holds `manifest.parquet`), or a data set as `prepare` reads it.
        out: where the split is kept.
    """
    exported = Path(data, "manifest.parquet").exists()
    folder = Path(data) if exported else out
    if not Path(folder, "manifest.parquet").exists():
        from dfssd.config import Data
        from dfssd.data.preparation.prepare import prepare

        prepare(Data(data=data, label_fraction=1.0), 0, Storage(str(folder)))
    manifest = read_manifest(Storage(str(folder)))
    if exported:  # its paths are relative
        manifest.rows = [replace(r, uri=str(folder.absolute() / r.uri)) for r in manifest.rows]
    return manifest


def subset(manifest: Manifest, fraction: float, seed: int, store: Storage) -> dict[str, int]:
    """Write the data set of one seed: the first `fraction` of the train images in the seed's own labelling order."""
    train = [r for r in manifest.of_split("train") if r.boxes is not None]
    order = labelling_order(
        [r.image_id for r in train], class_counts([r.boxes for r in train], len(manifest.names)), seed
    )
    chosen = {train[k].image_id for k in order[: max(1, round(fraction * len(train)))]}
    return hide(manifest, chosen, store, label_fraction=fraction, seed=seed)


def hide(manifest: Manifest, chosen: set[str], store: Storage, **meta: float) -> dict[str, int]:
    """Write a data set whose train images are labelled where their ids are chosen; the labels of others are withheld."""
    train = [r for r in manifest.of_split("train") if r.boxes is not None]
    withheld = {r.image_id: r.boxes for r in train if r.image_id not in chosen and r.boxes is not None}
    rows = [
        replace(r, labelled=r.image_id in chosen, boxes=None if r.image_id in withheld else r.boxes)
        for r in manifest.rows
    ]
    write_manifest(store, Manifest(rows, manifest.names, {**manifest.meta, **meta}))
    write_withheld(store, withheld)
    val = len([r for r in manifest.of_split("val") if r.boxes is not None])
    return {
        "labelled": len(chosen),
        "val": val,
        "unlabelled": len(train) - len(chosen),
        "test": len(manifest.of_split("test")),
    }


def export(data: str, imgsz: int, out: Path) -> None:
    """Write a copy with images of `imgsz` px, which needs neither the originals nor `prepare`."""
    manifest = all_labels(data, out.with_name(out.name + "-split"))
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for row in manifest.rows:
        image = shrink(decode(row.uri), imgsz)
        grey = bool((np.ptp(image.astype(np.int16), axis=2) == 0).all())  # decodes to the same three channels
        data = cv2.imencode(".jpg", image[..., 0] if grey else image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        own = hashlib.sha256(data).hexdigest()[
            : len(row.image_id)
        ]  # training looks whether a picture is that of its id
        name = f"images/{own}.jpg"
        (out / name).write_bytes(data)
        rows.append(replace(row, image_id=own, uri=name, width=image.shape[1], height=image.shape[0]))
    write_manifest(Storage(str(out)), Manifest(rows, manifest.names, manifest.meta))
    size = sum(f.stat().st_size for f in (out / "images").iterdir()) / 2**20
    print(f"{out}: {len(rows)} images of {imgsz} px, {size:.1f} MiB", flush=True)


def link(target: Path, name: Path) -> None:
    """Make `name` point at `target`."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.is_symlink():
        name.unlink()
    name.symlink_to(target.absolute())
