"""A pipeline that is broken at places drawn from a seed, and typed again until it ends: the faults, and what they cost.

Each fault waits for the run to reach its place, and the run waits for the fault: its storage holds the first checkpoint
there until the fault has come, so that all of them come, however fast the machine is.

`reliability.py` compares what it leaves with an undisturbed run, and writes the table.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from breakable import Proxy, Server
from places import EVERY, STAGES, TRAININGS, Position, barrier, lost, places, position, written

ROOT = Path(__file__).parents[1]
WORKERS = ("RayTrainWorker", "MapWorker", "ray::measure", "ray::Map")
LIMIT_S = 600.0  # until a run must be further after a fault
MARK = "\n=== typed again ===\n"


@dataclass
class Fault:
    """One fault (a key of FAULTS), where the run was, seconds until it was further, steps made again, exit code."""

    kind: str
    at: Position
    recovery_s: float = 0.0
    lost: int = 0
    code: int | None = None
    note: str = ""


@dataclass
class Run:
    """One pipeline whose command is typed again until it ends well; its log goes on over all attempts."""

    folder: Path
    command: list[str]
    env: dict[str, str]
    proxy: Proxy | None = None
    tracking: Server | None = None
    attempts: int = 0
    begun: int = 0  # where in the log the present attempt begins (bytes)
    problems: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def text(self, since: int = 0) -> str:
        return self.log.read_bytes()[since:].decode(errors="replace") if self.log.exists() else ""

    def start(self) -> None:
        self.attempts += 1
        self.begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def ended(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def wait(self, limit_s: float) -> int:
        assert self.process is not None
        return self.process.wait(timeout=limit_s)

    def stop(self) -> None:
        """End what is left of it."""
        if self.process is not None:
            for one in [*self.family(), self.process]:
                try:
                    one.kill()
                except (psutil.NoSuchProcess, ProcessLookupError):
                    continue
            self.process.wait()


def _kill_one_of(run: Run, words: Sequence[str], rng: random.Random) -> str:
    """SIGKILL a process of the run whose command has one of these words, once there is one."""
    deadline = time.monotonic() + 60
    while run.ended() is None and time.monotonic() < deadline:
        found = []
        for one in run.family():
            try:
                name = " ".join(one.cmdline())
            except psutil.Error:
                continue
            found += [(one, w) for w in words if w in name]
        if found:
            victim, word = rng.choice(found)
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
            return word.removeprefix("ray::")
        time.sleep(0.1)
    return "none was there"


def kill_worker(run: Run, rng: random.Random) -> str:
    return _kill_one_of(run, WORKERS, rng)


def kill_node(run: Run, rng: random.Random) -> str:
    """Ray's own process of the machine, which holds the object store."""
    return _kill_one_of(run, ("/raylet/raylet ",), rng)


def kill_driver(run: Run, rng: random.Random) -> str:
    assert run.process is not None
    run.process.kill()
    return ""


def terminate(run: Run, rng: random.Random) -> str:
    """SIGTERM: the job must end by itself within 30 s and say how to go on."""
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    try:
        code = run.wait(45)
    except subprocess.TimeoutExpired:
        run.stop()
        return "did not end within 45 s of SIGTERM"
    return f"ended after {time.monotonic() - begun:.0f} s with {code}"


def kill_tracking(run: Run, rng: random.Random) -> str:
    """The MLflow server dies, and is started again some seconds later, for which nobody waits."""
    assert run.tracking is not None
    run.tracking.kill()
    seconds = rng.uniform(2, 10)
    threading.Timer(seconds, run.tracking.start, kwargs={"wait_s": 0}).start()
    return f"back after {seconds:.0f} s"


def fail_storage(run: Run, rng: random.Random) -> str:
    """Storage answers 500 for some seconds."""
    assert run.proxy is not None
    run.proxy.mode = "fail"
    seconds = rng.uniform(2, 8)
    time.sleep(seconds)
    run.proxy.mode = "pass"
    return f"{seconds:.0f} s"


def lose_storage(run: Run, rng: random.Random) -> str:
    """Storage is gone until the job has ended by itself, with a sentence."""
    assert run.proxy is not None
    run.proxy.mode = "refuse"
    begun = time.monotonic()
    try:
        code = run.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        run.stop()
        return f"did not end within {LIMIT_S:.0f} s"
    finally:
        run.proxy.mode = "pass"
    return f"ended after {time.monotonic() - begun:.0f} s with {code}"


FAULTS: dict[str, tuple[Callable[[Run, random.Random], str], str]] = {
    "worker": (kill_worker, "a training worker, a labelling actor or a measuring task is killed (SIGKILL)"),
    "driver": (kill_driver, "the driver is killed (SIGKILL)"),
    "node": (kill_node, "Ray's process of the machine, with the object store, is killed (SIGKILL)"),
    "terminate": (terminate, "the driver gets SIGTERM"),
    "tracking": (kill_tracking, "the MLflow server is killed, and is back after 2 to 10 s"),
    "storage fails": (fail_storage, "S3 answers 500 for 2 to 8 s"),
    "storage gone": (lose_storage, "S3 refuses every connection until the job has ended"),
}


