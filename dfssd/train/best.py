"""The best weights on val: measured, kept, given up on, and written at the end."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from typing import Any

import torch

from dfssd.evaluate.validation import validate
from dfssd.models import precision
from dfssd.models.families import class_names, family_of
from dfssd.train.clocks import Meter
from dfssd.train.log import say
from dfssd.train.session import Session


def validate_and_keep_best(s: Session) -> dict[str, float]:
    """Measure the weight average on the val split; remember its weights if mAP50-95 was never higher."""
    begun = time.monotonic()
    s.average_statistics()
    with precision.for_validation(s.device):
        result = validate(s.ema.ema, s.val, dict(enumerate(class_names(s.ema.ema))), s.workers, s.device)
    metrics = {k: v for k, v in result.items() if isinstance(v, float)}
    before = s.best["metrics"]["map50_95"] if s.best else -math.inf
    if s.best is None or metrics["map50_95"] >= before:
        weights = {k: v.detach().cpu().clone() for k, v in s.ema.ema.state_dict().items()}
        risen = s.best is None or metrics["map50_95"] > before
        since = s.step if risen or s.best is None else s.best["since"]  # an equal value is no progress
        s.best = {"step": s.step, "since": since, "metrics": metrics, "ema": weights}
    say(
        s.workers,
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
            say(s.workers, f"{s.job.stage}: is now better than its teacher (val mAP50-95 {reached:.4f}); {hint}")
    return metrics


def lead(teacher: float, student: float, fade: float) -> float:
    """Weight (0..1) of the teacher's terms by val mAP50-95: 1 while the student is no better, 0 where it is `fade` ahead."""
    return 1.0 if fade <= 0 else min(1.0, max(0.0, 1 - (student - teacher) / fade))


def out_of_patience(s: Session) -> bool:
    """Has validation not improved for as long as the settings allow?"""
    since = s.step - s.best["since"] if s.best else 0
    if not s.job.patience or since < s.job.patience * s.job.val_every():
        return False
    say(s.workers, f"{s.job.stage}: no better validation for {since} steps, stops at step {s.step} of {s.job.steps}")
    return True


def collapsed(s: Session, last: dict[str, float]) -> bool:
    """Has a teacher that labels for itself stopped learning anything good? Its best weights are kept."""
    reason = s.in_loop.failing(last["map50_95"]) if s.in_loop and last else ""
    if reason and s.best is not None:
        kept = f"its best weights (step {s.best['step']}) are kept"
        say(s.workers, f"{s.job.stage}: {reason}; stops at step {s.step}, {kept}")
    return bool(reason)


def finish(s: Session, last: dict[str, float], meter: Meter) -> dict[str, Any]:
    """Write `best.pt` and `last.pt` in the family's format, and return what is worth knowing."""
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
    if s.workers.rank == 0:
        best, family = deepcopy(s.ema.ema), family_of(s.ema.ema)
        best.load_state_dict(s.best["ema"])
        note = {"stage": s.job.stage, "fingerprint": s.job.fingerprint()}
        s.job.store.write("best.pt", family.save(best, {**note, **result["best"]}))
        s.job.store.write_json("history.json", s.history)
        s.job.store.write("last.pt", family.save(s.ema.ema, {**note, "step": s.step}))
    return result
