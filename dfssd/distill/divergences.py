"""How two feature maps are compared: pure functions (student, teacher) -> scalar.

Both maps are (B,C,H,W) with equal shapes; the caller has brought the student to the teacher's channels and size (see
`dfssd.distill.features`). The teacher is a constant: no gradient goes to it. Each is a mean over images, so that two
halves of a batch average to the whole, except `score_l2`, whose normaliser is the score in the batch, and `hw_js`, whose
layers are weighted by their values: there sums and normalisers are added over workers first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # of a variance: guards channels that are the same everywhere
MASKED = 0.65  # share of positions that MGD hides from the student, its value for one-stage detectors


def standardise(features_bchw: Tensor) -> Tensor:
    """Zero mean and unit variance over the positions of each channel of each image (an all-equal channel becomes 0).

    Scale differences between networks carry no information about what was seen where (PKD, Cao et al., NeurIPS 2022,
    section 3.2, does the same over the batch; per image keeps the loss independent of how a batch is split).
    """
    centred = features_bchw - features_bchw.mean((2, 3), keepdim=True)
    return centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + EPS)


def _wide(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def _moments(features_bchw: Tensor) -> tuple[Tensor, Tensor]:
    """The maps less their means, and (B,C,1,1) their variances, in float32 or more."""
    wide = torch.promote_types(features_bchw.dtype, torch.float32)
    centred = features_bchw - features_bchw.mean((2, 3), keepdim=True, dtype=wide)
    count = features_bchw.shape[2] * features_bchw.shape[3]
    return centred, torch.linalg.vector_norm(centred, dim=(2, 3), keepdim=True).square() / count


def mse(student_bchw: Tensor, teacher_bchw: Tensor) -> Tensor:
    """Mean squared difference of the raw maps (mimic; Li et al., CVPR 2017, "Mimicking very efficient network for object
    detection", eq. 3)."""
    return F.mse_loss(_wide(student_bchw), _wide(teacher_bchw.detach()))


def pkd(student_bchw: Tensor, teacher_bchw: Tensor) -> Tensor:
    """1 - Pearson correlation of each channel over the positions, mean over images and channels; in [0, 2].

    Equal to half the mean squared difference of the standardised maps (PKD, Cao et al., NeurIPS 2022, eq. 4), up to the
    guard against channels without variance: two all-equal channels count 0.
    """
    value: Tensor = _Pearson.apply(student_bchw, teacher_bchw.detach())
    return value


class _Pearson(torch.autograd.Function):
    """Half the mean squared difference of the standardised maps, from moments of each channel and with the gradient written
    out: no standardised map is ever made, so that less than half as much memory is read and written as with them.

    With a and b the maps less their means, v their variances, r = 1/sqrt(v + eps) and c = r_s r_t mean(a b), the value of a
    channel is (v_s r_s^2 + v_t r_t^2) / 2 - c, and its gradient r_s^2 (1 - v_s r_s^2 + c) a - r_s r_t b over the number of
    positions. All of it is in float32 where the maps have fewer bits.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, student: Tensor, teacher: Tensor) -> Tensor:
        (a, v_s), (b, v_t) = _moments(student), _moments(teacher)
        r_s, r_t = torch.rsqrt(v_s + EPS), torch.rsqrt(v_t + EPS)
        both, share_s = r_s * r_t, v_s * r_s.square()
        correlation = both * (a * b).mean((2, 3), keepdim=True)
        # Rounding may leave a sum of terms that cancel a hair below 0.
        value = (0.5 * (share_s + v_t * r_t.square()) - correlation).clamp_(min=0).mean()
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            own = r_s.square() * (1 - share_s + correlation) / student.numel()
            ctx.save_for_backward(a.mul_(own).addcmul_(b, both / student.numel(), value=-1))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * upstream, None


def kl(student_bchw: Tensor, teacher_bchw: Tensor, tau: float = 1.0) -> Tensor:
    """KL(teacher || student) (nats) between the softmax over channels at each position, times tau^2, mean over positions
    (Hinton et al. 2015, section 2, at every position of a map).

    Args:
        tau: temperature of the softmax.
    """
    return tau**2 * _kl(student_bchw.movedim(1, -1), teacher_bchw.movedim(1, -1), tau)


def cwd(student_bchw: Tensor, teacher_bchw: Tensor, tau: float = 4.0) -> Tensor:
    """KL(teacher || student) (nats) between the softmax over positions of each channel, times tau^2, mean over channels
    (CWD, Shu et al., ICCV 2021, eq. 4).

    Args:
        tau: temperature of the softmax.
    """
    return tau**2 * _kl(student_bchw.flatten(2), teacher_bchw.flatten(2), tau)


def _kl(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) over the last axis, mean over the others."""
    log_q = F.log_softmax(teacher.detach() / tau, -1)
    terms = log_q.exp() * (log_q - F.log_softmax(student / tau, -1))
    return terms.sum(-1).mean()


def js(student_bchw: Tensor, teacher_bchw: Tensor, tau: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence (nats) of each channel's spatial softmax, mean over images and channels; in [0, ln 2].

    JS = 1/2 KL(P||M) + 1/2 KL(Q||M), M = (P+Q)/2 (Lin 1991, eq. 3.1). Spatial softmax per channel as in CWD (Shu et al.,
    ICCV 2021, section 3.1). A position of probability 0 contributes 0 and not NaN.

    Args:
        tau: temperature of the softmax.
    """
    each: Tensor = _JensenShannon.apply(student_bchw.flatten(2) / tau, teacher_bchw.detach().flatten(2) / tau)
    return each.mean()


class _JensenShannon(torch.autograd.Function):
    """JS over the last axis, with the gradient written out: by autograd it takes six times as long on a CPU.

    With k = log P - log M, dJS/dlogits = 1/2 P (k - sum P k): what dM/dP adds is constant over the axis and vanishes
    in the softmax.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor, constant: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(constant, -1)
        p, q = log_p.exp(), log_q.exp()
        log_m = ((p + q) * 0.5).clamp_(min=torch.finfo(p.dtype).tiny).log_()
        against_p, against_q = log_p.sub_(log_m), log_q.sub_(log_m)
        kl_p = (p * against_p).sum(-1, keepdim=True)
        kl_q = (q * against_q).sum(-1, keepdim=True)
        ctx.save_for_backward(against_p.sub_(kl_p).mul_(p).mul_(0.5))
        # Rounding may leave a sum of terms that cancel a hair below 0.
        return (0.5 * (kl_p + kl_q)).squeeze(-1).clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * upstream.unsqueeze(-1), None


def hw_js(student: Sequence[Tensor], teacher: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """JS of each tap layer, joined by `hierarchical` (DFSSD; its published code gives NaN on any input).

    Args:
        student, teacher: one (B,C,H,W) map a layer, equal shapes pairwise.
        tau: temperature of the softmax.
    """
    return hierarchical(torch.stack([js(s, t, tau) for s, t in zip(student, teacher, strict=True)]))


def hierarchical(divergences_l: Tensor, values_l: Tensor | None = None) -> Tensor:
    """Sum over tap layers with weights softmax(divergence), which pay most attention to the layers that differ most.

    HW-JS = sum_l stopgrad(softmax_l(JS_l)) JS_l (DFSSD). Without the stop, the loss could fall by moving weight between
    layers instead of by moving features.

    Args:
        divergences_l: (L,) divergence of each layer.
        values_l: (L,) what the weights are made from, where `divergences_l` is one worker's share only.
    """
    weights = torch.softmax((divergences_l if values_l is None else values_l).detach(), 0)
    return (weights * divergences_l).sum()


def mgd(student_bchw: Tensor, teacher_bchw: Tensor, generator: nn.Module, hidden_b1hw: Tensor) -> Tensor:
    """Mean squared difference between the teacher and what a small network makes of the student with positions hidden
    (MGD, Yang et al., ECCV 2022, eq. 4 and 5).

    Args:
        generator: trained with the student; (B,C,H,W) -> (B,C,H,W).
        hidden_b1hw: bool, positions set to 0 (see `hidden_positions`).
    """
    return mse(generator(student_bchw * ~hidden_b1hw), teacher_bchw)


def hidden_positions(features_bchw: Tensor, share: float = MASKED, generator: torch.Generator | None = None) -> Tensor:
    """(B,1,H,W) bool: each position hidden with probability `share`."""
    size, _, height, width = features_bchw.shape
    return torch.rand(size, 1, height, width, device=features_bchw.device, generator=generator) < share


def score_l2(student_bchw: Tensor, teacher_bchw: Tensor, score_b1hw: Tensor) -> Tensor:
    """Squared difference weighted by the teacher's best class score at each position (Ultralytics 8.4,
    `DistillationModel.loss_sl2`): sum(score * mean over channels) / sum(score)."""
    weighted, total = score_l2_sums(student_bchw, teacher_bchw, score_b1hw)
    return weighted / total.clamp(min=torch.finfo(total.dtype).tiny)


def score_l2_sums(student_bchw: Tensor, teacher_bchw: Tensor, score_b1hw: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of `score_l2`, so that both can be added over workers first."""
    difference = (student_bchw - teacher_bchw.detach()).square().mean(1, keepdim=True)
    return (difference * score_b1hw).sum(), score_b1hw.sum()
