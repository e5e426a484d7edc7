"""A loading process that the kernel kills for want of memory."""

import shutil
import time
from contextlib import suppress

import psutil
import pytest
import torch
from small import make_job, tiny_config

from dfssd.data.loaders import LoaderLost
from dfssd.models.yolo.detector import read_detector
from dfssd.train.in_process import train_in_process


def _loaders() -> list[psutil.Process]:
    """Processes that were forked from the server which Python has started for them."""
    found = []
    for server in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            found += server.children() if "forkserver" in " ".join(server.cmdline()) else []
    return found


def test_a_killed_loader_is_named_and_the_run_goes_on_from_its_checkpoint(prepared, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(prepared / "r", other / "r")
    whole = make_job("label_only", str(other / "r"), tiny_config(other, steps=12))
    train_in_process(whole)
    job = make_job("label_only", str(prepared / "r"), tiny_config(prepared, steps=12, loader_workers=1))
    killed: list[float] = []

    def kill(session):
        """After the first validation, when the process has made a few of the batches that are still to come."""
        for process in _loaders() if not killed else ():
            process.kill()
            killed.append(time.monotonic())

    with pytest.raises(LoaderLost, match=r"ended from outside .*--loader-workers"):
        train_in_process(job, on_validation=kill)
    assert killed and time.monotonic() - killed[0] < 120, "it is not waited for"
    assert not job.store.exists("best.pt")
    train_in_process(job)
    a, b = (read_detector(j.store.read("last.pt"), "x").state_dict() for j in (whole, job))
    assert all(torch.equal(a[k], b[k]) for k in a)
