"""The gradient of one step: forward and backward passes over this worker's micro-batches.

Every term is divided by a normaliser of the global batch, and the target scores among them are known only after a
forward pass. Where every worker has one micro-batch, they add up their normalisers between forward and backward pass.
Where one has several, it would have to keep the graphs of all; instead every worker passes its own without a graph
first, which gives the exact normalisers for one more forward pass of the student (the teacher's answers are kept), and
then each with its graph. So memory for activations is that of one micro-batch, and gradients are those of the global
batch: exactly, whoever computes which.

The collectives of a step stand at the head of `dfssd.train.loop.train`, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfssd.data.dataset import network_input
from dfssd.data.sampling import stable_seed
from dfssd.distill.criterion import Measured, StudentOutput, Terms, Totals
from dfssd.models.head import TeacherOutput
from dfssd.train.feed import MicroBatch
from dfssd.train.guards import check_finite, check_teacher, judge, reach
from dfssd.train.session import Session

HALF_SCALE = 128.0  # of gradients that are only looked at, in float16: far from both of its ends

# What the teacher, and the student's own average, say of each micro-batch.
Taught = dict[int, tuple[TeacherOutput | None, TeacherOutput | None]]


@dataclass
class Pass:
    """One forward pass over a micro-batch, and its sums."""

    out: StudentOutput
    teacher: TeacherOutput | None
    measured: Measured


@dataclass
class Gradient:
    """What is known once the gradient is there.

    Args:
        terms: this worker's share, summed over its micro-batches; numbers are those of the global batch.
        asked: (1,) what the workers ask for, added up (`Interrupt.wanted`).
        norms: gradient norm by term at the student's outputs, at log steps.
    """

    terms: Terms
    asked: Tensor
    norms: dict[str, float] = field(default_factory=dict)


def accumulate(s: Session, batches: list[MicroBatch], asked: float, log: bool, first_layer: Tensor | None) -> Gradient:
    """Compute the gradient of the global batch's loss; it stays in the parameters.

    Args:
        asked: what this worker asks the others for.
        log: also check that all is finite and that every term reaches the student.
        first_layer: weight to follow the gradients to as well; None: to the student's outputs alone.

    Raises:
        DfssdError: a term is not finite or reaches nothing.
    """
    progress = s.step / s.job.steps
    taught: Taught = {}
    # By all workers alike: DDP's own forward pass may exchange something too (buckets), in the order of everybody else.
    alone = _forward(s, batches[0], taught, s.wrapped, 0, 1) if s.micro_batches == s.workers.size else None
    totals, asked_sum = _totals(s, batches, alone, taught, asked)
    if s.criterion.balance:
        _follow_balance(s, batches, alone, taught, totals)
    scale = HALF_SCALE if s.scaler else 1.0
    shares: list[Terms] = []
    squared_norms: list[Tensor] = []  # of each micro-batch: (1 or 2, terms), at the outputs and the first layer
    for turn, batch in enumerate(batches):
        with _synchronised(s.wrapped, turn == len(batches) - 1):
            one = alone or _forward(s, batch, taught, s.wrapped, turn, len(batches))
            terms = s.criterion.terms(one.measured, totals, progress)
            if log:
                check_teacher(one.teacher, s.step)
                check_finite(terms.losses, s.step, batch.files)
                targets = (None,) if first_layer is None else (None, first_layer)
                squared_norms.append(torch.stack([reach(terms.losses, one.out, t, scale) for t in targets]))
                s.clock.mark("checks")
            # Each term is a share of the global loss; DDP averages over workers, hence the factor. Times the batch as in
            # Ultralytics, whose clipping norm belongs to a loss of that size.
            loss = terms.total() * (s.job.config.train.batch * s.workers.size)
            (s.scaler.scale(loss) if s.scaler else loss).backward()
            s.clock.mark("backward")
        shares.append(terms)
    gradient = Gradient(_summed(shares), asked_sum)
    if log:
        total = s.workers.sum(torch.stack(squared_norms).sum(0))
        if s.scaler and not bool(torch.isfinite(total).all()):  # an overflow, which the scale will meet too
            return gradient
        gradient.norms = judge(gradient.terms, total[0], at_first_layer=False)
        if first_layer is not None:
            judge(gradient.terms, total[1], at_first_layer=True)
    return gradient


def forward(
    s: Session, images_bchw: Tensor, weak_bchw: Tensor, labelled: int, network: nn.Module | None = None
) -> tuple[StudentOutput, TeacherOutput | None]:
    """The one pass of the student, and the one of what teaches it, each in its own precision.

    Targets are rounded once and enter no gradient, so a teacher may be in bf16 where the student is in fp32.

    Args:
        weak_bchw: the same images as those who teach see them.
    """
    with autocast(s, s.dtype):
        student = (network or s.wrapped)(images_bchw, labelled)
    return student, s.teacher(weak_bchw) if s.teacher else None


def own_average(s: Session, weak_bchw: Tensor) -> TeacherOutput | None:
    """What the student's own average says, once it has passed the teacher."""
    if s.teaching is None or s.teaching.own is None or s.criterion.lead == 1:
        return None
    return s.teaching.own(weak_bchw)


