"""Measure teacher, label-only student and distilled student; leaves <run>/report."""

from dfssd.cli import run

if __name__ == "__main__":
    run("evaluate")
