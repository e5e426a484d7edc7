"""What one training step of the published DFSSD code computes, for benchmarks/step.py.

Counted by instrumenting that code (a fork of Ultralytics 8.2.100): the student runs twice with gradient and once without
(its body, for features), the teacher once with gradient (it is trained, although called fixed) and twice without. The
feature loss is computed and trains nothing. Written anew from that count; no line is taken over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

from dfssd.models.yolo.taps import Taps

TAPS = (2, 4, 6, 8, 12, 15, 18, 21)


class PublishedStep:
    """Six forwards and one backward through three of them, fp32, NCHW, SGD on student, teacher and projections."""

    def __init__(self, student: DetectionModel, teacher: DetectionModel) -> None:
        self.student, self.teacher = student.train(), teacher.train().requires_grad_(True)
        self.taps = [Taps(m, TAPS, "student") for m in (student, teacher)]
        pairs = zip(self.taps[0].channels, self.taps[1].channels, strict=True)
        self.align = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        parameters = [p for m in (student, teacher, self.align) for p in m.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(parameters, lr=0.01, momentum=0.937, nesterov=True)

    def __call__(self, batch: dict[str, Any]) -> None:
        images = batch["img"]
        loss = self.student.loss(batch, self.student(images))[0].sum()
        loss = loss + self.teacher.loss(batch, self.teacher(images))[0].sum()
        self._features(images)
        with torch.no_grad():
            target = self.teacher(images)
        second = self.student(images)
        loss = loss + 0.25 * sum(F.mse_loss(second[k], target[k]) for k in ("boxes", "scores"))
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.student.parameters() if p.grad is not None], 10.0)
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def _features(self, images: Tensor) -> None:
        """The feature loss on a pass of its own of each network, without gradient."""
        maps = []
        for model, taps in zip((self.student, self.teacher), self.taps, strict=True):
            model(images)
            maps.append(taps.take())
        for conv, own, other in zip(self.align, *maps, strict=True):
            p, q = conv(own).flatten(2).softmax(-1), other.flatten(2).softmax(-1)
            m = (p + q) / 2
            (p * (p / m).log() + q * (q / m).log()).sum(-1).mean()
