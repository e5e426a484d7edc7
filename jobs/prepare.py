"""Check images and labels, group near-duplicates, split, choose the labelled subset; leaves <run>/dataset."""

from dfssd.cli import run

if __name__ == "__main__":
    run("prepare")
