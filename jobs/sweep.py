"""Sweep: many runs of the student with Ray Tune, from a file in tune_spaces/, and a table of what came of them."""

from dfssd.cli import run

if __name__ == "__main__":
    run("sweep")
