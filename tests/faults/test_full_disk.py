"""No room at every kind of write: each of a pipeline fails once, and a real filesystem that is too small grows bit by bit."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import faulty
import numpy as np
import pytest
import torch
from in_process import STAGES, run_pipeline, without_ray
from small import tiny_config

from dfssd.config import Config, Data, Evaluate
from dfssd.data.manifest import read_pseudo
from dfssd.errors import StorageError
from dfssd.models.yolo.detector import read_detector
from dfssd.pipeline import replay
from dfssd.runtime import outbox, tracker
from dfssd.runtime.storage import Storage, _write_local

ROOT = Path(__file__).parents[2]
FEW = ("dataset", "label_only")


def small_pipeline(strip: Path, storage: Path) -> Config:
    config = tiny_config(storage, steps=4, val_every=2, threshold_policy="fixed", tta="none")
    data, evaluate = Data(data=str(strip), label_fraction=0.4), Evaluate(latency_repeats=3, sample_images=2)
    return config.model_copy(update={"data": data, "evaluate": evaluate})


def equal(first: Storage, second: Storage) -> None:
    """Weights, pseudo-labels and measured numbers of two runs."""
    for model in ("teacher", "label_only", "student"):
        if not first.exists(f"{model}/stage.json"):
            continue
        for name in ("best.pt", "last.pt"):
            a, b = (read_detector(r.read(f"{model}/{name}"), name).state_dict() for r in (first, second))
            assert all(torch.equal(a[k], b[k]) for k in a), f"{model}/{name}"
        steps = [
            [h["step"] for h in r.read_json(f"{model}/history.json") if "loss/total" in h] for r in (first, second)
        ]
        assert steps[0] == steps[1] == [1, 2, 3, 4]
    digests = [r.read_json("dataset/stage.json")["digest"] for r in (first, second)]
    assert digests[0] == digests[1]
    if first.exists("pseudo/stage.json"):  # files name the teacher by a digest that holds when it was written
        a, b = (read_pseudo(r.at("pseudo")) for r in (first, second))
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "stages",
    [pytest.param(FEW, id="two stages"), pytest.param(STAGES, marks=pytest.mark.faults, id="all")],
)
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whichever_write_of_a_pipeline_fails_it_ends_in_a_sentence_and_goes_on(strip, tmp_path, monkeypatch, stages):
    """The n-th write fails, for all n: each in an attempt of its own, which the next attempt goes on from."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setattr(outbox, "ANSWER_S", 0.01)
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    met: list[str] = []
    attempts = 0

    def rule(name, path):
        place = re.sub(r"[0-9a-f]{32}", "*", path.removeprefix(str(tmp_path / "broken")))
        if name != "write" or place in met or "/leases/" in place:
            return None
        met.append(place)
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with monkeypatch.context() as patch:
        without_ray(patch)
        run_pipeline(small_pipeline(strip, tmp_path / "whole"), stages)
        faulty.install(patch, rule)
        while attempts < 300:
            attempts, before = attempts + 1, len(met)
            try:
                run_pipeline(small_pipeline(strip, tmp_path / "broken"), stages)
                break
            except StorageError as error:
                assert "full" in str(error) and "the same command goes on" in str(error), str(error)
                assert len(met) > before, "an attempt that met no new write must not fail"
            assert not list((tmp_path / "broken").rglob("*.part"))
    kinds = {place.rpartition("/")[2] for place in met}
    print(f"{len(met)} writes, {attempts} attempts: {sorted(kinds)}")
    assert {
        "manifest.parquet",
        "started.json",
        "state.pt",
        "MANIFEST.json",
        "best.pt",
        "last.pt",
        "stage.json",
    } <= kinds
    assert len(met) >= 8 * len(stages)
    equal(Storage(str(tmp_path / "whole" / "r")), Storage(str(tmp_path / "broken" / "r")))


def test_half_a_file_takes_no_room_on_a_full_disk(tmp_path, monkeypatch):
    """The disk is full in the middle of a file, not before it."""
    real = os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        _write_local(str(tmp_path / "a" / "x"), b"new")
    assert not list(tmp_path.rglob("x*"))
    monkeypatch.setattr(os, "fsync", real)
    _write_local(str(tmp_path / "a" / "x"), b"new")
    assert (tmp_path / "a" / "x").read_bytes() == b"new"


GROWING = """
import json, os, subprocess, sys, time
from pathlib import Path
root, strip, place = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
sys.path.insert(0, sys.argv[4])
import conftest, pytest
from in_process import run_pipeline, without_ray
from test_full_disk import small_pipeline
from dfssd.errors import DfssdError, StorageError
import torch
torch.set_num_threads(1)
patch = pytest.MonkeyPatch()
without_ray(patch)

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(place)], check=True)

said, megabytes = [], 0.06
mount("size=60k")
while True:
    try:
        run_pipeline(small_pipeline(strip, place))
        break
    except StorageError as error:
        said.append([megabytes, str(error)])
        assert not list(place.rglob("*.part"))
        megabytes = round(megabytes * 1.7, 2) if megabytes < 20 else megabytes + 25
        assert megabytes < 900
        mount("remount", f"size={int(megabytes * 1000)}k")
view = root / "view"  # the same disk, not to be written
view.mkdir()
subprocess.run(["mount", "--bind", str(place), str(view)], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
read_only = ""
try:
    run_pipeline(small_pipeline(strip, view))
except StorageError as error:
    read_only = str(error)
os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{view}/mlflow.db"
(root / "elsewhere").mkdir()
begun = time.monotonic()
run_pipeline(small_pipeline(strip, root / "elsewhere"), ("dataset", "label_only"))
took_s = time.monotonic() - begun
subprocess.run(["cp", "-r", str(place / "r"), str(place / "mlflow.db"), str(root)], check=True)
(root / "said.json").write_text(json.dumps({"said": said, "read_only": read_only, "took_s": took_s}))
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode,
    reason="needs mount namespaces",
)
def test_a_filesystem_that_is_too_small_and_one_that_is_read_only(strip, tmp_path, monkeypatch):
    """With MLflow's sqlite file on the same disk."""
    from mlflow import MlflowClient

    kept, place = tmp_path / "kept", tmp_path / "place"
    kept.mkdir()
    place.mkdir()
    command = [sys.executable, "-c", GROWING, str(kept), str(strip), str(place), str(Path(__file__).parents[1])]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *command],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/faults:{ROOT}/tests"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = json.loads((kept / "said.json").read_text())
    for megabytes, text in said["said"]:
        assert "full" in text and ("to do" in text), (megabytes, text)
    assert len(said["said"]) > 8
    assert "not writable" in said["read_only"] and "another --storage-path" in said["read_only"]
    assert (kept / "elsewhere" / "r" / "label_only" / "stage.json").exists() and said["took_s"] < 60
    (tmp_path / "whole").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with monkeypatch.context() as patch:
        without_ray(patch)
        run_pipeline(small_pipeline(strip, tmp_path / "whole"))
    equal(Storage(str(tmp_path / "whole" / "r")), Storage(str(kept / "r")))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    replay.replay(str(kept), "r", "dfssd")
    client = MlflowClient(f"sqlite:///{kept}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("dfssd").experiment_id])
    assert len(runs) == len(STAGES) + 1
    for model in ("teacher", "label_only", "student"):
        (own,) = (r for r in runs if r.data.tags.get("stage") == model)
        steps = [row.step for row in client.get_metric_history(own.info.run_id, "loss/total")]
        assert sorted(steps) == [1, 2, 3, 4] and tracker.BATCH
