"""What sets one training stage apart from another. Alone in its file: the table of stages has it, and so each `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """What a stage trains, and what teaches it beside the labels.

    Args:
        model: which of the two networks; a teacher has steps and a patience of its own.
        distils: learns from a teacher inside the loop, and from everything that section `distill` sets.
        labels_itself: its own weight average labels the unlabelled images inside the loop.
    """

    model: Literal["teacher", "student"]
    distils: bool = False
    labels_itself: bool = False
