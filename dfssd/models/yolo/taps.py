"""Outputs of chosen layers of an Ultralytics network, taken by forward hooks from a pass that happens anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.tasks import DetectionModel

from dfssd.errors import DfssdError

PROBE = 64  # side of the zero image that finds out channels (px)


class Taps:
    """Forward hooks on layers of a network; `take` hands over what the last pass left.

    Args:
        model: detector; its layers are numbered as in its yaml.
        layers: numbers of the layers.
        who: teacher or student, for messages.

    Raises:
        DfssdError: a number names no layer, or a layer that gives no feature map.
    """

    def __init__(self, model: DetectionModel, layers: Sequence[int], who: str) -> None:
        self.layers, self.who = tuple(layers), who
        self._maps: dict[int, Tensor] = {}
        for layer in self.layers:
            if not 0 <= layer < len(model.model) - 1:
                raise DfssdError(
                    f"the {who} has no layer {layer} to tap: its layers before the head are 0..{len(model.model) - 2}",
                    todo=f"change {'--teacher-taps' if who == 'teacher' else '--taps'}",
                )
        self._hooks = [model.model[k].register_forward_hook(_Keep(self._maps, k)) for k in self.layers]
        try:
            self.channels = [m.shape[1] for m in self._probe(model)]
        except BaseException:
            self.remove()
            raise

    def _probe(self, model: DetectionModel) -> list[Tensor]:
        """Maps of a small zero image; in eval mode, so that batch norm does not see it."""
        modes = [(m, m.training) for m in model.modules()]
        parameter = next(model.parameters())
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, PROBE, PROBE, device=parameter.device, dtype=parameter.dtype))
        finally:
            for module, mode in modes:
                module.training = mode
        return self.take()

    def take(self) -> list[Tensor]:
        """(B,C,H,W) a layer, of the last pass; a second call without another pass is an error.

        Raises:
            DfssdError: a hook did not fire.
        """
        missing = [k for k in self.layers if k not in self._maps]
        if missing:
            raise DfssdError(
                f"loss term 'feat': no output of layer {', '.join(map(str, missing))} of the {self.who} arrived",
                todo="the hook was removed or the network was replaced; rebuild the taps, or set --lambda-f 0",
            )
        maps = [self._maps[k] for k in self.layers]
        self._maps.clear()
        for layer, one in zip(self.layers, maps, strict=True):
            if not isinstance(one, Tensor) or one.ndim != 4:
                raise DfssdError(f"layer {layer} of the {self.who} gives no feature map", todo="tap another layer")
        return maps

    def remove(self) -> None:
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()


class _Keep:
    """A hook that keeps a layer's output. A copy of the network (its weight average) copies it too, harmlessly: into a
    store of its own."""

    def __init__(self, maps: dict[int, Tensor], layer: int) -> None:
        self.maps, self.layer = maps, layer

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.maps[self.layer] = output