def autocast(s: Session, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(s.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def _forward(s: Session, batch: MicroBatch, taught: Taught, network: nn.Module, turn: int, count: int) -> Pass:
    """A pass that counts in the running statistics as micro-batch `turn` of this worker's `count`; 0 of 0: not at all."""
    if count:
        s.norms.turn(turn, count)
    else:
        s.norms.still()
    if s.criterion.masks is not None:  # of the micro-batch, whoever computes it
        s.criterion.masks.manual_seed(stable_seed(s.job.config.run.seed, "masks", s.step, batch.index))
    labelled = batch.targets.labelled
    images, weak = _inputs(s, batch)
    if batch.index not in taught:
        taught[batch.index] = s.teacher(weak) if s.teacher else None, own_average(s, weak)
        s.clock.mark("teacher")
    with autocast(s, s.dtype):
        out = network(images, labelled)
    s.clock.mark("student")
    teacher, own = taught[batch.index]
    measured = s.criterion.measure(out, teacher, batch.targets, s.step / s.job.steps, own)
    s.clock.mark("criterion")
    return Pass(out, teacher, measured)


def _inputs(s: Session, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """The images as the student sees them, and as those who teach do; in half precision where all compute in the same one."""
    kinds = {s.dtype, *({s.teacher_dtype} if s.teaching else ())}
    dtype = (kinds.pop() if len(kinds) == 1 else None) or torch.float32
    if batch.strong is None:
        images = network_input(batch.images, s.device, dtype)
        return images, images
    few = [part.expand(-1, 3, -1, -1) for part in (batch.images[: batch.targets.labelled], batch.strong)]
    images = network_input(torch.cat(few), s.device, dtype)
    return images, network_input(batch.images, s.device, dtype) if s.teaching else images


def _totals(
    s: Session, batches: list[MicroBatch], alone: Pass | None, taught: Taught, asked: float
) -> tuple[Totals, Tensor]:
    """Normalisers and counts of the global batch, and what all workers ask for."""
    if alone is not None:
        measured, flat = alone.measured, alone.measured.flat()
    else:
        with torch.no_grad():
            parts = [_forward(s, b, taught, s.student, 0, 0).measured for b in batches]
        measured, flat = parts[0], torch.stack([p.flat() for p in parts]).sum(0)
    flat = s.workers.sum(torch.cat([flat, flat.new_full((1,), asked)]))
    return measured.named(flat[:-1]), flat[-1:]


def _follow_balance(
    s: Session,
    batches: list[MicroBatch],
    alone: Pass | None,
    taught: Taught,
    totals: Totals,
) -> None:
    """Measure gradients of the terms where it is time to: with several micro-batches, by one more pass over each."""
    balance = s.criterion.balance
    assert balance is not None
    if balance.due:
        scale = HALF_SCALE if s.scaler else 1.0
        names: list[str] = []
        parts = []
        for batch in batches:
            one = alone or _forward(s, batch, taught, s.student, 0, 0)
            names, squared_norms = s.criterion.squared_norms(one.measured, totals, scale)
            parts.append(squared_norms)
        balance.follow(names, s.workers.sum(torch.stack(parts).sum(0)))
    balance.advance()


@contextmanager
def _synchronised(network: nn.Module, last: bool) -> Iterator[None]:
    """DDP adds up gradients over workers in the last backward pass of a step, and not before."""
    with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
        yield


def _summed(shares: list[Terms]) -> Terms:
    """Terms of several micro-batches; counts are global in each of them."""
    if len(shares) == 1:
        return shares[0]
    losses = {k: torch.stack([t.losses[k].detach() for t in shares]).sum() for k in shares[0].losses}
    return Terms(losses, shares[0].counts, shares[0].policy, shares[0].paused)
