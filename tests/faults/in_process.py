"""A whole pipeline in this process, without Ray: each stage's own body, with its work done here."""

from __future__ import annotations

from typing import Any

from dfssd.config import Config
from dfssd.pipeline.context import Context
from dfssd.pipeline.run import run_stage
from dfssd.pseudo.in_process import label_in_process
from dfssd.runtime.artefact_names import ArtefactName
from dfssd.runtime.placement import Resources
from dfssd.train.in_process import train_in_process

STAGES = ("dataset", "teacher", "label_only", "pseudo", "quality", "student", "report")


class _Here:
    """Stands for `ray.remote(f)`: the call is made at once."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def options(self, **settings: Any) -> _Here:
        return self

    def remote(self, *args: Any) -> Any:
        return self.function(*args)


def without_ray(patch: Any) -> None:
    """Let labelling and measuring be done by this process."""
    import ray

    from dfssd.pseudo import labeller
    from dfssd.runtime import cluster, tasks

    def label(config: Any, run: Any, folder: str, manifest: Any, weights: Any, log: Any) -> Any:
        return label_in_process(config, run, folder, manifest, weights, log=log, cores=1)

    real = ray.remote

    def remote(*args: Any, **settings: Any) -> Any:
        ours = args and getattr(args[0], "__module__", "").startswith("dfssd.")
        return _Here(args[0]) if ours else real(*args, **settings)

    patch.setattr(labeller, "label", label)
    patch.setattr(ray, "remote", remote)
    patch.setattr(cluster, "connect", lambda: None)
    patch.setattr(cluster, "actor_resources", lambda *args: None)
    patch.setattr(cluster, "task_resources", lambda *args: Resources(1, 1, False))
    patch.setattr(tasks, "result", lambda done, *args: done)


def run_pipeline(config: Config, stages: tuple[str, ...] = STAGES) -> None:
    """All stages in order, as `run_stages` does, in this process.

    Raises:
        DfssdError: as the stages do.
    """
    context = Context(config, fit=train_in_process)
    context.run.check_writable()
    try:
        for stage in stages:
            run_stage(context, ArtefactName.parse(stage))
    finally:
        context.runs.end_parent("FINISHED")
        context.runs.close()
