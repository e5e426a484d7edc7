"""What the data asks of all trials of a sweep, before the first one begins: a number of steps, and unlabelled images."""

from __future__ import annotations

import numpy as np

from dfssd.config import Config, section
from dfssd.errors import DfssdError
from dfssd.pipeline.budget import with_expected_steps, without_unlabelled
from dfssd.pipeline.data import count_images
from dfssd.pipeline.stages import PSEUDO_LABELS
from dfssd.sweep.points import apply, draw, points
from dfssd.sweep.space import Space

# Settings that do something only where there are unlabelled images. The balance works between other terms as well.
OF_UNLABELLED = {*PSEUDO_LABELS, *section("pseudo")} - {"distill.balance"}
DRAWN = 32  # points of a search that chooses them as it goes, to see what it asks for


def as_the_data_asks(config: Config, space: Space) -> Config:
    """`with_equal_steps`, then `as_labelled`."""
    return as_labelled(with_equal_steps(config, space), space)


def with_equal_steps(config: Config, space: Space) -> Config:
    """The config with a number of steps for all trials, which compare equal steps: the data's list of images suggests it.

    Raises:
        DfssdError: the data cannot be read.
    """
    if config.train.steps:
        return config
    found, keys = count_images(config), {*space.axes, *(key for row in space.rows.values() for key in row)}
    hides = any(key.startswith("data.label") for key in keys)
    expected = with_expected_steps(config, found.images, found.labelled, hides)
    return config.model_copy(
        update={"train": expected.train}
    )  # and nothing else: trials may hide other shares of the labels


def as_labelled(config: Config, space: Space) -> Config:
    """The config without unlabelled images in a batch where every image is labelled, as the pipeline does, and says so.

    Raises:
        DfssdError: the data cannot be read; or a trial would need unlabelled images, which otherwise shows once its teacher
            is trained.
    """
    found = count_images(config)
    if found.images != found.labelled:
        return config
    rng = np.random.default_rng(space.seeds[0])
    planned = points(space) or [("", draw(space.axes, rng)) for _ in range(DRAWN)]
    trials = [(row, settings, apply(config, settings)) for row, settings in planned]
    hides = any(own.data.hides_labels for _, _, own in trials)
    for row, settings, own in trials:
        if own.data.hides_labels or settings.get("method") == "label_only" or not own.unlabelled_batch():
            continue
        asks = [key for key, value in settings.items() if key in OF_UNLABELLED and value]
        if hides:
            asks = asks or ["distill.unlabelled_ratio (the default)"]
        if asks:
            raise DfssdError(
                f"every image of the data is labelled, so that there is nothing to pseudo-label, but the space asks for "
                f"{', '.join(asks)}",
                where=f"space {space.name}" + (f", row '{row}'" if row else ""),
                todo="add images without labels (--unlabelled FOLDER), hide labels for research (--label-fraction 0.1), or "
                "set distill.unlabelled_ratio to 0 in that row",
            )
    if hides or not config.unlabelled_batch():
        return config  # the trials differ, and each says for itself
    print("every image is labelled: the trials learn from labels and teacher alone", flush=True)
    return without_unlabelled(config)
