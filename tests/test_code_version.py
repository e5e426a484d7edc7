"""The code of a run is named with git, without it, and where a job was submitted."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dfssd
from dfssd.runtime import code_version as module
from dfssd.runtime.code_version import code_version, tree_id

PACKAGE = Path(dfssd.__file__).parent


def git(folder, *words):
    own = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run([*own, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """A copy of the package without .git above it, as a submitted job sees it; the code runs from there."""
    copy = tmp_path / "job" / "dfssd"
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns("*.pyc.*")
    )  # half-written by other processes, soon gone
    monkeypatch.setattr(module, "__file__", str(copy / "runtime" / "code_version.py"))
    for name in [n for n in os.environ if n.startswith("GIT_")] + ["DFSSD_COMMIT"]:  # as where a hook runs the tests
        monkeypatch.delenv(name, raising=False)
    return copy


def test_without_git_the_folder_is_named_as_git_would(uploaded):
    said = code_version()
    assert said == f"{dfssd.__version__}+tree.{tree_id(uploaded)[:12]}"
    if not shutil.which("git"):
        return
    git(uploaded.parent, "init", "-q")
    (uploaded.parent / ".gitignore").write_text("__pycache__/\n")
    git(uploaded.parent, "add", "-A")
    git(uploaded.parent, "commit", "-q", "-m", "m")
    assert git(uploaded.parent, "rev-parse", "HEAD:dfssd") == tree_id(uploaded)
    assert code_version() == f"{dfssd.__version__}+g{git(uploaded.parent, 'rev-parse', '--short', 'HEAD')}"
    (uploaded / "errors.py").write_text("x = 1")
    assert code_version().endswith("+")


def test_what_the_submitter_says_counts_where_git_is_not(uploaded, monkeypatch):
    monkeypatch.setenv("DFSSD_COMMIT", "1a2b3c4+")
    assert code_version() == f"{dfssd.__version__}+g1a2b3c4+"
    monkeypatch.setenv("DFSSD_COMMIT", "$(git describe)")  # not expanded
    assert "+tree." in code_version()
