"""Which model family a setting, a file or a network belongs to: the one place that chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dfssd.errors import DfssdError
from dfssd.models.family import ONLY_BOXES, Family, TeacherNetwork
from dfssd.models.pairing import Pairing
from dfssd.models.yolo.family import Yolo

# Asked in this order. The last one gets what nobody claims, and says what is wrong with it.
FAMILIES: list[Family] = [Yolo()]


def family_of(what: str | bytes | nn.Module) -> Family:
    """The family of a --teacher or --student setting, of the content of a file, or of a network."""
    return next((f for f in FAMILIES if f.claims(what)), FAMILIES[-1])


def resolve_weights(spec: str) -> tuple[str, bytes | None]:
    """`Family.resolve` of the family that the setting names."""
    return family_of(spec).resolve(spec)


def build_model(spec: str, names: Sequence[str], imgsz: int, weights: bytes | None = None) -> tuple[nn.Module, str]:
    """`Family.build`: of the weights' family where there are any, else of the setting's."""
    return family_of(spec if weights is None else weights).build(spec, names, imgsz, weights)


def load_model(data: bytes, where: str, imgsz: int = 640) -> nn.Module:
    """`Family.load` of the family that the file is of."""
    return family_of(data).load(data, where, imgsz)


def ready_model(data: bytes, where: str, imgsz: int) -> tuple[nn.Module, list[str]]:
    """A detector from a file, quick for inference on the CPU, and its classes."""
    model = load_model(data, where, imgsz)
    family = family_of(model)
    return family.ready(model), family.names(model)


def class_names(model: nn.Module) -> list[str]:
    """(C,) classes of a network."""
    return family_of(model).names(model)


def predict(
    model: nn.Module, images_bchw: Tensor, conf: float, iou: float, most: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """`Family.boxes` of a network: (n,6) [x1, y1, x2, y2 px of the input, score, class] an image."""
    return family_of(model).boxes(model, images_bchw, conf, iou, most, dtype)


def pair(teacher: TeacherNetwork, student: nn.Module, names: Sequence[str], prediction: str) -> Pairing:
    """`Family.pair` of two networks.

    Raises:
        DfssdError: they are of two families, or this teacher cannot teach this student.
    """
    own, other = family_of(student), family_of(teacher.model)
    if own is not other:
        raise DfssdError(f"a {other.name} teacher cannot teach its output to a {own.name} student", todo=ONLY_BOXES)
    return own.pair(teacher, student, names, prediction)
