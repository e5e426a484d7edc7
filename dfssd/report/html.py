"""`report.html`: one file, pictures inside, that can be mailed: for the engineer at the line first, then for a reviewer."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dfssd.config import Config
from dfssd.config.file import whole
from dfssd.data.manifest import read_manifest
from dfssd.evaluate.detections import read_detections
from dfssd.evaluate.escapes import thresholds_of
from dfssd.evaluate.verdict import share
from dfssd.report import cases, charts, pictures, tables
from dfssd.report.plots import ahead
from dfssd.report.point import Figure, point_charts, point_text, svg
from dfssd.report.quality import rows as quality_rows
from dfssd.report.terminal import said
from dfssd.runtime.artefact_names import QUALITY, newest_round
from dfssd.runtime.code_version import code_version
from dfssd.runtime.storage import Storage

CONTENTS = (
    ("verdict", "Verdict"),
    ("point", "Operating point"),
    ("misses", "Worst misses"),
    ("alarms", "Worst false alarms"),
    ("side", "Side by side"),
    ("review", "For the reviewer: metrics"),
    ("training", "Training"),
    ("pseudo", "Pseudo-labels"),
    ("data", "Data"),
    ("settings", "Settings and versions"),
)
SIDE_PICTURES = 4
VERSIONS = ("torch", "ultralytics", "ray", "mlflow", "onnxruntime", "numpy", "opencv-python-headless", "opencv-python")
Rows = tuple[list[str], list[list[str]]]


def write_report(config: Config, run: Storage, results: dict[str, Any]) -> None:
    """Write `report/report.html` and `detections.png` from what the stages have left."""
    pictures.write_detection_sheet(config, run, results, tables.models_in(results))
    run.write("report/report.html", render(config, run, results).encode())


def render(config: Config, run: Storage, results: dict[str, Any]) -> str:
    """The page as text."""
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    page = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    quality = _quality(run)
    return page.get_template("report.html.jinja").render(
        run_name=config.run.run_name,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        code=code_version(),
        environment=results["environment"],
        contents=[(key, title) for key, title in CONTENTS if key != "pseudo" or quality],
        quality=quality,
        **_engineer(config, run, results),
        **_reviewer(run, results),
        **_data(run, repeat_threshold(run, results)),
        training=_training(run, results),
        times=_times(run),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions=_versions(results),
        settings=json.dumps(whole(config), indent=2),
    )


def _table(title: str, rows: Rows) -> dict[str, Any]:
    return {"title": title, "header": rows[0], "rows": rows[1]}


def _engineer(config: Config, run: Storage, results: dict[str, Any]) -> dict[str, Any]:
    """Verdict, operating point, worst cases, side by side."""
    titles = tables.models_in(results)
    best, names = list(titles)[-1], run.at("dataset").read_json("stage.json")["summary"]["names"]
    manifest, detections = read_manifest(run.at("dataset")), read_detections(run.at("report"))
    point, test = results[best]["operating_point"], results[best]["test"]
    tau = {m: thresholds_of(results[m]["operating_point"], names) for m in titles}
    lines = [line for line in said(results) if line]
    found = detections.get((best, "test"), {})
    line, prose = test["line"], tables.in_prose(best, titles[best])
    return {
        "said": [(text.startswith("  "), text.strip()) for text in lines if not _is_note(text)],
        "notes": [text.strip() for text in lines if _is_note(text)],
        "cards": [
            (
                f"escapes of {prose}",
                share(line["escape"]).split(" (")[0],
                "defective test pictures that pass",
            ),
            ("rejects", share(line["overkill"]).split(" (")[0], "clean test pictures thrown out"),
            ("false boxes", f"{line['false_boxes']:.2f}", "a test picture"),
            ("latency", f"{results[best]['latency_ms']:.1f} ms", f"95 %: {results[best]['latency_p95_ms']:.1f} ms"),
        ],
        "models": _table(f"Models, {tables.model_title(results)}", tables.model_rows(results)),
        "chosen": tables.CHOSEN,
        "latency_note": results["latency"]["note"],
        "point_text": point_text(point, prose, line["escape"]),
        "point_charts": point_charts(results, titles, point, names, prose),
        "escapes": _table("Escapes by class", tables.escape_rows(results, names, best)),
        "best_title": prose,
        "misses": cases.worst_misses(manifest, found, tau[best]),
        "alarms": cases.worst_alarms(manifest, found, tau[best]),
        "side": cases.side_by_side(
            manifest, detections, tau, titles, min(SIDE_PICTURES, config.evaluate.sample_images)
        ),
    }


def _is_note(text: str) -> bool:
    return any(
        word in text
        for word in (
            "disagree",
            "cannot measure",
            "cannot be",
            "cannot confirm",
            "cannot choose",
            "common score is used",
        )
    )


def _reviewer(run: Storage, results: dict[str, Any]) -> dict[str, Any]:
    """Metrics by class and size, curves, confusion, calibration."""
    titles = tables.models_in(results)
    best, names = list(titles)[-1], run.at("dataset").read_json("stage.json")["summary"]["names"]
    test = results[best]["test"]
    scores = test["scores"]
    by_class = scores["by_class"]

    def curve(key: str) -> dict[str, Any]:
        return {n: list(zip(scores["score"], by_class[n][key], strict=True)) for n in [*names, "all"]}

    pr = {
        n: [(r, p) for r, p in zip(by_class[n]["recall"], by_class[n]["precision"], strict=True) if p is not None]
        for n in [*names, "all"]
    }
    honest = {
        titles[m]: [(b["score"], b["precision"]) for b in results[m]["test"]["calibration"]["bins"]] for m in titles
    }
    chart = partial(svg, x_label="score", x_range=(0, 1))
    drawn = [
        Figure(svg("Precision over recall (IoU 0.5)", pr, "recall", "precision", x_range=(0, 1)), ""),
        Figure(chart("F1 over the score", curve("f1")), ""),
        Figure(chart("Precision over the score", curve("precision")), ""),
        Figure(chart("Recall over the score", curve("recall")), ""),
        Figure(
            chart("Calibration: precision of boxes with this score", honest, diagonal=True),
            "In the square letterbox of the line. On the dashed line a score is the share of right boxes.",
        ),
    ]
    matrix = test["confusion"]
    rows = [[n, *map(str, counts)] for n, counts in zip(matrix["names"], matrix["counts"], strict=True)]
    return {
        "classes": _table("mAP50 by class", tables.class_rows(results, names)),
        "sizes": _table("mAP50-95 by box size", tables.size_rows(results)),
        "review_charts": [one for one in drawn if one.chart],
        "confusion": _table("Confusion", (["labelled as", *matrix["names"]], rows)),
    }


def _training(run: Storage, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Curves of each training: loss, val, thresholds over time."""
    blocks = []
    order = {name: k for k, name in enumerate(run.at("dataset").read_json("stage.json")["summary"]["names"])}
    for stage, title in tables.models_in(results).items():
        if not run.exists(f"{stage}/history.json"):
            continue
        history = run.read_json(f"{stage}/history.json")

        def series(prefix: str, history: list[dict[str, Any]] = history) -> dict[str, Any]:
            keys = sorted(
                {k for h in history for k in h if k.startswith(prefix)}, key=lambda k: order.get(k[len(prefix) :], 0)
            )
            return {
                k[len(prefix) :]: charts.thinned([(h["step"], h[k]) for h in history if k in h and h[k] is not None])
                for k in keys
            }

        measured = series("val/")
        val = {label: measured.get(k, []) for k, label in (("map50", "mAP50"), ("map50_95", "mAP50-95"))}
        drawn = [
            Figure(svg(f"Validation of {tables.in_prose(stage, title)}", val, "step"), ""),
            Figure(
                svg("Loss", {"total": series("loss/").get("total", [])}, "step", y_range=None), _faded(stage, history)
            ),
            Figure(svg("Thresholds of pseudo-labels over time", series("threshold/"), "step"), ""),
        ]
        blocks.append({"title": title, "charts": [one for one in drawn if one.chart]})
    return blocks


