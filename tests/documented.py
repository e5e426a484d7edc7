"""The tables of the documentation that follow from tables of the code. `python tests/documented.py` writes them anew.

In a page they stand between `<!-- NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfssd.config import Distill, Thresholds
from dfssd.config.choices import DIVERGENCES, FORMATS, POLICIES
from dfssd.pipeline.stages import STAGES

DOCS = Path(__file__).parents[1] / "docs"


def choices(head: tuple[str, str], table: Mapping[str, Any], default: str) -> str:
    rows = [
        f"| `{name}`{' (default)' if name == default else ''} | {getattr(row, 'explained', '') or row.says} |"
        for name, row in table.items()
    ]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *rows])


def stages() -> str:
    rows = [
        f"| `{row.role}` | {row.does} | `{row.command_name}` | {'yes' if row.in_rounds else ''} |" for row in STAGES
    ]
    return "\n".join(["| stage | what it does | command | in every round |", "|---|---|---|---|", *rows])


def blocks() -> dict[str, dict[str, str]]:
    """Text by page and name."""
    divergences = choices(
        ("`--divergence`", "how feature maps are compared"), DIVERGENCES, Distill.model_fields["divergence"].default
    )
    policies = choices(
        ("`--threshold-policy`", "which candidates become pseudo-labels"),
        POLICIES,
        Thresholds.model_fields["threshold_policy"].default,
    )
    return {
        "distillation.md": {"divergences": divergences},
        "pseudo_labels.md": {"policies": policies},
        "data.md": {"formats": ", ".join(f"`{name}`" for name in FORMATS) + "."},
        "design.md": {"stages": stages()},
    }


def written(page: str, own: Mapping[str, str]) -> str:
    """A page with its blocks as they should be."""
    for name, text in own.items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)",
            lambda found, text=text: f"{found[1]}\n{text}\n{found[2]}",
            page,
            flags=re.S,
        )
        assert count == 1, f"<!-- {name} --> stands {count} times in its page"
    return page


if __name__ == "__main__":
    for page, own in blocks().items():
        (DOCS / page).write_text(written((DOCS / page).read_text(), own))
