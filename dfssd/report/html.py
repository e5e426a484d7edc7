"""`report.html`: one file, pictures inside, that can be mailed."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import Any

from dfssd.config import Config
from dfssd.data.manifest import read_manifest
from dfssd.evaluate.gate import verdict
from dfssd.report import pictures, tables
from dfssd.report.quality import rows as quality_rows
from dfssd.runtime.artefact_names import QUALITY, newest_round
from dfssd.runtime.code_version import code_version
from dfssd.runtime.storage import Storage

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;border:1px solid #ddd}
.warning{background:#fff6e5;border-left:4px solid #f58231;padding:.6rem 2rem}
.verdict{font-size:1.15rem;padding:.6rem 1rem;background:#f3f6fa;border-left:4px solid #4363d8}
pre{background:#f6f6f6;padding:1rem;overflow:auto}h2{margin-top:2.5rem}
"""

NO_GATE = "No label-only student to compare with."


def write_report(config: Config, run: Storage, results: dict[str, Any]) -> None:
    """Write `report/report.html` from what the stages have left."""
    pictures.write_detection_sheet(config, run, results, tables.models_in(results))
    summary, manifest = run.at("dataset").read_json("stage.json")["summary"], read_manifest(run.at("dataset"))
    said = verdict(results["gate"]) if "gate" in results else NO_GATE
    parts = [
        f"<h1>dfssd: {escape(config.run.run_name)}</h1>",
        f"<p class=verdict>{escape(said)}</p>",
        "<h2>Test split</h2>" + _table(*tables.model_rows(results)),
        f"<p>{escape(_environment(results))}</p>",
        "<h3>mAP50 by class</h3>" + _table(*tables.class_rows(results, summary["names"])),
        "<h2>Data</h2>" + _table(*tables.split_rows(summary)),
        f"<p>{escape(tables.split_table(summary).split(chr(10), 1)[1].rsplit('┘', 1)[-1].strip())}</p>",
        "<h3>Labelled classes</h3>" + _table(*tables.balance_rows(manifest, config.train.repeat_threshold)),
        _picture(run, "dataset/groups.png", "The ten largest groups of near-duplicates, one a row"),
        _picture(run, "report/detections.png", "Labels and detections on test images (score 0.25 and more)"),
    ]
    for number in range(1, newest_round(run) + 1):
        parts.append(_quality(run, str(QUALITY.of_round(number)), number))
    for stage in tables.models_in(results):
        parts.append(_picture(run, f"{stage}/curves.png", f"Training of {stage}"))
    settings = json.dumps(config.model_dump(mode="json"), indent=2)
    parts.append(f"<h2>Settings</h2><p>code {escape(code_version())}</p><pre>{escape(settings)}</pre>")
    page = f"<!doctype html><meta charset=utf-8><title>dfssd report</title><style>{STYLE}</style>" + "\n".join(parts)
    run.write("report/report.html", page.encode())


def _quality(run: Storage, folder: str, number: int) -> str:
    """Section on the pseudo-labels of a round; '' where their quality was not measured."""
    if not run.exists(f"{folder}/stage.json"):
        return ""
    numbers = run.read_json(f"{folder}/quality.json")
    chosen = numbers["chosen"]
    others = [p for p in numbers["policies"] if p != chosen]
    notes = "".join(f"<li>{escape(w)}</li>" for w in numbers["warnings"])
    return (
        f"<h2>Pseudo-labels{'' if number == 1 else f', round {number}'}: policy '{escape(chosen)}'</h2>"
        + (f"<ul class=warning>{notes}</ul>" if notes else "")
        + _table(*quality_rows(numbers, [chosen]))
        + f"<details><summary>the other policies</summary>{_table(*quality_rows(numbers, others))}</details>"
        + _picture(run, f"{folder}/quality.png", "Precision and recall of pseudo-labels over the threshold")
        + _picture(run, f"{folder}/doubtful.png", "Most doubtful images: pseudo-labels coloured, uncertain boxes grey")
    )


def _environment(results: dict[str, Any]) -> str:
    e = results["environment"]
    return (
        f"{e['test_images']} test images at {e['imgsz']} px. Latency: median of one image through network and NMS, "
        f"fp32, {e['threads']} thread(s), {e['processor']}, torch {e['torch']}."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _picture(run: Storage, name: str, title: str) -> str:
    if not run.exists(name):
        return ""
    data = base64.b64encode(run.read(name)).decode()
    return f"<h2>{escape(title)}</h2><img alt='{escape(title)}' src='data:image/png;base64,{data}'>"
