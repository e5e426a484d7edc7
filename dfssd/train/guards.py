"""Stop at once when a loss term is not what it claims to be.

A term that is silently 0 or NaN, or that does not reach the student, is the commonest defect of distillation code in
the field. So: every term is finite at every step; at the first step every term's gradient is followed to the student's
first layer, and at every log step to the student's outputs (which costs no backward pass through the network).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfssd.errors import DfssdError
from dfssd.models.detector import Branch

REMEDY = {
    "sup": "check the labels of the images named, lower --lr, or try --amp fp32",
    "pse": "check the candidates (pseudo-label report), lower --lambda-u",
    "pred": "check the teacher, lower --lambda-p",
    "feat": "check the teacher, lower --lambda-f",
}


def check_finite(losses: dict[str, Tensor], step: int, images: list[str]) -> None:
    """Raise before the update if a term is NaN or infinite.

    Raises:
        DfssdError: naming term, step and images of the batch.
    """
    if bool(torch.isfinite(torch.stack([v.detach() for v in losses.values()]).sum())):
        return
    broken = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
    raise DfssdError(
        f"loss term {', '.join(broken)} is not finite at step {step}; nothing was updated",
        where="images " + ", ".join(images[:4]) + (" ..." if len(images) > 4 else ""),
        todo=REMEDY[broken[0].split("/")[0]],
    )


def grouped(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of the parts of each term: sup, pse, pred, feat."""
    terms: dict[str, Tensor] = {}
    for name, value in losses.items():
        key = name.split("/")[0]
        terms[key] = terms[key] + value if key in terms else value
    return terms


def check_reach(
    losses: dict[str, Tensor],
    raw: dict[str, Branch],
    projected: list[Tensor],
    first_layer: Tensor | None,
    silent: set[str],
) -> dict[str, float]:
    """Gradient norm of each term at the student, which must be finite and above 0.

    Args:
        losses: terms of this step.
        raw, projected: the student's outputs.
        first_layer: weight of the student's first layer to follow the gradients to, or None for the outputs only.
        silent: terms that may be 0 in this batch (no pseudo-label, no candidate).

    Returns:
        Gradient norm by term, at the first layer where that is given, else at the outputs.

    Raises:
        DfssdError: a term's gradient does not arrive, or is not finite.
    """
    outputs = [t for b in raw.values() for t in (b["boxes"], b["scores"])] + projected
    targets = [first_layer] if first_layer is not None else [t for t in outputs if t.requires_grad]
    norms: dict[str, float] = {}
    for name, term in grouped(losses).items():
        if not term.requires_grad:
            raise DfssdError(
                f"loss term '{name}' is not connected to the student: it would train nothing",
                todo="its inputs were detached or computed under no_grad; fix the tap or set the term's weight to 0",
            )
        grads = torch.autograd.grad(term, targets, retain_graph=True, allow_unused=True)
        total = torch.stack([g.float().norm() for g in grads if g is not None] or [torch.zeros(())]).norm()
        norms[name] = float(total)
        if not torch.isfinite(total):
            raise DfssdError(f"the gradient of loss term '{name}' is not finite", todo=REMEDY[name])
        if norms[name] == 0 and name not in silent:
            raise DfssdError(
                f"loss term '{name}' has no gradient at the student: it would train nothing",
                todo="check the tap layers and the teacher, or set the term's weight to 0 to leave it out",
            )
    return norms
