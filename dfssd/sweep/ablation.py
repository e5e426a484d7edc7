"""The table of a sweep: mean and standard deviation over seeds, paired differences, cost; and from where it is read."""

from __future__ import annotations

import csv as csv_module
import io
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from dfssd.errors import DfssdError
from dfssd.report.tables import render

RESAMPLES = 10_000
HEADER = ["row", "seeds", "test mAP50", "test mAP50-95", "difference", "95 % interval", "steps", "time (min)", "cost"]

COLUMNS = [
    *("row", "x", "seeds", "test_map50_mean", "test_map50_sd", "test_map50_by_seed", "test_map50_95_mean"),
    *("difference", "interval_low", "interval_high", "steps", "minutes", "cost", "cost_unit"),
]


@dataclass(frozen=True)
class AblationRow:
    """One row of the table; shares 0..1.

    Args:
        values, values_95: test mAP50 and mAP50-95 by seed.
        difference: mean over the seeds that the first row has too, of the value minus the first row's; None: the first
            row itself, or no seed in common.
        interval: 95 % of the bootstrap of `difference` over seeds; None below two seeds.
        cost: CPU- or GPU-hours of all its trials together.
    """

    name: str
    x: float | None
    values: dict[int, float]
    values_95: dict[int, float]
    difference: float | None
    interval: tuple[float, float] | None
    steps: int
    minutes: float
    cost: float
    unit: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def sd(self) -> float:
        """Standard deviation over seeds (n - 1); 0 of one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0


def bootstrap_interval(differences: list[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile interval of the mean of paired differences (Efron & Tibshirani 1993, section 13.3).

    Over few seeds it is too narrow (with three, 1/9 of the resamples are of one value): read it as a lower bound. BCa, which
    corrects for bias and skewness, needs more values than there are seeds to estimate them from.
    """
    if len(differences) < 2:
        return None
    found = bootstrap(
        (np.asarray(differences),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def ranked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of a search with the best point first; those of a grid as they are, in the order of its file."""
    if not records or records[0]["search"] == "grid":
        return records
    metric, sign = records[0]["metric"], -1 if records[0]["mode"] == "max" else 1
    by_row: dict[str, list[float]] = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record["result"][metric])
    places = sorted(by_row, key=lambda row: (sign * statistics.fmean(by_row[row]), row))
    return [{**record, "order": places.index(record["row"])} for record in records]


def rows_of(records: list[dict[str, Any]]) -> list[AblationRow]:
    """Rows in the order of the trials.

    Args:
        records: of finished trials, with row, seed, x and result (see `dfssd.sweep.trial`).
    """
    names = list(dict.fromkeys(record["row"] for record in sorted(records, key=lambda r: (r["order"], r["row"]))))
    first: dict[int, float] = {}
    rows: list[AblationRow] = []
    for name in names:
        own = {record["seed"]: record for record in records if record["row"] == name}
        values = {seed: r["result"]["test/map50"] for seed, r in sorted(own.items())}
        first = first or values
        paired = [values[seed] - first[seed] for seed in values if seed in first]
        some = next(iter(own.values()))["result"]
        unit = "gpu_hours" if "gpu_hours" in some else "cpu_hours"
        rows.append(
            AblationRow(
                name=name,
                x=next(iter(own.values())).get("x"),
                values=values,
                values_95={seed: r["result"]["test/map50_95"] for seed, r in sorted(own.items())},
                difference=statistics.fmean(paired) if paired and rows else None,
                interval=bootstrap_interval(paired) if rows else None,
                steps=int(some["step"]),
                minutes=statistics.fmean(r["result"]["duration_s"] for r in own.values()) / 60,
                cost=sum(r["result"][unit] for r in own.values()),
                unit=unit.replace("_", "-").replace("cpu", "CPU").replace("gpu", "GPU"),
            )
        )
    return rows


def _cells(row: AblationRow, pm: str = "±") -> list[str]:
    def spread(values: dict[int, float]) -> str:
        mean = 100 * statistics.fmean(values.values())
        return f"{mean:.1f} {pm} {100 * statistics.stdev(values.values()):.1f}" if len(values) > 1 else f"{mean:.1f}"

    low, high = row.interval or (0.0, 0.0)
    return [
        row.name,
        str(len(row.values)),
        spread(row.values),
        spread(row.values_95),
        "" if row.difference is None else f"{100 * row.difference:+.1f}",
        "" if row.interval is None else f"{100 * low:+.1f} to {100 * high:+.1f}",
        str(row.steps),
        f"{row.minutes:.1f}",
        f"{row.cost:.2f} {row.unit}",
    ]


def terminal(rows: list[AblationRow], title: str) -> str:
    return render(f"{title}: mean ± standard deviation over seeds, in %", HEADER, [_cells(row) for row in rows])


def markdown(rows: list[AblationRow]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *(_cells(row) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def csv(rows: list[AblationRow]) -> str:
    """Full precision, shares 0..1, values by seed."""
    buffer = io.StringIO()
    writer = csv_module.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        low, high = row.interval or ("", "")
        by_seed = " ".join(f"{seed}:{value:.6f}" for seed, value in row.values.items())
        mean_95 = statistics.fmean(row.values_95.values())
        ends = ["" if row.difference is None else row.difference, low, high, row.steps, row.minutes, row.cost, row.unit]
        own = [row.name, "" if row.x is None else row.x, len(row.values), row.mean, row.sd, by_seed, mean_95]
        writer.writerow([*own, *ends])
    return buffer.getvalue()


def latex(rows: list[AblationRow]) -> str:
    """A tabular with booktabs rules."""

    def escaped(cell: str) -> str:
        for sign in "\\&%#_{}":
            cell = cell.replace(sign, "\\textbackslash{}" if sign == "\\" else f"\\{sign}")
        return cell

    lines = ["\\begin{tabular}{l" + "r" * (len(HEADER) - 1) + "}", "\\toprule"]
    lines += [" & ".join(map(escaped, HEADER)) + " \\\\", "\\midrule"]
    for row in rows:
        cells = [escaped(cell).replace("±", "$\\pm$") for cell in _cells(row)]
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def from_mlflow(client: Any, experiment: str, sweep: str) -> list[dict[str, Any]]:
    """Records of the finished trials of a sweep, from MLflow alone.

    Raises:
        DfssdError: there is none.
    """
    found = client.get_experiment_by_name(experiment)
    own = f"tags.sweep = '{sweep}' and tags.kind = 'trial' and attributes.status = 'FINISHED'"
    runs = client.search_runs([found.experiment_id], own, max_results=10_000) if found else []
    records: dict[str, dict[str, Any]] = {}
    for run in runs:  # the newest first
        tags, metrics = run.data.tags, run.data.metrics
        result = {k.removeprefix("result/"): v for k, v in metrics.items() if k.startswith("result/")}
        if "test/map50" not in result:
            continue
        record = {
            "trial": tags["trial"],
            "row": tags["row"],
            "order": int(tags["order"]),
            "seed": int(tags["seed"]),
            "search": tags["search"],
            "metric": tags["metric"],
            "mode": tags["mode"],
            "x": _number(tags["x"]) if "x" in tags else None,
            "settings": {k.removeprefix("set."): _number(v) for k, v in tags.items() if k.startswith("set.")},
            "result": result,
        }
        records.setdefault(tags["trial"], record)
    if not records:
        raise DfssdError(
            f"MLflow knows no finished trial of the sweep {sweep!r}",
            where=f"experiment {experiment!r}",
            todo="give the sweep's --run-name, and its --storage-path or MLFLOW_TRACKING_URI",
        )
    return sorted(records.values(), key=lambda r: (r["order"], r["row"], r["seed"]))


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
