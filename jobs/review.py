"""Pseudo-labels out to where people review them, and corrected labels back into the next version of the data set."""

from dfssd.cli import run

if __name__ == "__main__":
    run("review")
