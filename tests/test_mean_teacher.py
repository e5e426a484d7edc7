"""The teacher whose own average labels the unlabelled images inside the loop."""

import pytest
import torch
from small import make_job, tiny_config

from dfssd.data.manifest import read_manifest
from dfssd.models.detector import build_detector, detector_bytes
from dfssd.runtime.storage import Storage
from dfssd.train.worker import train_in_process


def _given(storage, steps=6, **changes):
    run = Storage(str(storage / "r"))
    names = read_manifest(run.at("dataset")).names
    torch.manual_seed(3)
    run.write("mean_teacher/init.pt", detector_bytes(build_detector("yolov8n.yaml", names, 64), {}))
    config = tiny_config(storage, steps=steps, **changes)
    return make_job("mean_teacher", str(storage / "r"), config)


def test_runs(prepared):
    job = _given(prepared)
    print(train_in_process(job))
