"""What a detector takes over from given weights, and what of it is new.

Tensors go by their names and shapes, the rows of the class head by the names of the classes: a head that knew other
classes, or the same ones in another order, must not lend its rows to classes that only have the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from ultralytics.nn.tasks import DetectionModel

TASKS = {"Segment": "segmentation", "Pose": "pose", "OBB": "oriented-box"}  # heads that hold a whole detection head
FEW = 5  # class names that are written out


@dataclass(frozen=True)
class Start:
    """What was taken over.

    Args:
        tensors: of the network, (taken over whole, all of them); parameters and buffers.
        layers: of the network, (whose tensors are all taken over, all that have any).
        parameters: (taken over, all of them), counted value by value, but for constants.
        kept: classes whose rows of the class head are taken over.
        names: classes of the network.
        given_names: classes that the weights knew.
        new: parts with tensors that are not taken over, such as "layer 22, class branch".
        task: what else the weights were trained for; '' for detection.
        moved: do kept rows stand at another place than they stood?
    """

    tensors: tuple[int, int]
    layers: tuple[int, int]
    parameters: tuple[int, int]
    kept: tuple[str, ...]
    names: tuple[str, ...]
    given_names: tuple[str, ...]
    new: tuple[str, ...]
    task: str = ""
    moved: bool = False

    def said(self) -> str:
        """In one line."""
        share = 100 * self.parameters[0] / max(self.parameters[1], 1)
        shown = "all" if self.parameters[0] == self.parameters[1] else f"{min(share, 99.9):.1f} %"
        text = (
            f"{self.tensors[0]} of {self.tensors[1]} tensors, {self.layers[0]} of {self.layers[1]} layers, {shown} of the "
            "parameters taken over"
        )
        text += f" (from a {self.task} model)" if self.task else ""
        return "; ".join([text, self._head(), *([f"new: {', '.join(self.new)}"] if self.new else [])])

    def _head(self) -> str:
        """What became of the class head."""
        count, known = len(self.names), len(self.given_names)
        if not self.kept:
            return f"class head: new ({count} classes for {known})"
        place = ", moved to their places" if self.moved else ""
        if len(self.kept) == count:
            return f"class head: the rows of all {count} classes kept by name{place}"
        fresh = [name for name in self.names if name not in self.kept]
        named = ", ".join(fresh[:FEW]) + (f" and {len(fresh) - FEW} more" if len(fresh) > FEW else "")
        return f"class head: the rows of {len(self.kept)} of {count} classes kept by name{place}; new rows: {named}"


def detection_layout(source: DetectionModel) -> tuple[dict[str, Any], str]:
    """Layout of the detector inside a model, and what else that model does ('' for nothing).

    A head for masks, keypoints or angles is a detection head with further branches, and its tensors have the same names.
    """
    layout = deepcopy(source.yaml)
    last = list(layout["head"][-1])
    task = next((task for name, task in TASKS.items() if str(last[2]).startswith(name)), "")
    if task:
        layout["head"] = [*layout["head"][:-1], [*last[:2], "Detect", ["nc"]]]
        layout.pop("kpt_shape", None)
    return layout, task


@torch.no_grad()
def take_over(model: DetectionModel, source: DetectionModel, names: Sequence[str], task: str = "") -> Start:
    """Copy into a new detector what its start weights hold for it.

    Args:
        model: with C = len(names) classes; changed in place.
        source: where the weights come from, in float32.
        names: classes of `model`.
        task: as `detection_layout` says.
    """
    own, given = model.state_dict(), source.state_dict()
    known = [str(source.names[k]) for k in sorted(source.names)]
    by_name = {name: row for row, name in enumerate(known)}
    # Rows of the new head and where they stood; a name that occurs twice says nothing.
    rows = [(k, by_name[n]) for k, n in enumerate(names) if known.count(n) == 1 and list(names).count(n) == 1]
    heads, constants = _class_rows(model), {k for k, _ in model.named_parameters() if ".dfl" in k}
    shown = [k for k, _ in model.named_parameters() if k not in constants]
    values, whole = 0, set[str]()
    kept = bool(rows)
    for key, tensor in own.items():
        other = given.get(key)
        if key in heads:
            fits = other is not None and other.shape[1:] == tensor.shape[1:] and other.shape[0] == len(known)
            kept &= fits
            if fits and rows:
                to, of = (torch.tensor(ends) for ends in zip(*rows, strict=True))
                tensor[to] = other[of]
                values += len(rows) * (tensor.numel() // len(tensor))
                whole |= {key} if len(rows) == len(names) else set()
        elif other is not None and other.shape == tensor.shape:
            tensor.copy_(other)
            values += tensor.numel() if key in shown else 0
            whole.add(key)
    layers = {key.split(".")[1] for key in own}
    open_keys = [key for key in own if key not in whole]
    return Start(
        tensors=(len(whole), len(own)),
        layers=(len(layers - {key.split(".")[1] for key in open_keys}), len(layers)),
        parameters=(values, sum(own[k].numel() for k in shown)),
        kept=tuple(names[k] for k, _ in rows) if kept else (),
        names=tuple(names),
        given_names=tuple(known),
        new=_parts(open_keys, heads, len(model.model) - 1),
        task=task,
        moved=any(k != row for k, row in rows),
    )


def _class_rows(model: DetectionModel) -> set[str]:
    """Names of the tensors of a head that have a row a class."""
    head, last = model.model[-1], len(model.model) - 1
    return {
        f"model.{last}.{branch}.{level}.{len(convolutions) - 1}.{kind}"
        for branch in ("cv3", "one2one_cv3")
        for level, convolutions in enumerate(getattr(head, branch, None) or ())
        for kind in ("weight", "bias")
    }


def _parts(keys: Sequence[str], heads: set[str], last: int) -> tuple[str, ...]:
    """Where new tensors lie, but for the last rows of the class head, of which is spoken apart."""
    parts: dict[str, None] = {}
    for key in keys:
        if key in heads:
            continue
        layer, branch = key.split(".")[1:3]
        inside = "class branch" if "cv3" in branch else "box branch" if "cv2" in branch else branch
        parts[f"layer {layer}" + (f", {inside}" if int(layer) == last else "")] = None
    return tuple(parts)
