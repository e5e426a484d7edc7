"""Batch norm whose statistics are those of a micro-batch: ghost batch norm (Hoffer, Hubara and Soudry, NeurIPS 2017, section
4.1), which the number of workers does not change and for which nothing is exchanged.

Running statistics follow the mean over all micro-batches of a step. A worker that computes n of them one after the
other gives each its share of the step's momentum; over workers the mean is taken where statistics are needed
(`WorkerGroup. average_buffers`), since a running average is linear in what it follows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Uncounted(nn.BatchNorm2d):
    """Batch norm that does not count its batches, which nobody asks for where the momentum is set: an operation a layer."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.momentum is None:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )


class GhostNorm:
    """The batch norms of a network that trains on one or several micro-batches a step.

    Args:
        modules: what trains; batch norms in eval mode are not touched by it.
    """

    def __init__(self, *modules: nn.Module) -> None:
        found = [n for m in modules for n in m.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm)]
        for norm in found:
            if type(norm) is nn.BatchNorm2d:
                norm.__class__ = _Uncounted
        self._norms = [(norm, float(norm.momentum)) for norm in found if norm.momentum is not None]

    def turn(self, index: int, count: int) -> None:
        """The next pass is micro-batch `index` (from 0) of `count`: afterwards all of them weigh the same in the running
        statistics, and together as much as one pass does with the norm's own momentum."""
        for norm, momentum in self._norms:
            norm.momentum = momentum / (count - (count - 1 - index) * momentum)

    def still(self) -> None:
        """The next pass leaves the running statistics as they are."""
        for norm, _ in self._norms:
            norm.momentum = 0.0
