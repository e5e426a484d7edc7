"""Boxes out to where people review them: Label Studio, CVAT, COCO and YOLO, in these programs' own formats.

Sources: labelstud.io/guide/predictions and /tags/rectanglelabels (percent of the image, one result a box),
docs.cvat.ai/docs/dataset_management/formats/format-cvat ("CVAT for images 1.1"), cocodataset.org/#format-data.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from dfssd.data.boxes import CLS, SCORE, H, W, X, Y, corners
from dfssd.data.manifest import Boxes, Row


@dataclass
class Proposal:
    """An image and what the teacher proposes on it: (n,5) or more [cls, cx, cy, w, h (0..1), score]."""

    row: Row
    boxes: Boxes
    name: str = ""  # with folders, where other images of the data set have the same file name

    @property
    def file(self) -> str:
        return self.name or self.row.uri.rsplit("/", 1)[-1]


def told_apart(rows: Sequence[Row]) -> dict[str, str]:
    """File names by image id, with as many folders before them as tell each from others of the same name."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        same.setdefault(row.uri.rsplit("/", 1)[-1].rpartition(".")[0].lower(), []).append(row)
    names: dict[str, str] = {}
    for group in same.values():
        parts = [row.uri.rpartition("://")[2].strip("/").split("/") for row in group]
        most = max(map(len, parts))
        k = next((k for k in range(1, most) if len({"/".join(p[-k:]) for p in parts}) == len(group)), most)
        names.update({row.image_id: "/".join(p[-k:]) for row, p in zip(group, parts, strict=True)})
    return names


def export(
    fmt: str, proposals: Sequence[Proposal], names: Sequence[str], by: str, root: str = "", among: Sequence[Row] = ()
) -> dict[str, bytes]:
    """Files by name, to be imported into the program.

    Args:
        fmt: a name of `config.choices.REVIEW_FORMATS`.
        by: what made the boxes (a run and its teacher), shown as the predictions' version.
        root: folder that Label Studio serves (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT); '': the disk's root.
        among: all images of the data set, which the names must tell apart; default those of the proposals.
    """
    called = told_apart(among or [p.row for p in proposals])
    proposals = [replace(p, name=called[p.row.image_id]) for p in proposals]
    if fmt == "labelstudio":
        return {
            "tasks.json": label_studio(proposals, names, by, root),
            "labelling_config.xml": label_studio_config(names),
        }
    if fmt == "cvat":
        return {"annotations.xml": cvat(proposals, names), "images.txt": _list(proposals)}
    if fmt == "coco":
        return {"annotations.json": coco(proposals, names), "images.txt": _list(proposals)}
    return {"yolo.zip": yolo(proposals, names), "images.txt": _list(proposals)}


def _list(proposals: Sequence[Proposal]) -> bytes:
    """Where the images lie, to be uploaded."""
    return "".join(f"{p.row.uri}\n" for p in proposals).encode()


def label_studio(proposals: Sequence[Proposal], names: Sequence[str], by: str, root: str) -> bytes:
    """Tasks with predictions."""
    tasks = []
    for proposal in proposals:
        row = proposal.row
        results = []
        for k, box in enumerate(proposal.boxes):
            x1, y1, _, _ = corners(proposal.boxes[k : k + 1])[0]
            value = {"x": 100 * x1, "y": 100 * y1, "width": 100 * box[W], "height": 100 * box[H], "rotation": 0}
            result = {
                "id": f"{row.image_id[:8]}-{k}",
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": row.width,
                "original_height": row.height,
                "image_rotation": 0,
                "value": {
                    **{key: round(float(v), 6) for key, v in value.items()},
                    "rectanglelabels": [names[int(box[CLS])]],
                },
            }
            if len(box) > SCORE:
                result["score"] = round(float(box[SCORE]), 4)
            results.append(result)
        scores = [float(b[SCORE]) for b in proposal.boxes if len(b) > SCORE]
        prediction = {"model_version": by, "score": round(min(scores), 4) if scores else 0.0, "result": results}
        data = {"image": _served(row.uri, root), "image_id": row.image_id, "file": proposal.file}
        tasks.append({"data": data, "predictions": [prediction]})
    return json.dumps(tasks, indent=1, ensure_ascii=False).encode()


