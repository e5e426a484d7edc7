"""What the jobs of single stages share: their flags are the settings that their rows of the table read."""

from __future__ import annotations

from collections.abc import Sequence

from dfssd.config import Config
from dfssd.errors import DfssdError
from dfssd.pipeline.stages import row_of
from dfssd.runtime.artefact_names import ArtefactName


def reads(*names: ArtefactName) -> tuple[str, ...]:
    """Settings that these stages read."""
    return tuple(dict.fromkeys(key for name in names for key in row_of(name).reads_in(name.round)))


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
