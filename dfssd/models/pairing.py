"""What a teacher can teach a student: classes by name, head branches, and how their boxes are compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dfssd.models.head import HeadOutput


@dataclass(frozen=True)
class Pairing:
    """How the predictions of one teacher stand to those of one student.

    Args:
        classes: teacher's channel of each of the student's classes, or None where they are the same.
        branches: head branches that both have; the others learn from labels and pseudo-labels alone.
        bins: do both predict the same DFL bins? Else distances are compared.
        notes: what is only possible in part, in sentences.
    """

    classes: tuple[int, ...] | None
    branches: tuple[str, ...]
    bins: bool
    notes: tuple[str, ...] = ()

    def by_bins(self, student: HeadOutput) -> bool:
        """Are distributions over DFL bins compared in this branch? Else distances."""
        return self.bins and student.boxes.shape[1] > 4

    def scores(self, branch: HeadOutput) -> Tensor:
        """(B,C,A) teacher's class logits for the student's classes."""
        if self.classes is None:
            return branch.scores
        return branch.scores.index_select(1, _index(self.classes, branch.scores.device))


@lru_cache(maxsize=8)
def _index(classes: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept on the device: made anew it would be a copy that every step waits for."""
    return torch.tensor(classes, device=device)
