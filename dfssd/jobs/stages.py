"""The commands of single stages: their flags are the settings that their rows of the table read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfssd.config import Config
from dfssd.config.file import keys_in
from dfssd.config.flags import parse
from dfssd.errors import DamagedFile, DfssdError
from dfssd.pipeline.stages import row_of, rows_of
from dfssd.runtime.artefact_names import EXPORT, LABEL_ONLY, REPORT, STUDENT, TEACHER, ArtefactName


def reads(*names: ArtefactName) -> tuple[str, ...]:
    """Settings that these stages read."""
    return tuple(dict.fromkeys(key for name in names for key in row_of(name).reads_in(name.round)))


def run_rows(command: str, words: Sequence[str]) -> None:
    """Run the stages of a command; its help is what their rows say."""
    rows = rows_of(command)
    names = [ArtefactName(row.role) for row in rows]
    said = [f"{row.does[0].upper()}{row.does[1:]}; leaves <run>/{row.role}." for row in rows]
    said += [row.command.more for row in rows if row.command.more]
    more = " ".join(row.command.example for row in rows)
    example = f"dfssd {command} --storage-path runs --run-name line3 {more}".rstrip()
    config, _ = parse("\n".join(said), reads(*names), words, prog=f"dfssd {command}", example=example)
    from dfssd.pipeline.run import run_stages

    run_stages(config, names)


def is_named(key: str, words: Sequence[str], given: str) -> bool:
    """Does the command line, or its --config, name this setting, be it with the value that it has by default?

    Args:
        key: dotted. words: of the command line. given: its --config.
    """
    flag = "--" + key.rpartition(".")[2].replace("_", "-")
    named = {word.partition("=")[0].replace("_", "-").replace("--no-", "--", 1) for word in words}
    return flag in named or (bool(given) and key in keys_in(given))


def as_exported(config: Config, words: Sequence[str], given: str) -> Config:
    """The settings with the formats and int8 that the export of the run holds, where --overwrite makes it again and the
    command names no formats: to measure at another rate is no reason to lose OpenVINO.

    Args:
        words: of the command line. given: its --config.
    """
    if not config.run.overwrite or is_named("export.formats", words, given):
        return config
    from dfssd.runtime.artefact import Stage  # which --help does without
    from dfssd.runtime.storage import Storage

    run = Storage(config.run.storage_path).at(config.run.run_name)
    asked: dict[str, Any] = {"formats": list(config.export.formats), "int8": config.export.int8}
    stage = Stage(run, EXPORT, {"export": dict(asked)}, (), row_of(EXPORT).grows)
    try:
        stage.keep()
    except DamagedFile as error:
        print(f"WARNING: {error.where}: {error.what}; what else than {', '.join(asked['formats'])} is lost", flush=True)
    kept = stage.config["export"]
    if is_named("export.int8", words, given):
        kept["int8"] = asked["int8"]
    kept["nms_inside"] = config.export.nms_inside or (
        not is_named("export.nms_inside", words, given) and stage.recorded().get("export", {}).get("nms_inside", False)
    )
    if kept == {**asked, "nms_inside": config.export.nms_inside}:
        return config
    said = ", ".join([*kept["formats"], *(name.replace("_", " ") for name in ("int8", "nms_inside") if kept[name])])
    print(f"formats: {said}, with those of this export (--formats makes exactly what it names)", flush=True)
    export = config.export.model_copy(update={**kept, "formats": tuple(kept["formats"])})
    return config.model_copy(update={"export": export})


def at_size_of_run(config: Config, words: Sequence[str], given: str) -> Config:
    """The settings at the input size of the run, where the command line names none: another size is another measurement.

    Args:
        words: of the command line. given: its --config, whose size counts.
    """
    if is_named("train.imgsz", words, given):
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
