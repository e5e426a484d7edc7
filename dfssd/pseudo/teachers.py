"""The labelling teachers: networks on a device, and what they find in a decoded shard.

They do nothing but run networks: decoding comes before, and fusing views and writing after, in stages of their own
(`pseudo.shards`), so that a GPU waits for neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfssd.config import Config
from dfssd.data.boxes import DET_CLS, DET_SCORE, XYXY
from dfssd.errors import DfssdError
from dfssd.models.families import class_names, family_of, load_model, predict
from dfssd.models.precision import autocast_dtype
from dfssd.pseudo.fusion import FLIPS
from dfssd.pseudo.shards import IMAGE, Shard
from dfssd.runtime.storage import Storage

AUTO_BATCH = {"cpu": 16, "cuda": 64}  # images in a forward pass; halved where a GPU's memory does not hold them
CPU_PIXELS = 820_000  # of a forward pass on a CPU: with more, maps no longer stay in its caches (2 images of 640 px)
MEMORY = ("out of memory", "alloc_failed", "allocation failed")  # what PyTorch, cuDNN and cuBLAS say of full memory


def digest(weights: Sequence[bytes]) -> str:
    """Identity of a set of teachers: 16 hex digits over the digests of their weights."""
    each = [hashlib.sha256(w).hexdigest() for w in weights]
    return each[0][:16] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()[:16]


def class_map(own: dict[int, str], names: Sequence[str], where: str) -> np.ndarray:
    """(C of the teacher,) class id of the data for each of the teacher's classes, by name; -1 where the data lacks it.

    Raises:
        DfssdError: the teacher does not know one of the data's classes.
    """
    known = [own[k] for k in sorted(own)]
    missing = sorted(set(names) - set(known))
    if missing:
        raise DfssdError(
            f"the teacher does not know the classes {missing}; it knows {known}",
            where=where,
            todo="give a teacher that was trained on these classes, under the same names",
        )
    return np.array([names.index(n) if n in names else -1 for n in known])


def precision(amp: str, device: torch.device) -> torch.dtype:
    """Type of weights and features of a labelling network.

    On a GPU fp16, whose 11 bits are nearer to fp32 than the 8 of bf16, from compute capability 7.0 on, where it is native
    (V100, T4, and all later ones); on a CPU bf16 where it is native. Boxes are decoded in float32 whatever it is.
    """
    if amp == "auto" and device.type == "cuda":
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    return autocast_dtype(amp, device) or torch.float32


def auto_batch(device: torch.device, imgsz: int) -> int:
    """Images of a forward pass."""
    most = AUTO_BATCH[device.type]
    return max(1, min(most, round(CPU_PIXELS / imgsz**2))) if device.type == "cpu" else most


class Teachers:
    """Turns a decoded shard into what each network finds in each form of each image.

    Args:
        weights: content of a .pt for each teacher; where: what to call them in an error.
        names: class names of the data.

    Raises:
        DfssdError: a file holds no detector, or one that does not know the classes.
    """

    def __init__(
        self, config: Config, weights: Sequence[bytes], where: Sequence[str], names: Sequence[str], device: torch.device
    ) -> None:
        self.config, self.device, self.digest = config, device, digest(weights)
        self.dtype = precision(config.train.amp, device)
        self.flips = FLIPS if config.pseudo.tta == "flips" else FLIPS[:1]
        self.models, self.maps = list[Any](), list[np.ndarray]()
        for data, path in zip(weights, where, strict=True):
            model = load_model(data, path, config.train.imgsz)
            self.maps.append(class_map(dict(enumerate(class_names(model))), names, path))
            self.models.append(family_of(model).ready(model, device, self.dtype, torch.channels_last))
        self.batch = config.pseudo.label_batch or auto_batch(device, config.train.imgsz)

    @property
    def views(self) -> int:
        """Forms of an image times teachers."""
        return len(self.flips) * len(self.models)

    def __call__(self, row: Shard) -> Shard:
        """
        Returns:
            the row without its images; found: (N,8), see `pseudo.shards`; views; teacher: digest of the weights.

        Raises:
            DfssdError: a GPU failed, or its memory does not hold the batch; names the images.
        """
        parts, done, total = [], 0, len(row["ids"])
        while done < total:
            count = max(1, self.batch // len(self.flips))  # mirrored forms are part of the batch
            part = slice(done, done + count)
            try:
                found = self.find(row["images"][part])
            except RuntimeError as error:  # all that CUDA, cuDNN and cuBLAS raise
                self._mend(error, [str(i) for i in row["ids"][part]])
                continue
            found[:, IMAGE] += done
            parts.append(found)
            done += count
        rest = {k: v for k, v in row.items() if k != "images"}
        return {**rest, "found": np.concatenate(parts), "views": self.views, "teacher": self.digest}

    def _mend(self, error: RuntimeError, ids: list[str]) -> None:
        """Halve an automatic batch that memory does not hold.

        Raises:
            DfssdError: it cannot be halved, or the GPU failed in another way.
            RuntimeError: it was no GPU.
        """
        said = str(error)
        where = "images " + ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")
        memory = isinstance(error, torch.cuda.OutOfMemoryError) or any(word in said.lower() for word in MEMORY)
        if memory and self.batch > 1 and not self.config.pseudo.label_batch:
            self.batch //= 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return
        if memory:
            raise DfssdError(
                f"{len(ids) * len(self.flips)} images do not fit into the GPU's memory",
                where=where,
                todo="lower --label-batch or --imgsz",
            ) from error
        if self.device.type == "cuda":
            raise DfssdError(
                f"the GPU failed while labelling: {said.splitlines()[0]}",
                where=where,
                todo="run the same command again, which goes on from here; if the same images fail again, look at them",
            ) from error
        raise RuntimeError(f"{said} (while labelling {where})") from error

    @torch.no_grad()
    def find(self, images_bhwc: np.ndarray) -> np.ndarray:
        """(N,8) boxes that the networks find in b images: see `pseudo.shards`. All forms of all images are one batch."""
        b, settings = len(images_bhwc), self.config.pseudo
        images = self._input(images_bhwc)
        forms = torch.cat([images.flip(_axes(flip)) if any(flip) else images for flip in self.flips])
        found: list[Tensor] = []
        for model in self.models:
            for few in forms.split(max(self.batch, 1)):
                found += predict(model, few, settings.floor, settings.nms_iou, settings.max_candidates)
        counts = np.array([len(f) for f in found])
        boxes = torch.cat(found).float().cpu().numpy()  # the one wait for the device
        place = np.repeat(np.arange(len(found)), counts)  # (teacher, form, image), image fastest
        teacher = place // (b * len(self.flips))
        classes = np.concatenate(
            [self.maps[t][boxes[teacher == t, DET_CLS].astype(int)] for t in range(len(self.models))]
        )
        columns = [place % b, place // b, boxes[:, XYXY], boxes[:, DET_SCORE], classes]
        result = np.column_stack(columns).astype(np.float32)
        return np.asarray(result[classes >= 0])

    def _input(self, images_bhwc: np.ndarray) -> Tensor:
        """(B,3,H,W) 0..1 in the networks' type, channels last as the images lie in memory."""
        pixels = torch.from_numpy(images_bhwc if images_bhwc.flags.writeable else images_bhwc.copy())
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return pixels.permute(0, 3, 1, 2).to(self.dtype).div_(255)


