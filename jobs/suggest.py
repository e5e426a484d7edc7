"""Which unlabelled images are most worth a label: a table with scores, a contact sheet, and tasks for a labelling program."""

from dfssd.cli import run

if __name__ == "__main__":
    run("suggest")
