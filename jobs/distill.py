"""Train the student on labels, pseudo-labels and the teacher's features and predictions; leaves <run>/student."""

from dfssd.cli import run

if __name__ == "__main__":
    run("distill")