def _axes(flip: tuple[bool, bool]) -> list[int]:
    return [axis for axis, on in zip((3, 2), flip, strict=True) if on]


def load_teachers(
    config: Config, run: Storage, weights: Sequence[str], names: Sequence[str], device: torch.device
) -> Teachers:
    """The teachers whose files lie in the run."""
    return Teachers(config, [run.read(w) for w in weights], [run.path(w) for w in weights], names, device)


def check_teachers(run: Storage, weights: Sequence[str], names: Sequence[str]) -> None:
    """Look at the teachers before actors are started.

    Raises:
        DfssdError: a file holds no detector, or one that does not know the classes.
    """
    for name in weights:
        where = run.path(name)
        class_map(dict(enumerate(class_names(load_model(run.read(name), where)))), names, where)


class TeacherActor:
    """The teachers in an actor of Ray Data.

    A user error of the constructor is raised by the first call: Ray would take it for a broken node, and start the actor
    again and again.

    Args:
        run_uri: storage of the run.
        weights: files of the teachers, relative to the run.
        names: class names of the data.
        threads: torch threads.
        gpu: has the actor reserved a GPU, or a part of one? Ray shows it that one only, as cuda:0.
    """

    def __init__(
        self, run_uri: str, config: Config, weights: Sequence[str], names: Sequence[str], threads: int, gpu: bool
    ) -> None:
        torch.set_num_threads(threads)
        self.failed: DfssdError | None = None
        try:
            device = _device(gpu)
            self.teachers = load_teachers(config, Storage(run_uri), weights, names, device)
        except DfssdError as error:
            self.failed = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.failed is not None:
            raise self.failed
        return self.teachers(row)


def _device(gpu: bool) -> torch.device:
    """
    Raises:
        DfssdError: a GPU was reserved that PyTorch does not see.
    """
    if gpu and not torch.cuda.is_available():
        raise DfssdError(
            "a labelling actor was given a GPU that PyTorch does not see",
            todo="check driver and CUDA version of the node (nvidia-smi, python -m torch.utils.collect_env), "
            "or label with --gpu never",
        )
    return torch.device("cuda" if gpu else "cpu")