def _served(uri: str, root: str) -> str:
    """Address at which Label Studio finds the image: in an object store as it is, on a disk through its local storage."""
    if "://" in uri:
        return uri
    inside = uri[len(root.rstrip("/")) :] if root and uri.startswith(root.rstrip("/") + "/") else uri
    return f"/data/local-files/?d={quote(inside.lstrip('/'))}"


def label_studio_config(names: Sequence[str]) -> bytes:
    """Labelling interface for a project that takes these tasks."""
    labels = "\n".join(f"    <Label value={quoteattr(n)}/>" for n in names)
    return (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}\n  </RectangleLabels>\n</View>\n'
    ).encode()


def cvat(proposals: Sequence[Proposal], names: Sequence[str]) -> bytes:
    """CVAT for images 1.1; upload it as annotations of a task with these images."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for name in names:
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "attributes")
    for k, proposal in enumerate(proposals):
        row = proposal.row
        size = {"width": str(row.width), "height": str(row.height)}
        image = ElementTree.SubElement(root, "image", {"id": str(k), "name": proposal.file, **size})
        for box, edges in zip(proposal.boxes, corners(proposal.boxes), strict=True):
            x1, y1, x2, y2 = edges * [row.width, row.height, row.width, row.height]
            places = {"xtl": x1, "ytl": y1, "xbr": x2, "ybr": y2}
            numbers = {key: f"{float(v):.3f}" for key, v in places.items()}
            said = {"label": names[int(box[CLS])], "source": "auto", "occluded": "0", "z_order": "0"}
            ElementTree.SubElement(image, "box", {**said, **numbers})
    ElementTree.indent(root)
    text: str = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'.encode()


def coco(proposals: Sequence[Proposal], names: Sequence[str]) -> bytes:
    """COCO detection, with scores."""
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for k, proposal in enumerate(proposals, 1):
        row = proposal.row
        size = {"width": row.width, "height": row.height}
        images.append({"id": k, "file_name": proposal.file, **size, "dfssd_id": row.image_id})
        for box, edges in zip(proposal.boxes, corners(proposal.boxes), strict=True):
            x1, y1, x2, y2 = (edges * [row.width, row.height, row.width, row.height]).tolist()
            note: dict[str, Any] = {"id": len(notes) + 1, "image_id": k, "category_id": int(box[CLS]) + 1, "iscrowd": 0}
            note |= {"bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)], "area": round((x2 - x1) * (y2 - y1), 3)}
            note |= {"segmentation": []} | ({"score": round(float(box[SCORE]), 4)} if len(box) > SCORE else {})
            notes.append(note)
    categories = [{"id": c + 1, "name": name} for c, name in enumerate(names)]
    return json.dumps({"images": images, "annotations": notes, "categories": categories}, ensure_ascii=False).encode()


def yolo(proposals: Sequence[Proposal], names: Sequence[str]) -> bytes:
    """A .zip with labels/NAME.txt and classes.txt, as LabelImg, Label Studio and X-AnyLabeling read it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("classes.txt", "".join(f"{n}\n" for n in names))
        stems = [p.file.rsplit(".", 1)[0] for p in proposals]
        times = Counter(stems)
        for proposal, stem in zip(proposals, stems, strict=True):
            lines = (f"{int(b[CLS])} {b[X]:.6f} {b[Y]:.6f} {b[W]:.6f} {b[H]:.6f}\n" for b in proposal.boxes)
            archive.writestr(f"labels/{stem if times[stem] < 2 else proposal.file}.txt", "".join(lines))  # a.jpg, a.png
    return buffer.getvalue()
