"""The teacher of a student: its weights, what is tapped, how it stands to the student, and whether it learns itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Config
from dfssd.data.manifest import Manifest
from dfssd.errors import DfssdError
from dfssd.models.families import build_model, class_names, family_of, load_model, pair
from dfssd.models.family import TeacherNetwork
from dfssd.models.pairing import Pairing
from dfssd.models.precision import autocast_dtype
from dfssd.runtime.storage import Storage
from dfssd.train.job import TrainJob

EMA_TAU = 100  # updates over which the decay of a weight average builds up


@dataclass
class Teaching:
    """A teacher at work.

    Args:
        teacher: what teaches: the frozen weights, or the weight average of the online ones.
        pairing: how its predictions stand to the student's.
        online: the network that goes on training, and its weight average; None where the teacher is frozen.
        own: the student's own average, for when it has passed the teacher.
        reached: mAP50-95 on the val split of the run's own frozen teacher; None of any other.
    """

    teacher: TeacherNetwork
    pairing: Pairing
    online: nn.Module | None = None
    ema: ModelEMA | None = None
    reached: float | None = None
    own: TeacherNetwork | None = None


def build_teaching(
    job: TrainJob, run: Storage, student: nn.Module, average: ModelEMA, manifest: Manifest, device: torch.device
) -> Teaching | None:
    """Load and check the teacher; None where no enabled term needs one.

    Args:
        average: the student's own, which takes over once it has passed the teacher.

    Raises:
        DfssdError: it cannot be loaded, or cannot teach this student.
    """
    config = job.config
    if not job.distills or not config.distill.uses_teacher:
        return None
    given = job.store.exists("teacher.pt")  # left there by the stage, from --distill-teacher
    store, name = (job.store, "teacher.pt") if given else (run.at(str(job.teacher)), "best.pt")
    data, where = store.read(name), config.distill.distill_teacher if given else store.path(name)
    layers = config.distill.teacher_taps or config.distill.taps
    layers = layers if config.distill.lambda_f > 0 else ()
    dtype = autocast_dtype(config.distill.teacher_amp, device)
    if config.distill.teacher_mode == "frozen":
        frozen = load_model(data, where, config.train.imgsz)
        teacher, online, ema = family_of(frozen).teacher(frozen, device, layers, dtype=dtype), None, None
    else:
        online, ema = _online(data, where, config, manifest, device)
        teacher = family_of(online).teacher(ema.ema, device, layers, frozen=False, dtype=dtype)
    try:
        pairing = pair(teacher, student, manifest.names, config.distill.prediction)
    except DfssdError as error:
        raise DfssdError(error.what, where=where, todo=error.todo) from error
    known = online is None and not given and store.exists("stage.json")
    reached = store.read_json("stage.json")["summary"]["best"]["map50_95"] if known else None
    own = None
    if reached is not None and config.distill.fade > 0:
        own = family_of(student).teacher(average.ema, device, frozen=False, dtype=dtype)
    return Teaching(teacher, pairing, online, ema, reached, own)


def _online(
    data: bytes, where: str, config: Config, manifest: Manifest, device: torch.device
) -> tuple[nn.Module, ModelEMA]:
    """The teacher as a network that trains, and its weight average."""
    known = class_names(load_model(data, where, config.train.imgsz))
    if known != list(manifest.names):
        raise DfssdError(
            f"an online teacher trains on the labels, but knows other classes: {', '.join(known)}",
            where=where,
            todo="take --teacher-mode frozen, or a teacher of exactly these classes",
        )
    online = build_model(where, manifest.names, config.train.imgsz, data)[0].to(device).train()
    online.to(memory_format=torch.channels_last)
    return online, ModelEMA(online, decay=config.train.ema_decay, tau=EMA_TAU)