def _wait_until(run: Run, reached: Position, rng: random.Random) -> bool:
    """Wait until the run is at a place, and this attempt of it at work; has it ended before?"""
    name = STAGES[reached[0]]
    while run.ended() is None:
        text, works = run.text(), re.search(r"\w: (starts|goes on|step \d)", run.text(run.begun))
        begun = re.search(rf"{name}: (starts|goes on)", text)
        if works and (position(text) > reached or (position(text) == reached and (reached[1] or begun))):
            time.sleep(rng.uniform(0, 1.0 if reached[1] else 3.0))
            return run.ended() is None
        time.sleep(0.25)
    return False


def _again(run: Run, fault: Fault | None) -> None:
    """Type the command again where the job has ended; what it said must be a sentence, unless it was killed."""
    code = run.ended()
    if code is None or code == 0:
        return
    said = run.text().rpartition(MARK)[2]
    if code not in (2, 130, -signal.SIGKILL) or (code > 0 and "Traceback" in said.rpartition("\nerror: ")[2]):
        run.problems.append(f"exit code {code} after {fault}, without a sentence at the end:\n{said[-3000:]}")
        print(f"PROBLEM: exit code {code} after {fault}", flush=True)
    with run.log.open("a") as log:
        log.write(MARK)
    run.start()


def break_it(run: Run, kind: str, rng: random.Random) -> Fault:
    """One fault, and the time until the run is further than it was."""
    fault, offset, begun = Fault(kind, position(run.text())), run.log.stat().st_size, time.monotonic()
    fault.note = FAULTS[kind][0](run, rng)
    while position(run.text()) <= fault.at and time.monotonic() - begun < LIMIT_S:
        if run.ended() is not None:
            if run.ended() == 0:
                break
            fault.code = run.ended()
            _again(run, fault)
        time.sleep(0.25)
    fault.recovery_s = round(time.monotonic() - begun, 1)
    fault.lost = lost(fault.at, run.text(offset))
    if position(run.text()) <= fault.at and run.ended() != 0:
        raise AssertionError(f"no further within {LIMIT_S:.0f} s: {fault}\n{run.text()[-3000:]}")
    print(json.dumps(asdict(fault)), flush=True)
    return fault


def plan(steps: int, number: int, seed: int) -> list[tuple[str, Position]]:
    """All faults: each kind equally often, in a shuffled order, at places spread over the pipeline."""
    rng = random.Random(seed)
    kinds = [kind for _ in range(number // len(FAULTS) + 1) for kind in FAULTS][:number]
    rng.shuffle(kinds)
    return list(zip(kinds, places(steps, number, rng), strict=True))


def _hold(run: Run, place: Position | None, steps: int, breaks: str = "") -> None:
    """Let the run get to the next fault's place (None: its end), and further than it is where a fault now `breaks` it."""
    assert run.proxy is not None
    if place is None:
        run.proxy.holds = lambda path: False
        return
    stage, step = position(run.text())
    if breaks in ("terminate", "stop"):  # it may still store the step it is at, and those on the way
        step += 3 * EVERY
    stays = not breaks or (breaks == "stop" and STAGES[stage] not in TRAININGS)
    last = barrier(place, (0, -1) if stays else (stage, step), steps)
    run.proxy.holds = lambda path: (written(path) or (0, 0)) > last


def with_faults(run: Run, steps: int, number: int, seed: int, faults: list[Fault], until: float = float("inf")) -> bool:
    """Run to the end with so many faults on the way, then once more, so that MLflow gets what it has missed.

    Args:
        faults: those that came before; what comes is added.
        until: by time.monotonic, when to end it in order, to go on later; then False is returned.
    """
    planned = plan(steps, number, seed)
    ends = [*(place for _, place in planned), None]
    _hold(run, ends[len(faults)], steps)
    run.start()
    try:
        while (k := len(faults)) < number:
            kind, place = planned[k]
            while not _wait_until(run, place, random.Random(f"{seed} {k} place")):
                if run.ended() == 0:
                    break
                _again(run, faults[-1] if faults else None)
            if run.ended() == 0:
                break
            _hold(run, ends[k + 1], steps, kind)
            faults.append(break_it(run, kind, random.Random(f"{seed} {k}")))
            if time.monotonic() > until:
                _hold(run, ends[k + 1], steps, "stop")
                print(terminate(run, random.Random()), flush=True)
                return False
        while run.wait(1800) != 0:
            _again(run, faults[-1])
        if run.tracking:
            run.tracking.start()
        run.start()
        assert run.wait(900) == 0, run.text()[-3000:]
        assert not run.problems, "\n".join(run.problems)
    finally:
        run.stop()
    return True
