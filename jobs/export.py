"""Write the student for the machine at the line; leaves <run>/export."""

from dfssd.cli import run

if __name__ == "__main__":
    run("export")
