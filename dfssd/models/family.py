"""What the rest of the code asks of a model family: raw output, loss, boxes, and what a network of it can be taught.

Training, distillation, labelling and measuring know a network by this protocol alone. `dfssd.models.families` says which
family a file, a name or a network belongs to; YOLO (`dfssd.models.yolo.family`) is the one that there is.

Legend: B images, A anchor points, C classes, N branches of a head, K numbers that describe a box.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dfssd.errors import DfssdError
from dfssd.models.head import HeadOutput, TeacherOutput
from dfssd.models.pairing import Pairing
from dfssd.models.targets import Targets

MOST_PARTS = 256  # that are compiled for themselves, before the rest is left as it is
Raw = dict[str, HeadOutput]  # head output by branch; there is always `head.MAIN`


def compile_part(module: nn.Module) -> None:
    """`torch.compile` one part of a network, of which there may be many, with backward passes that can be repeated."""
    import torch._dynamo.config as dynamo  # seconds, which only who compiles should wait for
    import torch._functorch.config as functorch

    # All parts share a code object, whose compiled forms are counted together.
    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_PARTS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, MOST_PARTS)
    functorch.donated_buffer = False  # balance goes backwards through the head and keeps the graph
    module.compile(dynamic=False)  # sizes are those of a micro-batch, but differ from part to part


class Loss(Protocol):
    """The detection loss of a network, as sums: the caller divides, by normalisers of the global batch.

    Args:
        components: names of the parts, such as box and cls.
    """

    components: tuple[str, ...]

    def set_progress(self, share: float) -> None:
        """Move what depends on how much of the training is done (0..1)."""

    def branch_weights(self) -> dict[str, float]:
        """Share of each branch in the loss."""

    def __call__(self, raw: Raw, targets: Targets) -> tuple[Tensor, Tensor]:
        """(N,B,len(components)) weighted sums, and (N,B) normalisers. Box weights, ignored areas and silent images are the
        loss's to respect (see `Targets`)."""


class TappedLayers(Protocol):
    """Outputs of chosen layers, of the last pass."""

    @property
    def channels(self) -> list[int]: ...

    def take(self) -> list[Tensor]:
        """(B,channels,H,W) a layer."""


class TeacherNetwork(Protocol):
    """A network that teaches: in eval mode, without gradients. `model` is what holds its weights, `names` its classes,
    `channels` those of the maps in `TeacherOutput.taps`."""

    model: nn.Module
    names: list[str]
    channels: list[int]

    def __call__(self, images_bchw: Tensor) -> TeacherOutput: ...


class Family(ABC):
    """A kind of detector. It holds no state: networks do.

    What follows `boxes` may be left out: such a family trains on labels and pseudo-labels, labels, and is measured. It cannot
    teach or be taught (`channels`, `taps`, `teacher`, `pair`), be exported (`decoder`), or say which images are alike to it
    (`watch`); whoever asks is told.
    """

    name: str

    @abstractmethod
    def claims(self, what: str | bytes | nn.Module) -> bool:
        """Is this one of the family: a --teacher or --student setting, the content of a file, or a network? Runs no code
        from a file."""

    @abstractmethod
    def resolve(self, spec: str) -> tuple[str, bytes | None]:
        """Check a setting before anything is started; the content of its file where it has one.

        Raises:
            DfssdError: it is not there, or no detector.
        """

    @abstractmethod
    def build(self, spec: str, names: Sequence[str], imgsz: int, weights: bytes | None) -> tuple[nn.Module, str]:
        """A trainable detector of these classes, on the CPU, in float32; and in a line what it took over from `weights`."""

    @abstractmethod
    def load(self, data: bytes, where: str, imgsz: int) -> nn.Module:
        """A finished detector for inference: eval mode, float32, no gradients.

        Raises:
            DfssdError: the file holds no detector, or code.
        """

    @abstractmethod
    def save(self, model: nn.Module, extra: dict[str, Any]) -> bytes:
        """Content of a file that `load` reads, with `extra` (JSON) in it."""

    @abstractmethod
    def names(self, model: nn.Module) -> list[str]:
        """(C,) its classes."""

    def ready(
        self,
        model: nn.Module,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> nn.Module:
        """A loaded detector made quick for inference; its boxes are decoded in float32 whatever `dtype` is."""
        moved: nn.Module = model.to(device, dtype, memory_format=memory_format)  # type: ignore[call-overload]
        return moved

    def compile(self, model: nn.Module) -> None:
        """Compile a network in place, by parts.

        Gradients are also taken at the maps that its head receives (`distill.balance`), and inside one compiled graph nothing
        leads from its outputs back to them.
        """
        for part in model.children():
            compile_part(part)

    @abstractmethod
    def raw(self, model: nn.Module, images_bchw: Tensor) -> Raw:
        """Head output of a network in training mode."""

    @abstractmethod
    def loss(self, model: nn.Module, box_loss: str) -> Loss:
        """The detection loss of this network; `box_loss` is one of `dfssd.config.choices`."""

    @abstractmethod
    def boxes(
        self,
        model: nn.Module,
        images_bchw: Tensor,
        conf: float,
        iou: float,
        most: int,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Boxes after NMS (arguments as in `dfssd.models.yolo.predict`): (n,6) [x1, y1, x2, y2 px, score, class] an image."""

    def decoder(self, model: nn.Module) -> nn.Module:
        """The network as a module that can be traced into a graph, for any batch size: images (B,3,S,S) to decoded boxes and
        scores (B,4+C,A) [cx, cy, w, h px, scores]; of a head that needs no NMS (B,n,6) [x1, y1, x2, y2 px, score, class]."""
        raise DfssdError(
            f"a {self.name} model cannot be exported", todo="give --formats without a value: nothing is exported"
        )

    def kept_float(self, convolutions: Sequence[str]) -> list[str]:
        """Of the convolutions of an exported graph, by name, those that int8 leaves as they are: what decodes boxes, where
        rounding costs whole pixels."""
        return []

    def watch(self, model: nn.Module, see: Callable[[Sequence[Tensor]], None]) -> RemovableHandle:
        """Have `see` called in every pass with the maps that enter the head (as in `HeadOutput.feats`)."""
        raise DfssdError(f"a {self.name} model does not show its features", todo="take another network")

    def channels(self, model: nn.Module) -> list[int]:
        """Channels of `HeadOutput.feats`, which are compared where no layers are tapped."""
        raise self._untaught("has no feature maps to compare")

    def taps(self, model: nn.Module, layers: Sequence[int], who: str) -> TappedLayers:
        """Hooks on layers of a network; `who` is teacher or student, for messages."""
        raise self._untaught("has no layers to tap")

    def teacher(
        self,
        model: nn.Module,
        device: torch.device,
        layers: Sequence[int] = (),
        frozen: bool = True,
        dtype: torch.dtype | None = None,
    ) -> TeacherNetwork:
        """A network at work as a teacher (arguments as in `dfssd.models.yolo.detector.Teacher`)."""
        raise self._untaught("cannot teach: only its boxes can, as pseudo-labels")

    def pair(self, teacher: TeacherNetwork, student: nn.Module, names: Sequence[str], prediction: str) -> Pairing:
        """How a teacher of this family stands to a student of this family (arguments as in `dfssd.models.yolo.pair`)."""
        raise self._untaught("cannot be taught by a teacher's output")

    def _untaught(self, why: str) -> DfssdError:
        return DfssdError(f"a {self.name} model {why}", todo=ONLY_BOXES)


ONLY_BOXES = "set --lambda-p 0 --lambda-l 0 --lambda-f 0: pseudo-labels need nothing in common"
