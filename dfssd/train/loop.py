"""The training loop: one function for teacher, label-only baseline and student."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfssd.data.dataset import network_input
from dfssd.distill.criterion import Terms
from dfssd.errors import DfssdError
from dfssd.models import precision
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.best import collapsed, finish, out_of_patience, validate_and_keep_best
from dfssd.train.build import build_session
from dfssd.train.clocks import Meter, traced
from dfssd.train.feed import MicroBatch
from dfssd.train.interrupt import STOP, Interrupt
from dfssd.train.job import TrainJob
from dfssd.train.log import Log, progress_line, record, say, step_metrics
from dfssd.train.memory import fit_micro_batch, told_when_full
from dfssd.train.optim import learning_rate
from dfssd.train.session import Session
from dfssd.train.signals import Signals
from dfssd.train.step import accumulate

Save = Callable[[dict[str, Any], Session], None]


def train(
    job: TrainJob,
    workers: WorkerGroup,
    device: torch.device,
    log: Log,
    save: Save,
    interrupt: Interrupt | None = None,
) -> dict[str, Any]:
    """Train to the last step, from the newest whole checkpoint if there is one; leave `best.pt` and `last.pt`.

    Collectives of a step, in the order in which every worker makes them:

    0. where the network's own average labels (`label_in_loop`): counts of its scores and of labelled boxes;
    1. `accumulate`: normalisers, values of the layers, counts, and what workers ask for (a checkpoint, an end);
    2. every 20th step under `--balance gradnorm`: squared gradient norms of the terms;
    3. the gradient, by DDP during the backward pass of the last micro-batch;
    4. at log steps: squared gradient norms at the student's outputs (in the first step at its first layer, too);
    5. at log steps: the loss terms, for the log;
    6. at validations: running statistics of batch norm, then what was matched on val;
    7. before a checkpoint: running statistics of batch norm.

    Args:
        log: takes (metrics, step) at every log step and validation, on every rank.
        save: takes (metrics, session) after each validation, and ({}, session) where somebody asked for a checkpoint, on
            every rank; persists a checkpoint.
        interrupt: through which one is asked for; default by the clock alone.

    Returns:
        best and last validation metrics, and how the time was spent.

    Raises:
        DfssdError: a loss term is not finite or reaches nothing, the data cannot be read, or it was asked to stop.
    """
    s = build_session(job, workers, device)
    state = checkpoint.load_agreed(job.store.at("train"), job.fingerprint(), workers)
    if state is not None:
        s.load_state(state)
        say(workers, f"{job.stage}: resumed at step {s.step} of {job.steps}")
    fit_micro_batch(s, fresh=state is None)
    config, steps = job.config.train, job.steps
    say(
        workers,
        f"{job.stage}: {precision.describe(s.dtype, device, config.tf32)}, {s.micro_batches} micro-batches a step",
    )
    first_layer = next(p for p in s.student.parameters() if p.requires_grad)
    meter, signals, begun, first = Meter(), Signals(), time.monotonic(), s.step
    interrupt = interrupt or Interrupt(60 * config.checkpoint_min)
    feed, last_metrics = s.feed(), {}
    if s.in_loop and s.step == 0:  # the weights it begins with are the ones to beat
        last_metrics = validate_and_keep_best(s)
        s.in_loop.started_at = last_metrics["map50_95"]

    with precision.for_training(device, config.tf32), traced(job.store, config.profile_steps) as trace:
        while s.step < steps and not out_of_patience(s) and not collapsed(s, last_metrics):
            meter.start()
            is_log_step = s.step == first or (s.step + 1) % config.log_every == 0 or s.step + 1 == steps
            s.clock.start(is_log_step)
            batches = feed.take()
            if s.in_loop:
                label_in_loop(s, batches)
            s.clock.mark("data")

            lr = learning_rate(job.train, s.step, steps)
            for group in s.optimiser.param_groups:
                group["lr"] = lr * group["lr_factor"]
            layer = first_layer if s.step == first else None
            with told_when_full(s):
                gradient = accumulate(s, batches, interrupt.wanted(), is_log_step, layer)
            learn_thresholds(s, batches, gradient.terms)
            if s.step + 1 < steps:
                feed.prepare()  # while the device computes; thresholds have moved

            norm, broken = clip(s)
            asked = signals.receive()  # of the step before, which the device has finished: nobody waits here
            update(s, broken)
            s.clock.mark("optimiser")
            signals.send(s.step - 1, broken, gradient.asked, gradient.terms, [f for b in batches for f in b.files])
            meter.stop(feed.waited())

            is_validation = s.step % job.val_every() == 0 or s.step == steps
            if is_log_step or is_validation:  # these wait for the device anyway
                asked = max(asked, signals.receive())
            if is_log_step:
                metrics = step_metrics(s, gradient, lr, float(norm), meter)
                record(s, metrics, log)
                left = (time.monotonic() - begun) / (s.step - first) * (steps - s.step)
                say(workers, progress_line(job.stage, s.step, steps, metrics, left))
                if s.step < steps and (changed := feed.follow(metrics["time/step (s)"], metrics["time/data wait (s)"])):
                    say(workers, f"{job.stage}: {changed}")
            if is_validation:
                last_metrics = validate_and_keep_best(s)
                record(s, {f"val/{k}": v for k, v in last_metrics.items()}, log)
            if is_validation or asked:
                s.average_statistics()
                save(last_metrics if is_validation else {}, s)
                interrupt.stored()
            if asked >= STOP and s.step < steps:
                raise stopped(s)
            trace()
    return finish(s, last_metrics, meter)


def label_in_loop(s: Session, batches: list[MicroBatch]) -> None:
    """Let the weight average label the weak view of the unlabelled images."""
    assert s.in_loop is not None
    found, counted = [], []
    for batch in batches:
        weak = network_input(batch.images[batch.targets.labelled :], s.device)
        with_candidates, counts = s.in_loop.label(weak, batch.batch, batch.targets.labelled, s.teacher_dtype)
        found.append(with_candidates)
        counted.append(counts)
    s.in_loop.see(torch.stack(counted).sum(0), s.device)
    for batch, with_candidates in zip(batches, found, strict=True):
        chosen = s.targets(with_candidates, batch.targets.labelled)
        batch.chosen = chosen.pin_memory() if s.device.type == "cuda" else chosen
        batch.targets = batch.chosen.to(s.device)


def learn_thresholds(s: Session, batches: list[MicroBatch], terms: Terms) -> None:
    """Move the thresholds of a policy that learns; the others are not asked, and nobody waits for them."""
    if s.policy is None or not s.policy.learns or not all(b.chosen.pseudo for b in batches):
        return
    alone = s.workers.size == 1  # then the numbers never left the CPU
    seen = torch.stack([b.chosen.policy for b in batches]).sum(0) if alone else terms.policy.cpu()
    s.policy.update(*seen.chunk(2))


def clip(s: Session) -> tuple[Tensor, Tensor]:
    """Limit the gradient's norm, that of an online teacher apart from the student's.

    Nothing waits here: what is not finite in any term makes the norm not finite, on all workers alike, and then the optimiser
    leaves the weights as they are (`update`), and the host hears of it after the next step (`Signals`).

    Returns:
        The student's norm, and 1 where the gradient is not finite, else 0.
    """
    if s.scaler:
        s.scaler.unscale_(s.optimiser)
    limit, online = s.job.config.train.grad_clip, s.student.online
    # In order: a sum of norms depends on it in its last bit.
    taught = [] if online is None else list(online.parameters())
    excluded = set(taught)
    norm = nn.utils.clip_grad_norm_([p for p in s.student.parameters() if p not in excluded], limit)
    finite = torch.isfinite(norm)
    if taught:
        finite = finite & torch.isfinite(nn.utils.clip_grad_norm_(taught, limit))
    return norm, (~finite).float()


def update(s: Session, broken: Tensor) -> None:
    """One step of the optimiser, unless the gradient is not finite, and of the weight averages."""
    if s.scaler:
        s.scaler.step(s.optimiser)  # an overflow is part of finding the scale, and no error
        s.scaler.update()
        broken.zero_()
    else:
        s.optimiser.found_inf = broken  # type: ignore[attr-defined]  # asked by the fused optimiser, on the device
        s.optimiser.step()
    s.optimiser.zero_grad(set_to_none=True)
    s.ema.update(s.student.detector)
    if s.teacher_ema:
        s.teacher_ema.update(s.student.online)
    s.step += 1


def stopped(s: Session) -> DfssdError:
    """What to say to whoever stopped the run."""
    return DfssdError(
        f"{s.job.stage}: stopped at step {s.step} of {s.job.steps}, as asked; a checkpoint is stored",
        where=s.job.store.uri,
        todo="the same command goes on from there",
    )
