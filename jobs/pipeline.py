"""All stages in order: prepare, teacher, label-only baseline, pseudo-labels, distillation, evaluation.

Interrupt it anywhere and type the same command again: finished stages are skipped, the interrupted one goes on.
"""

from dfssd.cli import main, parse, run_stages
from dfssd.closing import print_results
from dfssd.config import Config
from dfssd.stages import ORDER

SECTIONS = [name for name in Config.model_fields if name != "baseline"]
BASELINE = (bool, Config.model_fields["baseline"])


def job() -> None:
    config, _ = parse(__doc__ or "", SECTIONS, baseline=BASELINE)
    run_stages(config, [s for s in ORDER if config.baseline or s != "label_only"])
    if not config.run.dry_run:
        print_results(config)


if __name__ == "__main__":
    main(job)
