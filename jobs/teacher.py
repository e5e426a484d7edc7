"""Train on the labelled images alone: the teacher, or the label-only student that all is compared with."""

from dfssd.cli import run

if __name__ == "__main__":
    run("teacher")
