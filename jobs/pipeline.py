"""All stages in order: prepare, teacher, label-only baseline, pseudo-labels, distillation, evaluation.

Interrupt it anywhere and type the same command again: finished stages are skipped, the interrupted one goes on.
"""

from dfssd.cli import main, parse
from dfssd.config import Config
from dfssd.pipeline.run import run_stages
from dfssd.pipeline.stages import wanted
from dfssd.report.terminal import print_results

OWN = ("baseline", "publish_best", "rounds")
SECTIONS = [name for name in Config.model_fields if name not in OWN]
FLAGS = {name: (Config.model_fields[name].annotation, Config.model_fields[name]) for name in OWN}


def job() -> None:
    config, _ = parse(__doc__ or "", SECTIONS, **FLAGS)
    run_stages(config, wanted(config))
    if not config.run.dry_run:
        print_results(config)


if __name__ == "__main__":
    main(job)
