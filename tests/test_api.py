"""What `import dfssd` gives a notebook, and that the package works outside a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dfssd

ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_nothing_slow():
    code = (
        "import dfssd, sys; print(sorted({'torch','ray','numpy','pyarrow','pydantic'} & set(sys.modules)), dir(dfssd))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("[] ") and "open_run" in said


def test_settings_by_the_names_of_flags(tmp_path):
    config = dfssd.settings(imgsz=96, label_fraction=0.2, rounds=2, taps="4,15")
    assert (config.train.imgsz, config.data.label_fraction, config.rounds) == (96, 0.2, 2)
    assert config.distill.taps == (4, 15)
    (tmp_path / "a.yaml").write_text("train: {lr: 0.5, steps: 7}")
    config = dfssd.settings(tmp_path / "a.yaml", steps=8)
    assert (config.train.lr, config.train.steps) == (0.5, 8)
    with pytest.raises(dfssd.DfssdError, match="did you mean 'imgsz'"):
        dfssd.settings(imgzs=96)
    with pytest.raises(dfssd.DfssdError, match="--imgsz 100: must be a multiple of 32"):
        dfssd.settings(imgsz=100)
    with pytest.raises(AttributeError):
        dfssd.nothing  # noqa: B018


def test_a_run_is_made_and_read(strip, tmp_path, capsys):
    config = dfssd.settings(data=str(strip), label_fraction=0.4, storage_path=str(tmp_path), run_name="n")
    with pytest.raises(dfssd.DfssdError, match="did you mean 'dataset'"):
        dfssd.run(config, ["datasets"])
    with pytest.raises(dfssd.DfssdError, match="did you mean 'dataset'"):
        dfssd.run(config, "datasets")  # one name is no list of letters
    with pytest.raises(dfssd.DfssdError, match="no stage of this run is finished"):
        dfssd.open_run(str(tmp_path), "n")
    run = dfssd.run(config, ["dataset"])
    assert set(run.stages) == {"dataset"} and run.stages["dataset"]["summary"]["images"] == 60
    assert dfssd.open_run(str(tmp_path), "n") == run or dfssd.open_run(str(tmp_path), "n").stages == run.stages
    for ask in (lambda: run.metrics, lambda: run.model(), lambda: run.history("teacher")):
        with pytest.raises(dfssd.DfssdError, match="finished stages: dataset"):
            ask()


def test_a_run_s_model_is_an_ultralytics_model(tmp_path):
    from dfssd.models.yolo.detector import build_detector, detector_bytes

    run = dfssd.api.FinishedRun(dfssd.api.Storage(str(tmp_path)))
    run.store.write("student/best.pt", detector_bytes(build_detector("yolov8n.yaml", ["pit", "dent"], 64), {}))
    assert run.model().names == {0: "pit", 1: "dent"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_works_outside_a_checkout(tmp_path):
    """Built from what git knows, installed alone, and used from an empty folder."""
    copy = tmp_path / "source"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        place = copy / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)], check=True)
    wheel = next(tmp_path.glob("dfssd-*.whl"))
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {n for n in names if n.startswith("dfssd/")} | {
        f"dfssd/{n}" for n in names if n.startswith("tune_spaces/")
    }
    assert wanted <= inside and "dfssd/py.typed" in inside and not {n for n in inside if n.startswith("tests/")}
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    (tmp_path / "empty").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def command(*words):
        script = [sys.executable, str(tmp_path / "site" / "bin" / "dfssd"), *words]
        return subprocess.run(script, cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=300)

    assert command("--version").stdout == f"dfssd {dfssd.__version__}\n"
    where = [sys.executable, "-c", "import dfssd.jobs.sweep, dfssd.sweep.space as s; print(s.find_space('divergence'))"]
    found = subprocess.run(where, cwd=tmp_path / "empty", env=env, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(tmp_path / "site" / "dfssd" / "tune_spaces" / "divergence.py")
    assert command("prepare", "--storage-path", "runs").returncode == 2
    assert "no space nothing" in command("sweep", "nothing", "--storage-path", "runs").stderr
