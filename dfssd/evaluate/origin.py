"""The run that a model file comes from: at which scores and size it works, and which pictures trained or chose it.

Files are known by the sha256 of their weights, never by their name: a file that lies in a run's folder but is another one has
no origin, and takes no operating point that was chosen for other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dfssd.data.manifest import VAL, Manifest, Row, read_manifest
from dfssd.runtime.artefact_names import DATASET, REPORT
from dfssd.runtime.storage import Storage

UP = 3  # folders above a file in which its run is looked for: <run>/export/student_openvino/model.xml


@dataclass(frozen=True)
class Origin:
    """A training of a run, and which of its files this is.

    Args:
        model: the training's artefact, e.g. "student". file: e.g. "best.pt". record: its `stage.json`.
    """

    run: Storage
    model: str
    file: str
    record: Mapping[str, Any]

    @cached_property
    def _measured(self) -> tuple[str, dict[str, Any]] | None:
        """Name of the model in the report whose numbers are those of this file, and the report; None without one."""
        if self.file == "last.pt" or not self.run.exists(f"{REPORT}/stage.json"):
            return None
        name = str(self.record.get("published", self.model)) if self.file == "best.pt" else self.model
        made_from = self.run.read_json(f"{REPORT}/stage.json")["inputs"]
        if made_from.get(name) != self.run.read_json(f"{name}/stage.json")["digest"]:
            return None  # trained again since
        results = self.run.read_json(f"{REPORT}/metrics.json")
        return (name, results) if "operating_point" in results.get(name, {}) else None

    @property
    def point(self) -> dict[str, Any] | None:
        """The operating point that val of its run chose for these weights; None where its report did not measure them."""
        return self._measured[1][self._measured[0]]["operating_point"] if self._measured else None

    @property
    def imgsz(self) -> int | None:
        """Side of the input (px) at which the operating point was chosen."""
        return int(self._measured[1]["environment"]["imgsz"]) if self._measured else None

    def _version(self, digest: str) -> Manifest | None:
        """The data set of the run with this digest: the present one, or an earlier one that `--update` has kept."""
        present = self.run.at(str(DATASET))
        for store in (present, *(present.at("versions", number) for number in present.folders("versions"))):
            if store.exists("stage.json") and store.read_json("stage.json").get("digest") == digest:
                return read_manifest(store)
        return None

    @cached_property
    def _weights(self) -> Mapping[str, Any]:
        """`stage.json` of the training that made these very weights."""
        if self.file == "best.pt" and "published" in self.record:
            published: dict[str, Any] = self.run.read_json(f"{self.record['published']}/stage.json")
            return published
        return self.record

    @cached_property
    def _trained_on(self) -> Manifest | None:
        return self._version(self._weights["inputs"].get(str(DATASET), ""))

    @cached_property
    def manifest(self) -> Manifest:
        """The data set that trained it; where that was not kept, the run's present one."""
        return self._trained_on or read_manifest(self.run.at(str(DATASET)))

    def seen(self, rows: Sequence[Row]) -> dict[str, int] | None:
        """How many of these pictures it was trained on (`trained`), of those with their labels (`labels`), and how many chose
        its weights and scores (`chose`); pictures are the same where their bytes are. None: the data set that trained it was
        replaced since, and nothing tells what was labelled then.
        """
        manifest, inputs = self._trained_on, self._weights["inputs"]
        if manifest is None:
            return None
        unlabelled = any(name.startswith(("pseudo", "mean_teacher")) for name in (self.model, *inputs))
        labels = {r.image_id for r in manifest.labelled_rows()}
        trained = labels | {r.image_id for r in manifest.unlabelled_rows() if unlabelled}
        chose = {r.image_id for r in manifest.of_split(VAL)}
        if self._measured:  # scores may have been chosen on a later version than the weights
            later = self._version(self.run.read_json(f"{REPORT}/stage.json")["inputs"].get(str(DATASET), ""))
            chose |= {r.image_id for r in later.of_split(VAL)} if later else set()
        ids = {row.image_id for row in rows}
        return {"trained": len(ids & trained), "labels": len(ids & labels), "chose": len(ids & chose)}


def origin_of(file: Path, metadata: Mapping[str, Any] | None = None, runs: Storage | None = None) -> Origin | None:
    """The training that a file comes from, where its run can be found; else None.

    Args:
        file: a .pt in a training's folder, or an exported model.
        metadata: of an exported model; none: the file is a .pt.
        runs: folder of runs in which that of an exported model is looked for by its name, where it does not lie in it.
    """
    near = [Storage(str(folder)) for folder in file.absolute().parents[:UP]]
    if metadata is None:
        data = file.read_bytes()
        return _found(near, [file.absolute().parent.name], hashlib.sha256(data).hexdigest())
    name, _, model = str(metadata.get("trained", "")).partition("/")
    places = [*near, runs.at(name)] if runs and name else near
    return _found(places, [model], str(metadata.get("weights_sha256", "")))


def _found(places: Iterable[Storage], models: Sequence[str], sha256: str) -> Origin | None:
    for run in places:
        for model in filter(None, models):
            if not (run.exists(f"{DATASET}/stage.json") and run.exists(f"{model}/stage.json")):
                continue
            record = run.read_json(f"{model}/stage.json")
            for name, entry in record.get("outputs", {}).items():
                if name.endswith(".pt") and entry["sha256"] == sha256:
                    return Origin(run, model, name, record)
    return None


def in_words(file: str, seen: Mapping[str, int] | None, pictures: int, found: bool = False) -> str:
    """One sentence on pictures that a model knows already; '' where it knows none.

    Args:
        seen: see `Origin.seen`; none: not known. pictures: how many are measured. found: was the run it comes from?
    """
    if seen is None:
        why = "the data set that trained it was replaced in its run" if found else "the run it comes from was not found"
        return f"{file}: {why}, so nobody knows whether its training pictures are among these."
    said = []
    if seen["trained"]:
        labels = f" ({seen['labels']} with their labels)" if seen["labels"] < seen["trained"] else ""
        said.append(f"{seen['trained']} of these {pictures} pictures trained it{labels}")
    if seen["chose"]:
        said.append(f"{seen['chose']} chose its weights and scores (val of its run)")
    return f"WARNING: {file}: {' and '.join(said)}: its numbers flatter." if said else ""
