"""A job that does as a pipeline does, at many steps a second: it prints, stores checkpoints, and goes on from them.

python made_up_job.py STEPS
"""

from __future__ import annotations

import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from places import EVERY, STAGES, TRAININGS

PLACE = os.environ["AWS_ENDPOINT_URL"] + "/dfssd/runs/c/"


def ask(path: str, data: bytes | None = None) -> bytes | None:
    """Write, or read; None where nothing is there. Ends the job where its storage fails for more than a second."""
    request = urllib.request.Request(PLACE + path, data=data, method="GET" if data is None else "PUT")
    begun = time.monotonic()
    while time.monotonic() - begun < 1.0:
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
        except OSError:
            pass
        time.sleep(0.05)
    print("\nerror: the storage does not answer", flush=True)
    sys.exit(2)


def train(stage: str, steps: int) -> None:
    step = int(ask(f"{stage}/newest") or 0)
    if step:
        print(f"{stage}: resumed at step {step} of {steps}", flush=True)
    while step < steps:
        step += 1
        print(f"{stage}: step {step}/{steps} ({100 * step // steps} %)", flush=True)
        if step % EVERY == 0:
            ask(f"{stage}/train/step_{step:07d}/state.pt", b"x")
            ask(f"{stage}/newest", str(step).encode())


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    for stage in STAGES:
        if ask(f"{stage}/stage.json") is None:
            print(f"{stage}: starts", flush=True)
            if stage in TRAININGS:
                train(stage, int(int(sys.argv[1]) * TRAININGS[stage]))
            ask(f"{stage}/stage.json", b"{}")
        print(f"{stage}: finished ", flush=True)


if __name__ == "__main__":
    main()
