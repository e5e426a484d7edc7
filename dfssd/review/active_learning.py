"""One turn of the label loop: suggest images, export proposals, take corrected labels back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dfssd.config import Config, Data
from dfssd.data.boxes import above
from dfssd.data.manifest import Boxes, Manifest, Row, read_manifest
from dfssd.data.preparation.corrections import as_boxes, with_new_classes, write_corrections
from dfssd.errors import DfssdError
from dfssd.pseudo.calibration import calibrate
from dfssd.pseudo.quality import Quality, measure
from dfssd.pseudo.shards import read_shards
from dfssd.report.pictures import draw
from dfssd.review import suggest
from dfssd.review.coverage import Coverage, choose
from dfssd.review.exports import Proposal, export
from dfssd.review.incoming import read_corrected
from dfssd.review.network import look
from dfssd.review.sheets import captioned, table
from dfssd.runtime.artefact_names import DATASET, PSEUDO, STUDENT, ArtefactName, is_finished, newest_round
from dfssd.runtime.storage import Storage

LOOKED_AT = 4000  # images a network looks at for features and disagreement
LIKELY = 0.5  # probability from which a class is named among what an image shows
FOLDER = "suggest"


@dataclass
class Labelled:
    """What the newest round of labelling left."""

    manifest: Manifest
    rows: list[Row]  # unlabelled images with candidates
    boxes: list[Boxes]
    quality: Quality

    @property
    def tau_c(self) -> np.ndarray:
        return self.quality.tau[self.quality.chosen]


def read_labelled(config: Config, run: Storage) -> Labelled:
    """Candidates and thresholds of the newest round.

    Raises:
        DfssdError: the unlabelled images have not been labelled yet, or there are none.
    """
    pseudo = PSEUDO.of_round(newest_round(run))
    if not is_finished(run, pseudo):
        raise DfssdError(
            "the unlabelled images have not been looked at yet",
            where=run.uri,
            todo="run `dfssd teacher` and `dfssd pseudo_label` first, or `dfssd pipeline`",
        )
    manifest = read_manifest(run.at(str(DATASET)))
    by_id = {r.image_id: r for r in manifest.unlabelled_rows()}
    found = [(by_id[i], b) for i, b in read_shards(run.at(str(pseudo)), "shard") if b is not None and i in by_id]
    if not found:
        raise DfssdError("there is no unlabelled image", where=run.uri, todo="add images with --unlabelled FOLDER")
    rows, boxes = zip(*found, strict=True)
    return Labelled(manifest, list(rows), list(boxes), measure(config, run, str(pseudo)))


@dataclass
class Looked:
    """Unlabelled images that may be suggested, and what the networks make of them.

    Args:
        rows: n images; boxes: the teacher's candidates on each.
        groups: (n,) near-duplicate groups.
        features: (n,d) unit vectors; known: (m,d) those of labelled images, which show `known_shows` (m,C); taken: groups of
            labelled images.
        teacher: the network that labelled.
    """

    state: Labelled
    rows: list[Row]
    boxes: list[Boxes]
    scores: suggest.Scores
    groups: np.ndarray
    features: np.ndarray
    known: np.ndarray
    known_shows: np.ndarray
    taken: set[int]
    teacher: str

    def choose(self, k: int) -> tuple[list[int], np.ndarray]:
        """The k images that are most worth a label, and gains; see `coverage.choose`."""
        weights = suggest.demand(self.scores.shows)
        coverage = Coverage(self.features, self.scores.shows, self.known, self.known_shows, weights)
        return choose(coverage, self.scores.worth(), self.groups, self.taken, k)


def look_at(config: Config, run: Storage, teacher: ArtefactName, k: int) -> Looked:
    """Show unlabelled images, several times `k` where there are more, and the labelled ones to a network.

    Args:
        teacher: the one that labelled the images; it looks at them where there is no student.
    """
    state = read_labelled(config, run)
    val = state.quality.evidence["val"]
    calibration = calibrate(val.found, val.hits)
    order = looked_at(state, suggest.score(state.boxes, None, state.tau_c, calibration).alone(), max(LOOKED_AT, 4 * k))
    rows, boxes = [state.rows[i] for i in order], [state.boxes[i] for i in order]
    network = STUDENT if is_finished(run, STUDENT) else teacher
    known = state.manifest.labelled_rows()[:LOOKED_AT]
    everything, features = look(
        config, run, f"{network}/best.pt", state.manifest.names, [*rows, *known], f"suggest: {network} looks"
    )
    student = everything[: len(rows)] if network == STUDENT else None
    scores = suggest.score(boxes, student, state.tau_c, calibration)
    known_shows = suggest.shown([r.boxes for r in known], len(state.manifest.names))
    groups, taken = np.array([r.group for r in rows]), {r.group for r in state.manifest.labelled_rows()}
    n = len(rows)
    return Looked(state, rows, boxes, scores, groups, features[:n], features[n:], known_shows, taken, str(teacher))


def looked_at(state: Labelled, alone: np.ndarray, limit: int) -> list[int]:
    """At most `limit` images: all, or half of them the best by themselves, and half drawn from the others, so that what is
    typical is there in its share. The draw follows the ids, which are digests: it is the same at every call.
    """
    if len(alone) <= limit:
        return list(range(len(alone)))
    best: list[int] = np.argsort(-alone, kind="stable").tolist()
    others = sorted(best[limit // 2 :], key=lambda i: state.rows[i].image_id)
    return best[: limit // 2] + others[: limit - limit // 2]


def suggest_images(
    config: Config, run: Storage, teacher: ArtefactName, k: int, fmt: str | None, root: str
) -> list[str]:
    """Choose `k` images; leaves suggest.csv, scores.csv, suggest.png and the export below `<run>/suggest`.

    Args:
        teacher: see `look_at`.

    Returns:
        names of what was written.
    """
    seen = look_at(config, run, teacher, k)
    state, rows = seen.state, seen.rows
    chosen, gain = seen.choose(k)
    store = run.at(FOLDER)
    _write_tables(store, seen, chosen, gain)
    proposals = [Proposal(rows[i], proposed(seen.boxes[i], state.tau_c)) for i in chosen]
    captions = [f"{p.file}\ngain {gain[i]:.2f}" for p, i in zip(proposals, chosen, strict=True)]
    drawn = [(draw(p.row, p.boxes, state.manifest.names), c) for p, c in zip(proposals, captions, strict=True)]
    store.write("suggest.png", captioned(drawn))
    written = ["suggest.csv", "scores.csv", "suggest.png"]
    by = f"{run.uri.rsplit('/', 1)[-1]}/{seen.teacher}"
    everything = state.manifest.rows
    for name, data in (export(fmt, proposals, state.manifest.names, by, root, everything) if fmt else {}).items():
        store.write(name, data)
        written.append(name)
    return [store.path(name) for name in written]


def _write_tables(store: Storage, seen: Looked, chosen: list[int], gain: np.ndarray) -> None:
    """The choice in its order; and all images that were looked at, those that are left by what they would still add."""
    header = ["rank", "file", "gain", "uncertainty", "disagreement", "boxes", "shows", "group", "image_id", "uri"]
    rank, scores, names = {row: k + 1 for k, row in enumerate(chosen)}, seen.scores, seen.state.manifest.names

    def line(i: int) -> list[object]:
        row = seen.rows[i]
        parts = [float(v[i]) for v in (gain, scores.uncertainty, scores.disagreement, scores.boxes.sum(1))]
        shows = "; ".join(names[c] for c in np.flatnonzero(scores.shows[i] >= LIKELY))
        return [rank.get(i, ""), row.uri.rsplit("/", 1)[-1], *parts, shows, row.group, row.image_id, row.uri]

    left = [int(i) for i in np.argsort(-gain, kind="stable") if int(i) not in rank]
    store.write("suggest.csv", table(header, [line(i) for i in chosen]))
    store.write("scores.csv", table(header, [line(i) for i in [*chosen, *left]]))


def proposed(boxes: Boxes, tau_c: np.ndarray) -> Boxes:
    """Candidates that a person should see: those above half their class's threshold."""
    return above(boxes, tau_c, 0.5)


