"""The training loop: one function for teacher, label-only baseline and student."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dfssd.data.dataset import network_input
from dfssd.distill.criterion import Terms
from dfssd.errors import DfssdError
from dfssd.evaluate.validation import validate
from dfssd.models import precision
from dfssd.models.detector import detector_bytes
from dfssd.runtime.progress import clock
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.clocks import Meter, traced
from dfssd.train.feed import MicroBatch
from dfssd.train.interrupt import STOP, Interrupt
from dfssd.train.job import TrainJob
from dfssd.train.memory import fit_micro_batch, told_when_full
from dfssd.train.optim import learning_rate
from dfssd.train.session import Session, build_session
from dfssd.train.signals import Signals
from dfssd.train.step import Gradient, accumulate

Log = Callable[[dict[str, float], int], None]
Save = Callable[[dict[str, Any], Session], None]


def train(
    job: TrainJob,
    world: WorkerGroup,
    device: torch.device,
    log: Log,
    save: Save,
    interrupt: Interrupt | None = None,
) -> dict[str, Any]:
    """Train to the last step, from the newest whole checkpoint if there is one; leave `best.pt` and `last.pt`.

    The collectives of a step, which every worker makes in the same order, stand at the head of `dfssd.train.step`.

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
    s = build_session(job, world, device)
    state = checkpoint.load_agreed(job.store.at("train"), job.fingerprint(), world)
    if state is not None:
        s.load_state(state)
        say(world, f"{job.stage}: resumed at step {s.step} of {job.steps}")
    fit_micro_batch(s, fresh=state is None)
    config, steps = job.config.train, job.steps
    say(
        world,
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
                say(world, progress_line(job.stage, s.step, steps, metrics, left))
                if changed := feed.follow(metrics["time/step (s)"], metrics["time/data wait (s)"]):
                    say(world, f"{job.stage}: {changed}")
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
    alone = s.world.size == 1  # then the numbers never left the CPU
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


def record(s: Session, metrics: dict[str, float], log: Log) -> None:
    """Keep the numbers of one step in the run's history (which a checkpoint carries) and pass them on."""
    s.history.append({"step": s.step, **metrics})
    log(metrics, s.step)


def step_metrics(s: Session, gradient: Gradient, lr: float, norm: float, meter: Meter) -> dict[str, float]:
    """Numbers of one log step, with units in the names; loss terms are those of the global batch."""
    losses, config = gradient.terms.losses, s.job.config
    flat = s.world.sum(torch.stack([v.detach() for v in losses.values()]))
    step_s, data_s = meter.read()
    images = config.train.batch + (config.unlabelled_batch() if "unlabelled" in s.streams.streams else 0)
    metrics = {f"loss/{k}": float(v) for k, v in zip(losses, flat, strict=True)}
    metrics["loss/total"] = float(flat.sum())
    metrics |= {k: float(v) for k, v in gradient.terms.counts.items()}
    metrics |= {f"grad/{k}": v for k, v in gradient.norms.items()}
    metrics |= {"lr": lr, "grad/norm": norm, "time/step (s)": step_s, "time/data wait (s)": data_s}
    metrics |= {f"time/{k} (s)": v for k, v in s.clock.read().items()}
    metrics |= {"speed (img/s)": images / max(step_s, 1e-9), "workers": float(s.world.size)}
    if s.device.type == "cuda":
        metrics["memory/peak (GiB)"] = torch.cuda.max_memory_allocated(s.device) / 2**30
    if s.scaler:
        metrics["scale"] = float(s.scaler.get_scale())
    if s.policy:
        tau = s.policy.thresholds().tolist()
        metrics |= {f"threshold/{n}": t for n, t in zip(s.manifest.names, tau, strict=True)}
    return metrics


def progress_line(stage: str, step: int, steps: int, metrics: dict[str, float], left_s: float) -> str:
    parts = {k.split("/")[1]: 0.0 for k in metrics if k.startswith("loss/") and k != "loss/total"}
    for key, value in metrics.items():
        if key.startswith("loss/") and key != "loss/total":
            parts[key.split("/")[1]] += value
    terms = " + ".join(f"{k} {v:.3f}" for k, v in parts.items())
    return (
        f"{stage}: step {step}/{steps} ({100 * step / steps:.0f} %)  loss {metrics['loss/total']:.3f} = {terms}  "
        f"lr {metrics['lr']:.1e}  {metrics['time/step (s)'] * 1e3:.0f} ms/step "
        f"({metrics['time/data wait (s)'] * 1e3:.0f} data)  {metrics['speed (img/s)']:.0f} img/s  left {clock(left_s)}"
    )


def validate_and_keep_best(s: Session) -> dict[str, float]:
    """Measure the weight average on the val split; remember its weights if mAP50-95 was never higher."""
    begun = time.monotonic()
    s.average_statistics()
    with precision.for_validation(s.device):
        result = validate(s.ema.ema, s.val, s.ema.ema.names, s.world, s.device)
    metrics = {k: v for k, v in result.items() if isinstance(v, float)}
    before = s.best["metrics"]["map50_95"] if s.best else -math.inf
    if s.best is None or metrics["map50_95"] >= before:
        weights = {k: v.detach().cpu().clone() for k, v in s.ema.ema.state_dict().items()}
        risen = s.best is None or metrics["map50_95"] > before
        since = s.step if risen or s.best is None else s.best["since"]  # an equal value is no progress
        s.best = {"step": s.step, "since": since, "metrics": metrics, "ema": weights}
    say(
        s.world,
        f"{s.job.stage}: step {s.step}  val mAP50 {metrics['map50']:.4f}  mAP50-95 {metrics['map50_95']:.4f}  "
        f"(best mAP50-95 {s.best['metrics']['map50_95']:.4f} at step {s.best['step']})  "
        f"{time.monotonic() - begun:.1f} s",
    )
    reached = s.teaching.reached if s.teaching else None
    if reached is not None:
        s.criterion.lead = lead(reached, metrics["map50_95"], s.job.config.distill.fade)
        if before <= reached < metrics["map50_95"]:
            fades = s.job.config.distill.fade > 0
            hint = (
                "its teacher's terms fade, its own average takes over"
                if fades
                else "which may hold it back: set --fade"
            )
            say(s.world, f"{s.job.stage}: is now better than its teacher (val mAP50-95 {reached:.4f}); {hint}")
    return metrics


def lead(teacher: float, student: float, fade: float) -> float:
    """Weight (0..1) of the teacher's terms by val mAP50-95: 1 while the student is no better, 0 where it is `fade` ahead."""
    return 1.0 if fade <= 0 else min(1.0, max(0.0, 1 - (student - teacher) / fade))


def out_of_patience(s: Session) -> bool:
    """Has validation not improved for as long as the settings allow?"""
    since = s.step - s.best["since"] if s.best else 0
    if not s.job.patience or since < s.job.patience * s.job.val_every():
        return False
    say(s.world, f"{s.job.stage}: no better validation for {since} steps, stops at step {s.step} of {s.job.steps}")
    return True


def collapsed(s: Session, last: dict[str, float]) -> bool:
    """Has a teacher that labels for itself stopped learning anything good? Its best weights are kept."""
    reason = s.in_loop.failing(last["map50_95"]) if s.in_loop and last else ""
    if reason and s.best is not None:
        kept = f"its best weights (step {s.best['step']}) are kept"
        say(s.world, f"{s.job.stage}: {reason}; stops at step {s.step}, {kept}")
    return bool(reason)


def finish(s: Session, last: dict[str, float], meter: Meter) -> dict[str, Any]:
    """Write `best.pt` and `last.pt` in Ultralytics' format, and return what is worth knowing."""
    assert s.best is not None, "a run ends with a validation"
    meter.read()
    result: dict[str, Any] = {
        "best": {"step": s.best["step"], **s.best["metrics"]},
        "last": last,
        "steps": s.step,
        "before_s": s.before_s,
        "seconds_per_step": meter.total_step_s / max(meter.total_steps, 1),
        "data_wait_share": meter.total_data_s / max(meter.total_step_s, 1e-9),
        "precision": str(s.dtype or torch.float32),
        "device": str(s.device),
        "threads": torch.get_num_threads(),
    }
    if s.world.rank == 0:
        best = deepcopy(s.ema.ema)
        best.load_state_dict(s.best["ema"])
        note = {"stage": s.job.stage, "fingerprint": s.job.fingerprint()}
        s.job.store.write("best.pt", detector_bytes(best, {**note, **result["best"]}))
        s.job.store.write_json("history.json", s.history)
        s.job.store.write("last.pt", detector_bytes(s.ema.ema, {**note, "step": s.step}))
    return result


def say(world: WorkerGroup, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)
