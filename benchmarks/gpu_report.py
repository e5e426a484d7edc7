"""What benchmarks/gpu.py found, as Markdown, and against what is aimed at."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import numpy as np
import torch
import torchvision
import ultralytics

AIMS = {  # on an H100 with 16 cores, 640 px, 32 + 32 images
    "training (img/s)": (1500, True),
    "data wait (share)": (0.05, False),
    "labelling (img/s)": (3000, True),
    "labelling with flips (img/s)": (1000, True),
    "step over distill_model": (0.55, False),
}


def environment(device: torch.device) -> dict[str, Any]:
    card: dict[str, Any] = {"card": platform.processor() or platform.machine()}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        card = {"card": p.name, "memory (GiB)": round(p.total_memory / 2**30, 1), "sms": p.multi_processor_count}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **card,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "ultralytics": ultralytics.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def headline(found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that there are aims for."""
    flat = {k: v for section in found["sections"].values() for k, v in section.items() if k in AIMS}
    return {k: {"found": flat[k], "aim": aim, "met": (flat[k] >= aim) == more} for k, (aim, more) in AIMS.items()
            if k in flat}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    env = found["environment"]
    lines = [f"# {env['card']}, {env['cores']} cores, torch {env['torch']}, {env['date']}", ""]
    if found.get("headline"):
        lines += ["| | found | aim | met |", "|---|---|---|---|"]
        lines += [f"| {k} | {number(v['found'])} | {number(v['aim'])} | {'yes' if v['met'] else 'no'} |"
                  for k, v in found["headline"].items()]  # fmt: skip
    for name, section in found["sections"].items():
        lines += ["", f"## {name}", "", "| | |", "|---|---|"]
        for key, value in section.items():
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            lines += [f"| {f'{key}: {k}'.rstrip(': ')} | {number(v)} |" for k, v in pairs]
    lines += ["", *(f"Not run: {k} ({v})" for k, v in found["skipped"].items())]
    return "\n".join(lines) + "\n"


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
