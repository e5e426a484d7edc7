"""Does a micro-batch fit into the GPU's memory? Asked before the first step, where the answer can still change the run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dfssd.errors import DfssdError
from dfssd.models.targets import BUCKET, NOWHERE, Targets
from dfssd.pseudo.selection import COUNTS, StepTargets
from dfssd.train.session import Session

Probe = Callable[[Session, int], bool]
PLACES = 4 * BUCKET  # boxes an image that the trial step makes room for


def fit_micro_batch(s: Session, fresh: bool, probe: Probe | None = None) -> None:
    """Halve automatic micro-batches until one fits, at the start of a run; never later, where it would change the numbers.

    Args:
        fresh: the run begins; one that is resumed keeps its micro-batches.
        probe: does a step of one of so many micro-batches fit? Default: a trial step, on a GPU only.

    Raises:
        DfssdError: the micro-batch that was asked for, or of a resumed run, does not fit; says which one would.
    """
    if probe is None:
        if s.device.type != "cuda":
            return
        probe = _fits
    config, count = s.job.config, s.micro_batches
    while not all(s.workers.gather(probe(s, count))):
        if 2 * count > config.most_workers():
            raise DfssdError(
                f"the GPU's memory does not hold a micro-batch of {_size(s, count)}, and the batch cannot be cut further",
                todo="lower --imgsz, take a smaller model, or --teacher-amp bf16",
            )
        count *= 2
    if count == s.micro_batches:
        return
    if config.train.micro_batch or not fresh:
        size = -(-config.train.batch // count)
        raise DfssdError(
            f"the GPU's memory does not hold a micro-batch of {_size(s, s.micro_batches)}; {_size(s, count)} would fit",
            todo=f"set --micro-batch {size}" + ("" if fresh else " under a new --run-name: it changes the numbers"),
        )
    if s.workers.rank == 0:
        print(
            f"{s.job.stage}: {_size(s, count)} fit into the GPU's memory at a time: {count} micro-batches a step",
            flush=True,
        )
    s.micro_batches = count


@contextmanager
def told_when_full(s: Session) -> Iterator[None]:
    """Say which micro-batch would fit where the memory runs out in the middle of a run.

    Raises:
        DfssdError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        half = max(1, -(-s.job.config.train.batch // s.micro_batches) // 2)
        raise DfssdError(
            f"the GPU's memory ran out at step {s.step} with micro-batches of {_size(s, s.micro_batches)}",
            todo=f"set --micro-batch {half} under a new --run-name (it changes the numbers), or give this run a GPU alone",
        ) from error


def _size(s: Session, count: int) -> str:
    """Images of the largest of so many micro-batches, in words."""
    labelled, unlabelled = _images(s, count)
    return f"{labelled} + {unlabelled} images" if unlabelled else f"{labelled} images"


def _images(s: Session, count: int) -> tuple[int, int]:
    unlabelled = s.job.config.unlabelled_batch() if "unlabelled" in s.streams.streams else 0
    return -(-s.job.config.train.batch // count), -(-unlabelled // count)


def _fits(s: Session, count: int) -> bool:
    """Make forward and backward pass of one micro-batch of made-up images; nothing of it stays."""
    from dfssd.train.step import forward

    labelled, unlabelled = _images(s, count)
    side, images = s.job.config.train.imgsz, labelled + unlabelled
    s.norms.still()
    try:
        batch = torch.rand(images, 3, side, side, device=s.device).contiguous(memory_format=torch.channels_last)
        out, teacher = forward(s, batch, batch, labelled, s.student)
        measured = s.criterion.measure(out, teacher, _made_up(s, images, labelled), 0.0)
        terms = s.criterion.terms(measured, measured.parts, 0.0)
        terms.total().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        s.student.zero_grad(set_to_none=True)
        out = teacher = measured = terms = batch = None  # type: ignore[assignment]
        gc.collect()
        if s.device.type == "cuda":
            torch.cuda.empty_cache()


def _made_up(s: Session, images: int, labelled: int) -> StepTargets:
    box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    full = torch.ones(images, PLACES)
    targets = Targets(
        cls=torch.zeros(images, PLACES, dtype=torch.long),
        xywh=box.expand(images, PLACES, 4).contiguous(),
        valid=full.bool(),
        weight=full,
        box_weight=full,
        ignored_xywh=torch.full((images, PLACES, 4), NOWHERE),
        silent=torch.zeros(images, dtype=torch.bool),
    )
    learns = images > labelled and s.policy is not None
    policy = torch.zeros(2 * len(s.manifest.names) if learns else 0)
    return StepTargets(targets, labelled, learns, torch.zeros(len(COUNTS)), policy).to(s.device)
