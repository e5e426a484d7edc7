"""Batches on their way to the device: chosen on the CPU, pinned, and copied on a stream of its own while a step computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfssd.data.loaders import Supply
from dfssd.pseudo.selection import StepTargets

Choose = Callable[[dict[str, Any], int], StepTargets]


@dataclass
class MicroBatch:
    """Images and boxes of one forward pass.

    Args:
        index: which micro-batch of the step it is, counted over all workers.
        images: (B,3,H,W) uint8 on the device; labelled ones first.
        strong: strong view of the unlabelled ones; None where they are seen as they are.
        targets: boxes on the device.
        batch: as the loader collated it.
        chosen: the same on the CPU.
    """

    index: int
    images: Tensor
    strong: Tensor | None
    targets: StepTargets
    chosen: StepTargets
    batch: dict[str, Any]

    @property
    def files(self) -> list[str]:
        """Names of the images, for messages."""
        files: list[str] = self.batch["im_file"]
        return files


class Feed:
    """Takes collated batches from a loader, and has the next ones copied while the device computes.

    Args:
        batches: collated micro-batches, those of a step one after the other (`dfssd.data.dataset.collate`).
        indices: which micro-batches of a step are this worker's.
        choose: boxes of a batch whose first so many images are labelled -> targets, on the CPU.
        labelled: labelled images of each micro-batch of a step.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, Any]],
        indices: range,
        choose: Choose,
        labelled: list[int],
        device: torch.device,
    ) -> None:
        self.source, self.batches = batches, iter(batches)
        self.indices, self.choose, self.labelled, self.device = indices, choose, labelled, device
        self._waited_s = 0.0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: list[MicroBatch] = []

    def prepare(self) -> None:
        """Choose and copy the next step's batches, unless that is done; thresholds must be those of now."""
        if not self._ready:
            self._ready = [self._copied(index) for index in self.indices]

    def take(self) -> list[MicroBatch]:
        """The micro-batches of the next step."""
        self.prepare()
        batches, self._ready = self._ready, []
        if self._side is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._side)
            for tensor in _tensors(batches):
                tensor.record_stream(now)  # else the allocator would give its memory away once the side stream is done
        return batches

    def waited(self) -> float:
        """Seconds that the loader kept us waiting since the last call."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def follow(self, step_s: float, waited_s: float) -> str:
        """Let the number of loading processes follow the step; says what was changed (`Supply.follow`)."""
        return self.source.follow(step_s, waited_s, len(self.indices)) if isinstance(self.source, Supply) else ""

    def _copied(self, index: int) -> MicroBatch:
        begun = time.perf_counter()
        batch = next(self.batches)
        self._waited_s += time.perf_counter() - begun
        chosen = self.choose(batch, self.labelled[index])
        if self._side is None:
            return moved(index, batch, chosen, self.device)
        with torch.cuda.stream(self._side):
            return moved(index, batch, chosen, self.device)


def moved(index: int, batch: dict[str, Any], chosen: StepTargets, device: torch.device) -> MicroBatch:
    """A collated batch on the device; from pinned memory nobody waits for the copy."""
    images, strong = batch["img"].to(device, non_blocking=True), batch.get("img_strong")
    if strong is not None:
        strong = strong.to(device, non_blocking=True)
    if device.type == "cuda":
        chosen = chosen.pin_memory()
    return MicroBatch(index, images, strong, chosen.to(device), chosen, batch)


def _tensors(batches: list[MicroBatch]) -> Iterator[Tensor]:
    for b in batches:
        boxes = vars(b.targets.boxes).values()
        yield from (t for t in (b.images, b.strong, b.targets.counts, b.targets.policy, *boxes) if t is not None)
