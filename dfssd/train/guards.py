"""Stop at once when a loss term is not what it claims to be.

A term that is silently 0 or NaN, or that does not reach the student, is the commonest defect of distillation code in
the field. So: no update is made from a term that is not finite; at the first step every term's gradient is followed to the
student's first layer, and at every log step, the first one too, to the student's outputs (which costs no backward pass
through the network).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfssd.distill.criterion import StudentOutput, Terms, grouped
from dfssd.errors import DfssdError
from dfssd.models.head import TeacherOutput
from dfssd.runtime.worker_group import WorkerGroup

REMEDY = {
    "sup": "check the labels of the images named, lower --lr, or try --amp fp32",
    "pse": "check the candidates (pseudo-label report), lower --lambda-u",
    "pred": "check the teacher, lower --lambda-p or --lambda-l",
    "feat": "check the teacher, lower --lambda-f",
    "teacher": "lower --teacher-lr-factor, or take --teacher-mode frozen",
}
LAMBDA = {"pse": "--lambda-u", "pred": "--lambda-p and --lambda-l", "feat": "--lambda-f"}
NEGLIGIBLE = 1e-6  # of the supervised gradient at the student's first layer: no weight anybody means


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


def check_teacher(teacher: TeacherOutput | None, step: int) -> None:
    """A teacher that says NaN, or the same everywhere, teaches nothing good.

    Raises:
        DfssdError: naming what is broken.
    """
    if teacher is None:
        return
    tensors = {f"{k} of branch {b}": getattr(raw, k) for b, raw in teacher.raw.items() for k in ("boxes", "scores")}
    tensors |= {f"tap {k}": tap for k, tap in enumerate(teacher.taps)}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DfssdError(
                f"the teacher's output is not finite at step {step} ({name}): loss terms 'pred' and 'feat' would be NaN",
                todo="its weights are damaged or overflow: train it again, or try --amp fp32",
            )


def check_reach(
    losses: dict[str, Tensor],
    out: StudentOutput,
    first_layer: Tensor | None,
    silent: set[str],
    workers: WorkerGroup | None = None,
) -> dict[str, float]:
    """`reach` and `judge` of a step of one micro-batch a worker; `silent` terms may be 0 in this batch."""
    squared_norms = (workers or WorkerGroup()).sum(reach(losses, out, first_layer))
    return _judged(list(grouped(losses)), squared_norms, first_layer is not None, silent)


def reach(losses: dict[str, Tensor], out: StudentOutput, first_layer: Tensor | None, scale: float = 1.0) -> Tensor:
    """Squared gradient norm of each term at the student; those of several micro-batches are added up (at the first layer that
    is an upper bound by their number, which is all that is judged).

    Args:
        losses: terms of this step.
        out: the student's outputs.
        first_layer: weight of the student's first layer to follow the gradients to, or None for the outputs only.
        scale: of a half-precision backward pass.

    Raises:
        DfssdError: a term is not connected to the student.
    """
    heads = [t for b in out.raw.values() for t in (b.boxes, b.scores)]
    targets = [first_layer] if first_layer is not None else [t for t in heads + out.projected if t.requires_grad]
    own = [t for b in (out.teacher or {}).values() for t in (b.boxes, b.scores)]
    squared_norms = []
    for name, term in grouped(losses).items():
        if not term.requires_grad:
            raise DfssdError(
                f"loss term '{name}' is not connected to the student: it would train nothing",
                todo="its inputs were detached or computed under no_grad; fix the tap or set the term's weight to 0",
            )
        reached = own if name == "teacher" else targets
        term = term * scale if scale != 1 else term
        grads = torch.autograd.grad(term, reached, retain_graph=True, allow_unused=True)
        found = [(g.float() / scale).square().sum() for g in grads if g is not None]
        squared_norms.append(torch.stack(found or [term.new_zeros(())]).sum())
    return torch.stack(squared_norms)


def judge(terms: Terms, squared_norms: Tensor, at_first_layer: bool) -> dict[str, float]:
    """Gradient norm of each term, which must be finite, above 0 and not negligible.

    Args:
        squared_norms: `reach`, added up over all micro-batches and workers: one of them may see no pseudo-label.

    Raises:
        DfssdError: a term's gradient does not arrive, or is not finite.
    """
    return _judged(list(grouped(terms.losses)), squared_norms, at_first_layer, terms.silent)


def _judged(names: list[str], squared_norms: Tensor, at_first_layer: bool, silent: set[str]) -> dict[str, float]:
    norms = dict(zip(names, squared_norms.sqrt().tolist(), strict=True))
    for name, norm in norms.items():
        _judge(name, norm, norms.get("sup", 0.0) if at_first_layer else 0.0, name in silent)
    return norms


def _judge(name: str, norm: float, supervised: float, may_be_silent: bool) -> None:
    if not norm < float("inf"):
        raise DfssdError(f"the gradient of loss term '{name}' is not finite", todo=REMEDY[name])
    if may_be_silent:
        return
    if norm == 0:
        raise DfssdError(
            f"loss term '{name}' has no gradient at the student: it would train nothing",
            todo="check the tap layers and the teacher, or set the term's weight to 0 to leave it out",
        )
    if name in LAMBDA and norm < NEGLIGIBLE * supervised:
        raise DfssdError(
            f"loss term '{name}' weighs next to nothing: its gradient at the student's first layer is {norm:.1e}, the "
            f"supervised one {supervised:.1e}",
            todo=f"check {LAMBDA[name]}, or take --balance gradnorm",
        )
