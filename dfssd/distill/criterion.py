"""What is weighted and summed: L = L_sup + lambda_u L_pse + lambda_p L_pred + lambda_f s(t) L_feat.

The labelled images of a batch come first, then the unlabelled ones; the student saw all of them in one forward pass, and
so did the teacher. Every term is this worker's share of a global number: the sum of a term over workers is the loss of
the global batch, whatever the number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfssd.config import Distill
from dfssd.distill.divergences import feature_loss
from dfssd.distill.predictions import dense_class
from dfssd.models.detection_loss import COMPONENTS, DetectionLoss, Targets
from dfssd.models.detector import Branch
from dfssd.pseudo.thresholds import Policy, class_sums
from dfssd.world import World


@dataclass
class Terms:
    """Weighted loss terms of one step by name (this worker's share), and numbers worth logging (global)."""

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]

    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class Criterion:
    """All loss terms of a step.

    Args:
        detection: detection loss of the student.
        config: weights and settings; None trains on labels alone.
        policy: class thresholds; needed with `config`.
        labelled: labelled images of this worker's batch, which come first.
    """

    def __init__(
        self, detection: DetectionLoss, config: Distill | None, policy: Policy | None, labelled: int, world: World
    ) -> None:
        self.detection, self.config, self.policy = detection, config, policy
        self.labelled, self.world = labelled, world

    def __call__(
        self,
        raw: dict[str, Branch],
        projected: list[Tensor],
        teacher: Branch | None,
        batch: dict[str, Any],
        progress: float,
    ) -> Terms:
        """Compute the terms of one step.

        Args:
            raw: student's head output by branch.
            projected: student's taps, projected to the teacher's channels.
            teacher: teacher's raw head output for the same images, or None.
            batch: collated boxes on the student's device (see `dfssd.data.dataset.collate`).
            progress: share of the training that is done (0..1).
        """
        self.detection.set_progress(progress)
        sums: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (sums, normalisers)
        counts: dict[str, Tensor] = {}
        real = batch["batch_idx"] < self.labelled
        sums["sup"] = self.detection(_slice(raw, 0, self.labelled), _targets(batch, real, 0))
        images = raw["one2many"]["scores"].shape[0]
        if self.config and images > self.labelled and self.config.lambda_u > 0:
            sums["pse"] = self._pseudo(_slice(raw, self.labelled, images), batch, ~real, counts)
        if self.config and teacher is not None and self.config.lambda_p > 0:
            parts = [dense_class(branch["scores"], teacher["scores"]) for branch in raw.values()]
            shares = [self.detection.branch_weights()[name] for name in raw]
            loss = sum((w * p[0] for w, p in zip(shares, parts, strict=True)), torch.zeros(()))
            sums["pred"] = (loss.view(1, 1), parts[0][1].view(1))
        losses = self._normalised(sums, counts)
        if self.config and teacher is not None and self.config.lambda_f > 0:
            weight = self.config.lambda_f * schedule(self.config.feature_schedule, progress)
            divergence = feature_loss(self.config.divergence, projected, teacher["feats"], self.config.feature_tau)
            losses[f"feat/{self.config.divergence}"] = weight * divergence / self.world.size
        return Terms(losses, counts)

    def _pseudo(
        self, raw: dict[str, Branch], batch: dict[str, Any], mine: Tensor, counts: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Detection loss on unlabelled images: pseudo-labels weighted by score, uncertain boxes left out.

        A box that moved under flips (agreement below the limit) still says that there is a defect of this class, but
        not where exactly: its box and DFL terms have no weight (Soft Teacher, Xu et al., ICCV 2021, section 3.3).

        An image without any candidate is left out as a whole (its area travels through a mosaic as a box of score 0), and
        every anchor inside an uncertain box is neither positive nor background: an unlabelled image never says "no defect
        here" where the teacher was not sure.
        """
        assert self.config is not None and self.policy is not None
        candidates, score = _targets(batch, mine, self.labelled), batch["score"][mine]
        tau = self.policy.thresholds().to(score.device)
        seen = score > 0  # a score of 0 marks the area of an image without candidates
        stats = torch.cat(class_sums(candidates.cls[seen], score[seen], len(tau)))
        stats = self.world.sum(stats)
        self.policy.update(*stats.cpu().chunk(2))
        sure = score >= tau[candidates.cls.long()]  # thresholds are above 0
        candidates.weight = score.pow(self.config.score_power)
        placed = batch["agreement"][mine] >= self.config.agreement_min
        candidates.box_weight = candidates.weight * placed
        counts["pse/pseudo_labels"] = sure.sum().float()
        counts["pse/uncertain"] = (~sure & seen).sum().float()
        counts["pse/without_box_term"] = (sure & ~placed).sum().float()
        if self.config.uncertain == "background":
            return self.detection(raw, candidates.where(sure))
        size = raw["one2many"]["scores"].shape[0]
        ignore = self.detection.anchors_inside(raw["one2many"]["feats"], candidates.where(~sure), size)
        silent = torch.ones(size, dtype=torch.bool, device=score.device)
        silent[candidates.image[seen].long()] = False
        return self.detection(raw, candidates.where(sure), ignore | silent[:, None])

    def _normalised(self, sums: dict[str, tuple[Tensor, Tensor]], counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Divide every sum by its normaliser over all workers (one reduction for all), and weight it."""
        flat = torch.cat([n.detach().float() for _, n in sums.values()] + [c.view(1) for c in counts.values()])
        flat = self.world.sum(flat)
        losses: dict[str, Tensor] = {}
        start = 0
        for name, (values, normaliser) in sums.items():
            mean = (values / flat[start : start + len(normaliser)].clamp(min=1).unsqueeze(1)).sum(0)
            start += len(normaliser)
            if name == "pred":
                assert self.config is not None
                losses["pred/cls"] = self.config.lambda_p * mean[0]
                continue
            weight = 1.0 if name == "sup" or self.config is None else self.config.lambda_u
            losses.update({f"{name}/{part}": weight * mean[k] for k, part in enumerate(COMPONENTS)})
        for k, key in enumerate(counts):
            counts[key] = flat[start + k]
        return losses


def schedule(kind: str, progress: float) -> float:
    """s(t): 1, or a cosine from 1 to 0.1 over the whole training."""
    return 1.0 if kind == "constant" else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def _slice(raw: dict[str, Branch], first: int, last: int) -> dict[str, Branch]:
    """Head output of the images first..last-1."""
    return {
        name: {
            "boxes": b["boxes"][first:last],
            "scores": b["scores"][first:last],
            "feats": [f[first:last] for f in b["feats"]],
        }
        for name, b in raw.items()
    }


def _targets(batch: dict[str, Any], keep: Tensor, first: int) -> Targets:
    """Boxes chosen by `keep`, with images counted from `first`, all with weight 1."""
    image = batch["batch_idx"][keep] - first
    return Targets(batch["cls"][keep], batch["bboxes"][keep], image, torch.ones_like(image), torch.ones_like(image))
