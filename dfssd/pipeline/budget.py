"""Without `--steps`: how many steps the data asks for, and why.

Published semi-supervised detection sees each unlabelled image some ten to fifty times (Unbiased Teacher, Liu et al., ICLR
2021; Soft Teacher, Xu et al., ICCV 2021: 180 000 steps on COCO). Those train from ImageNet on 80 classes; 20 is at the lower
end. The number is a rule of thumb and was not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dfssd.config import Config
from dfssd.runtime.artefact_names import DATASET, is_finished
from dfssd.runtime.storage import Storage

TIMES = 20  # that each unlabelled image is seen
TIMES_LABELLED = 100  # that each labelled image is seen where there is no unlabelled one
FEW = 0.1  # share of the labels that is expected to stay where they are hidden and nobody says how many
FEWEST, MOST = 1000, 20000  # steps, unless --epochs-unlabelled says how often


def steps_for(config: Config, labelled: int, unlabelled: int) -> tuple[int, str]:
    """Optimiser steps for that many images, and why, in one line.

    Args:
        config: with the batch, its ratio of unlabelled images, and `--epochs-unlabelled`.
        labelled, unlabelled: images that train.
    """
    own, batch = config.train.epochs_unlabelled, config.train.batch
    mixed = config.unlabelled_batch() > 0 and unlabelled > 0
    images, each, kind = (unlabelled, config.unlabelled_batch(), "un") if mixed else (labelled, batch, "")
    if own and mixed:
        steps, limit = max(1, math.ceil(own * images / each)), ""
    else:
        asked = math.ceil((TIMES if mixed else TIMES_LABELLED) * images / each)
        steps = min(max(asked, FEWEST), MOST)
        limit = (
            "" if steps == asked else f", the {'fewest' if steps > asked else 'most'} that are chosen without --steps"
        )
    why = f"each of {images} {kind}labelled images is seen {_times(steps * each / max(images, 1))}"
    if mixed:
        why += f", each of {labelled} labelled ones {_times(steps * batch / max(labelled, 1))}"
    return steps, f"{steps} steps{limit}: {why} (--steps gives another number)"


def _times(count: float) -> str:
    return f"{count:.0f} times" if count >= 1.5 else "once" if count >= 0.95 else f"with a chance of {count:.0%}"


def with_steps(config: Config, run: Storage, quiet: bool = False) -> Config:
    """Settings as a finished data set asks for: no unlabelled images in a batch where it has none, and the number of steps
    where it is not given, which is said unless `quiet` (of a stage that trains nothing).

    The same data and settings always give the same, so that a run that goes on keeps it.
    """
    if not is_finished(run, DATASET):
        return config
    summary = run.read_json(f"{DATASET}/stage.json")["summary"]
    if config.train.steps and "splits" not in summary:
        return config  # a record that says nothing about its images
    labelled, unlabelled = int(summary["labelled_images"]), unlabelled_images(summary)
    config = without_unlabelled(config) if not unlabelled else config
    return config if config.train.steps else _settled(config, labelled, unlabelled, quiet=quiet)


def unlabelled_images(summary: Mapping[str, Any]) -> int:
    """Unlabelled images that may train, of a finished data set's summary."""
    splits = summary["splits"]
    return int(splits["train"]["images"] - summary["labelled_images"] + splits["unlabelled-only"]["images"])


def with_expected_steps(config: Config, images: int, labelled: int, hides: bool = False) -> Config:
    """The same for data that is not prepared yet, about: images in all, and those with a label.

    Args:
        hides: labels will be hidden from training by something else than these settings say.
    """
    hides = hides or config.data.hides_labels
    if images == labelled and not hides:
        config = without_unlabelled(config)
    if config.train.steps:
        return config
    unknown = FEW if hides and images == labelled else 1.0  # how many labels stay is not known before they are read
    share, own = config.data.split_shares[0], config.data.label_fraction or unknown
    used = round(share * labelled * own)
    return _settled(config, used, max(0, round(images - (1 - share) * labelled) - used), "about, as the data looks: ")


def without_unlabelled(config: Config) -> Config:
    """Settings for data without unlabelled images."""
    if not config.distill.unlabelled_ratio:
        return config
    return config.model_copy(update={"distill": config.distill.model_copy(update={"unlabelled_ratio": 0.0})})


def _settled(config: Config, labelled: int, unlabelled: int, said: str = "", quiet: bool = False) -> Config:
    steps, why = steps_for(config, labelled, unlabelled)
    if not quiet:
        print(f"{said}{why}", flush=True)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
