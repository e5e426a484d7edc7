"""The group of training workers, as little of it as the loop needs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class WorkerGroup:
    """Rank and size of the worker group; a size of 1 needs no process group."""

    rank: int = 0
    size: int = 1

    def share_of(self, count: int) -> int:
        """How many of `count` samples of a global batch are this worker's; shares differ by one at most."""
        return len(range(self.rank, count, self.size))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all workers; `tensor` itself where there is only one."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of every worker, on every worker."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_gradients(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that backward passes average gradients over all workers; buffers stay each worker's own."""
        if self.size == 1:
            return model
        with (
            warnings.catch_warnings()
        ):  # PyTorch 2.14 has another name for the buffers' setting, which 2.6 does not know
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    @torch.no_grad()
    def average_buffers(self, model: nn.Module, share: float) -> None:
        """Average batch norm statistics, which each worker keeps from its own micro-batches.

        Args:
            share: of the micro-batches of a step, this worker's.
        """
        if self.size == 1:
            return
        buffers = [b for b in model.buffers() if b.dtype.is_floating_point]
        flat = torch.cat([b.flatten() for b in buffers]) * share
        dist.all_reduce(flat)
        for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
