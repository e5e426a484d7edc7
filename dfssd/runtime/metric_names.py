"""Names of metrics as MLflow takes them. Class names are the user's: `scratch/`, `+` and Chinese ones must arrive too."""

from __future__ import annotations


def metric_name(name: str) -> str:
    """A name that MLflow accepts: letters and digits of any script, "_", "-", ".", " ", ":", and "/" between parts that are
    not empty, "." or ".." (it treats names as paths). Brackets become blanks; other characters their code in hex,
    so that two classes never share a name.
    """
    parts = ["".join(map(_letter, part)).strip().replace("  ", " ") for part in name.split("/")]
    return "/".join({"": "x2F", ".": "x2E", "..": "x2Ex2E"}.get(part, part) for part in parts)


def _letter(c: str) -> str:
    if c.isalnum() or c in "_-. :":
        return c
    return " " if c in "()" or c.isspace() else f"x{ord(c):02X}"
