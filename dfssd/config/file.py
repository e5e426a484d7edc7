"""Settings as a file: `--config run.yaml` or `.json`. What reports and stage records hold can be given back."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dfssd.config.free import UNRECORDED
from dfssd.config.sections import SECTIONS, Config, all_keys
from dfssd.errors import DfssdError, nearest

WHOLE = "settings.json"  # of a run's folder: all settings of its pipeline

# A stage's record knows these by their content: what they were called says nothing about its result.
_BY_CONTENT = ("data.data", "data.unlabelled", "pseudo.label_teachers", "distill.distill_teacher")
# Named first where a record lacks them: with the default they make the most different run.
MATTER_MOST = ("data.label_fraction", "models.teacher", "models.student", "train.imgsz")


def read_config(path: str, base: Config | None = None, needs: Collection[str] = ()) -> Config:
    """Settings from a file: sections with fields, dotted keys, or a record (`stage.json`) with them under `config`.

    Args:
        base: what the file does not say; default the defaults.
        needs: dotted keys that a record has to hold, for it says nothing of those that its stage does not read.

    Raises:
        DfssdError: no such file, neither YAML nor JSON, an unknown key (with the nearest), a value that cannot be, or the
            record of a stage that reads less than is needed.
    """
    tree = (base or Config()).model_dump()
    found, is_record = _read(path)
    flat = _flat(found, path)
    if is_record:
        _refuse_half_a_run(path, flat, needs)
    for key, value in flat.items():
        name, _, field = key.partition(".")
        if field:
            tree[name][field] = value
        else:
            tree[name] = value
    return checked(tree, where=path)


def keys_in(path: str) -> set[str]:
    """Dotted keys of the settings that a file names; errors as of `read_config`."""
    return set(_flat(_read(path)[0], path))


def checked(tree: dict[str, Any], where: str = "") -> Config:
    """The settings, checked as a whole.

    Raises:
        DfssdError: what is wrong with them, by flag.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise DfssdError("; ".join(_said(e) for e in error.errors()), where=where) from error


def _said(error: Any) -> str:
    """One fault in words: the flag, the value, and what is allowed."""
    said = error["msg"].removeprefix("Value error, ")
    field = [part for part in error["loc"] if isinstance(part, str) and part not in SECTIONS]
    if not field or said.startswith("--"):
        return str(said)
    flag = f"--{field[-1].replace('_', '-')}"
    if said.startswith(repr(error["input"])):
        return f"{flag} {said}"
    return f"{flag} {error['input']}: {said.replace('Input should be', 'must be')}"


def to_yaml(config: Config, keys: tuple[str, ...]) -> str:
    """These settings as YAML that `read_config` takes."""
    import yaml

    plain, tree = config.model_dump(mode="json"), dict[str, Any]()
    for key in keys:
        name, _, field = key.partition(".")
        if field:
            tree.setdefault(name, {})[field] = plain[name][field]
        else:
            tree[name] = plain[name]
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def whole(config: Config) -> dict[str, Any]:
    """All settings, JSON-ready, to be fed back: without what one command alone was told to do with what was there."""
    plain = config.model_dump(mode="json")
    plain["run"] |= {"overwrite": False, "dry_run": False}
    plain["data"]["update"] = False
    return plain


def _refuse_half_a_run(path: str, held: Collection[str], needs: Collection[str]) -> None:
    """What a stage does not read is not in its record; as defaults it would silently make another run.

    Raises:
        DfssdError: naming what is missing, and the file that holds everything.
    """
    by_content = {key for key in _BY_CONTENT if key in needs}  # asked for by a warning of its own
    missing = [key for key in needs if key not in held and key not in UNRECORDED and key not in by_content]
    if not missing:
        return
    stage = Path(path).expanduser().absolute().parent
    first = [key for key in MATTER_MOST if key in missing] or missing[:4]
    more = f" and {len(missing) - len(first)} more" if len(missing) > len(first) else ""
    kept = stage.parent / WHOLE
    if kept.exists():
        todo = f"--config {kept} holds all settings of its last finished pipeline"
    else:
        todo = f"save the JSON at the end of {stage.parent / 'report' / 'report.html'} as a file: it holds all settings"
    raise DfssdError(
        f"a stage's record holds only what that stage reads ({stage.name}): {', '.join(first)}{more} are missing, and "
        "would be the defaults",
        where=path,
        todo=f"{todo}; or give the missing ones as flags",
    )


def _read(path: str) -> tuple[dict[str, Any], bool]:
    """What a file says, and whether it is the record of a stage."""
    import yaml

    try:
        text = Path(path).expanduser().read_text()
        found = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise DfssdError(
            f"the settings cannot be read: {why}", where=path, todo="--config takes a YAML or JSON file"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise DfssdError(f"the file is neither YAML nor JSON: {error}", where=path) from error
    if found is None:
        return {}, False
    if not isinstance(found, dict):
        raise DfssdError(
            "the file holds no settings", where=path, todo="write sections with fields, see --print-config"
        )
    if not {"config", "inputs"} <= set(found):
        return {str(k): v for k, v in found.items()}, False
    record = {name: dict(v) if isinstance(v, dict) else v for name, v in found["config"].items()}
    for name, _, field in (key.partition(".") for key in _BY_CONTENT):
        if record.get(name, {}).pop(field, None):
            print(
                f"WARNING: {path} knows {name}.{field} by its content alone: give --{field.replace('_', '-')}",
                flush=True,
            )
    return record, True


def _flat(tree: dict[str, Any], path: str) -> dict[str, Any]:
    """Values by dotted key, each known."""
    known, flat = all_keys(), dict[str, Any]()
    for name, value in tree.items():
        own = {f"{name}.{field}": v for field, v in value.items()} if isinstance(value, dict) else {name: value}
        for key, setting in own.items():
            if key not in known:
                same = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
                raise DfssdError(
                    f"{key!r} is not a setting{nearest(key, same or known)}",
                    where=path,
                    todo="--print-config shows all settings of a command",
                )
            flat[key] = setting
    return flat
