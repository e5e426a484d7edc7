"""What a user sees last: the table, the verdict, where things lie, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dfssd.config import Config
from dfssd.data.formats.listing import IMAGE_SUFFIXES
from dfssd.data.manifest import read_manifest
from dfssd.errors import mask
from dfssd.evaluate.gate import published, verdict
from dfssd.evaluate.verdict import (
    common_point,
    disagreement,
    doubts,
    equal_footing,
    escapes_in_words,
    labels_in_words,
    on_test,
)
from dfssd.report.tables import models_in, render, result_table
from dfssd.runtime.artefact_names import LABEL_ONLY
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import tracking_uri


def print_results(config: Config) -> None:
    """Print the results of a finished run."""
    storage = Storage(config.run.storage_path)
    run = storage.at(config.run.run_name)
    results = run.read_json("report/metrics.json")
    print()
    print(result_table(results))
    print()
    print("\n".join(said(results)))
    if config.publish_best:
        print(published(results))
    print()
    for label, name in (("report", "report/report.html"), ("numbers", "report/metrics.json")):
        print(f"{label:9} {_place(run, name)}")
    for stage, label in reversed(models_in(results).items()):
        print(f"{label}: {_place(run, stage, 'best.pt')}")
    print_export(config)


def print_export(config: Config) -> None:
    """What was exported, with its parity and latency; then what to type next."""
    run = Storage(config.run.storage_path).at(config.run.run_name)
    if run.exists("export/stage.json") and not _is_current(run):
        print(f"export    {_place(run, 'export')} carries the scores of an earlier report: export again (below)")
    elif run.exists("export/stage.json"):
        done = run.read_json("export/export.json")
        for name, size in done["files"].items():
            print(f"exported  {_place(run, 'export', name)}  ({size / 2**20:.1f} MB)")
        for parity in done["parity"].values():
            off = f"{parity['box_px']:.2g} px, {parity['score']:.2g} of score"
            print(
                f"parity    {parity['name']} ({parity['precision']}) on {parity['pictures']} labelled pictures"
                f"{' (' + parity['splits'] + ')' if 'splits' in parity else ''}: {off} off at most; "
                f"mAP50-95 {parity['map50_95'][0]:.4f} -> {parity['map50_95'][1]:.4f}; {parity['passed'][0]} -> "
                f"{parity['passed'][1]} of the {parity['defective']} defective ones pass"
            )
        times = ", ".join(f"{name} {t['p50_ms']:.1f}" for name, t in done["latency"]["timings"].items())
        print(f"latency   {times} ms ({done['latency']['note']})")
        if done["speedup"]:
            busy = " (the machine was busy: measure again)" if done["latency"]["busy"] else ""
            print(f"          in ONNX Runtime {done['speedup']:.1f} times as fast as the teacher{busy}")
    print("\nnext:")
    for command in next_commands(config, run):
        print(f"  {command}")
    if not run.is_local and _is_current(run):
        first = _first_file(run)
        print(f"(at the line: fetch {_place(run, 'export', first)}, then dfssd predict {first} PICTURES)")
    if run.is_local:
        print("(yolo takes one score for all classes, dfssd predict the thresholds by class: their boxes differ)")
    if link := runs_page(config, run):
        print(f"runs in MLflow: {link}")


def _place(run: Storage, *parts: str) -> str:
    """Where something of a run lies, as a person finds it: its path on a disk, its URI in an object store."""
    return run.path(*parts) if run.is_local else mask(run.uri_of(*parts))


def _first_file(run: Storage) -> str:
    return str(next(iter(run.read_json("export/export.json")["files"])))


def said(results: dict[str, Any]) -> list[str]:
    """The verdict in sentences: did the unlabelled images pay, on val and on test, and what the line would see."""
    unlabelled = bool(results.get("labels", {}).get("unlabelled", True))
    missing = "distilled" if "label_only" in results else "label-only"
    no_gate = f"no gate: there is no {missing} student to compare with"
    lines = [verdict(results["gate"], unlabelled) if "gate" in results else no_gate]
    lines += [
        disagreement(results),
        labels_in_words(results),
        on_test(results),
        *escapes_in_words(results, models_in(results)),
        equal_footing(results),
    ]
    return [line for line in lines if line]


def next_commands(config: Config, run: Storage) -> list[str]:
    """Commands that can be pasted: quoted, at the operating point, and only on files that are on this machine's disks."""
    commands = []
    source = shlex.quote(_pictures(config, run))
    results = run.read_json("report/metrics.json")
    exported = run.read_json("export/export.json")["model"] if run.exists("export/stage.json") else ""
    if run.is_local and (uri := tracking_uri(Storage(config.run.storage_path))).startswith("sqlite"):
        commands.append(f"mlflow ui --backend-store-uri {shlex.quote(uri)}")
    if _is_current(run):
        if run.is_local:
            commands.append(f"dfssd predict {shlex.quote(run.path('export', _first_file(run)))} {source}")
    else:
        place = f"--storage-path {shlex.quote(config.run.storage_path)} --run-name {shlex.quote(config.run.run_name)}"
        again = (
            " --publish-best" if config.publish_best or (exported == LABEL_ONLY.role and "student" in results) else ""
        )
        again += " --overwrite" if exported else ""
        commands.append(f"dfssd export {place} --imgsz {config.train.imgsz}{again}")
    best = exported or next((m for m in reversed(models_in(results)) if run.exists(f"{m}/best.pt")), "")
    if best in results and run.is_local:
        score, model = results[best]["operating_point"]["score"], run.path(best, "best.pt")
        commands.append(
            f"yolo predict model={shlex.quote(model)} source={source} imgsz={config.train.imgsz} conf={score}"
        )
    return commands


