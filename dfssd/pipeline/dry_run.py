"""`--dry-run`: check everything that can be checked without doing the work, and say how long the work will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfssd.config import Config
from dfssd.errors import DamagedFile, DfssdError
from dfssd.pipeline.budget import with_expected_steps, with_steps
from dfssd.pipeline.context import Context
from dfssd.pipeline.data import count_images
from dfssd.pipeline.stages import is_wanted, make_stage, plan, resolve, row_of
from dfssd.pipeline.timing import StepTimer, step_timer
from dfssd.pipeline.training import train_job
from dfssd.report.tables import render
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, PSEUDO, REPORT, ArtefactName, is_finished
from dfssd.runtime.progress import clock

RAY_START_S = 20  # seconds until a worker group runs its first step, seen on two cores


def dry_run(context: Context, stages: Sequence[ArtefactName]) -> None:
    """Check storage, data, weights and resources; print stages, their state, steps and expected time.

    Raises:
        DfssdError: the first thing that would stop the real run.
    """
    context.run.check_writable()
    print(f"storage: {context.run.uri} is writable")
    config = context.config = _with_steps(context, stages)
    names = [n for n in plan(config, stages) if DATASET not in stages or is_wanted(config, n)]
    states = _states(context, names)
    timer, images = step_timer(config), _images(context, names)
    rows, times = [], []
    for name in names:
        steps, seconds = _expected(context, name, images, None if states[name] == "finished" else timer)
        times.append(seconds)
        rows.append([str(name), states[name], steps, _clock(times[-1])])
    rows.append(["all", "", "", _clock(None if None in times else sum(t or 0.0 for t in times))])
    print(render(f"plan ({timer.title})", ["stage", "state", "steps", "expected time"], rows))


def _with_steps(context: Context, names: Sequence[ArtefactName]) -> Config:
    """Settings as the prepared data set asks for, else as the data's list of images suggests: a number of steps where none is
    given, and no unlabelled images in a batch where every image is labelled.
    """
    config = with_steps(context.config, context.run)
    if DATASET not in names or is_finished(context.run, DATASET):
        return config
    found = count_images(config)
    return with_expected_steps(config, found.images, found.labelled)


def _clock(seconds: float | None) -> str:
    return "unknown" if seconds is None else clock(seconds)


def _states(context: Context, names: Sequence[ArtefactName]) -> dict[ArtefactName, str]:
    """State of each stage, once what it needs is found; prints what is there.

    Raises:
        DfssdError: what would stop the stage.
    """
    states: dict[ArtefactName, str] = {}
    told: set[str] = set()
    for name in names:
        stage, row = make_stage(context.config, context.run, name), row_of(name)
        state = _state(context, stage, states)
        if row.needs and state != "finished":
            for line in resolve(row.needs)(context, stage, tuple(states)):
                if line not in told:
                    print(line)
                told.add(line)
        states[name] = state
    return states


def _state(context: Context, stage: Stage, before: Mapping[ArtefactName, str]) -> str:
    """State of a stage, whose inputs are finished or planned before it.

    Raises:
        DfssdError: an input is neither, or the artefact there was made with other settings.
    """
    remade = [name for name in stage.inputs if before.get(name, "finished") != "finished"]
    if not remade or any(name not in remade and not is_finished(context.run, name) for name in stage.inputs):
        if not context.config.run.overwrite:
            return stage.state()
        try:
            return "overwritten" if stage.differs() else stage.state()
        except DamagedFile:
            return "overwritten"
    there = any(stage.store.exists(name) for name in ("started.json", "stage.json"))
    return "overwritten" if there and context.config.run.overwrite else "new"


def _expected(context: Context, name: ArtefactName, images: int, timer: StepTimer | None) -> tuple[str, float | None]:
    """(steps, seconds) that a stage will take; None where a step cannot be timed.

    Args:
        timer: None of a finished stage, which takes no time.
    """
    config, training = context.config, row_of(name).training
    if training:
        job = train_job(config, context.run, name)
        if timer is None:
            return str(job.steps), 0.0
        step_s = timer(job.model_spec, job.distills or name.round > 1, job.distills)
        if step_s is None:
            return str(job.steps), None
        # Validation of a tenth of the images, ten times, costs about a third of a training step an image.
        validation = 10 * images / 10 / config.train.batch * step_s / 3
        return str(job.steps), job.steps * step_s + validation + RAY_START_S
    if timer is None:
        return "", 0.0
    if name.role == PSEUDO.role:
        views = (4 if config.pseudo.tta == "flips" else 1) * max(1, len(config.pseudo.label_teachers))
        return "", RAY_START_S + images * views / 50
    return "", RAY_START_S + images / 50 if name == REPORT else images / 1000


def _images(context: Context, names: Sequence[ArtefactName]) -> int:
    """Images of the prepared data set, or of the data that will be prepared.

    Raises:
        DfssdError: it is not prepared, nor is that planned.
    """
    if DATASET in names:
        return count_images(context.config).images
    if not is_finished(context.run, DATASET):
        raise DfssdError(
            "the data set is not prepared", where=context.run.path(str(DATASET)), todo="run dfssd prepare first"
        )
    return int(context.run.read_json(f"{DATASET}/stage.json")["summary"]["images"])
