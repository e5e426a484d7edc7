"""The whole pipeline on two nodes that share nothing but S3 and MLflow."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from nodes import can_isolate, services, start_nodes

from dfssd.data.synthetic import make_dataset

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--imgsz",
    "64",
    "--batch",
    "4",
    "--steps",
    "8",
    "--teacher-steps",
    "6",
    "--val-every",
    "4",
    "--log-every",
    "2",
    "--amp",
    "fp32",
    "--teacher",
    "yolov8n.yaml",
    "--tta",
    "none",
    "--label-fraction",
    "0.4",
    "--latency-repeats",
    "3",
    "--sample-images",
    "2",
    "--num-workers",
    "2",
    "--cpus-per-worker",
    "2",
    "--gpu",
    "never",
    "--num-actors",
    "2",
    "--no-baseline",
]
WATCH = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
import time
for _ in range(120):
    if sum(n["Alive"] for n in ray.nodes()) == 2:
        break
    time.sleep(0.5)
print(json.dumps(sorted(n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"])))
"""
ACTORS = """
from collections import Counter
import json, sys, ray
from ray.util.state import list_actors
ray.init(address=sys.argv[1], logging_level="ERROR")
found = [a for a in list_actors(limit=1000) if sys.argv[2] in (a.class_name or "")]
print(json.dumps(list(Counter(a.node_id for a in found).values())))
"""


@pytest.mark.slow  # two minutes and more
@pytest.mark.skipif(not can_isolate(), reason="needs mount namespaces")
def test_the_pipeline_on_two_nodes_that_share_no_files():
    root = Path(tempfile.mkdtemp(prefix="dfssd-n-"))
    try:
        with services(root) as (place, env):
            _check(root, place, env)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _check(root, place, env):
    import boto3

    s3 = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="testing", aws_secret_access_key="x"
    )
    s3.create_bucket(Bucket="dfssd")
    make_dataset(root / "images", images=60, side=64, seed=3)
    for file in (root / "images").rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), "dfssd", f"data/{file.relative_to(root / 'images')}")
    shutil.rmtree(root / "images")  # the only copy is behind the endpoint now
    address = start_nodes(place, env)
    seen = subprocess.run([sys.executable, "-c", WATCH, address], env=env, capture_output=True, text=True, timeout=120)
    assert seen.stdout.strip() == '["127.0.0.2", "127.0.0.3"]', seen.stdout + seen.stderr
    command = [
        sys.executable,
        str(ROOT / "jobs/pipeline.py"),
        "--data",
        "s3://dfssd/data",
        "--storage-path",
        "s3://dfssd/runs",
    ]
    done = subprocess.run(
        [*command, "--run-name", "two", *SETTINGS],
        cwd=root / "driver",
        env={**env, "RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    out = done.stdout + done.stderr
    assert done.returncode == 0, out[-6000:]
    assert not any((root / "driver").iterdir()), "the driver left files behind"
    # One of each pair on each node. Training workers are not known by their lines: only the first of them has much to say.
    for actor in ("TeacherActor", "RayTrainWorker"):
        look = [sys.executable, "-c", ACTORS, address, actor]
        seen = subprocess.run(look, env=env, capture_output=True, text=True, timeout=120)
        a_node = json.loads(seen.stdout)
        assert len(a_node) == 2 and a_node[0] == a_node[1], (f"{actor}s a node: " + seen.stdout, seen.stderr)
        assert actor != "TeacherActor" or a_node == [1, 1], seen.stdout
    names = [
        o["Key"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket="dfssd")
        for o in page.get("Contents", [])
    ]
    for name in (
        "dataset/stage.json",
        "pseudo/stage.json",
        "student/best.pt",
        "report/report.html",
        "student/train/step_0000008/MANIFEST.json",
    ):
        assert f"runs/two/{name}" in names, names
    _check_tracking(root, env, out)


def _check_tracking(root, env, out):
    import mlflow

    client = mlflow.MlflowClient(env["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("dfssd").experiment_id])
    assert len(runs) >= 5 and {run.info.status for run in runs} == {"FINISHED"}
    student = next(r for r in runs if r.info.run_name.endswith("student"))
    assert student.data.metrics["loss/total"] > 0
    assert {a.path for a in client.list_artifacts(student.info.run_id)} >= {"curves.png", "weights"}
    secrets = [env["AWS_SECRET_ACCESS_KEY"], env["RAY_AUTH_TOKEN"]]
    kept = (root / "mlflow.db").read_bytes() + b"".join(
        p.read_bytes() for p in (root / "artefacts").rglob("*") if p.is_file()
    )
    logs = out + (root / "a.log").read_text() + (root / "b.log").read_text()
    for secret in secrets:
        assert secret.encode() not in kept and secret not in logs
