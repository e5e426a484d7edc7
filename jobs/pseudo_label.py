"""Stream the unlabelled images through the teacher (Ray Data), and measure what its labels are worth."""

from dfssd.cli import run

if __name__ == "__main__":
    run("pseudo_label")
