"""benchmarks/gpu.py must run on a lent machine that has little installed, and leave what it has when it is cut."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
ABSENT = ("ray", "mlflow", "tyro", "optuna", "rich", "scipy", "boto3", "dfssd.cli")
RUN = """import runpy, sys
sys.modules |= dict.fromkeys({absent!r})
sys.path.insert(0, {folder!r})
sys.argv = ["gpu.py", "--device", "cpu", "--quick", *{more!r}]
runpy.run_path({folder!r} + "/{script}.py", run_name="__main__")
"""


def _run(out, *more, script="gpu"):
    code = RUN.format(absent=ABSENT, folder=str(FOLDER), more=["--out", str(out), *more], script=script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=out, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / f"{script}.json").read_text()), (out / "gpu.md").read_text() if script == "gpu" else ""


def test_it_runs_with_nothing_but_what_it_says(tmp_path):
    found, table = _run(tmp_path, "--minutes", "60")  # on a slow machine, too
    assert list(found["sections"]) == ["end to end", "step", "labelling", "validation", "64 px, 2+2, fp32"]
    assert not found["skipped"] and set(found["headline"]) == {
        "training (img/s)", "data wait (share)", "labelling (img/s)", "labelling with flips (img/s)",
        "step over distill_model",
    }  # fmt: skip
    step = found["sections"]["step"]
    assert step["distill_model fp32 (ms)"] > 0 and {"teacher", "criterion", "backward"} <= set(step["parts (ms)"])
    assert found["sections"]["labelling"]["labelling: boxes a view"] > 1
    assert "| training (img/s) |" in table and "## validation" in table


@pytest.mark.slow
def test_without_time_it_says_what_it_left_out(tmp_path):
    found, table = _run(tmp_path, "--minutes", "0")
    assert not found["sections"] and "validation" in found["skipped"] and "Not run: step (" in table


@pytest.mark.slow
def test_a_whole_run_leaves_its_history_and_numbers(tmp_path):
    found, _ = _run(tmp_path, script="gpu_run")
    for stage in ("teacher", "student"):
        assert found[stage]["result"]["steps"] == 4 and found[stage]["history"][-1]["val/map50"] >= 0
    assert found["pseudo"]["summary"]["images"] == 10
