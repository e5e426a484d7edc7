"""What the host wants to know of a step on the device, without waiting for it: it looks one step later.

A wait for the device before the optimiser would keep the host from queueing the next step, and two small networks are
bound by how fast work is queued. So an update is made only where the gradient is finite, which the optimiser decides on
the device, and the host hears of it when the next step is already queued.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfssd.distill.criterion import Terms
from dfssd.errors import DfssdError
from dfssd.train.guards import check_finite


@dataclass
class _Sent:
    step: int
    terms: Terms
    images: list[str]
    values: Tensor  # [the gradient is not finite, what the workers ask for], on the host
    arrived: torch.cuda.Event | None


class Signals:
    """Numbers of the step before."""

    def __init__(self) -> None:
        self._sent: _Sent | None = None

    def send(self, step: int, broken: Tensor, asked: Tensor, terms: Terms, images: list[str]) -> None:
        """Let the numbers of this step travel to the host.

        Args:
            broken: 1 where the gradient is not finite.
            asked: what the workers want (`Interrupt.wanted`), added up.
            terms, images: to say what was not finite.
        """
        values, arrived = torch.stack([broken.detach().reshape(()), asked.reshape(())]), None
        if values.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            values = host
        self._sent = _Sent(step, terms, images, values, arrived)

    def receive(self) -> float:
        """What the workers asked for in the last step that was sent; 0 where there is none.

        Raises:
            DfssdError: the gradient of that step was not finite.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return 0.0
        if sent.arrived is not None:
            sent.arrived.synchronize()  # long done: a whole step was queued since
        broken, asked = sent.values.tolist()
        if broken:
            check_finite(sent.terms.losses, sent.step, sent.images)
            raise DfssdError(
                f"the gradient is not finite at step {sent.step}; nothing was updated",
                where="images " + ", ".join(sent.images[:4]),
                todo="lower --lr, or try --amp fp32",
            )
        return float(asked)
