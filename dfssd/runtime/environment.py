"""Environment that Ray and the workers see; apart from what imports Ray, which reads some of it when it is imported."""

from __future__ import annotations

import os

# Read by Ray when it is imported or started, so they are set before ray.init; what the user has set stays.
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
WORKER_ENV = {
    "OMP_WAIT_POLICY": "passive",  # spinning threads on a busy core make a step many times slower
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
}


def set_driver_environment() -> None:
    """Set what the user has not set."""
    for key, value in DRIVER_ENV.items():
        os.environ.setdefault(key, value)