def _faded(stage: str, history: list[dict[str, Any]]) -> str:
    """Caption of a loss that falls because terms leave it; '' where none does."""
    spans = ahead([h for h in history if "loss/total" in h])
    if not spans:
        return ""
    return (
        f"From step {spans[0][0]} on the student is ahead of its teacher on val: the teacher's terms fade to zero as meant "
        f"(--fade) and the loss falls with them. Term by term: {stage}/curves.png."
    )


def _times(run: Storage) -> dict[str, Any]:
    """Seconds of each finished stage."""
    rows = []
    for stage in sorted(run.folders()):
        if run.exists(f"{stage}/stage.json"):
            record = run.read_json(f"{stage}/stage.json")
            rows.append((record["finished_utc"], [stage, f"{record['duration_s']:.0f}", record["finished_utc"]]))
    return _table("Time a stage", (["stage", "duration (s)", "finished"], [row for _, row in sorted(rows)]))


def _quality(run: Storage) -> list[dict[str, Any]]:
    """What the pseudo-labels of each round are worth."""
    found = []
    for number in range(1, newest_round(run) + 1):
        folder = str(QUALITY.of_round(number))
        if not run.exists(f"{folder}/stage.json"):
            continue
        numbers = run.read_json(f"{folder}/quality.json")
        names = run.at("dataset").read_json("stage.json")["summary"]["names"]
        chosen = numbers["chosen"]
        titles = {
            "quality.png": "Precision and recall of pseudo-labels over the threshold",
            "doubtful.png": "Most doubtful images: pseudo-labels with names, uncertain boxes thin and without",
        }
        found.append(
            {
                "title": f"Round {number}: policy '{chosen}'",
                "warnings": numbers["warnings"],
                "chosen": _table("Chosen policy", quality_rows(numbers, [chosen], names)),
                "others": _table(
                    "Other policies", quality_rows(numbers, [p for p in numbers["policies"] if p != chosen], names)
                ),
                "pictures": [
                    cases.embedded(run.read(f"{folder}/{n}"), t)
                    for n, t in titles.items()
                    if run.exists(f"{folder}/{n}")
                ],
            }
        )
    return found


