"""Stages and their artefacts: skip what is finished, continue what was interrupted, refuse what has changed.

A stage is a function of its inputs and its config. `started.json` is written first (config, inputs, MLflow run),
`stage.json` last (the same, plus outputs with sizes and sha256): an artefact without `stage.json` is unfinished.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfssd import __version__
from dfssd.errors import DfssdError
from dfssd.runtime.artefact_names import ArtefactName, is_finished
from dfssd.runtime.storage import Storage


def code_version() -> str:
    """Version and, in a checkout, the commit; '+' marks uncommitted changes."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__  # no git here: an installed package or an uploaded working directory
    return f"{__version__}+g{commit}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'key: old -> new' for every dotted key whose value differs."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key, '(unset)')} -> {b.get(key, '(unset)')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "(unset)") != b.get(key, "(unset)")
    ]


@dataclass
class Stage:
    """One step of the pipeline and the folder it leaves its artefact in.

    Args:
        run: storage of the run, `<storage-path>/<run-name>`.
        name: of the artefact; as text its folder.
        config: the settings this stage's result depends on.
        inputs: artefacts that it reads; their output digests become part of what must match.
    """

    run: Storage
    name: ArtefactName
    config: dict[str, Any]
    inputs: tuple[ArtefactName, ...] = ()
    started: float = field(default_factory=time.time)

    @property
    def store(self) -> Storage:
        return self.run.at(str(self.name))

    def input_digests(self) -> dict[str, str]:
        digests = dict[str, str]()
        for name in self.inputs:
            if not is_finished(self.run, name):
                raise DfssdError(
                    f"stage '{self.name}' needs the artefact '{name}', which is not finished",
                    where=self.run.path(str(name)),
                    todo="run that stage first, or jobs/pipeline.py, which runs all in order",
                )
            digests[str(name)] = self.run.read_json(f"{name}/stage.json")["digest"]
        return digests

    def key(self) -> dict[str, Any]:
        return {"config": self.config, "inputs": self.input_digests()}

    def state(self) -> str:
        """'finished', 'interrupted' or 'new'; compares what was recorded with what is asked for.

        Raises:
            DfssdError: the artefact there was made, or begun, with other settings or inputs; or an input is missing.
        """
        state, changed = self._compared(self.key())
        if changed:
            raise self._refusal(state, changed)
        return state

    def differs(self) -> bool:
        """Was what is there made, or begun, with other settings or inputs?"""
        return bool(self._compared(self.key())[1])

    def _compared(self, key: dict[str, Any]) -> tuple[str, list[str]]:
        """State of what is there, and how its settings and inputs differ from `key`."""
        for name, state in (("stage.json", "finished"), ("started.json", "interrupted")):
            if self.store.exists(name):
                recorded = self.store.read_json(name)
                return state, differences({k: recorded[k] for k in ("config", "inputs")}, key)
        return "new", []

    def _refusal(self, state: str, changed: list[str]) -> DfssdError:
        return DfssdError(
            f"stage '{self.name}' was {'made' if state == 'finished' else 'begun'} with other settings:\n    "
            + "\n    ".join(changed),
            where=self.store.uri,
            todo="take a new --run-name, or add --overwrite to replace it and what was made from it",
        )

    def begin(self, overwrite: bool) -> str:
        """Return the state; with `overwrite` an artefact that does not match is removed first.

        Nothing is removed before all inputs are there: a missing one says nothing about the artefact that was made of it.

        Raises:
            DfssdError: an input is missing; or, without `overwrite`, the artefact there does not match.
        """
        key = self.key()
        state, changed = self._compared(key)
        if changed and not overwrite:
            raise self._refusal(state, changed)
        if changed:
            self.store.delete()
            state = "new"
        if state == "new":
            self.store.write_json("started.json", {**key, "mlflow_run_id": None})
        return state

    def recorded_run_id(self) -> str | None:
        """The MLflow run of this stage, so that a resumed stage goes on in the same run."""
        if not self.store.exists("started.json"):
            return None
        run_id = self.store.read_json("started.json").get("mlflow_run_id")
        return str(run_id) if run_id else None

    def record_run_id(self, run_id: str) -> None:
        self.store.write_json("started.json", {**self.store.read_json("started.json"), "mlflow_run_id": run_id})

    def finish(self, outputs: list[str], summary: dict[str, Any]) -> dict[str, Any]:
        """Write `stage.json`; from here on the stage counts as finished.

        Args:
            outputs: files of the artefact, relative to it; they get a size and sha256.
            summary: numbers worth reading without opening the artefact; `before_s`: what earlier attempts have spent.
        """
        digests = {name: self.store.digest(name) for name in sorted(outputs)}
        record = {
            **self.key(),
            "outputs": digests,
            "digest": digest_of(digests),
            "code_version": code_version(),
            "duration_s": round(summary.get("before_s", 0.0) + time.time() - self.started, 1),
            "finished_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "mlflow_run_id": self.recorded_run_id(),
            "summary": summary,
        }
        self.store.write_json("stage.json", record)
        return record


def digest_of(outputs: dict[str, dict[str, Any]]) -> str:
    """One digest for a set of outputs, from their names and sha256."""
    lines = "\n".join(f"{name} {info['sha256']}" for name, info in sorted(outputs.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
