"""What is weighted and summed: L = L_sup + lambda_u L_pse + lambda_p L_cls + lambda_l L_loc + lambda_f s(t) L_feat.

The labelled images of a batch come first, then the unlabelled ones; the student saw all of them in one forward pass, and
so did the teacher. Every term is this worker's share of a global number: the sum of a term over workers is the loss of
the global batch, whatever the number of workers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfssd.config import Distill
from dfssd.distill import predictions as p
from dfssd.distill.balance import Balance
from dfssd.distill.features import joined, layer_terms
from dfssd.models.detection_loss import COMPONENTS, DetectionLoss, Targets
from dfssd.models.detector import Branch, TeacherOutput
from dfssd.models.pairing import Pairing
from dfssd.pseudo.running import RunningThresholds
from dfssd.pseudo.thresholds import Policy, class_sums
from dfssd.runtime.worker_group import WorkerGroup

Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (K,...) sums and their (K,) normalisers


@dataclass
class StudentOutput:
    """What one forward pass of the student leaves.

    Args:
        raw: head output by branch.
        taps: (B,C,H,W) feature maps that are compared, before projection; the neck's without a teacher.
        projected: the taps in the teacher's channels; none where features are not distilled.
        teacher: head output of an online teacher for the labelled images.
    """

    raw: dict[str, Branch]
    taps: list[Tensor]
    projected: list[Tensor]
    teacher: dict[str, Branch] | None = None


@dataclass
class Terms:
    """Weighted loss terms of one step by name (this worker's share), and numbers worth logging (global).

    Args:
        paused: terms whose schedule is at 0.
    """

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    paused: frozenset[str] = frozenset()

    @property
    def silent(self) -> set[str]:
        """Terms that may have no gradient in this step; waits for the device, so it is not asked at every step."""
        none = float(self.counts.get("pse/pseudo_labels", 1)) == 0
        return {*self.paused, *({"pse"} if none else ())}

    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class Criterion:
    """All loss terms of a step.

    Args:
        detection: detection loss of the student.
        config: weights and settings; None trains on labels alone.
        policy: class thresholds; needed with `config`.
        labelled: labelled images of this worker's batch, which come first.
        pairing: how the teacher's predictions stand to the student's; needed with a teacher.
        generators: MGD's networks.
        teacher_detection: detection loss of an online teacher.
    """

    def __init__(
        self,
        detection: DetectionLoss,
        config: Distill | None,
        policy: Policy | RunningThresholds | None,
        labelled: int,
        world: WorkerGroup,
        pairing: Pairing | None = None,
        generators: nn.ModuleList | None = None,
        teacher_detection: DetectionLoss | None = None,
    ) -> None:
        self.detection, self.config, self.policy = detection, config, policy
        self.labelled, self.world, self.pairing = labelled, world, pairing
        self.generators, self.teacher_detection = list(generators or []), teacher_detection
        self.balance = Balance(config, world) if config and config.balance == "gradnorm" else None

    def __call__(
        self, out: StudentOutput, teacher: TeacherOutput | None, batch: dict[str, Any], progress: float
    ) -> Terms:
        """Compute the terms of one step.

        Args:
            teacher: what the teacher says of the same images, or None.
            batch: collated boxes on the student's device (see `dfssd.data.dataset.collate`).
            progress: share of the training that is done (0..1).
        """
        self.detection.set_progress(progress)
        sums: Sums = {}
        counts: dict[str, Tensor] = {}
        config, images = self.config, out.raw["one2many"]["scores"].shape[0]
        real = batch["batch_idx"] < self.labelled
        labels = _targets(batch, real, 0)
        sums["sup"] = self.detection(_slice(out.raw, 0, self.labelled), labels)
        if config and images > self.labelled and config.lambda_u > 0:
            sums["pse"] = self._pseudo(_slice(out.raw, self.labelled, images), batch, ~real, counts)
        s_t = schedule(config, progress) if config else 1.0
        if teacher is not None:
            sums |= self._predictions(out.raw, teacher)
            # Skipped at weight 0, but not under DDP, which waits for the gradient of every parameter.
            if out.projected and self._weights()["feat"] > 0 and (s_t > 0 or self.world.size > 1):
                sums["feat"] = self._features(out.projected, teacher)
        if out.teacher is not None and self.teacher_detection is not None:
            self.teacher_detection.set_progress(progress)
            sums["teacher"] = self.teacher_detection(out.teacher, labels)
        losses = self._normalised(sums, counts)
        self._scale(losses, out, s_t)
        return Terms(losses, counts, frozenset({"feat"} if s_t == 0 else ()))

    def _predictions(self, raw: dict[str, Branch], teacher: TeacherOutput) -> Sums:
        """Prediction terms of all branches that both heads have, each (K,1) sums and (K,) normalisers."""
        assert self.config is not None and self.pairing is not None
        config, terms = self.config, {}
        pairs = [(raw[b], teacher.raw[b]) for b in self.pairing.branches]
        scores = [self.pairing.scores(t) for _, t in pairs]
        shares = self.detection.branch_weights()
        best = [p.best_score(t) for t in scores]
        if config.lambda_p > 0 and config.prediction == "mse":
            terms["pred/mse"] = [
                p.raw_mse(s["boxes"], t["boxes"], s["scores"], c) for (s, t), c in zip(pairs, scores, strict=True)
            ]
        elif config.lambda_p > 0:
            terms["pred/cls"] = [
                p.dense_class(s["scores"], c, b) for (s, _), c, b in zip(pairs, scores, best, strict=True)
            ]
        if config.lambda_l > 0 and config.prediction == "soft":
            terms["pred/loc"] = [
                p.dfl_localisation(s["boxes"], t["boxes"], b, config.loc_tau, config.loc_top)
                if self.pairing.bins and s["boxes"].shape[1] > 4
                else p.distance_localisation(s["boxes"], t["boxes"], b, config.loc_top)
                for (s, t), b in zip(pairs, best, strict=True)
            ]
        weights = [shares[b] for b in self.pairing.branches]
        return {
            name: (
                torch.stack([w * s for w, (s, _) in zip(weights, parts, strict=True)]),
                torch.stack([n for _, n in parts]),
            )
            for name, parts in terms.items()
        }

    def _features(self, projected: list[Tensor], teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
        """(L,) sums and normalisers of the feature term, one a tap layer."""
        assert self.config is not None and self.pairing is not None
        kind = self.config.divergence
        best = p.best_score(self.pairing.scores(teacher.raw["one2many"])) if kind == "score_l2" else None
        return layer_terms(kind, projected, teacher.taps, best, self.config.feature_tau, self.generators)

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

    def _normalised(self, sums: Sums, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Divide every sum by its normaliser over all workers (one reduction for all), and weight it."""
        layers = sums["feat"][0].detach() if "feat" in sums else torch.zeros(0)
        parts = [n.detach().float() for _, n in sums.values()]
        flat = self.world.sum(torch.cat([*parts, layers.to(parts[0].device), *(c.view(1) for c in counts.values())]))
        totals = dict(zip(sums, flat.split([len(n) for n in parts] + [len(layers) + len(counts)])[:-1], strict=True))
        rest = flat[sum(len(n) for n in parts) :]
        counts |= dict(zip(counts, rest[len(layers) :], strict=True))
        losses: dict[str, Tensor] = {}
        weights = self._weights()
        for name, (values, _) in sums.items():
            if name == "feat":
                assert self.config is not None
                scale = totals[name].clamp(min=1e-12)
                kind = self.config.divergence
                losses[f"feat/{kind}"] = weights[name] * joined(kind, values / scale, rest[: len(layers)] / scale)
            elif values.ndim == 1:  # a prediction term, a number a branch
                losses[name] = weights[name] * (values / totals[name].clamp(min=1)).sum()
            else:
                mean = (values / totals[name].clamp(min=1).unsqueeze(1)).sum(0)
                losses.update({f"{name}/{part}": weights[name] * mean[k] for k, part in enumerate(COMPONENTS)})
        return losses

    def _weights(self) -> dict[str, float]:
        """Lambda of each term."""
        if self.config is None:
            return {"sup": 1.0}
        c = self.config
        pred = {"pred/cls": c.lambda_p, "pred/mse": c.lambda_p, "pred/loc": c.lambda_l}
        return {"sup": 1.0, "teacher": 1.0, "pse": c.lambda_u, "feat": c.lambda_f, **pred}

    def _scale(self, losses: dict[str, Tensor], out: StudentOutput, s_t: float) -> None:
        """Apply the automatic balance, where there is one, and then the schedule of the feature term."""
        factors: dict[str, float] = {}
        if self.balance:
            neck = out.raw["one2many"]["feats"]
            self.balance.update(grouped(losses), [*neck, *(t for t in out.taps if all(t is not n for n in neck))])
            factors = self.balance.factors
        for name in losses:
            group = name.split("/")[0]
            factor = factors.get(group, 1.0) * (s_t if group == "feat" else 1.0)
            if factor != 1.0:
                losses[name] = losses[name] * factor


def grouped(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of the parts of each term: sup, pse, pred, feat, teacher."""
    terms: dict[str, Tensor] = {}
    for name, value in losses.items():
        key = name.split("/")[0]
        terms[key] = terms[key] + value if key in terms else value
    return terms


def schedule(config: Distill, progress: float) -> float:
    """s(t): 1; a cosine from 1 to 0.1 over the whole training; or 1, and 0 in the last `off_last` of it.

    The last is how YOLO distillation is published (MMYOLO, CWD: off for the last epochs, with mosaic).
    """
    if config.feature_schedule == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
    off = config.feature_schedule == "off_last_epochs" and progress >= 1 - config.off_last
    return 0.0 if off else 1.0


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
