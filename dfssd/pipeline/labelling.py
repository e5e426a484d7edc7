"""Stages `pseudo` and `quality`: the teacher's labels, and what they are worth."""

from __future__ import annotations

from dfssd.data.boxes import above
from dfssd.data.manifest import Manifest, read_manifest
from dfssd.errors import DfssdError
from dfssd.pipeline.budget import unlabelled_images
from dfssd.pipeline.context import Context, Planned, Result
from dfssd.pipeline.settings import given_weights
from dfssd.pipeline.stages import best_teacher, row_of, teachers
from dfssd.pseudo.quality import Quality, doubt, measure
from dfssd.report import quality as report
from dfssd.report.pictures import draw
from dfssd.review.exports import Proposal, label_studio
from dfssd.review.sheets import captioned, table
from dfssd.runtime.artefact import Stage
from dfssd.runtime.artefact_names import DATASET, PSEUDO, is_finished, val_score
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import Tracker


def needs(context: Context, stage: Stage, planned: Planned) -> list[str]:
    """There are unlabelled images, as far as the data set is there, and outside a dry run the cluster holds the actors.

    Raises:
        DfssdError: one of them is not so.
    """
    config = context.config
    summary = context.run.read_json(f"{DATASET}/stage.json")["summary"] if is_finished(context.run, DATASET) else {}
    if "splits" in summary and not unlabelled_images(summary):
        raise DfssdError(
            "every image that may train is labelled: there is nothing to pseudo-label",
            where=context.run.path(str(DATASET)),
            todo="go on with dfssd distill, which then learns from labels and teacher; or prepare the data with --unlabelled "
            "FOLDER (images without labels) or --label-fraction 0.1 (hides nine of ten labels)",
        )
    if not config.run.dry_run:
        from dfssd.runtime.cluster import actor_resources, connect

        connect()
        actor_resources(config.run, config.pseudo.num_actors)
    return []


def label_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Label the unlabelled images, and those of the val split, with Ray Data."""
    from dfssd.pseudo.labeller import label
    from dfssd.runtime.cluster import connect

    weights = [f"{name}/best.pt" for name in stage.inputs if row_of(name).teaches]
    if weights and (said := who_labels(context.run, stage.name.round)):
        print(f"{stage.name}: {said}", flush=True)
    for k, spec in enumerate(() if weights else context.config.pseudo.label_teachers):
        weights.append(f"{stage.name}/teachers/{k}.pt")  # a copy: workers may run on other machines
        context.run.write(weights[-1], given_weights(spec))
    connect()
    manifest = read_manifest(context.run.at(str(DATASET)))
    tracker = Tracker(context.runs.uri, run_id, stage.store, system=True)
    try:
        summary = label(context.config, context.run, str(stage.name), manifest, weights, tracker.log)
    finally:
        tracker.close()
    return summary, [f for f in stage.store.files() if f != "started.json"]


def who_labels(run: Storage, number: int) -> str:
    """Which of a round's teachers labels and teaches from then on, and why, in a line; '' where there is one only."""
    finished = [name for name in teachers(number) if is_finished(run, name)]
    if len(finished) < 2:
        return ""
    scores, best = {name: val_score(run, name) for name in finished}, best_teacher(run, number)
    others = ", ".join(f"{name} {score:.4f}" for name, score in scores.items() if name != best)
    return f"{best} labels and teaches, the best on val (mAP50-95 {scores[best]:.4f}; {others})"


def quality_stage(context: Context, stage: Stage, run_id: str) -> Result:
    """Compare the pseudo-labels of a round with the val split and with what is withheld."""
    quality = measure(context.config, context.run, str(PSEUDO.of_round(stage.name.round)))
    numbers = quality.numbers()
    manifest = read_manifest(context.run.at(str(DATASET)))
    print(report.terminal_table(numbers), flush=True)
    stage.store.write_json("quality.json", numbers)
    stage.store.write("quality.csv", report.csv(numbers))
    stage.store.write("quality.png", report.curves(quality))
    outputs = ["quality.json", "quality.csv", "quality.png", *_write_doubtful(stage, quality, manifest)]
    for name in outputs:
        context.runs.artefact(run_id, name, stage.store.read(name))
    return numbers, outputs


def _write_doubtful(stage: Stage, quality: Quality, manifest: Manifest) -> list[str]:
    """The most doubtful images as a sheet with file names, as a table, and as tasks for Label Studio; worst first."""
    by_id = {r.image_id: r for r in manifest.unlabelled_rows()}
    tau = quality.tau[quality.chosen]
    found = [(by_id[image_id], boxes, doubt(boxes, tau)) for image_id, boxes in quality.doubtful if image_id in by_id]
    names = [row.uri.rsplit("/", 1)[-1] for row, _, _ in found]
    drawn = [draw(row, boxes, manifest.names, tau) for row, boxes, _ in found]
    captions = [f"{name}\ndoubt {value:.2f}" for name, (_, _, value) in zip(names, found, strict=True)]
    lines = [[name, value, row.image_id, row.uri] for name, (row, _, value) in zip(names, found, strict=True)]
    proposals = [Proposal(row, above(boxes, tau, 0.5)) for row, boxes, _ in found]
    stage.store.write("doubtful.png", captioned(list(zip(drawn, captions, strict=True))))
    stage.store.write("doubtful.csv", table(["file", "doubt", "image_id", "uri"], lines))
    stage.store.write("doubtful_tasks.json", label_studio(proposals, manifest.names, str(stage.name), ""))
    return ["doubtful.png", "doubtful.csv", "doubtful_tasks.json"]
