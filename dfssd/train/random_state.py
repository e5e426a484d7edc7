"""The random number generators of a process: what a resumed run must find as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """States of all generators but PyTorch's own on the CPU, as tensors and plain values (for `weights_only=True`)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    python = random.getstate()
    return {
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": [python[0], torch.tensor(python[1], dtype=torch.int64), python[2]],
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set them; CUDA's only where both machines have one."""
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
