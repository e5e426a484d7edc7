"""All that is trained, in one module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dfssd.distill.criterion import StudentOutput
from dfssd.distill.features import Projections
from dfssd.models.families import family_of
from dfssd.models.head import MAIN


class Student(nn.Module):
    """All that is trained: the detector, the projections of its taps, and an online teacher where there is one.

    They live in one module, so that DDP synchronises the gradients of all.

    Args:
        teacher_channels: channels of the teacher's taps; None: features are not distilled.
        layers: layers to tap; none: the neck's outputs.
        generators: with MGD's generators.
        online: a teacher that trains too, on the labelled images of a batch.
    """

    def __init__(
        self,
        detector: nn.Module,
        teacher_channels: list[int] | None = None,
        layers: Sequence[int] = (),
        generators: bool = False,
        online: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.detector, self.online = detector, online
        self.family = family_of(detector)
        self.taps = self.family.taps(detector, layers, "student") if layers and teacher_channels else None
        self.projections = None
        if teacher_channels:
            own = self.taps.channels if self.taps else self.family.channels(detector)
            self.projections = Projections(own, teacher_channels, generators)

    def forward(self, images_bchw: Tensor, labelled: int = 0) -> StudentOutput:
        """One pass; the first `labelled` images also go through an online teacher."""
        raw = self.family.raw(self.detector, images_bchw)
        taps = self.taps.take() if self.taps else raw[MAIN].feats
        projected = self.projections(taps) if self.projections is not None else []
        teacher = family_of(self.online).raw(self.online, images_bchw[:labelled]) if self.online is not None else None
        return StudentOutput(raw, taps, projected, teacher)
