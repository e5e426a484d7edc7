"""Automatic weights: the gradient of each term at the neck is kept at a stated share of the supervised one.

In the spirit of GradNorm (Chen et al., ICML 2018, eq. 1), without its trained weights: the ratio of norms is measured
every EVERY steps, which costs a backward pass through the head only, and followed smoothly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfssd.config import Distill

EVERY = 20  # steps between two measurements
SMOOTHING = 0.3  # weight of a new measurement, in the logarithm
# Pseudo-labels vanish and return with the thresholds: a factor that followed would make one stray box shout.
LIMIT = {"pse": 10.0}


class Balance:
    """Factors of the terms 'pse', 'pred' and 'feat', on top of their lambdas.

    At each step: where `due`, the `squared_norms` of all micro-batches are added up and given to `follow`; then `advance`.

    Args:
        config: `share_u`, `share_p`, `share_f`; a share of 0 leaves a term as it is.
    """

    def __init__(self, config: Distill) -> None:
        shares = {"pse": config.share_u, "pred": config.share_p, "feat": config.share_f}
        self.shares = {k: v for k, v in shares.items() if v > 0}
        self.factors: dict[str, float] = {}
        self.calls = 0

    @property
    def due(self) -> bool:
        """Is it time to measure?"""
        return self.calls % EVERY == 0

    def advance(self) -> None:
        """A step was made."""
        self.calls += 1

    def names(self, terms: dict[str, Tensor]) -> list[str]:
        """Terms that are balanced; the same for all micro-batches of a step."""
        return [n for n in self.shares if n in terms and terms[n].requires_grad]

    def squared_norms(self, terms: dict[str, Tensor], neck: list[Tensor], scale: float = 1.0) -> Tensor:
        """Squared gradient norm of the supervised term and of those of `names`; images add up.

        Args:
            terms: weighted loss by name (sup, pse, pred, feat), a micro-batch's share of the global loss.
            neck: student's feature maps where gradients are compared.
            scale: of a half-precision backward pass.
        """
        return torch.stack([_square(terms[n], neck, scale) for n in ("sup", *self.names(terms))])

    def follow(self, names: list[str], squared_norms: Tensor) -> None:
        """Move the factors.

        Args:
            names: of the terms after the supervised one.
            squared_norms: sum over all micro-batches and workers.
        """
        norms = squared_norms.sqrt().tolist()
        for name, norm in zip(names, norms[1:], strict=True):
            if not (norm > 0 and norms[0] > 0 and math.isfinite(norm) and math.isfinite(norms[0])):
                continue  # nothing to measure; what is not finite stops the run elsewhere
            wanted = self.shares[name] * norms[0] / norm
            before = self.factors.get(name, wanted)
            factor = math.exp((1 - SMOOTHING) * math.log(before) + SMOOTHING * math.log(wanted))
            limit = LIMIT.get(name, math.inf)
            self.factors[name] = min(max(factor, 1 / limit), limit)

    def state_dict(self) -> dict[str, Any]:
        return {"factors": dict(self.factors), "calls": self.calls, "shares": dict(self.shares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from measured factors, brought to the shares of this run: another trial's may have been others."""
        before = state.get("shares", self.shares)
        known = [k for k in state["factors"] if k in self.shares and before.get(k)]
        self.factors = {k: state["factors"][k] * (self.shares[k] / before[k]) for k in known}
        self.calls = int(state["calls"])


def _square(term: Tensor, neck: list[Tensor], scale: float) -> Tensor:
    """Squared norm of a term's gradient over all maps."""
    grads = torch.autograd.grad(term * scale if scale != 1 else term, neck, retain_graph=True, allow_unused=True)
    found = [(g.float() / scale).square().sum() for g in grads if g is not None]
    return torch.stack(found or [term.new_zeros(())]).sum()
