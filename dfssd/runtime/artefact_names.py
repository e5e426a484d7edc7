"""Rounds of teacher and labels: names of their artefacts, which is the newest, and when there is no further one.

Round 1 is `teacher`, `pseudo`, `quality`; round 2 `teacher_2` (trained on labels and on the pseudo-labels of round 1),
`pseudo_2`, `quality_2`. The student learns from the newest round that has pseudo-labels.
"""

from __future__ import annotations

from dfssd.runtime.storage import Storage


def in_round(kind: str, number: int) -> str:
    """Name of an artefact in a round: teacher, teacher_2, teacher_3."""
    return kind if number == 1 else f"{kind}_{number}"


def split_round(name: str) -> tuple[str, int]:
    """Kind and round of an artefact's name; label_only has no round."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if number.isdigit() else (name, 1)


def newest_round(run: Storage) -> int:
    """The newest round whose pseudo-labels are finished; 1 where there is none yet."""
    number = 1
    while run.exists(f"{in_round('pseudo', number + 1)}/stage.json"):
        number += 1
    return number


def finished_models(run: Storage) -> list[str]:
    """Artefacts of finished trainings: teachers round by round, label_only, student."""
    teachers, number = [], 1
    while run.exists(f"{in_round('teacher', number)}/stage.json"):
        teachers.append(in_round("teacher", number))
        number += 1
    return teachers + [m for m in ("label_only", "student") if run.exists(f"{m}/stage.json")]


def improved(run: Storage, number: int) -> bool:
    """Is the teacher of this round better on val (mAP50-95) than the one before? Says so in one line."""
    before, after = (
        float(run.read_json(f"{in_round('teacher', n)}/stage.json")["summary"]["best"]["map50_95"])
        for n in (number - 1, number)
    )
    better = after > before
    print(
        f"round {number}: teacher's val mAP50-95 {before:.4f} -> {after:.4f}, "
        + ("its labels are used" if better else f"no better: the labels of round {number - 1} are used"),
        flush=True,
    )
    return better
