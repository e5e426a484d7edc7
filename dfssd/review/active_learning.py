"""One turn of the label loop: suggest images, export proposals, take corrected labels back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dfssd.config import Config, Data
from dfssd.data.boxes import above
from dfssd.data.manifest import Boxes, Manifest, Row, read_manifest
from dfssd.data.preparation.corrections import as_boxes, write_corrections
from dfssd.errors import DfssdError
from dfssd.pseudo.quality import Quality, measure
from dfssd.pseudo.shards import read_shards
from dfssd.report.pictures import draw
from dfssd.review import suggest
from dfssd.review.exports import Proposal, export
from dfssd.review.incoming import read_corrected
from dfssd.review.network import look
from dfssd.review.sheets import captioned, table
from dfssd.runtime.artefact_names import DATASET, PSEUDO, STUDENT, ArtefactName, is_finished, newest_round
from dfssd.runtime.storage import Storage

LOOKED_AT = 2000  # images a network looks at for features and disagreement; the best by the teacher's candidates first
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
        features: (n,d) unit vectors; known: (m,d) those of labelled images; taken: groups of labelled images.
        teacher: the network that labelled.
    """

    state: Labelled
    rows: list[Row]
    boxes: list[Boxes]
    scores: suggest.Scores
    groups: np.ndarray
    features: np.ndarray
    known: np.ndarray
    taken: set[int]
    teacher: str

    def choose(self, k: int, total: np.ndarray | None = None) -> tuple[list[int], np.ndarray]:
        """The k best by `total` (default all scores together), see `suggest.choose`."""
        total = self.scores.total() if total is None else total
        return suggest.choose(total, self.groups, self.features, self.known, k, self.taken)


def look_at(config: Config, run: Storage, teacher: ArtefactName, k: int) -> Looked:
    """Show the most promising unlabelled images, several times `k`, and the labelled ones to a network.

    Args:
        teacher: the one that labelled the images; it looks at them where there is no student.
    """
    state = read_labelled(config, run)
    first = suggest.score(state.manifest, state.boxes, None, state.tau_c)
    order = np.argsort(-first.total(), kind="stable")[: max(LOOKED_AT, 4 * k)]
    rows, boxes = [state.rows[i] for i in order], [state.boxes[i] for i in order]
    network = STUDENT if is_finished(run, STUDENT) else teacher
    known = state.manifest.labelled_rows()[:LOOKED_AT]
    everything, features = look(
        config, run, f"{network}/best.pt", state.manifest.names, [*rows, *known], f"suggest: {network} looks"
    )
    student = everything[: len(rows)] if network == STUDENT else None
    scores = suggest.score(state.manifest, boxes, student, state.tau_c)
    groups, taken = np.array([r.group for r in rows]), {r.group for r in known}
    n = len(rows)
    return Looked(state, rows, boxes, scores, groups, features[:n], features[n:], taken, str(teacher))


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
    state, rows, total = seen.state, seen.rows, seen.scores.total()
    chosen, distance = seen.choose(k)
    store = run.at(FOLDER)
    _write_tables(store, rows, seen.scores, distance, chosen)
    proposals = [Proposal(rows[i], proposed(seen.boxes[i], state.tau_c)) for i in chosen]
    captions = [f"{p.file}\nscore {total[i]:.2f}" for p, i in zip(proposals, chosen, strict=True)]
    drawn = [(draw(p.row, p.boxes, state.manifest.names), c) for p, c in zip(proposals, captions, strict=True)]
    store.write("suggest.png", captioned(drawn))
    written = ["suggest.csv", "scores.csv", "suggest.png"]
    by = f"{run.uri.rsplit('/', 1)[-1]}/{seen.teacher}"
    for name, data in (export(fmt, proposals, state.manifest.names, by, root) if fmt else {}).items():
        store.write(name, data)
        written.append(name)
    return [store.path(name) for name in written]


def _write_tables(
    store: Storage, rows: list[Row], scores: suggest.Scores, distance: np.ndarray, chosen: list[int]
) -> None:
    header = ["rank", "file", "score", "uncertainty", "disagreement", "rare", "distance", "group", "image_id", "uri"]
    rank = {row: k + 1 for k, row in enumerate(chosen)}
    total = scores.total()

    def line(i: int) -> list[object]:
        row = rows[i]
        parts = [float(v[i]) for v in (total, scores.uncertainty, scores.disagreement, scores.rare, distance)]
        return [rank.get(i, ""), row.uri.rsplit("/", 1)[-1], *parts, row.group, row.image_id, row.uri]

    store.write("suggest.csv", table(header, [line(i) for i in chosen]))
    store.write("scores.csv", table(header, [line(int(i)) for i in np.argsort(-total, kind="stable")]))


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
    for name, data in export(fmt, proposals, state.manifest.names, run.uri.rsplit("/", 1)[-1], root).items():
        store.write(name, data)
        names.append(store.path(name))
    return names


def take_back(config: Config, run: Storage, path: str, reviewer: str) -> str:
    """Keep corrected labels with the run and make the next version of the data set.

    Returns:
        what happened, in one line.

    Raises:
        DfssdError: there is no data set, or nothing in the file is about it.
    """
    if not is_finished(run, DATASET):
        raise DfssdError("the data set is not prepared", where=run.uri, todo="run `dfssd prepare` first")
    manifest = read_manifest(run.at(str(DATASET)))
    corrections, bad = read_corrected(path, manifest, reviewer)
    for correction in corrections:
        as_boxes(correction, manifest.names)  # refuses unknown classes before anything is written
    for problem in bad[:5]:
        print(f"WARNING: not used: {problem}", flush=True)
    if len(bad) > 5:
        print(f"WARNING: and {len(bad) - 5} more", flush=True)
    name = write_corrections(run, corrections)
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
