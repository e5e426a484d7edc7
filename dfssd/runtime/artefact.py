"""Stages and their artefacts: skip what is finished, continue what was interrupted, refuse what has changed.

A stage is a function of its inputs and its config. `started.json` is written first (config, inputs, MLflow run),
`stage.json` last (the same, plus outputs with sizes and sha256): an artefact without `stage.json` is unfinished.
What `stage.json` says is checked: sizes where a stage is skipped, sha256 of what a stage reads before it starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dfssd.errors import DamagedFile, DfssdError
from dfssd.runtime.artefact_names import PSEUDO, ArtefactName, is_finished
from dfssd.runtime.code_version import code_version
from dfssd.runtime.lease import Lease
from dfssd.runtime.outputs import damaged_outputs, digest_of
from dfssd.runtime.records import differences
from dfssd.runtime.storage import Storage

REMADE = {PSEUDO.role: ("shard-", "val-")}  # outputs that the stage itself makes again, one by one
ADDED_TO = "added_to"  # in started.json: what was finished when an addition to it began
NOT_READ = (".png", ".csv", ".html", "last.pt")  # ends of outputs that no later stage reads


@dataclass
class Stage:
    """One step of the pipeline and the folder it leaves its artefact in.

    Args:
        run: storage of the run, `<storage-path>/<run-name>`.
        name: of the artefact; as text its folder.
        config: the settings this stage's result depends on.
        inputs: artefacts that it reads; their output digests become part of what must match.
        grows: dotted keys of settings (lists, switches) to which a finished artefact is added where more is asked for.
    """

    run: Storage
    name: ArtefactName
    config: dict[str, Any]
    inputs: tuple[ArtefactName, ...] = ()
    grows: tuple[str, ...] = ()
    started: float = field(default_factory=time.time)
    held: Lease | None = field(default=None, init=False)

    @property
    def store(self) -> Storage:
        return self.run.at(str(self.name))

    def lease(self) -> Lease:
        """What must be held while the stage is made, so that no two drivers make it at once."""
        self.held = Lease(self.run, str(self.name))
        return self.held

    def input_digests(self) -> dict[str, str]:
        digests = dict[str, str]()
        for name in self.inputs:
            if not is_finished(self.run, name):
                raise DfssdError(
                    f"stage '{self.name}' needs the artefact '{name}', which is not finished",
                    where=self.run.path(str(name)),
                    todo="run that stage first, or dfssd pipeline, which runs all in order",
                )
            digests[str(name)] = self.record_of(name)["digest"]
        return digests

    def record_of(self, name: ArtefactName) -> dict[str, Any]:
        """The `stage.json` of this artefact or of an input.

        Raises:
            DamagedFile: it is empty, cut, or of another shape.
        """
        todo = f"restore it from a backup, or make '{name}' again with --overwrite"
        keys = ("config", "inputs", "digest", "summary") if name == self.name else ("digest",)
        return self.run.read_record(f"{name}/stage.json", keys, todo)

    def key(self) -> dict[str, Any]:
        return {"config": self.config, "inputs": self.input_digests()}

    def keep(self) -> None:
        """Ask for what is there as well, in the settings that grow: what was finished before is not lost, not even where
        adding to it was interrupted.

        Raises:
            DamagedFile: the record is empty, cut, or of another shape.
        """
        for key, there in self._there_before().items():
            section, _, field = key.partition(".")
            asked = self.config[section][field]
            if isinstance(asked, list):
                self.config[section][field] = list(dict.fromkeys([*(there or []), *asked]))
            else:
                self.config[section][field] = asked or bool(there)

    def _there_before(self) -> dict[str, Any]:
        """What is finished, of the settings that grow, or was when an addition to it began; by dotted key."""
        if self.store.exists("stage.json"):
            return self._growing(self.record_of(self.name)["config"])
        return dict(self._started().get(ADDED_TO, {}))

    def recorded(self) -> dict[str, Any]:
        """The settings that are recorded of what is there, finished or begun, by section; none where nothing is."""
        if self.store.exists("stage.json"):
            try:
                return dict(self.record_of(self.name)["config"])
            except DamagedFile:
                return {}
        return dict(self._started().get("config", {}))

    def _growing(self, config: dict[str, Any]) -> dict[str, Any]:
        """What these settings say of those that grow, by dotted key."""
        parts = ((key, *key.split(".")) for key in self.grows)
        return {key: config.get(section, {}).get(field) for key, section, field in parts}

    def _only_grown(self, changed: list[str]) -> bool:
        """Do only settings differ that grow? Beside what is finished more is asked for, or what was begun is not finished."""
        mine = tuple(f"config.{key}: " for key in self.grows)
        return bool(changed and mine) and all(line.startswith(mine) for line in changed)

    def state(self) -> str:
        """'finished', 'added to', 'interrupted' or 'new'; compares what was recorded with what is asked for.

        Raises:
            DfssdError: the artefact there was made, or begun, with other settings or inputs, or is damaged; or an input is
                missing.
        """
        state, changed = self._compared(self.key())
        if self._only_grown(changed):
            return "added to" if state == "finished" else state
        if changed:
            raise self._refusal(state, changed)
        return "interrupted" if state == "finished" and self._made_again() else state

    def differs(self) -> bool:
        """Was what is there made, or begun, with other settings or inputs, or is its record damaged?"""
        try:
            return bool(self._compared(self.key())[1])
        except DamagedFile:
            return True

    def _compared(self, key: dict[str, Any]) -> tuple[str, list[str]]:
        """State of what is there, and how its settings and inputs differ from `key`."""
        if self.store.exists("stage.json"):
            state, recorded = "finished", self.record_of(self.name)
        elif self.store.exists("started.json"):
            todo = "restore it from a backup, or add --overwrite, which begins this stage anew"
            state, recorded = "interrupted", self.store.read_record("started.json", ("config", "inputs"), todo)
        else:
            return "new", []
        return state, differences({k: recorded[k] for k in ("config", "inputs")}, key)

    def _made_again(self) -> dict[str, str]:
        """By name, what is wrong with outputs of the finished artefact that the stage makes again, one by one.

        Raises:
            DamagedFile: other outputs are damaged.
        """
        remade = REMADE.get(self.name.role, ())
        damaged = damaged_outputs(self.store, self.record_of(self.name).get("outputs", {}), read=remade)
        lost = [f"{name}: {why}" for name, why in damaged.items() if not name.startswith(remade or ("\0",))]
        if lost:
            raise DamagedFile(
                f"the artefact '{self.name}' is damaged:\n    " + "\n    ".join(lost),
                where=self.store.uri,
                todo="restore these files from a backup, or add --overwrite to make this stage again",
            )
        return damaged

    def _remove(self, damaged: dict[str, str]) -> None:
        """Remove damaged outputs, so that they are made again."""
        for name, why in damaged.items():
            print(f"WARNING: {self.store.path(name)} is damaged ({why}) and is made again", flush=True)
            self.store.delete(name)
        self.store.delete("stage.json")

    def check_inputs(self) -> None:
        """Compare what this stage reads with the sha256 that was written when it was made.

        Raises:
            DamagedFile: a file differs or is missing.
        """
        for name in self.inputs:
            outputs = {k: v for k, v in self.record_of(name).get("outputs", {}).items() if not k.endswith(NOT_READ)}
            damaged = damaged_outputs(self.run.at(str(name)), outputs, read=tuple(outputs))
            if not damaged:
                continue
            remade = all(one.startswith(REMADE.get(name.role, ("\0",))) for one in damaged)
            job = "run dfssd pseudo_label (or dfssd pipeline) again: it makes what is damaged anew"
            raise DamagedFile(
                f"stage '{self.name}' reads '{name}', which is damaged:\n    "
                + "\n    ".join(f"{file}: {why}" for file, why in damaged.items()),
                where=self.run.path(str(name)),
                todo=job if remade else f"restore the file from a backup, or make '{name}' again with --overwrite",
            )

    def _refusal(self, state: str, changed: list[str]) -> DfssdError:
        renewed = [line.removeprefix("inputs.").partition(":")[0] for line in changed if line.startswith("inputs.")]
        settings = [line for line in changed if not line.startswith("inputs.")]
        what = "settings" if settings or not renewed else "inputs"
        lines = [*settings, *(f"its input '{name}' is another one now, or was made again" for name in renewed)]
        return DfssdError(
            f"stage '{self.name}' was {'made' if state == 'finished' else 'begun'} with other {what}:\n    "
            + "\n    ".join(lines),
            where=self.store.uri,
            todo="take a new --run-name, or add --overwrite to replace it and what was made from it",
        )

    def begin(self, overwrite: bool, ready: Callable[[], object] = lambda: None) -> str:
        """Return the state; with `overwrite` an artefact that does not match, or is damaged, is removed first.

        Nothing is removed before all inputs are there: a missing one says nothing about the artefact that was made of it.

        Args:
            ready: asked before anything is written or removed, where there is something to make; raises where it cannot be.

        Raises:
            DfssdError: an input is missing; or, without `overwrite`, the artefact there does not match.
        """
        key, again = self.key(), dict[str, str]()
        try:
            state, changed = self._compared(key)
            if state == "finished" and not changed and (again := self._made_again()):
                state = "interrupted"
        except DamagedFile:
            if not overwrite:
                raise
            state, changed = "damaged", ["its files"]
        grows = not overwrite and self._only_grown(changed)
        if changed and not overwrite and not grows:
            raise self._refusal(state, changed)
        if state == "finished" and not changed:
            return state
        ready()
        self.check_inputs()
        if grows:  # what is there counts until the new files are written
            before = self._there_before()
            self.store.write_json("started.json", {**key, ADDED_TO: before, "mlflow_run_id": None})
            return "added to" if state == "finished" else state
        if changed:
            self.store.delete()
            state = "new"
        if again:
            self._remove(again)
        if state == "new" or not self.store.exists("started.json"):
            # What was there is gone now; the same command, once this one is interrupted, shall still know of it.
            asked = {ADDED_TO: self._growing(self.config)} if overwrite and self.grows else {}
            self.store.write_json("started.json", {**key, **asked, "mlflow_run_id": None})
        return state

    def recorded_run_id(self) -> str | None:
        """The MLflow run of this stage, so that a resumed stage goes on in the same run."""
        run_id = self._started().get("mlflow_run_id")
        return str(run_id) if run_id else None

    def _started(self) -> dict[str, Any]:
        """What `started.json` says; nothing where it is damaged, which costs no more than a run in MLflow."""
        if not self.store.exists("started.json"):
            return {}
        try:
            return self.store.read_record("started.json", (), "")
        except DamagedFile as error:
            print(f"WARNING: {error.where}: {error.what}", flush=True)
            return {}

    def record_run_id(self, run_id: str) -> None:
        """Remember the MLflow run. A known one stays where there is none now: MLflow may be down for a moment."""
        if run_id:
            self.store.write_json("started.json", {**self._started(), "mlflow_run_id": run_id})

    def finish(self, outputs: list[str], summary: dict[str, Any]) -> dict[str, Any]:
        """Write `stage.json`; from here on the stage counts as finished.

        Args:
            outputs: files of the artefact, relative to it; they get a size and sha256.
            summary: numbers worth reading without opening the artefact; `before_s`: what earlier attempts have spent.

        Raises:
            DfssdError: another driver has taken over.
        """
        if self.held:
            self.held.check()
        digests = {name: self.store.digest(name) for name in sorted(outputs)}
        record = {
            **self.key(),
            "outputs": digests,
            "digest": digest_of(digests),
            "code_version": code_version(),
            "duration_s": round(summary.get("before_s", 0.0) + max(0.0, time.time() - self.started), 1),  # clocks jump
            "finished_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "mlflow_run_id": self.recorded_run_id(),
            "summary": summary,
        }
        self.store.write_json("stage.json", record)
        return record
