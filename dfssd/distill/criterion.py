"""What is weighted and summed: L = L_sup + lambda_u L_pse + lambda_p L_cls + lambda_l L_loc + lambda_f s(t) L_feat.

The labelled images of a batch come first, then the unlabelled ones; the student saw all of them in one forward pass,
and so did the teacher. Every term is a micro-batch's share of a global number: the sum of a term over micro-batches is
the loss of the global batch, whoever computes which of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfssd.config import Distill
from dfssd.config.choices import DIVERGENCES
from dfssd.distill import predictions as p
from dfssd.distill.balance import Balance
from dfssd.distill.features import by_level, joined, layer_terms
from dfssd.models.family import Loss, Raw
from dfssd.models.head import MAIN, TeacherOutput
from dfssd.models.pairing import Pairing
from dfssd.pseudo.selection import COUNTS, StepTargets
from dfssd.runtime.worker_group import WorkerGroup

Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (K,...) sums and their (K,) normalisers
# Share of the labelled images' target scores, an image, by which the pseudo-label loss is divided at least. By those of its
# pseudo-labels alone, few of them would let the background of the unlabelled images outweigh the labels, ten times and more.
LEAST = 0.5
OWN = " (own)"  # ending of the terms that the student's own average teaches
Totals = dict[str, Tensor]  # what is added up over all micro-batches and workers, by name


@dataclass
class StudentOutput:
    """What one forward pass of the student leaves.

    Args:
        raw: head output by branch.
        taps: (B,C,H,W) feature maps that are compared, before projection; the neck's without a teacher.
        projected: the taps in the teacher's channels; none where features are not distilled.
        teacher: head output of an online teacher for the labelled images.
    """

    raw: Raw
    taps: list[Tensor]
    projected: list[Tensor]
    teacher: Raw | None = None


@dataclass
class Terms:
    """Weighted loss terms of one step by name (this worker's share), and numbers worth logging (global).

    Args:
        policy: (2C,) sums of scores and numbers of candidates by class in the global batch, for a policy that learns.
        paused: terms whose schedule is at 0.
    """

    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    policy: Tensor
    paused: frozenset[str] = frozenset()

    @property
    def silent(self) -> set[str]:
        """Terms that may have no gradient in this step; waits for the device, so it is not asked at every step."""
        none = float(self.counts.get("pse/pseudo_labels", 1)) == 0
        return {*self.paused, *({"pse"} if none else ())}

    def total(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


@dataclass
class Measured:
    """Sums of one micro-batch, before anything is divided.

    Args:
        sums: of each term, with its normalisers.
        parts: what has to be added up over all micro-batches and workers first: normalisers, values of the layers,
        counts. neck: the student's maps at which gradients are compared.
    """

    sums: Sums
    parts: dict[str, Tensor]
    neck: list[Tensor]

    def flat(self) -> Tensor:
        """All parts in one vector, for one reduction."""
        return torch.cat(list(self.parts.values()))

    def named(self, flat: Tensor) -> Totals:
        """The parts of such a vector by name."""
        return dict(zip(self.parts, flat.split([len(p) for p in self.parts.values()]), strict=True))


class Criterion:
    """All loss terms of a step. For each micro-batch `measure`; then, with what all of them add up to, `terms`.

    Args:
        detection: detection loss of the student.
        config: weights and settings; None trains on labels alone.
        workers: all workers; their number decides nothing but whether DDP waits for the gradient of every parameter.
        pairing: how the teacher's predictions stand to the student's; needed with a teacher.
        generators: MGD's networks.
        teacher_detection: detection loss of an online teacher.
        masks: draws MGD's hidden positions; the caller seeds it for each micro-batch.
    """

    def __init__(
        self,
        detection: Loss,
        config: Distill | None,
        workers: WorkerGroup,
        pairing: Pairing | None = None,
        generators: nn.ModuleList | None = None,
        teacher_detection: Loss | None = None,
        masks: torch.Generator | None = None,
    ) -> None:
        self.detection, self.config, self.workers, self.pairing = detection, config, workers, pairing
        self.generators, self.teacher_detection, self.masks = list(generators or []), teacher_detection, masks
        self.balance = Balance(config) if config and config.balance == "gradnorm" else None
        self.lead = 1.0  # weight of the teacher's terms; what is missing to 1 goes to the student's own average

    def measure(
        self,
        out: StudentOutput,
        teacher: TeacherOutput | None,
        targets: StepTargets,
        progress: float,
        own: TeacherOutput | None = None,
    ) -> Measured:
        """Sums of a micro-batch.

        Args:
            teacher: what the teacher says of the same images, or None.
            targets: boxes, on the student's device.
            progress: share of the training that is done (0..1).
            own: what the student's own average says of them, once it has passed the teacher.
        """
        self.detection.set_progress(progress)
        config, labelled = self.config, targets.labelled
        values, normalisers = self.detection(out.raw, targets.boxes)  # one pass for labels and pseudo-labels
        sums: Sums = {"sup": (values[:, :labelled].sum(1), normalisers[:, :labelled].sum(1))}
        learns = config is not None and config.lambda_u > 0 and targets.pseudo
        if learns:
            sums["pse"] = values[:, labelled:].sum(1), normalisers[:, labelled:].sum(1)
        if teacher is not None and config is not None:
            assert self.pairing is not None
            sums |= self._predictions(out.raw, teacher, self.pairing)
            # Skipped at weight 0, but not under DDP, which waits for the gradient of every parameter.
            if out.projected and config.lambda_f > 0 and (schedule(config, progress) > 0 or self.workers.size > 1):
                sums["feat"] = self._features(out.projected, teacher)
        if own is not None:
            shared = Pairing(None, tuple(out.raw), True)
            sums |= {k + OWN: v for k, v in self._predictions(out.raw, own, shared).items()}
        if out.teacher is not None and self.teacher_detection is not None:
            self.teacher_detection.set_progress(progress)
            learned = self.teacher_detection(out.teacher, targets.boxes.of_images(0, labelled))
            sums["teacher"] = learned[0].sum(1), learned[1].sum(1)
        parts = {name: n.detach().float() for name, (_, n) in sums.items()}
        if "feat" in sums:
            parts["layers"] = sums["feat"][0].detach()
        parts |= {"policy": targets.policy, **({"counts": targets.counts} if learns else {})}
        neck = out.raw[MAIN].feats
        return Measured(sums, parts, [*neck, *(t for t in out.taps if all(t is not n for n in neck))])

    def squared_norms(self, measured: Measured, totals: Totals, scale: float = 1.0) -> tuple[list[str], Tensor]:
        """What `Balance` has to know of a micro-batch: names of balanced terms, and their squared gradient norms."""
        assert self.balance is not None
        terms = grouped(self._divided(measured, totals))
        return self.balance.names(terms), self.balance.squared_norms(terms, measured.neck, scale)

    def terms(self, measured: Measured, totals: Totals, progress: float) -> Terms:
        """Weighted terms of a micro-batch: its share of the loss of the global batch.

        Args:
            totals: `Measured.parts`, added up over all micro-batches and workers.
        """
        losses, s_t = self._divided(measured, totals), schedule(self.config, progress) if self.config else 1.0
        factors = self.balance.factors if self.balance else {}
        for name in losses:
            group = name.split("/")[0]
            factor = factors.get(group, 1.0) * (s_t if group == "feat" else 1.0)
            if group in ("pred", "feat"):
                factor *= 1 - self.lead if name.endswith(OWN) else self.lead
            if factor != 1.0:
                losses[name] = losses[name] * factor
        alone = self.lead == 0 and not any(name.endswith(OWN) for name in losses)
        paused = {"feat"} if s_t == 0 or self.lead == 0 else set[str]()
        counts = dict(zip(COUNTS, totals["counts"], strict=True)) if "counts" in totals else {}
        return Terms(losses, counts, totals["policy"], frozenset(paused | ({"pred"} if alone else set())))

    def _predictions(self, raw: Raw, teacher: TeacherOutput, pairing: Pairing) -> Sums:
        """Prediction terms of all branches that both heads have, each (K,1) sums and (K,) normalisers."""
        assert self.config is not None
        config, terms = self.config, {}
        pairs = [(raw[b], teacher.raw[b]) for b in pairing.branches]
        scores = [pairing.scores(t) for _, t in pairs]
        shares = self.detection.branch_weights()
        best = [p.best_score(t) for t in scores]
        if config.lambda_p > 0 and config.prediction == "mse":
            terms["pred/mse"] = [
                p.raw_mse(s.boxes, t.boxes, s.scores, c) for (s, t), c in zip(pairs, scores, strict=True)
            ]
        elif config.lambda_p > 0:
            terms["pred/cls"] = [
                p.dense_class(s.scores, c, b) for (s, _), c, b in zip(pairs, scores, best, strict=True)
            ]
        if config.lambda_l > 0 and config.prediction == "soft":
            terms["pred/loc"] = [
                p.dfl_localisation(s.boxes, t.boxes, b, config.loc_tau, config.loc_top)
                if pairing.by_bins(s)
                else p.distance_localisation(s.boxes, t.boxes, b, config.loc_top)
                for (s, t), b in zip(pairs, best, strict=True)
            ]
        weights = [shares[b] for b in pairing.branches]
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
        head, scores = teacher.raw[MAIN], list[Tensor]()
        if DIVERGENCES[kind].needs == "scores":
            scores = by_level(p.best_score(self.pairing.scores(head)), head.feats)
        return layer_terms(kind, projected, teacher.taps, scores, self.config.feature_tau, self.generators, self.masks)

    def _divided(self, measured: Measured, totals: Totals) -> dict[str, Tensor]:
        """Every sum divided by its normaliser over the global batch, and weighted; balance and schedule come on top."""
        losses: dict[str, Tensor] = {}
        weights = self._weights()
        for name, (values, _) in measured.sums.items():
            if name == "feat":
                assert self.config is not None
                scale = totals[name].clamp(min=1e-12)
                kind = self.config.divergence
                losses[f"feat/{kind}"] = weights[name] * joined(kind, values / scale, totals["layers"] / scale)
            elif values.ndim == 1:  # a prediction term, a number a branch
                losses[name] = weights[name] * (values / totals[name].clamp(min=1)).sum()
            else:
                mean = (values / self._normaliser(name, totals).unsqueeze(1)).sum(0)
                losses.update(
                    {f"{name}/{part}": weights[name] * mean[k] for k, part in enumerate(self.detection.components)}
                )
        return losses

    def _normaliser(self, name: str, totals: Totals) -> Tensor:
        """(K,) what the sums of a detection loss are divided by: its target scores in the global batch, at least 1."""
        own = totals[name].clamp(min=1)
        if name != "pse":
            return own
        assert self.config is not None
        return torch.maximum(own, LEAST * self.config.unlabelled_ratio * totals["sup"])

    def _weights(self) -> dict[str, float]:
        """Lambda of each term."""
        if self.config is None:
            return {"sup": 1.0}
        c = self.config
        pred = {"pred/cls": c.lambda_p, "pred/mse": c.lambda_p, "pred/loc": c.lambda_l}
        pred |= {name + OWN: weight for name, weight in pred.items()}
        return {"sup": 1.0, "teacher": 1.0, "pse": c.lambda_u, "feat": c.lambda_f, **pred}


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