def _is_current(run: Storage) -> bool:
    """Is there an export, made from the report that is there?"""
    if not run.exists("export/stage.json"):
        return False
    made_from = run.read_json("export/stage.json")["inputs"].get("report")
    return bool(made_from == run.read_json("report/stage.json")["digest"])


def _pictures(config: Config, run: Storage) -> str:
    """A folder with pictures in it, as `yolo predict` wants one: the data's own, or that of the first test picture."""
    own = Path(config.data.data)
    if config.data.data and own.is_dir() and any(p.suffix.lower() in IMAGE_SUFFIXES for p in own.iterdir()):
        return str(own)
    row = next(iter(read_manifest(run.at("dataset")).of_split("test")), None)
    return str(Path(row.uri).parent) if row and Path(row.uri).is_file() else "PICTURES"


def runs_page(config: Config, run: Storage) -> str:
    """Address of the experiment's runs in MLflow; '' where there is none."""
    known = run.read_json("run.json") if run.exists("run.json") else {}
    if not known.get("experiment_id") or not (uri := tracking_uri(Storage(config.run.storage_path))):
        return ""
    page = f"/#/experiments/{known['experiment_id']}/runs?workflowType=machine_learning"
    return (
        mask(uri).rstrip("/") + page
        if uri.startswith("http")
        else f"http://127.0.0.1:5000{page} (while mlflow ui runs)"
    )


def print_files(results: dict[str, Any], on: str) -> None:
    """Print what model files measured, one a row, each at its own operating point."""
    header = [
        "model",
        "mAP50",
        "mAP50-95",
        "COCO mAP50-95",
        "score",
        "chosen on",
        "escapes",
        "rejects",
        "false boxes",
        "ms (p50, p95)",
    ]
    rows, notes = [], []
    for file, one in results.items():
        line, point = one["line"], one["operating_point"]
        coco = one["coco"]["all"]["map50_95"]
        rates = [f"{r['count']} of {r['pictures']}" for r in (line["escape"], line["overkill"])]
        numbers = [f"{one['map50']:.4f}", f"{one['map50_95']:.4f}", "-" if coco is None else f"{coco:.4f}"]
        times = f"{one['latency_ms']:.1f}, {one['latency_p95_ms']:.1f}"
        rows.append(
            [
                file,
                *numbers,
                f"{point['score']:.3f}",
                point["chosen_on"].split(" (")[0],
                *rates,
                f"{line['false_boxes']:.2f}",
                times,
            ]
        )
        notes += [f"scores chosen on {point['chosen_on']} for at most {point['max_escape']:.1%} escapes"]
        notes += [*one["remarks"], *point["notes"], *doubts(line, point["max_escape"], on), one["latency_note"]]
    print(render(f"measured on {on}", header, rows))
    if same := common_point(results):
        print(same)
    print("\n".join(dict.fromkeys(notes)))
