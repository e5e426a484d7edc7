"""What a step leaves in the log, in the run's history and on the terminal."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dfssd.runtime.progress import clock
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.clocks import Meter
from dfssd.train.session import Session
from dfssd.train.step import Gradient

Log = Callable[[dict[str, float], int], None]


def record(s: Session, metrics: dict[str, float], log: Log) -> None:
    """Keep the numbers of one step in the run's history (which a checkpoint carries) and pass them on."""
    s.history.append({"step": s.step, **metrics})
    log(metrics, s.step)


def step_metrics(s: Session, gradient: Gradient, lr: float, norm: float, meter: Meter) -> dict[str, float]:
    """Numbers of one log step, with units in the names; loss terms are those of the global batch."""
    losses, config = gradient.terms.losses, s.job.config
    flat = s.workers.sum(torch.stack([v.detach() for v in losses.values()]))
    step_s, data_s = meter.read()
    images = config.train.batch + (config.unlabelled_batch() if "unlabelled" in s.streams.streams else 0)
    metrics = {f"loss/{k}": float(v) for k, v in zip(losses, flat, strict=True)}
    metrics["loss/total"] = float(flat.sum())
    metrics |= {k: float(v) for k, v in gradient.terms.counts.items()}
    metrics |= {f"grad/{k}": v for k, v in gradient.norms.items()}
    metrics |= {"lr": lr, "grad/norm": norm, "time/step (s)": step_s, "time/data wait (s)": data_s}
    metrics |= {f"time/{k} (s)": v for k, v in s.clock.read().items()}
    metrics |= {"speed (img/s)": images / max(step_s, 1e-9), "workers": float(s.workers.size)}
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


def say(workers: WorkerGroup, text: str) -> None:
    if workers.rank == 0:
        print(text, flush=True)
