"""Tables of benchmarks/semi_supervised.py from the results of its rows, as JSON and Markdown."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t
from semi_rows import TITLES, parse_row

Results = dict[str, dict[int, dict[str, Any]]]  # row -> seed -> result


def read_results(setting: Path) -> Results:
    """Results of one setting (a data set and a label fraction)."""
    found: Results = {}
    for file in sorted(setting.glob("seed*/*/result.json")):
        one = json.loads(file.read_text())
        if "best" in one:
            found.setdefault(one["row"], {})[one["seed"]] = one
    return found


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean (Student's t); NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)))


def summary(results: Results) -> list[dict[str, Any]]:
    """One entry a row: means over seeds (points), and the paired difference to labels alone over the same seeds."""
    base, ceiling = results.get("label_only", {}), results.get("ceiling", {})
    entries = []
    for name, seeds in results.items():
        entry: dict[str, Any] = {"row": name, "seeds": sorted(seeds), "steps": next(iter(seeds.values())).get("steps")}
        for which in ("best", "last"):
            for split in ("val", "test"):
                for key in ("map50", "map50_95"):
                    values = [100 * r[which][split][key] for r in seeds.values()]
                    entry[f"{which}/{split}/{key}"] = round(statistics.mean(values), 2)
                    entry[f"{which}/{split}/{key}/sd"] = round(statistics.stdev(values), 2) if len(values) > 1 else None
                    pairs = [
                        100 * (r[which][split][key] - base[s][which][split][key]) for s, r in seeds.items() if s in base
                    ]
                    if pairs and name != "label_only":
                        entry[f"{which}/{split}/{key}/gain"] = round(statistics.mean(pairs), 2)
                        entry[f"{which}/{split}/{key}/interval"] = _finite(interval(pairs))
        gap = _mean(ceiling) - _mean(base) if ceiling and base else math.nan
        gain = entry.get("best/test/map50/gain", math.nan)
        entry["share_of_gap"] = _finite(gain / gap) if gap > 0 else None
        entries.append(entry)
    order = list(TITLES)
    return sorted(entries, key=lambda e: (order.index(parse_row(e["row"]).base), e["row"]))


def _mean(seeds: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(100 * r["best"]["test"]["map50"] for r in seeds.values())


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def markdown(setting: str, results: Results) -> str:
    """A table of one setting."""
    if not results:
        return f"### {setting}\n\nno row is finished yet\n"
    one = next(iter(next(iter(results.values())).values()))
    counts = f"{one['labelled']} labelled train + {one['val']} labelled val images, {one['unlabelled']} unlabelled"
    header = ["row", "seeds", "steps", "best: mAP50", "mAP50-95", "last: mAP50", "mAP50-95"]
    header += ["gain over labels alone, mAP50", "mAP50-95", "of the gap"]
    lines = [
        f"### {setting}",
        "",
        f"{counts}, {one['test']} test. Points on test; best, last: weights of the best validation, of the last step;",
        "± standard deviation over seeds; the gain is paired by seed, with its 95 % interval (t).",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for e in summary(results):
        parsed = parse_row(e["row"])
        title = TITLES.get(e["row"], f"{TITLES.get(parsed.base, parsed.base)}: `{e['row']}`")
        cells = [_cell(e, f"{w}/test/{k}") for w in ("best", "last") for k in ("map50", "map50_95")]
        gains = [_gain(e, f"best/test/{k}") for k in ("map50", "map50_95")]
        share = (
            "" if e["share_of_gap"] is None or parsed.base in ("label_only", "ceiling") else f"{e['share_of_gap']:.0%}"
        )
        lines.append(f"| {title} | {len(e['seeds'])} | {e['steps']} | {' | '.join(cells + gains)} | {share} |")
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, Any], key: str) -> str:
    spread = entry[f"{key}/sd"]
    return f"{entry[key]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def _gain(entry: dict[str, Any], key: str) -> str:
    gain, half = entry.get(f"{key}/gain"), entry.get(f"{key}/interval")
    if gain is None:
        return ""
    return f"{gain:+.1f}" + (f" ({gain - half:+.1f} to {gain + half:+.1f})" if half is not None else "")


def labels_table(setting: Path) -> str:
    """What the pseudo-labels of each teacher are worth against the withheld boxes."""
    lines = [
        "| labels of | seed | candidates' AP50 | silent images | gmm: P, R | match: P, R | fixed: P, R | precision: P, R |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in sorted(setting.glob("seed*/labels*/result.json")):
        r = json.loads(file.read_text())
        cells = [
            f"{r[p]['precision'][-1]:.2f}, {r[p]['recall'][-1]:.2f}" for p in ("gmm", "match", "fixed", "precision")
        ]
        lines.append(
            f"| {r['row'].partition('@')[2]} | {r['seed']} | {100 * r['ap50']:.1f} | {r['silent']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def write_tables(out: Path) -> str:
    """Write `table.md` and `table.json` for all settings below `out`; return the Markdown."""
    parts, numbers = [], {}
    for setting in sorted(p for p in out.iterdir() if list(p.glob("seed*"))):
        results = read_results(setting)
        parts += [markdown(setting.name, results), labels_table(setting)]
        numbers[setting.name] = summary(results) if results else []
    text = "\n".join(p for p in parts if p)
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(json.dumps(numbers, indent=1))
    return text
