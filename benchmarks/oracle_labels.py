"""True boxes in place of pseudo-labels, for the row that says how much there is to gain (see benchmarks/distillation.py).

Writes the artefact `pseudo` of a run from the boxes that `prepare` withheld: score 1, agreement 1. Never part of a training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tyro

from dfssd.data.manifest import pseudo_table, read_manifest, read_withheld, write_table
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, PSEUDO
from dfssd.runtime.storage import Storage


@dataclass
class Arguments:
    """Which run."""

    storage_path: str
    run_name: str


def main() -> None:
    a = tyro.cli(Arguments, description=__doc__)
    run = Storage(a.storage_path).at(a.run_name)
    stage = Stage(run, PSEUDO, {"oracle": True}, (DATASET,))
    if stage.begin(overwrite=False) == "finished":
        return
    ids = [r.image_id for r in read_manifest(run.at("dataset")).unlabelled_rows()]
    truth = read_withheld(run.at("dataset"))
    boxes = [np.pad(truth[i][:, :5], ((0, 0), (0, 2)), constant_values=1).astype(np.float32) for i in ids]
    write_table(stage.store, "shard-00000.parquet", pseudo_table(ids, "truth", list(boxes)))
    stage.finish(["shard-00000.parquet"], {"images": len(ids)})


if __name__ == "__main__":
    main()
