"""Every job with default flags on two nodes of two CPUs each: what it asks for fits on one of them."""

import time

import pytest
from placed import some_nodes
from small import SWEEP_BASE

from dfssd.data.synthetic import make_dataset

SIZE = ["--imgsz", "64"]
STUDENT = ["--batch", "4", "--amp", "fp32", "--steps", "6", "--val-every", "3", "--log-every", "1"]
TEACHER = ["--teacher-steps", "6", "--teacher", "yolov8n.yaml"]
MEASURING = ["--latency-repeats", "3", "--sample-images", "2"]
ALL = [*SIZE, *STUDENT, *TEACHER, *MEASURING, "--label-fraction", "0.4", "--no-baseline"]
OWN = {  # each job refuses flags that it does not read
    "teacher": [*STUDENT, "--role", "label_only"],
    "pseudo_label": ["--tta", "none", "--floor", "0.07"],
    "evaluate": MEASURING,
}
SPACE = 'ROWS = {"labels alone": {"method": "label_only"}, "distilled": {"method": "distill"}}'
pytestmark = pytest.mark.slow  # some five minutes


@pytest.fixture(scope="module")
def jobs():
    with some_nodes(cpus=(2, 2), gpus=(0, 0)) as jobs:
        make_dataset(jobs.root / "images", images=60, side=64, seed=3)
        yield jobs


def said(done):
    return done.stdout + done.stderr


def test_the_pipeline(jobs):
    done = jobs.run("pipeline", "--run-name", "r", "--data", str(jobs.root / "images"), *ALL)
    assert done.returncode == 0, said(done)[-4000:]
    assert "1 worker(s) with 2 CPUs each" in said(done), said(done)
    assert (jobs.root / "runs/r/report/report.html").exists()


def test_labelling_and_evaluation(jobs):
    """Again, on the pipeline's teacher; one actor a node fits, so two are placed side by side."""
    label = jobs.run("pseudo_label", "--run-name", "r", *SIZE, "--tta", "none", "--overwrite", "--num-actors", "2")
    assert label.returncode == 0 and "2 labelling actor(s)" in said(label), said(label)[-4000:]
    done = jobs.run("evaluate", "--run-name", "r", *SIZE, "--latency-repeats", "4", "--overwrite")
    assert done.returncode == 0, said(done)[-4000:]


def test_a_sweep(jobs):
    (jobs.root / "own_space.py").write_text(SPACE + SWEEP_BASE)
    data = ["--data", str(jobs.root / "images")]
    done = jobs.run("sweep", str(jobs.root / "own_space.py"), "--run-name", "sweep", *data)
    assert done.returncode == 0 and "2/2 trials" in said(done), said(done)[-4000:]


@pytest.mark.parametrize("job", ["teacher", "pseudo_label", "evaluate"])
def test_what_cannot_be_placed_says_so_within_a_minute(jobs, job):
    wrong = ["--gpu", "require"] if job == "pseudo_label" else ["--cpus-per-worker", "3"]
    lacks = (
        "1 labelling actor with a GPU each need 1 GPUs, the cluster has 0" if job == "pseudo_label" else "room for 0"
    )
    begun = time.monotonic()
    done = jobs.run(job, "--run-name", "r", "--overwrite", *SIZE, *OWN[job], *wrong)
    assert done.returncode == 2 and lacks in said(done) and "Traceback" not in said(done), said(done)[-3000:]
    assert time.monotonic() - begun < 60


def test_a_dry_run_times_its_steps_on_a_node(jobs):
    done = jobs.run("pipeline", "--run-name", "dry", "--data", str(jobs.root / "images"), *ALL, "--dry-run")
    assert done.returncode == 0 and "time from steps measured on" in said(done), said(done)[-3000:]
    assert "2 thread(s)" in said(done) and "unknown" not in said(done)


@pytest.mark.parametrize("job", ["teacher", "pseudo_label", "evaluate"])
def test_gpus_that_only_ray_believes_in_are_named(made_up_gpus, job):
    """Two GPUs of which PyTorch sees none: a user error, without retries; with --gpu never all is well."""
    flags = ["--run-name", "r", *SIZE]
    begun = time.monotonic()
    done = made_up_gpus.run(job, *flags, *OWN[job])
    assert done.returncode == 2 and "GPU that PyTorch does not see" in said(done), said(done)[-4000:]
    assert time.monotonic() - begun < 120
    done = made_up_gpus.run(job, *flags, *OWN[job], "--gpu", "never")
    assert done.returncode == 0, said(done)[-4000:]


@pytest.fixture(scope="module")
def made_up_gpus():
    with some_nodes(cpus=(1, 3), gpus=(0, 2)) as jobs:
        make_dataset(jobs.root / "images", images=60, side=64, seed=3)
        data = ["--data", str(jobs.root / "images"), "--label-fraction", "0.4"]
        assert jobs.run("prepare", "--run-name", "r", *data).returncode == 0
        assert jobs.run("teacher", "--run-name", "r", *SIZE, *STUDENT, *TEACHER, "--gpu", "never").returncode == 0
        yield jobs


@pytest.mark.parametrize(
    ("gpus", "workers", "said_so"),
    [((0, 0, 0), "auto", "3 worker(s) with 1 CPUs each"), ((0, 0, 1), "1", "1 worker(s) with 2 CPUs each")],
    ids=["one worker a node", "a GPU that is not to be used"],
)
def test_the_pipeline_on_three_unequal_nodes(gpus, workers, said_so):
    with some_nodes(cpus=(1, 2, 1), gpus=gpus) as jobs:
        make_dataset(jobs.root / "images", images=60, side=64, seed=3)
        more = ["--num-workers", workers, *(["--gpu", "never"] if any(gpus) else [])]
        done = jobs.run("pipeline", "--run-name", "r", "--data", str(jobs.root / "images"), *ALL, *more)
        assert done.returncode == 0 and said_so in said(done), said(done)[-4000:]
        assert (jobs.root / "runs/r/report/report.html").exists()
