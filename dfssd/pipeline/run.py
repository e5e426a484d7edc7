"""Run stages in order."""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config import Config
from dfssd.config_checks import check_weights, refuse_relative_paths_in_a_job, settings_without_effect
from dfssd.pipeline.dry_run import dry_run
from dfssd.pipeline.stages import Context, later_rounds, run_stage


def run_stages(config: Config, stages: Sequence[str]) -> None:
    """Run stages in order, or show the plan."""
    if "student" in stages:
        check_weights(config.distill)
    for note in settings_without_effect(config):
        print(f"WARNING: {note}", flush=True)
    refuse_relative_paths_in_a_job(config)
    context = Context(config)
    if config.run.dry_run:
        dry_run(context, stages)
        return
    context.run.check_writable()
    status = "FAILED"
    try:
        for name in stages:
            run_stage(context, name)
            if name == "quality":
                later_rounds(context)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        context.runs.end_parent(status)
