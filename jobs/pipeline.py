"""All stages in order: prepare, teacher, label-only baseline, pseudo-labels, distillation, evaluation."""

from dfssd.cli import run

if __name__ == "__main__":
    run("pipeline")
