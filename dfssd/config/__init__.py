"""Settings: what there is (sections), by name (choices), as flags, as a file, and what of it cannot be meant (checks)."""

from dfssd.config.sections import (
    SECTIONS,
    Config,
    Data,
    Distill,
    Evaluate,
    Export,
    MeanTeacher,
    Models,
    Pseudo,
    Run,
    Section,
    Thresholds,
    Train,
    all_keys,
    section,
)

__all__ = [
    "SECTIONS",
    "Config",
    "Data",
    "Distill",
    "Evaluate",
    "Export",
    "MeanTeacher",
    "Models",
    "Pseudo",
    "Run",
    "Section",
    "Thresholds",
    "Train",
    "all_keys",
    "section",
]
