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
from dfssd.distill.criterion import StudentOutput, Terms
from dfssd.errors import DfssdError
from dfssd.evaluate.validation import validate
from dfssd.models.detector import TeacherOutput, detector_bytes
from dfssd.pseudo.selection import StepTargets
from dfssd.runtime.progress import clock
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train import checkpoint
from dfssd.train.guards import check_finite, check_reach, check_teacher
from dfssd.train.job import TrainJob
from dfssd.train.optim import learning_rate
from dfssd.train.session import Session, build_session

Log = Callable[[dict[str, float], int], None]
Save = Callable[[dict[str, Any], Session], None]


def train(job: TrainJob, world: WorkerGroup, device: torch.device, log: Log, save: Save) -> dict[str, Any]:
    """Train to the last step, from the newest whole checkpoint if there is one; leave `best.pt` and `last.pt`.

    Args:
        log: takes (metrics, step) at every log step and validation, on every rank.
        save: takes (metrics, session) after each validation, on every rank; persists a checkpoint.

    Returns:
        best and last validation metrics, and how the time was spent.

    Raises:
        DfssdError: a loss term is not finite or reaches nothing, or the data cannot be read.
    """
    s = build_session(job, world, device)
    state = checkpoint.load_agreed(job.store.at("train"), job.fingerprint(), world)
    if state is not None:
        s.load_state(state)
        say(world, f"{job.stage}: resumed at step {s.step} of {job.steps}")
    config, steps, images_per_step = job.config.train, job.steps, job.config.train.batch
    if "unlabelled" in s.streams.streams:
        images_per_step += job.config.unlabelled_batch()
    first_layer = next(p for p in s.student.parameters() if p.requires_grad)
    meter, begun, first, last_metrics = Meter(), time.monotonic(), s.step, {}
    batches = iter(s.loader())
    if s.in_loop and s.step == 0:  # the weights it begins with are the ones to beat
        last_metrics = validate_and_keep_best(s)
        s.in_loop.started_at = last_metrics["map50_95"]

    while s.step < steps and not out_of_patience(s) and not collapsed(s, last_metrics):
        meter.start()
        batch = next(batches)
        meter.data_ready()
        images, weak, targets, chosen = to_device(s, batch)

        lr = learning_rate(job.train, s.step, steps)
        for group in s.optimiser.param_groups:
            group["lr"] = lr * group["lr_factor"]
        out, teacher = forward(s, images, weak)
        terms = s.criterion(out, teacher, targets, s.step / steps, own_average(s, weak))
        if s.policy and s.policy.learns and chosen.pseudo:
            s.policy.update(*(terms.policy if world.size > 1 else chosen.policy).cpu().chunk(2))

        is_log_step = s.step == first or (s.step + 1) % config.log_every == 0 or s.step + 1 == steps
        if is_log_step:
            check_teacher(teacher, s.step)
            check_finite(terms.losses, s.step, batch["im_file"])
            layer = first_layer if s.step == first else None
            grads = check_reach(terms.losses, out, layer, terms.silent, world)

        # Each term is this worker's share of the global loss; DDP averages, hence the factor. Times the batch as in
        # Ultralytics, whose clipping norm belongs to a loss of that size.
        (terms.total() * (config.batch * world.size)).backward()
        norm = clip(s, terms, batch["im_file"])
        update(s)
        meter.stop()

        if is_log_step:
            metrics = step_metrics(s, terms.losses, terms.counts, grads, lr, float(norm), meter, images_per_step)
            record(s, metrics, log)
            left = (time.monotonic() - begun) / (s.step - first) * (steps - s.step)
            say(world, progress_line(job.stage, s.step, steps, metrics, left))
        if s.step % job.val_every() == 0 or s.step == steps:
            last_metrics = validate_and_keep_best(s)
            record(s, {f"val/{k}": v for k, v in last_metrics.items()}, log)
            save(last_metrics, s)
    return finish(s, last_metrics, meter)


def forward(s: Session, images_bchw: Tensor, weak_bchw: Tensor) -> tuple[StudentOutput, TeacherOutput | None]:
    """The one pass of the student, and the one of what teaches it, each in its own precision.

    Targets are rounded once and enter no gradient, so a teacher may be in bf16 where the student is in fp32.

    Args:
        weak_bchw: the same images as those who teach see them.
    """
    with autocast(s, s.dtype):
        student = s.wrapped(images_bchw)
    with autocast(s, s.teacher_dtype):
        return student, s.teacher(weak_bchw) if s.teacher else None


def own_average(s: Session, weak_bchw: Tensor) -> TeacherOutput | None:
    """What the student's own average says, once it has passed the teacher."""
    if s.teaching is None or s.teaching.own is None or s.criterion.lead == 1:
        return None
    with autocast(s, s.teacher_dtype):
        return s.teaching.own(weak_bchw)


