"""The table of a sweep against numbers worked out by hand."""

import csv
import io

import numpy as np
import pytest

from dfssd.sweep import ablation
from dfssd.sweep.figure import draw


def record(row: str, seed: int, value: float, order: int, **more: object) -> dict:
    result = {"test/map50": value, "test/map50_95": value / 2, "step": 100.0, "duration_s": 120.0, "cpu_hours": 0.25}
    own = {"trial": f"{row}{seed}", "row": row, "seed": seed, "order": order, "x": None, "settings": {"a.b": order}}
    return {**own, "search": "grid", "result": result, **more}


@pytest.fixture
def records() -> list[dict]:
    base = [record("base", s, v, 0) for s, v in ((0, 0.30), (1, 0.40), (2, 0.35))]
    return [*base, *(record("full_method 5 %", s, v, 1) for s, v in ((2, 0.45), (0, 0.38), (1, 0.46)))]


def test_mean_deviation_and_paired_difference(records: list[dict]) -> None:
    base, full = ablation.rows_of(records[::-1])  # in whatever order they come
    assert (base.name, full.name) == ("base", "full_method 5 %")
    assert base.mean == pytest.approx(0.35)
    assert base.sd == pytest.approx(0.05)
    assert full.mean == pytest.approx(0.43)
    assert base.difference is None
    assert full.difference == pytest.approx((0.08 + 0.06 + 0.10) / 3)  # by seed, not by order
    assert full.interval == pytest.approx((0.06, 0.10))
    assert full.cost == pytest.approx(0.75)
    assert full.minutes == pytest.approx(2)


def test_only_seeds_that_both_rows_have_are_paired(records: list[dict]) -> None:
    _, full = ablation.rows_of([r for r in records if (r["row"], r["seed"]) != ("base", 1)])
    assert full.difference == pytest.approx(0.09)
    lone = ablation.rows_of([*records[:3], record("other", 7, 0.9, 2)])[1]
    assert lone.difference is None
    assert lone.interval is None


def test_a_search_has_its_best_point_first(records: list[dict]) -> None:
    searched = [{**r, "search": "optuna", "metric": "test/map50", "mode": "max"} for r in records]
    assert [row.name for row in ablation.rows_of(ablation.ranked(searched))] == ["full_method 5 %", "base"]
    searched = [{**r, "mode": "min"} for r in searched]
    assert [row.name for row in ablation.rows_of(ablation.ranked(searched))] == ["base", "full_method 5 %"]
    assert ablation.ranked(records) == records


def test_the_interval_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.03, 0.02, 40).tolist()
    low, high = ablation.bootstrap_interval(values) or (0, 0)
    error = np.std(values, ddof=1) / np.sqrt(40)
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.15 * error)
    assert ablation.bootstrap_interval([0.1]) is None


def test_markdown_csv_and_latex_say_the_same(records: list[dict]) -> None:
    rows = ablation.rows_of(records)
    markdown = ablation.markdown(rows)
    assert "| base | 3 | 35.0 ± 5.0 | 17.5 ± 2.5 |  |  | 100 | 2.0 | 0.75 CPU-hours |" in markdown
    assert "| full_method 5 % | 3 | 43.0 ± 4.4 | 21.5 ± 2.2 | +8.0 | +6.0 to +10.0 |" in markdown
    parsed = list(csv.DictReader(io.StringIO(ablation.csv(rows))))
    assert float(parsed[1]["difference"]) == pytest.approx(0.08)
    assert parsed[0]["test_map50_by_seed"] == "0:0.300000 1:0.400000 2:0.350000"
    latex = ablation.latex(rows)
    assert "full\\_method 5 \\% & 3 & 43.0 $\\pm$ 4.4" in latex
    assert latex.count("\\\\") == 3


def test_a_figure_for_each_kind_of_sweep(records: list[dict]) -> None:
    curves = [
        record(f"{n}, {x}", s, x / 2 + s / 10, k, x=x)
        for k, (n, x) in enumerate((n, x) for n in ("a", "b") for x in (0.1, 0.5, 1.0))
        for s in (0, 1)
    ]
    search = [record(f"lr {k}", 0, 0.1 * k, 0, settings={"train.lr": 0.001 * k, "d.k": "x" * k}) for k in range(1, 7)]
    pictures = [
        draw(ablation.rows_of(r), r, "t", search=is_search)
        for r, is_search in ((records, False), (curves, False), (search, True), (search[:1], True))
    ]
    assert all(p.startswith(b"\x89PNG") and len(p) > 5000 for p in pictures)
    assert len(set(pictures)) == 4
