"""Ray nodes on this machine, and jobs with default flags on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodes import Place, start_nodes, token_environment

ROOT = Path(__file__).parents[2]
WAIT = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
while sum(n["Alive"] for n in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.5)
"""


@contextmanager
def some_nodes(cpus: tuple[int, ...], gpus: tuple[int, ...]) -> Iterator[Jobs]:
    """Jobs on a cluster of such nodes, once all are there; they see the same files."""
    root = Path(tempfile.mkdtemp(prefix="dfssd-p-"))
    place, env = Place(root), token_environment()
    try:
        jobs = Jobs(root, {**env, "RAY_ADDRESS": start_nodes(place, env, cpus, gpus, isolated=False)})
        wait = [sys.executable, "-c", WAIT, jobs.env["RAY_ADDRESS"], str(len(cpus))]
        subprocess.run(wait, env=jobs.env, timeout=120, check=True)
        yield jobs
    finally:
        place.stop()
        shutil.rmtree(root, ignore_errors=True)


class Jobs:
    """Runs jobs/NAME.py on the cluster, in a folder that all nodes see."""

    def __init__(self, root: Path, env: dict[str, str]) -> None:
        self.root, self.env = root, {**env, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.env["YOLO_CONFIG_DIR"] = os.environ["YOLO_CONFIG_DIR"]

    def run(self, name: str, *flags: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--storage-path", str(self.root / "runs"), *flags]
        return subprocess.run(command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=timeout)
