"""A loading process that the kernel kills for want of memory."""

import shutil
import threading
import time

import psutil
import pytest
import torch
from small import make_job, tiny_config

from dfssd.data.loaders import LoaderLost
from dfssd.models.yolo.detector import read_detector
from dfssd.train.in_process import train_in_process


def _loaders() -> list[psutil.Process]:
    """Processes that were forked from the server which Python has started for them."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return [child for server in servers for child in server.children()]


def test_a_killed_loader_is_named_and_the_run_goes_on_from_its_checkpoint(prepared, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(prepared / "r", other / "r")
    whole = make_job("label_only", str(other / "r"), tiny_config(other, steps=12))
    train_in_process(whole)
    job = make_job("label_only", str(prepared / "r"), tiny_config(prepared, steps=12, loader_workers=1))
    killed: list[float] = []

    def kill():
        while not list((prepared / "r" / "label_only" / "train").glob("*/MANIFEST.json")):
            time.sleep(0.01)
        for process in _loaders():
            process.kill()
            killed.append(time.monotonic())

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(LoaderLost, match=r"ended from outside .*--loader-workers"):
        train_in_process(job)
    assert killed and time.monotonic() - killed[0] < 30
    assert not job.store.exists("best.pt")
    train_in_process(job)
    a, b = (read_detector(j.store.read("last.pt"), "x").state_dict() for j in (whole, job))
    assert all(torch.equal(a[k], b[k]) for k in a)
