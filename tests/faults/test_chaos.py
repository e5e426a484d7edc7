"""Faults at moments drawn from a seed, over one pipeline on S3 and an MLflow server: see benchmarks/reliability.py.

CHAOS_FAULTS (30), CHAOS_SEED (0) and CHAOS_STEPS (80, of each training) choose what is done.
"""

import http.server
import os
import random
import socket
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import broken_run
import places
import reliability
from breakable import Proxy


def _asked(name, default):
    return int(os.environ.get(f"CHAOS_{name}", default))


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(3 * 3600)
def test_a_pipeline_that_is_broken_again_and_again_ends_as_one_that_nobody_touched(tmp_path):
    number, seed, steps = _asked("FAULTS", "30"), _asked("SEED", "0"), _asked("STEPS", "80")
    outcome = reliability.measure(tmp_path, number, seed, steps)
    print(reliability.table(outcome.faults, steps, seed, outcome.took_s, outcome.parts))
    assert len(outcome.faults) == number and outcome.ended


def test_faults_are_spread_over_the_whole_pipeline_and_come_equally_often():
    for seed in range(5):
        chosen = places.places(60, 30, random.Random(seed))
        assert len(chosen) == 30 and chosen == sorted(chosen)
        reached = {places.STAGES[k] for k, _ in chosen}
        assert reached >= set(places.TRAININGS) and len(reached) > len(places.TRAININGS)


def test_no_run_gets_past_a_place_before_its_fault_and_each_gets_further_after_it():
    """All writes of a run in order, and faults at places drawn from seeds, the run being anywhere it may be by then."""
    steps, trainings = 60, {places.STAGES.index(n): int(60 * s) for n, s in places.TRAININGS.items()}
    writes = [
        (k, s)
        for k in range(len(places.STAGES))
        for s in [*range(places.EVERY, trainings.get(k, 0) + 1, places.EVERY), places.END]
    ]
    for seed in range(50):
        rng, reached = random.Random(seed), (0, -1)
        for place in places.places(steps, 30, rng):
            last = places.barrier(place, reached, steps)
            held = next((w for w in writes if w > last), None)
            assert held is None or (held >= place and held > reached), "it gets there, and on from where it is"
            there = max(place, reached) if held is None else rng.choice([max(place, reached), held])
            if there[1] == places.END:  # a stage's record is held: its last step is made
                there = (there[0], trainings.get(there[0], 0))
            assert there >= place, "the fault comes at its place, or after it"
            reached = there


def test_what_writes_say_of_a_run():
    assert places.written("/dfssd/runs/c/teacher/train/step_0000015/state.pt") == (1, 15)
    assert places.written("/dfssd/runs/c/student/stage.json") == (6, places.END)
    assert places.written("/dfssd/runs/c/student/best.pt") is None
    assert places.written("/dfssd/runs/c/leases/teacher.json") is None


def test_a_proxy_holds_a_write_and_drops_it_when_its_sender_dies():
    """Requests as a client sends them, to a server that notes what it gets."""
    got = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = Proxy(server.getsockname()[1])

        def serve():
            while True:
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=lambda one=one: got.append(one.recv(1000)), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        held, gone = set(), threading.Event()
        proxy.holds = lambda path: "held" in path and (held.add(path) or True)
        clients = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(3)]
        for client, name in zip(clients, ("free", "held1", "held2"), strict=True):
            client.sendall(f"PUT /b/{name}?x HTTP/1.1\r\n\r\n".encode())
        _until(lambda: sum(b"free" in g for g in got) == 1 and held == {"/b/held1", "/b/held2"})

        def let_go(path):
            """At the last moment, when the write is let go, the sender of one dies."""
            if "held1" in path:
                clients[1].close()
                time.sleep(0.3)
                gone.set()
            return False

        proxy.holds = let_go
        _until(lambda: any(b"held2" in g for g in got) and gone.is_set())
        time.sleep(0.3)
        assert not any(b"held1" in g for g in got)
        proxy.close()


class _Store(http.server.BaseHTTPRequestHandler):
    """Keeps what is put."""

    kept: ClassVar[dict[str, bytes]] = {}

    def do_GET(self):
        found = self.kept.get(self.path)
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(found or b"")))
        self.end_headers()
        self.wfile.write(found or b"")

    def do_PUT(self):
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_all_faults_come_however_fast_the_job_is_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """A job of some thousand steps a second, which nothing but its storage holds back."""
    whole = broken_run.FAULTS
    monkeypatch.setattr(broken_run, "FAULTS", {k: whole[k] for k in ("driver", "terminate", "storage gone")})
    hold, reached = broken_run._hold, []

    def noted(run, place, steps, breaks=""):
        """Note where the run is when a fault is about to come, before it is let go on from there."""
        if breaks not in ("", "stop"):
            reached.append(places.position(run.text()))
        hold(run, place, steps, breaks)

    monkeypatch.setattr(broken_run, "_hold", noted)
    handler = type("Store", (_Store,), {"kept": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy, faults, number, steps = Proxy(server.server_port), [], 4, 20
    env = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    try:
        command = [sys.executable, str(Path(__file__).parent / "made_up_job.py"), str(steps)]
        parts = 0
        while not broken_run.with_faults(
            broken_run.Run(tmp_path, command, env, proxy), steps, number, 1, faults, until=time.monotonic() + 2
        ):
            parts += 1
    finally:
        proxy.close()
        server.shutdown()
    assert len(faults) == number and parts
    planned = broken_run.plan(steps, number, 1)
    assert [f.kind for f in faults] == [kind for kind, _ in planned]
    for fault, (_, place), there in zip(faults, planned, reached, strict=True):
        late = there[1] - place[1] if there[0] == place[0] else 0
        assert fault.at >= there >= place and late <= 2 * places.EVERY, (fault, place, there)
        assert fault.lost <= places.EVERY, fault
    assert all(f"/dfssd/runs/c/{stage}/stage.json" in handler.kept for stage in places.STAGES)


def test_what_a_fault_cost():
    """It may meet a run that has gone on since it was looked at."""
    said = "typed again\n(RayTrainWorker pid=7) teacher: resumed at step 15 of 60\nteacher: step 16/60 (27 %)\n"
    assert places.lost((1, 18), said) == 3 and places.lost((1, 14), said) == 0
    assert places.lost((0, 0), said) == 0 and places.lost((1, 18), "teacher: starts") == 0
    assert places.lost((1, 58), said.replace("teacher", "mean_teacher")) == 0, "the teacher was finished"


def _until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_how_far_a_log_got():
    log = "dataset: finished in 3 s\n(RayTrainWorker pid=7) teacher: step 4/60 (7 %)  loss\nteacher: step 5  val mAP50 0.1\n"
    assert places.position(log) == (1, 4)
    assert places.position(log + "teacher: finished in 9 s\n") == (2, 0)
    assert (
        reliability.percentile([3.0, 1.0, 2.0], 0.95) == 3.0 and reliability.percentile([1.0] * 19 + [9.0], 0.95) == 1.0
    )
