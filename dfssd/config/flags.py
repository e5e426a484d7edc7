"""Flags of the command line, made from the settings: names, defaults, ranges and help stand in `dfssd.config` alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import tyro
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from dfssd.config.choices import Choice
from dfssd.config.file import checked, read_config, to_yaml
from dfssd.config.sections import SECTIONS, Config, section
from dfssd.errors import DfssdError

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
VERSION_HELP = "Print the version, and stop."  # which `cli.run` does, for all commands
COMMON: dict[str, Any] = {
    "config": (str, FieldInfo(default="", description="Settings from a YAML or JSON file; flags win over it.")),
    "print_config": (
        Switch,
        FieldInfo(default=False, description="Print the settings as YAML for --config, and stop."),
    ),
    "version": (Switch, FieldInfo(default=False, description=VERSION_HELP)),
}


def parse(
    doc: str,
    shown: Sequence[str],
    args: Sequence[str] | None = None,
    base: Config | None = None,
    *,
    prog: str | None = None,
    example: str = "",
    modes: Mapping[str, Sequence[str]] | None = None,
    spare: Collection[str] = (),
    **extra: Any,
) -> tuple[Config, Any]:
    """Read the command line of a job.

    Args:
        doc: the job's description, shown by --help.
        shown: settings that the job shows and accepts: dotted keys, or names of whole sections. The others keep their values.
        args: words of the command line; default those of the process.
        base: what flags that are not given mean; default the defaults.
        prog: how the command is called in its help.
        example: a command line, shown by --help.
        modes: further flags with which the job does something else, and the settings that it then reads. The others have no
            effect, nor have further flags that belong to none.
        spare: settings that the record of a stage, given as --config, need not hold.
        extra: further flags of the job, name=(type, pydantic's Field(...)). One that has an effect only with another one
            names it: `json_schema_extra={"of": "weights"}`, or with one value of it, `{"of": "export=labelstudio"}`.

    Returns:
        the full config, and the parsed flags with the extra ones as attributes.

    Raises:
        DfssdError: values that cannot be, flags without an effect, or an unreadable --config.
    """
    words = list(sys.argv[1:] if args is None else args)
    base = base or Config()
    keys = expand(shown)
    if file := _value_of("--config", words):
        flags = named(words)
        base = read_config(file, base, [k for k in keys if k not in spare and _flag_of(k) not in flags])
    model = _model(keys, base, {**extra, **COMMON})
    text = doc.strip() + (f"\n\nExample:\n  {example}" if example else "")
    parsed = tyro.cli(
        model,
        args=words,
        description=text,
        prog=prog,
        # All help is in the settings: tyro need not look for comments beside the source of classes that were made here.
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    tree = base.model_dump()
    for key in keys:
        name, _, field = key.partition(".")
        if field:
            tree[name][field] = getattr(getattr(parsed, name), field)
        else:
            tree[name] = getattr(parsed, name)
    config = checked(tree)
    if parsed.print_config:
        print(to_yaml(config, keys), end="")
        sys.exit(0)
    _refuse_without_effect(words, parsed, keys, modes or {}, extra)
    return config, parsed


def _refuse_without_effect(
    words: Sequence[str], parsed: Any, keys: Sequence[str], modes: Mapping[str, Sequence[str]], extra: Mapping[str, Any]
) -> None:
    """Refuse flags that do nothing in the mode that the others ask for."""
    given = named(words)
    for name, (_, info) in extra.items():
        if _word(name) in given and (mode := _of(info)) and not _is_on(parsed, mode):
            flag = "--" + mode.replace("_", "-").replace("=", " ")
            raise DfssdError(f"--{_word(name)} has no effect without {flag}", todo=f"leave it out, or give {flag}")
    for mode in (mode for mode in modes if _is_on(parsed, mode)):
        read = expand(modes[mode])
        idle = [_flag_of(key) for key in keys if key not in read and _flag_of(key) in given]
        idle += [_word(n) for n, (_, info) in extra.items() if n != mode and not _of(info) and _word(n) in given]
        if idle:
            flags = ", ".join(f"--{flag}" for flag in idle)
            raise DfssdError(f"{flags} has no effect with --{_word(mode)}", todo="leave it out")


def _is_on(parsed: Any, mode: str) -> bool:
    name, _, value = mode.partition("=")
    found = getattr(parsed, name)
    return found == value if value else bool(found)


def _word(name: str) -> str:
    return name.replace("_", "-")


def _of(info: FieldInfo) -> str:
    """The flag that this one belongs to; '' where it is always read."""
    return str(info.json_schema_extra.get("of", "")) if isinstance(info.json_schema_extra, dict) else ""


def named(words: Sequence[str]) -> set[str]:
    """Flags of a command line, without dashes before and values after."""
    return {
        w.partition("=")[0].replace("_", "-").removeprefix("--no-").removeprefix("--") for w in words if w[:2] == "--"
    }


def _flag_of(key: str) -> str:
    """How the flag of a setting is written, without its dashes."""
    name, _, field = key.partition(".")
    info = SECTIONS[name].model_fields[field] if field else Config.model_fields[name]
    more = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return _word(str(more.get("flag", field or name)))


def expand(shown: Sequence[str]) -> tuple[str, ...]:
    """Dotted keys in the order of the config, each once; a section's name stands for all of its fields."""
    wanted = {key for name in shown for key in (section(name) if name in SECTIONS else (name,))}
    found = [key for name in Config.model_fields for key in (section(name) if name in SECTIONS else (name,))]
    assert wanted <= set(found), f"unknown settings: {wanted - set(found)}"
    return tuple(key for key in found if key in wanted)


def _value_of(flag: str, words: Sequence[str]) -> str:
    """What was given to a flag that is needed before the others are read."""
    for k, word in enumerate(words):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and k + 1 < len(words):
            return words[k + 1]
    return ""


def _model(keys: Sequence[str], base: Config, extra: dict[str, Any]) -> Any:
    """A dataclass with the fields of these settings, unchecked: the config checks them, in words of its own."""
    fields: list[Any] = []
    for name in Config.model_fields:
        own = [key.partition(".")[2] for key in keys if key.startswith(f"{name}.")]
        if own:
            values, infos = getattr(base, name), SECTIONS[name].model_fields
            part = dataclasses.make_dataclass(
                SECTIONS[name].__name__,
                [_field(field, infos[field], infos[field].annotation, getattr(values, field)) for field in own],
                frozen=True,
            )
            part.__doc__ = SECTIONS[name].__doc__
            fields.append((name, part, part()))
        elif name in keys:
            info = Config.model_fields[name]
            fields.append(_field(name, info, info.annotation, getattr(base, name)))
    for name, (annotation, info) in extra.items():
        fields.append(_field(name, info, annotation, info.default))
    return dataclasses.make_dataclass("Job", fields)


def _field(name: str, info: FieldInfo, annotation: Any, default: Any) -> tuple[str, Any, Any]:
    if any(isinstance(m, BeforeValidator) for m in info.metadata):  # written in a form of its own: read as words
        annotation, default = tuple[str, ...], tuple(map(str, default))
    for choice in (m for m in info.metadata if isinstance(m, Choice)):
        annotation = Literal[choice.names]
    mode = _of(info).replace("_", "-").replace("=", " ")
    said = f"{info.description or ''}{allowed(info)}" + (f" Only with --{mode}." if mode else "")
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    flag = str(extra["flag"]) if "flag" in extra else None  # where the field's name would say too little
    return name, Annotated[annotation, tyro.conf.arg(help=said, name=flag)], default


def allowed(info: FieldInfo) -> str:
    """The range of a number in words, in brackets; '' where any value will do."""
    bounds = {}
    for rule in info.metadata:
        for kind in ("ge", "gt", "le", "lt", "multiple_of"):
            if getattr(rule, kind, None) is not None:
                bounds[kind] = getattr(rule, kind)
    words = {"ge": "from", "gt": "above", "le": "to", "lt": "below", "multiple_of": "in steps of"}
    said = " ".join(f"{words[kind]} {bounds[kind]:g}" for kind in words if kind in bounds)
    return f" [{said}]" if said else ""
