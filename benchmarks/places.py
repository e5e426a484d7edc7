"""Places in a pipeline: how far a log got, what a write to storage says, and where faults shall come."""

from __future__ import annotations

import random
import re

STAGES = ("dataset", "teacher", "mean_teacher", "label_only", "pseudo", "quality", "student", "report")
TRAININGS = {"teacher": 1.0, "mean_teacher": 0.5, "label_only": 1.0, "student": 1.0}  # share of the steps
EVERY = 5  # steps between checkpoints
END = 10**9  # in place of a step: the stage's last write
Position = tuple[int, int]  # stages that are finished, step of the next one


def position(text: str) -> Position:
    """How far a log got."""
    best = (0, 0)
    for name, step in re.findall(r"(\w+): step (\d+)/\d+ \(", text):
        if name in STAGES:
            best = max(best, (STAGES.index(name), int(step)))
    for name in re.findall(r"(\w+): finished ", text):
        if name in STAGES:
            best = max(best, (STAGES.index(name) + 1, 0))
    return best


def lost(at: Position, said: str) -> int:
    """Steps made again, by what was said after a fault. It may have come when the next stage had begun, and then none was."""
    resumed = re.search(r"(\w+): resumed at step (\d+) of", said)
    same = resumed is not None and resumed[1] in STAGES[at[0] : at[0] + 1]
    return max(at[1] - int(resumed[2]), 0) if resumed and same else 0


def written(path: str) -> Position | None:
    """What a run has reached that writes this file of its storage: a checkpoint, or the record of a finished stage."""
    found = re.search(r"/(\w+)/(?:train/step_(\d+)/|stage\.json)", path)
    if found is None or found[1] not in STAGES:
        return None
    return STAGES.index(found[1]), int(found[2]) if found[2] else END


def barrier(place: Position, reached: Position, steps: int) -> Position:
    """The last write that may pass until the fault at `place` has come, so that no machine is too fast for it.

    The next one, which is held, is the first checkpoint at the place, or beyond what the run has `reached` already.
    """
    stage, step = max(place, (reached[0], reached[1] + 1))
    if STAGES[stage] not in TRAININGS:
        return stage, END if step else 0
    return stage, (step - 1) // EVERY * EVERY if step <= int(steps * TRAININGS[STAGES[stage]]) else END


def places(steps: int, number: int, rng: random.Random) -> list[Position]:
    """Where the faults come: spread over trainings by their steps, and each other stage once."""
    grid = [(STAGES.index(name), s) for name, share in TRAININGS.items() for s in range(1, int(steps * share))]
    others = [(k, 0) for k, name in enumerate(STAGES) if name not in TRAININGS]
    rng.shuffle(others)
    chosen = others[: max(number // 6, 1)]
    width = len(grid) / max(number - len(chosen), 1)
    chosen += [grid[int((k + rng.random()) * width)] for k in range(number - len(chosen))]
    return sorted(chosen)
