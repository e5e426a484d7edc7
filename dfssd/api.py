"""For a notebook: run stages, read a run's metrics and models. `import dfssd` hands these on, imported when they are used.

import dfssd

config = dfssd.settings(data="my_images", imgsz=320, steps=2000, run_name="line3")
run = dfssd.run(config)                      # or dfssd.run(config, ["teacher", "label_only"])
run.metrics["student"]["test"]["map50_95"]
run.model("student").predict("picture.png")  # an Ultralytics YOLO
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfssd.config import Config, all_keys
from dfssd.errors import DfssdError, nearest
from dfssd.runtime.storage import Storage

if TYPE_CHECKING:
    from ultralytics import YOLO


def settings(file: str | Path = "", **values: Any) -> Config:
    """All settings of a run.

    Args:
        file: YAML or JSON as `--config` takes it; "" for the defaults.
        values: what differs, by the names of the flags with underscores: `imgsz=320`, `label_fraction=0.1`.

    Raises:
        DfssdError: an unknown name (with the nearest), or a value that cannot be.
    """
    from dfssd.config.file import checked, read_config

    sections = {
        key.rpartition(".")[2]: key.rpartition(".")[0] for key in all_keys()
    }  # by field; "" of the pipeline's own
    needs = [key for key in all_keys() if key.rpartition(".")[2] not in values]
    tree = (read_config(str(file), needs=needs) if file else Config()).model_dump()
    for name, value in values.items():
        if name not in sections:
            raise DfssdError(f"{name!r} is not a setting{nearest(name, sections)}")
        (tree[sections[name]] if sections[name] else tree)[name] = value
    return checked(tree)


def run(config: Config, stages: str | Sequence[str] = ()) -> FinishedRun:
    """Run stages in this process's Ray, skipping those that are finished; return what the run holds.

    Args:
        stages: one or several, such as ("teacher", "label_only"), by the names of docs/design.md, section 3; none: all of
            a pipeline.

    Raises:
        DfssdError: a user error, with the stage left so that the same call goes on; or an unknown stage.
    """
    from dfssd.pipeline.run import run_stages
    from dfssd.pipeline.stages import ROWS, wanted
    from dfssd.runtime.artefact_names import ArtefactName

    names = [ArtefactName.parse(stage) for stage in ((stages,) if isinstance(stages, str) else stages)]
    for name in names:
        if name.role not in ROWS:
            raise DfssdError(
                f"there is no stage {str(name)!r}{nearest(name.role, ROWS)}", todo=f"known: {', '.join(ROWS)}"
            )
    run_stages(config, names or wanted(config))
    return open_run(config.run.storage_path, config.run.run_name)


def open_run(storage_path: str, run_name: str) -> FinishedRun:
    """What a run has left.

    Raises:
        DfssdError: there is no such run.
    """
    store = Storage(storage_path).at(run_name)
    found = FinishedRun(store)
    if not found.stages:
        raise DfssdError("no stage of this run is finished", where=store.uri, todo="run one, or give another name")
    return found


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, read-only."""

    store: Storage

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Record of each finished stage (settings, inputs, outputs, summary), by its name."""
        names = [name for name in self.store.folders() if self.store.exists(f"{name}/stage.json")]
        return {name: dict(self.store.read_json(f"{name}/stage.json")) for name in names}

    @property
    def metrics(self) -> dict[str, Any]:
        """What `evaluate` measured, by model; and the gate.

        Raises:
            DfssdError: it was not run.
        """
        return dict(self.store.read_json(self._file("report", "metrics.json")))

    def history(self, stage: str) -> list[dict[str, float]]:
        """Logged numbers of a training (losses, validation), each with its "step".

        Raises:
            DfssdError: it is not finished.
        """
        return list(self.store.read_json(self._file(stage, "history.json")))

    def model(self, stage: str = "student") -> YOLO:
        """The best weights of a training, as an Ultralytics model.

        Raises:
            DfssdError: it is not finished.
        """
        import tempfile

        from ultralytics import YOLO

        data = self.store.read(self._file(stage, "best.pt"))
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / f"{stage}.pt"
            place.write_bytes(data)
            return YOLO(str(place), task="detect")

    def _file(self, stage: str, name: str) -> str:
        if not self.store.exists(f"{stage}/{name}"):
            have = ", ".join(self.stages)
            raise DfssdError(f"the run has no {stage}/{name}", where=self.store.uri, todo=f"finished stages: {have}")
        return f"{stage}/{name}"
