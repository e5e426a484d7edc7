"""Gradients averaged over workers by PyTorch's DistributedDataParallel."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

OWN_BUFFERS = next(  # the first name is that of torch 2.14, which warns of the second
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)


def averaged_gradients(student: nn.Module) -> nn.Module:
    """The student; a backward pass averages the gradient of every parameter over all workers.

    Buffers are each worker's own (`models.ghost_norm`). The graph is the same at every step, but is not declared static: DDP
    would take the first backward pass for the step's, and ours asks for gradients of single terms before (`train.guards`).
    """
    settings: dict[str, Any] = {OWN_BUFFERS: False}
    return DistributedDataParallel(student, gradient_as_bucket_view=True, **settings)
