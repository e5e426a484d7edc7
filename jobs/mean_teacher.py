"""Let the teacher go on with labelled and unlabelled images, which its own average labels; leaves <run>/mean_teacher."""

from dfssd.cli import run

if __name__ == "__main__":
    run("mean_teacher")
