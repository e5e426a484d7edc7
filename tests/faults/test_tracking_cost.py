"""What tracking costs a training: nothing that can be seen, whatever the server does."""

import contextlib
import http.server
import shutil
import socket
import statistics
import threading
import time

import pytest
from small import make_job, tiny_config

from dfssd.runtime.storage import Storage
from dfssd.train.in_process import train_in_process

ROUNDS = 5


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers 500, after some time."""

    slow_s = 0.0

    def _answer(self):
        time.sleep(self.slow_s)
        with contextlib.suppress(OSError):
            self.send_response(500)
            self.end_headers()

    do_GET = do_POST = _answer

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def servers():
    """By kind, the URI of a server that is none, refuses, fails at once, fails after 5 s, never answers."""
    made = []
    for slow_s in (0.0, 5.0):
        handler = type("Handler", (_Handler,), {"slow_s": slow_s})
        made.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=made[-1].serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0), backlog=50) as hanging:
        names = {"none": "", "refuses": "http://127.0.0.1:1"}
        names |= {k: f"http://127.0.0.1:{s.server_port}" for k, s in zip(("fails", "slow"), made, strict=True)}
        yield names | {"hangs": f"http://127.0.0.1:{hanging.getsockname()[1]}"}
    for server in made:
        server.shutdown()


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_training_takes_no_longer_whatever_the_server_does(prepared, tmp_path_factory, monkeypatch):
    """Steps of the loop, interleaved, by the wall; the close at the end, which is a few seconds at most, apart."""
    from dataclasses import replace

    from dfssd.runtime import tracker

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    closing: dict[str, list[float]] = {}
    looping: dict[str, list[float]] = {}
    real = tracker.Tracker.close
    kind = ""

    def close(self, *args):
        begun = time.perf_counter()
        real(self, *args)
        closing.setdefault(kind, []).append(time.perf_counter() - begun)

    monkeypatch.setattr(tracker.Tracker, "close", close)
    with servers() as uris:
        for number in range(ROUNDS + 1):
            for kind, uri in uris.items():
                folder = tmp_path_factory.mktemp("run")
                shutil.copytree(prepared / "r", folder / "r")
                job = make_job("label_only", str(folder / "r"), tiny_config(folder, steps=40, val_every=20))
                job = replace(job, tracking_uri=uri, mlflow_run_id="0" * 32 if uri else "")
                begun = time.perf_counter()
                train_in_process(job)
                took = time.perf_counter() - begun - closing[kind][-1]
                if number:  # the first round imports
                    looping.setdefault(kind, []).append(took)
                Storage(str(folder)).delete("r")
    none = looping.pop("none")
    ratios = {k: statistics.median(a / b for a, b in zip(v, none, strict=True)) for k, v in looping.items()}
    ends = {k: max(v) for k, v in closing.items()}
    print(f"\nratio to no server, median of {ROUNDS}: {ratios}\nat the end at most (s): {ends}")
    assert all(ratio < 1.05 for ratio in ratios.values()), ratios
    assert all(end < tracker.CLOSE_S + 1 for end in ends.values()), ends
