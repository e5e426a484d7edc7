"""docs/cluster.md: its commands are read by those who would run them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ray.scripts.scripts import cli as ray_cli

from dfssd.cli import job_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def commands():
    """Commands of the code blocks, with lines that end in a backslash joined, as words."""
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if words and words[0] != "export":
                yield words


def jobs():
    """Commands of our own jobs, also those behind `ray job submit ... --`."""
    for words in commands():
        own = words[words.index("--") + 1 :] if "--" in words else words
        if own[0] == "python":
            yield own[1:]


def test_every_kind_of_user_finds_a_page():
    titles = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    kinds = ["A laptop", "One machine with GPUs", "AWS, with `ray up`", "Kubernetes, with KubeRay"]
    assert titles[:4] == kinds
    for target in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert target in [re.sub(r"[^\w\- ]", "", t).lower().replace(" ", "-") for t in titles], target
    assert len(list(jobs())) >= 5


@pytest.mark.parametrize("words", list(jobs()), ids=lambda words: " ".join(words)[-40:])
def test_flags_exist(words, monkeypatch):
    assert (ROOT / words[0]).exists()
    seen = []
    monkeypatch.setattr("dfssd.pipeline.run.run_stages", lambda config, names: seen.append(config))
    monkeypatch.setattr("dfssd.report.terminal.print_results", lambda *rest: None)
    job_of(Path(words[0]).stem)(words[1:])
    assert seen


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "ray"], ids=lambda words: " ".join(words)[:40])
def test_ray_knows_its_flags(words):
    command, rest = ray_cli.commands[words[1]], words[2:]
    if words[1] == "job":
        command, rest = command.commands[words[2]], words[3:]
    command.make_context(words[1], list(rest))
    assert all((ROOT / w).exists() for w in rest if w.endswith(".yaml"))


def test_files_that_docker_and_kubectl_are_given_exist():
    named = [w[k + 1] for w in commands() if w[0] in ("docker", "kubectl") for k, x in enumerate(w) if x == "-f"]
    assert {n for n in named if "/" in n and not n.startswith("job/")} == {
        "deploy/Dockerfile",
        "deploy/networkpolicy.yaml",
        "deploy/rayjob.yaml",
    }
    assert all((ROOT / n).exists() for n in named if not n.startswith("job/"))


@pytest.mark.slow  # each measures a step
@pytest.mark.parametrize("words", [w for w in jobs() if "s3://" not in " ".join(w)], ids=lambda w: " ".join(w)[-40:])
def test_the_dry_runs_run(words, strip, tmp_path):
    local = {"my_data": str(strip), "/data/strip": str(strip), "runs": str(tmp_path), "/data/runs": str(tmp_path)}
    words = [local.get(w, w) for w in words]
    small = ["--imgsz", "64", "--batch", "4", "--teacher", "yolov8n.yaml", "--gpu", "never"]
    command = [sys.executable, str(ROOT / words[0]), *words[1:], *small, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "expected time" in done.stdout, done.stdout + done.stderr
