"""How busy the machine of a run is: processor, memory, disk, network and GPUs, as MLflow's own monitor measures them.

MLflow's monitor also sends what it measures, and its end waits for the server. Here its measuring parts fill averages, and
the numbers take the way of all others (`tracker.Tracker`), so that a server that hangs stops nothing.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

EVERY_S = 5.0  # between two samples


class SystemMetrics:
    """Samples the machine in a thread until it is closed."""

    def __init__(self) -> None:
        self._monitors = list[Any]()
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._work, daemon=True, name="system-metrics").start()

    def read(self) -> dict[str, float]:
        """Means over the samples since the last call, by the names that MLflow's page of system metrics shows; {} without."""
        with self._lock:
            found = {
                f"system/{k}": float(v) for m in self._monitors if m.metrics for k, v in m.aggregate_metrics().items()
            }
            for monitor in self._monitors:
                monitor.clear_metrics()
        return found

    def close(self) -> None:
        """End the thread with its next sample."""
        self._ended.set()

    def _work(self) -> None:
        monitors = _monitors()
        for monitor in monitors:  # shares of a processor are those since the call before
            monitor.collect_metrics()
            monitor.clear_metrics()
        with self._lock:
            self._monitors = monitors
        while not self._ended.wait(EVERY_S):
            with self._lock:
                for monitor in self._monitors:
                    monitor.collect_metrics()


def _monitors() -> list[Any]:
    """MLflow's monitors; that of NVIDIA's GPUs where there are some and nvidia-ml-py is installed."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # there is none
        found.append(GPUMonitor())
    return found
