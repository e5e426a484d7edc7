"""All stages in order: data set, teacher, mean teacher, label-only baseline, pseudo-labels, student, report, export."""

from dfssd.cli import run

if __name__ == "__main__":
    run("pipeline")
