"""What a user sees last: the table, where things lie, and what to type next."""

from __future__ import annotations

from dfssd.config import Config
from dfssd.evaluate.gate import publish_best, verdict
from dfssd.report.tables import result_table
from dfssd.runtime.storage import Storage
from dfssd.runtime.tracking import tracking_uri


def print_results(config: Config) -> None:
    """Print the results of a finished run."""
    storage = Storage(config.run.storage_path)
    run = storage.at(config.run.run_name)
    results = run.read_json("report/metrics.json")
    print()
    print(result_table(results))
    print(verdict(results["gate"]) if "gate" in results else "no gate: there is no label-only student to compare with")
    if config.publish_best:
        print(publish_best(run))
    print(f"\nstudent   {run.path('student', 'best.pt')}")
    print(f"report    {run.path('report', 'report.html')}")
    print(f"numbers   {run.path('report', 'metrics.json')}")
    print("\nnext:")
    uri = tracking_uri(storage)
    if uri.startswith("sqlite"):
        print(f"  mlflow ui --backend-store-uri {uri}")
    source = "IMAGE_OR_FOLDER"
    print(f"  yolo predict model={run.path('student', 'best.pt')} source={source} imgsz={config.train.imgsz}")