def repeat_threshold(run: Storage, results: dict[str, Any]) -> float:
    """What the last of the measured models was trained with: the command that measures has no such setting."""
    name = list(tables.models_in(results))[-1]
    return float(run.read_json(f"{name}/stage.json")["config"].get("train", {}).get("repeat_threshold", 0.0))


def _data(run: Storage, repeat_threshold: float) -> dict[str, Any]:
    """Splits, what was set aside, near-duplicates and leaks."""
    summary, manifest = run.at("dataset").read_json("stage.json")["summary"], read_manifest(run.at("dataset"))
    bad = ", ".join(f"{n} {reason}" for reason, n in summary["bad_files"].items()) or "none"
    shown, alike = run.exists("dataset/groups.png"), tables.alike(summary)
    return {
        "splits": _table("Splits", tables.split_rows(summary)),
        "balance": _table("Labelled classes", tables.balance_rows(manifest, repeat_threshold)),
        "data_text": (
            f"{summary['files']} files, {summary['images']} images; set aside: {bad}. {alike[0].upper()}{alike[1:]}; "
            f"{summary['test_images_with_near_duplicate_in_train']} test images have one in train."
        ),
        "data_pictures": [
            cases.embedded(run.read("dataset/groups.png"), "The ten largest groups of near-duplicates, one a row")
        ]
        if shown and summary["largest_group"] > 1
        else [],
    }


def _versions(results: dict[str, Any]) -> dict[str, Any]:
    e = results["environment"]
    rows = [["dfssd", code_version()], ["Python", platform.python_version()], ["measured on", e["processor"]]]
    for name in VERSIONS:
        try:
            rows.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            continue
    return _table("Versions", (["what", "version"], rows))
