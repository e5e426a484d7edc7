"""Memory of the labelling job does not grow with the number of images. Minutes long: `make test-slow`."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dfssd.config import Data
from dfssd.data.manifest import read_manifest
from dfssd.data.preparation.prepare import prepare
from dfssd.data.synthetic import make_dataset
from dfssd.models.yolo.detector import build_detector, detector_bytes
from dfssd.runtime.storage import Storage

ROOT = Path(__file__).parents[1]


def _resident(pid):
    """Memory of a process and all its children (bytes); pages they share, such as the object store, count once."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += int(rollup.split("\nPss:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            continue  # it ended while we looked
    return total


def _peak_gib(storage, images):
    strip = storage / "strip"
    make_dataset(strip, images=images, side=160, seed=1)
    run = Storage(str(storage)).at("r")
    summary = prepare(Data(data=str(strip), label_fraction=0.001, split_shares=(0.9, 0.05, 0.05)), 0, run.at("dataset"))
    torch.manual_seed(0)
    model = build_detector("yolov8n.yaml", read_manifest(run.at("dataset")).names, 160)
    run.write("teacher/best.pt", detector_bytes(model, {}))
    for stage in ("dataset", "teacher"):
        run.write_json(f"{stage}/stage.json", {"digest": stage, "summary": summary, "config": {}, "inputs": {}})
    flags = "--imgsz 160 --gpu never --run-name r --num-actors 1 --tta none"
    command = [sys.executable, str(ROOT / "jobs" / "pseudo_label.py"), "--storage-path", str(storage), *flags.split()]
    log, peak = (storage / "log").open("w"), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        time.sleep(0.2)
    assert process.returncode == 0, (storage / "log").read_text()[-3000:]
    return peak / 2**30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_at_5000_images_is_that_at_500(tmp_path):
    small, large = (_peak_gib(tmp_path / str(n), n) for n in (500, 5000))
    print(f"peak memory: {small:.2f} GiB at 500 images, {large:.2f} GiB at 5000")
    assert large < 1.1 * small
