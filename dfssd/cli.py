"""What all jobs share: flags from the config, user errors as text with exit code 2, and the dry run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from pydantic import ValidationError, create_model

from dfssd.config import Config, Section
from dfssd.errors import DfssdError, find_user_error


def parse(
    doc: str, sections: Sequence[str], args: Sequence[str] | None = None, base: Config | None = None, **extra: Any
) -> tuple[Config, Any]:
    """Read the command line of a job.

    Args:
        doc: the job's description, shown by --help.
        sections: sections of Config that the job uses; the others keep their defaults.
        base: what flags that are not given mean; default the defaults.
        extra: further flags of the job as pydantic fields, name=(type, Field(...)).

    Returns:
        the full config, and the parsed flags with the extra ones as attributes.
    """
    base = base or Config()
    fields: dict[str, Any] = {s: (Config.model_fields[s].annotation, getattr(base, s)) for s in sections}
    model = create_model("Job", __base__=Section, **fields, **extra)
    model.__doc__ = doc
    parsed = tyro.cli(
        model,
        args=split_layers(sys.argv[1:] if args is None else args),
        description=doc,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    shared = {name: getattr(parsed, name) for name in Config.model_fields if name in fields or name in extra}
    try:
        return Config(**shared), parsed
    except ValidationError as error:
        raise DfssdError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from error


def split_layers(args: Sequence[str]) -> list[str]:
    """Let layers be written as in papers: `--taps 15,18,21` beside `--taps 15 18 21`."""
    words: list[str] = []
    for word in args:
        flag, equals, value = word.partition("=")
        if flag in ("--taps", "--teacher-taps") and equals:
            words += [flag, *value.split(",")]
        elif words and words[-1] in ("--taps", "--teacher-taps"):
            words += word.split(",")
        else:
            words.append(word)
    return words


def main(job: Callable[[], None]) -> None:
    """Run a job; user errors end as text on stderr with exit code 2, Ctrl-C with 130 and how to go on."""
    try:
        job()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        user_error = find_user_error(error)
        if user_error is None:
            raise
        print(f"\nerror: {user_error}", file=sys.stderr)
        sys.exit(2)
