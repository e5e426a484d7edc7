"""What goes through Ray, by reading the code: no wait without an end, no data in closures."""

import ast
from pathlib import Path

from ray import cloudpickle
from small import make_job, tiny_config

from dfssd.pseudo.teachers import TeacherActor
from dfssd.train import worker

PACKAGE = Path(__file__).parents[1] / "dfssd"
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if "ray" in p.read_text()]


def calls(tree, name):
    """Calls of `ray.NAME`."""
    for node in ast.walk(tree):
        f = node.func if isinstance(node, ast.Call) else None
        if isinstance(f, ast.Attribute) and f.attr == name and isinstance(f.value, ast.Name) and f.value.id == "ray":
            yield node


def unlimited(source):
    """Lines of `ray.get` and `ray.wait` that may wait for ever."""
    tree = ast.parse(source)
    waits = [c for name in ("get", "wait") for c in calls(tree, name)]
    return [c.lineno for c in waits if not any(k.arg == "timeout" for k in c.keywords)]


def test_every_wait_for_ray_has_an_end():
    assert unlimited("ray.get(x)\nray.get(x, timeout=1)\nray.wait([x])") == [1, 3]
    assert {str(p): lines for p in FILES if (lines := unlimited(p.read_text()))} == {}
    assert sum(len(list(calls(ast.parse(p.read_text()), "get"))) for p in FILES) >= 4


def test_tasks_are_functions_of_the_package_and_no_closures():
    """A function that can be imported travels as its name; what it closes over would travel with every task."""
    found = 0
    for path in FILES:
        tree = ast.parse(path.read_text())
        top = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        top |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for call in calls(tree, "remote"):
            (task,) = call.args
            assert isinstance(task, ast.Name) and task.id in top, f"{path}:{call.lineno}"
            found += 1
    assert found >= 5


def test_what_workers_and_actors_are_given_is_small(prepared):
    """Settings and names; the manifest, weights and images come from storage."""
    job = make_job("label_only", str(prepared / "r"), tiny_config(prepared))
    given = cloudpickle.dumps((worker.train_worker, {"job": job, "threads": 1, "key": "k"}))
    actor = cloudpickle.dumps((TeacherActor, ("uri", job.config, ("teacher/best.pt",), ("a", "b"), 1, False)))
    assert len(given) < 20_000 and len(actor) < 20_000
