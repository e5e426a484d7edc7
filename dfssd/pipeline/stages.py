"""The table of stages: a row says what a stage leaves, what it reads, what must be there, and what does the work.

Order, skipping, resuming, refusing, the dry run, the flags of the jobs and the list in docs/design.md follow from it. To add
a stage, add a row, a body (a function in a file of this folder) and a script of jobs/; docs/extending.md shows how.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dfssd.config import Config, section
from dfssd.config.choices import IN_LOOP_POLICIES
from dfssd.pipeline.settings import counted
from dfssd.pipeline.stage_row import StageCommand, StageRow
from dfssd.runtime.artefact_names import (
    DATASET,
    EXPORT,
    LABEL_ONLY,
    MEAN_TEACHER,
    PSEUDO,
    QUALITY,
    REPORT,
    STUDENT,
    TEACHER,
    ArtefactName,
    better_on_val,
    is_finished,
    newest_round,
    val_score,
)
from dfssd.train.training import Training

if TYPE_CHECKING:
    from dfssd.runtime.artefact import Stage
    from dfssd.runtime.storage import Storage


def _teacher_inputs(config: Config, run: Storage, number: int) -> tuple[ArtefactName, ...]:
    return (DATASET,) if number == 1 else (DATASET, PSEUDO.of_round(number - 1))


def _labelling_inputs(config: Config, run: Storage, number: int) -> tuple[ArtefactName, ...]:
    external = config.pseudo.label_teachers and number == 1
    return (DATASET,) if external else (DATASET, best_teacher(run, number))


def _student_inputs(config: Config, run: Storage, number: int) -> tuple[ArtefactName, ...]:
    """A student learns from the newest round that has pseudo-labels, and from the teacher that made them."""
    newest, distill = newest_round(run), config.distill
    own = distill.uses_teacher and not distill.distill_teacher
    teacher = (best_teacher(run, newest),) if own else ()
    return (DATASET, *teacher, *((PSEUDO.of_round(newest),) if _has_unlabelled(config) else ()))


def _has_unlabelled(config: Config) -> bool:
    return config.unlabelled_batch() > 0


def _report_inputs(config: Config, run: Storage, number: int) -> tuple[ArtefactName, ...]:
    return (DATASET, *finished_models(run))


def _no_better(run: Storage, number: int) -> bool:
    """Is the teacher of a later round no better on val than the one before? Says so in one line."""
    if number == 1:
        return False
    before, after = val_score(run, best_teacher(run, number - 1)), val_score(run, best_teacher(run, number))
    better = after > before
    print(
        f"round {number}: teacher's val mAP50-95 {before:.4f} -> {after:.4f}, "
        + ("its labels are used" if better else f"no better: the labels of round {number - 1} are used"),
        flush=True,
    )
    return not better


PLACE = section("run", "seed", "num_workers", "cpus_per_worker", "gpu", "wait_min")  # where it lies; for any stage
RUN = section("run")
_ALONE = section("train", "teacher_steps", "teacher_patience")  # of a training of the student
PSEUDO_LABELS = (  # what L_pse without a teacher in the loop depends on
    *(f"distill.{k}" for k in ("unlabelled_ratio", "score_power", "uncertain", "silent", "agreement_min", "lambda_u")),
    *("distill.balance", "distill.share_u"),
    *section("thresholds"),
)
_SELF_LABELLED = (  # of a training whose own average labels
    *section("train", "lr", "ema_decay"),
    *(f"pseudo.{k}" for k in ("floor", "nms_iou", "max_candidates")),
    *(f"distill.{k}" for k in ("unlabelled_ratio", "uncertain", "silent", "balance", "share_u")),
    *(f"thresholds.{k}" for k in sorted(frozenset().union(*(row.uses for row in IN_LOOP_POLICIES.values())))),
)

STAGES = (
    StageRow(
        role=DATASET.role,
        does="check images and labels, group near-duplicates, split, choose the labelled subset",
        reads=(*PLACE, "run.seed", *section("data")),
        inputs=lambda config, run, number: (),
        body="dfssd.pipeline.data:prepare_stage",
        needs="dfssd.pipeline.data:needs",
        renew="dfssd.pipeline.data:renew",
        command=StageCommand(
            "prepare",
            "check images and labels, split, choose the labelled subset",
            "",
            "--data my_images --label-fraction 0.1",
        ),
    ),
    StageRow(
        role=TEACHER.role,
        does="train the large detector on the labelled images; in later rounds on its own pseudo-labels too",
        reads=(*RUN, "models.teacher", *section("train")),
        reads_later=PSEUDO_LABELS,
        free=("train.steps",),  # counts as far as train.teacher_steps comes from it
        inputs=_teacher_inputs,
        body="dfssd.pipeline.training:train_stage",
        training=Training("teacher"),
        needs="dfssd.pipeline.training:needs",
        in_rounds=True,
        ends_rounds=_no_better,
        command=StageCommand(
            "teacher", "train on labels alone: the teacher, or the label-only student", job="dfssd.jobs.teacher:job"
        ),
        teaches=True,
    ),
    StageRow(
        role=MEAN_TEACHER.role,
        does="the teacher goes on with labelled and unlabelled images, which its own average labels",
        reads=(*RUN, "models.teacher", *_SELF_LABELLED, *section("mean_teacher")),
        # The steps count as far as mean_teacher_steps comes from them.
        free=("mean_teacher.mean_teacher", "train.steps", "train.teacher_steps"),
        inputs=lambda config, run, number: (DATASET, TEACHER),
        body="dfssd.pipeline.training:train_stage",
        training=Training("teacher", labels_itself=True),
        needs="dfssd.pipeline.training:needs",
        wanted=lambda config: config.mean_teacher.mean_teacher and _has_unlabelled(config),
        command=StageCommand(
            does="let the teacher go on with the unlabelled images too",
            more="Where it is better on val than <run>/teacher, it labels and teaches from then on.",
            example="--teacher yolov8s.pt --mean-teacher-steps 2000",
        ),
        teaches=True,
    ),
    StageRow(
        role=LABEL_ONLY.role,
        does="train the student on the labelled images alone, for as many steps: what everything is compared with",
        reads=(*RUN, "models.student", *_ALONE),
        inputs=lambda config, run, number: (DATASET,),
        body="dfssd.pipeline.training:train_stage",
        training=Training("student"),
        needs="dfssd.pipeline.training:needs",
        wanted=lambda config: config.baseline,
        command=StageCommand("teacher"),
    ),
    StageRow(
        role=PSEUDO.role,
        does="stream the unlabelled images through the teacher; keep every candidate box",
        reads=(*section("run", "seed"), *section("pseudo"), "train.imgsz", "train.amp"),
        inputs=_labelling_inputs,
        body="dfssd.pipeline.labelling:label_stage",
        needs="dfssd.pipeline.labelling:needs",
        command=StageCommand(
            "pseudo_label",
            "label the unlabelled images, and measure the labels",
            "Interrupt it anywhere and type the same command again: what is labelled stays.",
            "--tta flips --threshold-policy gmm",
        ),
        wanted=_has_unlabelled,
        in_rounds=True,
    ),
    StageRow(
        role=QUALITY.role,
        does="measure what the pseudo-labels are worth, before anything trains on them",
        reads=(*PLACE, *section("thresholds"), "train.steps"),
        inputs=lambda config, run, number: (DATASET, PSEUDO.of_round(number)),
        body="dfssd.pipeline.labelling:quality_stage",
        command=StageCommand("pseudo_label"),
        wanted=_has_unlabelled,
        in_rounds=True,
    ),
    StageRow(
        role=STUDENT.role,
        does="train the student on labels, pseudo-labels and the teacher's features and predictions",
        reads=(*RUN, "models.student", *_ALONE, *section("thresholds"), *section("distill")),
        inputs=_student_inputs,
        body="dfssd.pipeline.training:train_stage",
        training=Training("student", distils=True),
        command=StageCommand(
            "distill",
            "train the student on labels, pseudo-labels and its teacher",
            example="--student yolov8n.pt --steps 3000 --num-workers auto",
        ),
        needs="dfssd.pipeline.training:needs",
    ),
    StageRow(
        role=REPORT.role,
        does="measure all finished models, and write the report",
        reads=(*section("run", "seed", "num_workers"), *section("evaluate"), "train.imgsz"),
        inputs=_report_inputs,
        body="dfssd.pipeline.evaluation:report_stage",
        needs="dfssd.pipeline.evaluation:needs",
        command=StageCommand(
            "evaluate", "measure all finished models, write the report", job="dfssd.jobs.evaluate:job"
        ),
    ),
    StageRow(
        role=EXPORT.role,
        does="write the student for the line (ONNX, OpenVINO, int8), prove that it finds the same, log it to MLflow",
        reads=(
            *section("run", "seed", "num_workers"),
            *section("export"),
            *("evaluate.latency_repeats", "train.imgsz", "publish_best"),
        ),
        free=(
            "export.register_as",
            "evaluate.latency_repeats",
            "publish_best",
        ),  # the last as far as the model is another
        inputs=lambda config, run, number: (DATASET, exported_model(config, run), REPORT),
        body="dfssd.pipeline.exporting:export_stage",
        needs="dfssd.pipeline.exporting:needs",
        grows=("export.formats", "export.int8"),
        again="dfssd.pipeline.exporting:register_finished",
        command=StageCommand(
            "export",
            "write the student for the line, and prove that it finds the same",
            job="dfssd.jobs.export:job",
        ),
        wanted=lambda config: bool(config.export.formats),
    ),
)
ROWS = {row.role: row for row in STAGES}


def row_of(name: ArtefactName) -> StageRow:
    return ROWS[name.role]


def rows_of(command: str) -> list[StageRow]:
    """The stages that a command runs, in order."""
    return [row for row in STAGES if row.command_name == command]


def wanted(config: Config) -> list[ArtefactName]:
    """The stages of a pipeline with these settings, in order, without later rounds."""
    return [name for name in (ArtefactName(row.role) for row in STAGES) if is_wanted(config, name)]


def is_wanted(config: Config, name: ArtefactName) -> bool:
    """Is the stage part of a pipeline with these settings? Later rounds need unlabelled images."""
    return row_of(name).wanted(config) and (name.round == 1 or _has_unlabelled(config))


def plan(config: Config, names: Sequence[ArtefactName]) -> Iterator[ArtefactName]:
    """These stages in order, with those of later rounds after the first round's last one, where it is among them."""
    again = [row.role for row in STAGES if row.in_rounds]
    for name in names:
        yield name
        if name.role == again[-1]:
            for number in range(2, config.rounds + 1):
                yield from (ArtefactName(role, number) for role in again)


