"""What the jobs of single stages share: their flags are the settings that their rows of the table read."""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.pipeline.stages import row_of
from dfssd.runtime.artefact_names import LABEL_ONLY, REPORT, STUDENT, TEACHER, ArtefactName


def reads(*names: ArtefactName) -> tuple[str, ...]:
    """Settings that these stages read."""
    return tuple(dict.fromkeys(key for name in names for key in row_of(name).reads_in(name.round)))


def at_size_of_run(config: Config, words: Sequence[str], given: str) -> Config:
    """The settings at the input size of the run, where the command line names none: another size is another measurement.

    Args:
        words: of the command line. given: its --config, whose size counts.
    """
    if given or any(word.partition("=")[0] == "--imgsz" for word in words):
        return config
    from dfssd.runtime.storage import Storage

    run = Storage(config.run.storage_path).at(config.run.run_name)
    for name in (REPORT, STUDENT, LABEL_ONLY, TEACHER):
        if run.exists(f"{name}/stage.json"):
            size = run.read_record(f"{name}/stage.json", ("config",), "")["config"].get("train", {}).get("imgsz")
            if size and size != config.train.imgsz:
                print(f"input size: {size} px, that of this run (--imgsz takes another)", flush=True)
                return config.model_copy(update={"train": config.train.model_copy(update={"imgsz": size})})
            return config
    return config


def refuse_without_effect(config: Config, name: ArtefactName, shown: Sequence[str], default: Config) -> None:
    """Refuse flags of a job that do nothing for the stage it was asked for.

    Args:
        shown: settings that the job shows.
        default: what is not given means.

    Raises:
        DfssdError: naming the flags.
    """
    idle = [key for key in shown if key not in reads(name)]
    given = [key.partition(".")[2] for key in idle if _value(config, key) != _value(default, key)]
    if given:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise DfssdError(f"{flags} has no effect on the stage {name}", todo="leave it out")


def _value(config: Config, key: str) -> object:
    section, _, field = key.partition(".")
    return getattr(getattr(config, section), field)
