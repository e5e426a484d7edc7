"""What one YOLO can teach another: classes by name, head branches, and how their boxes are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfssd.errors import DfssdError
from dfssd.models.pairing import Pairing
from dfssd.models.yolo.detector import Teacher


def pair(teacher: Teacher, student_head: Any, names: Sequence[str], prediction: str) -> Pairing:
    """Compare teacher and student once, before training.

    Args:
        student_head: the student's detection head.
        names: the student's classes.
        prediction: 'soft' or 'mse' (see `Distill`).

    Raises:
        DfssdError: classes or strides do not allow it, or `mse` meets heads of another shape.
    """
    missing = [n for n in names if n not in teacher.names]
    if missing:
        raise DfssdError(
            f"the teacher knows the classes {', '.join(teacher.names)}; it does not know {', '.join(missing)}",
            todo="train the teacher on these classes",
        )
    own, other = (h.stride.tolist() for h in (student_head, teacher.head))
    if own != other:
        raise DfssdError(
            f"teacher and student have other strides: {other} and {own}",
            todo="take both from YOLOv8, YOLO11, YOLO12 or YOLO26 with P3 to P5",
        )
    index = tuple(teacher.names.index(n) for n in names)
    bins = int(student_head.reg_max) == teacher.reg_max
    if prediction == "mse" and not bins:
        raise DfssdError(
            f"--prediction mse compares raw outputs, but the heads differ: {teacher.reg_max} bins a side in the teacher, "
            f"{student_head.reg_max} in the student",
            todo="take --prediction soft, which compares distances there, or models of one family",
        )
    wanted = ("one2many", "one2one") if hasattr(student_head, "one2one_cv2") else ("one2many",)
    shared = tuple(b for b in wanted if b in teacher.branches)
    notes = []
    if not bins:
        notes.append("teacher and student have other DFL bins: the localisation term compares distances")
    if len(shared) < len(wanted):
        notes.append("the teacher has no one-to-one head: the student's learns from labels and pseudo-labels alone")
    if len(teacher.names) > len(names):
        notes.append(f"the teacher knows {len(teacher.names)} classes, {len(names)} of them are taught")
    return Pairing(None if index == tuple(range(len(teacher.names))) else index, shared, bins, tuple(notes))