def teachers(number: int) -> list[ArtefactName]:
    """What may teach in a round, in the order of the table."""
    return [ArtefactName(row.role, number) for row in STAGES if row.teaches]


def best_teacher(run: Storage, number: int) -> ArtefactName:
    """The teacher that labels in a round, and teaches from then on: the best on val of those that are finished."""
    return better_on_val(run, teachers(number)) or TEACHER.of_round(number)


def finished_models(run: Storage) -> list[ArtefactName]:
    """Finished trainings: teachers round by round, then the students."""
    found, number = list[ArtefactName](), 1
    while own := [t for t in teachers(number) if is_finished(run, t)]:
        found += own
        number += 1
    others = [ArtefactName(row.role) for row in STAGES if row.training and not row.teaches]
    return found + [name for name in others if is_finished(run, name)]


def exported_model(config: Config, run: Storage) -> ArtefactName:
    """What goes to the line: the distilled student, without one the label-only student, without any the best teacher.

    With `publish_best` it is the better on val of both students, as the report's gate has it.
    """
    if config.publish_best and is_finished(run, REPORT) and is_finished(run, LABEL_ONLY):
        from dfssd.evaluate.gate import better

        gate = run.read_json(f"{REPORT}/metrics.json").get("gate")
        if gate and better(gate) == LABEL_ONLY.role:
            return LABEL_ONLY
    return next(
        (n for n in (STUDENT, LABEL_ONLY, best_teacher(run, newest_round(run))) if is_finished(run, n)), STUDENT
    )


def policies_at_work(config: Config, names: Sequence[ArtefactName]) -> dict[str, str]:
    """Threshold policies of these stages, by their flags: the mean teacher has one of its own."""
    others = {"--threshold-policy": config.thresholds.threshold_policy}
    if MEAN_TEACHER not in names:
        return others
    own = {"--mean-teacher-policy": config.mean_teacher.mean_teacher_policy}
    return own if len(names) == 1 else others | own


def settings_of(config: Config, name: ArtefactName) -> dict[str, Any]:
    """The settings that the result of a stage depends on.

    Raises:
        DfssdError: weights are named that are not there.
    """
    row = row_of(name)
    return counted(config, row.reads_in(name.round), row.free)


def make_stage(config: Config, run: Storage, name: ArtefactName) -> Stage:
    """The stage with what must match: its settings and its inputs."""
    from dfssd.runtime.artefact import Stage

    row = row_of(name)
    stage = Stage(run, name, settings_of(config, name), row.inputs(config, run, name.round), row.grows)
    if row.grows and not config.run.overwrite:
        stage.keep()
    return stage


def resolve(target: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found