def autocast(s: Session, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(s.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def clip(s: Session, terms: Terms, images: list[str]) -> Tensor:
    """Limit the gradient's norm, that of an online teacher apart from the student's; return the student's.

    The one place where a step waits for the device: what is not finite in any term makes the norm not finite, on all
    workers alike, and only then is it asked which term it was.

    Raises:
        DfssdError: it is not finite.
    """
    limit, online = s.job.config.train.grad_clip, s.student.online
    # In order: a sum of norms depends on it in its last bit.
    taught = [] if online is None else list(online.parameters())
    excluded = set(taught)
    norm = nn.utils.clip_grad_norm_([p for p in s.student.parameters() if p not in excluded], limit)
    others = nn.utils.clip_grad_norm_(taught, limit) if taught else torch.zeros(())
    if not bool(torch.isfinite(norm + others.to(norm.device))):
        check_finite(terms.losses, s.step, images)
        raise DfssdError(
            f"the gradient is not finite at step {s.step}; nothing was updated",
            where="images " + ", ".join(images[:4]),
            todo="lower --lr, or try --amp fp32",
        )
    return norm


def update(s: Session) -> None:
    """One step of the optimiser and of the weight averages."""
    s.optimiser.step()
    s.optimiser.zero_grad(set_to_none=True)
    s.ema.update(s.student.detector)
    if s.teacher_ema:
        s.teacher_ema.update(s.student.online)
    s.step += 1


class Meter:
    """Seconds of data wait and of the whole step, since the last reading and over all."""

    def __init__(self) -> None:
        self.steps, self.data_s, self.step_s = 0, 0.0, 0.0
        self.total_steps, self.total_data_s, self.total_step_s = 0, 0.0, 0.0
        self._begun = self._ready = 0.0

    def start(self) -> None:
        self._begun = time.perf_counter()

    def data_ready(self) -> None:
        self._ready = time.perf_counter()

    def stop(self) -> None:
        now = time.perf_counter()
        self.steps += 1
        self.data_s += self._ready - self._begun
        self.step_s += now - self._begun

    def read(self) -> tuple[float, float]:
        """(seconds a step, seconds of data wait a step) since the last call."""
        result = self.step_s / max(self.steps, 1), self.data_s / max(self.steps, 1)
        self.total_steps += self.steps
        self.total_data_s += self.data_s
        self.total_step_s += self.step_s
        self.steps, self.data_s, self.step_s = 0, 0.0, 0.0
        return result


def record(s: Session, metrics: dict[str, float], log: Log) -> None:
    """Keep the numbers of one step in the run's history (which a checkpoint carries) and pass them on."""
    s.history.append({"step": s.step, **metrics})
    log(metrics, s.step)


def to_device(s: Session, batch: dict[str, Any]) -> tuple[Tensor, Tensor, StepTargets, StepTargets]:
    """What the network sees of a batch, the weak view of it, and its boxes on the device and as chosen on the CPU."""
    weak = images = network_input(batch["img"], s.device)
    labelled = s.student.labelled
    if s.in_loop:
        with autocast(s, s.teacher_dtype):
            batch = s.in_loop.label(weak[labelled:], batch)
    if "img_strong" in batch:
        strong = network_input(batch["img_strong"], s.device)
        images = torch.cat([weak[:labelled], strong]).contiguous(memory_format=torch.channels_last)
    chosen = s.targets(batch)
    return images, weak, (chosen.pin_memory() if s.device.type == "cuda" else chosen).to(s.device), chosen


def step_metrics(
    s: Session,
    losses: dict[str, Tensor],
    counts: dict[str, Tensor],
    grads: dict[str, float],
    lr: float,
    norm: float,
    meter: Meter,
    images_per_step: int,
) -> dict[str, float]:
    """Numbers of one log step, with units in the names; loss terms are those of the global batch."""
    flat = s.world.sum(torch.stack([v.detach() for v in losses.values()]))
    step_s, data_s = meter.read()
    metrics = {f"loss/{k}": float(v) for k, v in zip(losses, flat, strict=True)}
    metrics["loss/total"] = float(flat.sum())
    metrics |= {k: float(v) for k, v in counts.items()}
    metrics |= {f"grad/{k}": v for k, v in grads.items()}
    metrics |= {"lr": lr, "grad/norm": norm, "time/step (s)": step_s, "time/data wait (s)": data_s}
    metrics |= {"speed (img/s)": images_per_step / max(step_s, 1e-9), "workers": float(s.world.size)}
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
    s.world.average_buffers(s.ema.ema)
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