def export_images(config: Config, run: Storage, which: str, fmt: str, k: int, root: str) -> list[str]:
    """Write proposals for review: the most doubtful images, or all pseudo-labels, below `<run>/review`."""
    state = read_labelled(config, run)
    by_id = {r.image_id: (r, b) for r, b in zip(state.rows, state.boxes, strict=True)}
    ids = [i for i, _ in state.quality.doubtful if i in by_id] if which == "doubtful" else list(by_id)
    chosen = [by_id[i] for i in ids]
    proposals = [Proposal(row, proposed(boxes, state.tau_c)) for row, boxes in (chosen[:k] if k else chosen)]
    store = run.at("review")
    names = []
    by, everything = run.uri.rsplit("/", 1)[-1], state.manifest.rows
    for name, data in export(fmt, proposals, state.manifest.names, by, root, everything).items():
        store.write(name, data)
        names.append(store.path(name))
    return names


def take_back(config: Config, run: Storage, path: str, reviewer: str, new_classes: Sequence[str] = ()) -> str:
    """Keep corrected labels with the run and make the next version of the data set.

    Args:
        new_classes: classes that a reviewer has added; they come behind those that there are.

    Returns:
        what happened, in one line.

    Raises:
        DfssdError: there is no data set, or nothing in the file is about it.
    """
    if not is_finished(run, DATASET):
        raise DfssdError("the data set is not prepared", where=run.uri, todo="run `dfssd prepare` first")
    manifest = read_manifest(run.at(str(DATASET)))
    classes = with_new_classes(manifest.names, new_classes)
    corrections, bad = read_corrected(path, replace(manifest, names=classes), reviewer)
    for correction in corrections:
        as_boxes(correction, classes)  # refuses unknown classes before anything is written
    for problem in bad[:5]:
        print(f"WARNING: not used: {problem}", flush=True)
    if len(bad) > 5:
        print(f"WARNING: and {len(bad) - 5} more", flush=True)
    name = write_corrections(run, corrections, classes[len(manifest.names) :])
    people = sorted({c.who for c in corrections})
    return f"{len(corrections)} images corrected by {', '.join(people)}, kept as {run.path(name)}"


def data_settings(run: Storage) -> Data:
    """The settings that the data set was prepared with, asking for the next version.

    Raises:
        DfssdError: it was prepared by a version that did not record them.
    """
    recorded = run.read_json(f"{DATASET}/stage.json")["summary"].get("data_settings")
    if recorded is None:
        raise DfssdError(
            "the data set does not say how it was prepared",
            where=run.path(str(DATASET), "stage.json"),
            todo="run the `dfssd prepare` command that made it again, with --update",
        )
    return Data(**{**recorded, "update": True})
