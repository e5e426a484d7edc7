"""Environment that Ray and the workers see.

Ray reads part of it when it is imported: `dfssd/__init__.py` sets it, before any module of the package can import Ray.
"""

from __future__ import annotations

import os
import sys

# Read by Ray when it is imported or started; what the user has set stays.
DRIVER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # report() waits for this poll; Ray's default is 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line twice
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` every worker would run uv again
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",  # lines of progress look alike, and every one counts
    "RAY_COLOR_PREFIX": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that cannot work ends without one
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune's boxes; a sweep has its own line for each trial
}
LOCAL_ENV = {  # of a Ray that a job starts for itself
    # It lives on loopback. The name is history: on Windows and macOS Ray does so unless this is 1, and on Linux, where it is
    # 1 unless said otherwise, GCS, raylet, workers and metrics would listen on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a training, on a machine that nobody takes away
}
WORKER_ENV = {
    "OMP_WAIT_POLICY": "passive",  # spinning threads on a busy core make a step many times slower
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
}


def set_driver_environment() -> None:
    """Set what the user has not set."""
    own = dict(DRIVER_ENV)
    if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:  # in a worker Ray is there before us
        own |= LOCAL_ENV
    for key, value in own.items():
        os.environ.setdefault(key, value)
