"""What a row of the table of stages says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfssd.config import Config
from dfssd.runtime.artefact_names import ArtefactName
from dfssd.train.training import Training

if TYPE_CHECKING:
    from dfssd.runtime.storage import Storage  # and pyarrow, which --help does without

Inputs = Callable[[Config, "Storage", int], tuple[ArtefactName, ...]]


@dataclass(frozen=True)
class StageCommand:
    """The command that runs a stage; several stages may name the same one, which then runs them in order.

    Args:
        name: `dfssd NAME`; '' the stage's role.
        does: one line for the list of commands; '' that of the stage.
        more: what its help says beside what its stages do.
        example: what its help shows after `dfssd NAME --storage-path runs --run-name line3`.
        job: "module:function" that takes the words after its name, where it does more than to run its stages.
    """

    name: str = ""
    does: str = ""
    more: str = ""
    example: str = ""
    job: str = ""


@dataclass(frozen=True)
class StageRow:
    """One stage.

    Args:
        role: what it leaves; the first of the artefact's two names (the other is the round).
        does: one line for documentation and help.
        reads: dotted keys of the settings that it reads. They are the flags of its job, and what must match for a finished
            artefact to be skipped, but for those that only change speed (`config.free.FREE`).
        inputs: artefacts that it reads, of (config, run, round).
        body: "module:function", imported when it is run; takes (context, stage, MLflow run id), returns the summary and the
            names of the files it has left.
        reads_later: further settings that it reads from round 2 on.
        free: settings that it reads and that do not count.
        training: what it trains, where it is a training.
        needs: "module:function" that stops where something else than an artefact is missing, and says what is there, in
            lines; takes (context, stage, names of the stages planned before it). It is asked before anything is begun or
            deleted, and by the dry run.
        renew: "module:function" that is asked where what is there differs, before it is refused; takes (context, stage).
        grows: settings to which a finished artefact is added where more is asked for, instead of refusing; `--overwrite`
            makes exactly what is asked for.
        again: "module:function" that is called where a finished artefact is skipped; takes (context, stage).
        wanted: is it part of a pipeline with these settings?
        in_rounds: does a later round (`--rounds`) do it again?
        ends_rounds: after it, of (run, round): is there no further stage of this round, nor a further round?
        command: how it is run alone.
        teaches: does it leave a teacher, which labels and teaches where it is the best one on val?
    """

    role: str
    does: str
    reads: tuple[str, ...]
    inputs: Inputs
    body: str
    reads_later: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    training: Training | None = None
    needs: str = ""
    renew: str = ""
    grows: tuple[str, ...] = ()
    again: str = ""
    wanted: Callable[[Config], bool] = lambda config: True
    in_rounds: bool = False
    ends_rounds: Callable[[Storage, int], bool] = lambda run, number: False
    command: StageCommand = StageCommand()
    teaches: bool = False

    @property
    def command_name(self) -> str:
        return self.command.name or self.role

    def reads_in(self, number: int) -> tuple[str, ...]:
        """Settings that it reads in a round."""
        return self.reads if number == 1 else (*self.reads, *self.reads_later)
