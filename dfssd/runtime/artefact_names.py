"""Names of artefacts as values: a role and a round. The only place that makes a folder of a name, and a name of a folder.

Round 1 is `teacher`, `pseudo`, `quality`; round 2 `teacher_2` (trained on labels and on the pseudo-labels of round 1),
`pseudo_2`, `quality_2`. What has no rounds (`dataset`, `label_only`, `student`, `report`, `export`) is of round 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfssd.runtime.storage import Storage


@dataclass(frozen=True, order=True)
class ArtefactName:
    """What a stage leaves: its role (teacher, pseudo, ...) and its round (1, 2, ...). As text it is the folder."""

    role: str
    round: int = 1

    def __str__(self) -> str:
        return self.role if self.round == 1 else f"{self.role}_{self.round}"

    @classmethod
    def parse(cls, folder: str) -> ArtefactName:
        """The name that has this folder: teacher_2 is the teacher of round 2, label_only has no round."""
        role, _, number = folder.rpartition("_")
        return cls(role, int(number)) if number.isdigit() else cls(folder)

    def of_round(self, number: int) -> ArtefactName:
        """The same role in another round."""
        return ArtefactName(self.role, number)


DATASET = ArtefactName("dataset")
TEACHER = ArtefactName("teacher")
MEAN_TEACHER = ArtefactName("mean_teacher")
LABEL_ONLY = ArtefactName("label_only")
PSEUDO = ArtefactName("pseudo")
QUALITY = ArtefactName("quality")
STUDENT = ArtefactName("student")
REPORT = ArtefactName("report")
EXPORT = ArtefactName("export")


def is_finished(run: Storage, name: ArtefactName) -> bool:
    return run.exists(f"{name}/stage.json")


def val_score(run: Storage, name: ArtefactName) -> float:
    """Best val mAP50-95 of a finished training."""
    return float(run.read_json(f"{name}/stage.json")["summary"]["best"]["map50_95"])


def better_on_val(run: Storage, names: Iterable[ArtefactName]) -> ArtefactName | None:
    """The finished training that is best on val, of equals the first; None where none is finished."""
    finished = [n for n in names if is_finished(run, n)]
    if len(finished) < 2:  # nothing to compare
        return finished[0] if finished else None
    return max(finished, key=lambda n: val_score(run, n))


def newest_round(run: Storage) -> int:
    """The newest round whose pseudo-labels are finished; 1 where there is none yet."""
    number = 1
    while is_finished(run, PSEUDO.of_round(number + 1)):
        number += 1
    return number
