"""Which settings a stage reads, and what of them its result depends on: by these an artefact is skipped or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dfssd.config import Config
from dfssd.config.free import FREE
from dfssd.errors import DfssdError


def counted(config: Config, reads: Iterable[str], free: Iterable[str] = ()) -> dict[str, Any]:
    """JSON-ready values by section of the settings that count.

    Args:
        reads: dotted keys of the settings that a stage reads.
        free: those of them that do not count, beside FREE.

    Raises:
        DfssdError: weights are named that are not there.
    """
    plain, tree = config.model_dump(mode="json"), dict[str, Any]()
    for key in reads:
        if key in FREE or key in free:
            continue
        name, _, field = key.partition(".")
        means = MEANS.get(key)
        tree.setdefault(name, {})[field] = means(config) if means else plain[name][field]
    return tree


def given_weights(spec: str) -> bytes:
    """Content of a .pt that labels or teaches.

    Raises:
        DfssdError: there is no such file, or it holds no detector.
    """
    from dfssd.models.families import resolve_weights

    _, weights = resolve_weights(spec)
    if weights is None:
        raise DfssdError(
            f"{spec} has no weights, so it cannot label or teach", todo="give the .pt of a trained detector"
        )
    return weights


def _digest(spec: str) -> str:
    return hashlib.sha256(given_weights(spec)).hexdigest() if spec else ""


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path and "://" not in path else path


def _content(config: Config) -> str:
    """The data by what it says, not by where it lies: a digest of images and labels."""
    from dfssd.pipeline.data import content

    return content(config)


# What a setting means where its text alone does not say it: files by their content, folders by where they are.
MEANS: dict[str, Callable[[Config], Any]] = {
    "data.data": _content,
    "data.labelled_list": lambda c: _absolute(c.data.labelled_list),
    "data.unlabelled": lambda c: len(c.data.unlabelled),  # their images are part of the content
    "train.teacher_steps": lambda c: c.teacher_steps(),
    "mean_teacher.mean_teacher_steps": lambda c: c.mean_teacher_steps(),
    "pseudo.label_teachers": lambda c: [_digest(spec) for spec in c.pseudo.label_teachers],
    "distill.distill_teacher": lambda c: _digest(c.distill.distill_teacher),
}
