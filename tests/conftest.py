"""Shared fixtures. The environment is set before Ray, torch or Ultralytics are imported anywhere."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PLACE = tempfile.gettempdir()  # Ray's socket paths are limited to some 107 characters, of which it needs 89 itself
_SCRATCH = Path(tempfile.mkdtemp(prefix="dfssd-t-", dir=_PLACE if len(_PLACE) <= 16 else "/tmp"))
os.environ |= {
    "RAY_TMPDIR": str(_SCRATCH / "r"),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_TOKEN_PATH": str(_SCRATCH / "token"),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # A machine that is busy, or filled by others: Ray's processes get time to start, and none is killed for want of memory.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_local_fs_capacity_threshold": "0.999",
    "YOLO_CONFIG_DIR": str(_SCRATCH / "yolo"),
    "YOLO_OFFLINE": "true",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # where there are two, one that waits leaves its core to others
    "MPLCONFIGDIR": str(_SCRATCH / "mpl"),
}
for _name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_AUTH_MODE"):
    os.environ.pop(_name, None)
(_SCRATCH / "r").mkdir()
(_SCRATCH / "token").write_text(secrets.token_hex(32))

import numpy as np
import pytest
import torch

from dfssd.config import Data
from dfssd.data.preparation.prepare import prepare
from dfssd.data.synthetic import make_dataset
from dfssd.runtime.storage import Storage

CR7 = Path(__file__).parents[2] / "shared" / "data" / "cr7-det"


def pytest_sessionfinish() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_ray_in_the_background() -> Iterator[None]:
    """A test that runs stages in this process must not leave a Ray behind that starts beside all tests after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfssd.pipeline.run._start_ray_early", lambda *args: None)
        yield


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    """A command that runs in this process leaves its handler of SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if signal.getsignal(signal.SIGTERM) != before:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def strip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 synthetic images of 64 px in the Ultralytics layout."""
    out = tmp_path_factory.mktemp("strip")
    make_dataset(out, images=60, side=64, seed=3)
    return out


@pytest.fixture(scope="session")
def cr7() -> Path:
    if not CR7.exists():
        pytest.skip("CR7-DET is not here")
    return CR7


@pytest.fixture
def prepared(strip: Path, tmp_path: Path) -> Path:
    """A storage path with run 'r' whose data set is prepared."""
    prepare(Data(data=str(strip), label_fraction=0.4), 0, Storage(str(tmp_path)).at("r", "dataset"))
    return tmp_path


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One local Ray for a module: 2 logical CPUs, whatever the machine has."""
    import ray

    settings = {"num_cpus": 2, "object_store_memory": 150 * 2**20, "log_to_driver": False}
    settings |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
    try:
        ray.init(address="local", **settings)
    except Exception as error:  # another program took a port that was just free, or the machine is slow: as jobs do
        print(f"Ray did not start, once more: {error}")
        ray.shutdown()
        ray.init(address="local", **settings)
    yield
    ray.shutdown()
    os.environ.pop("RAY_AUTH_MODE", None)  # ray.init of a local cluster sets it for the whole process
