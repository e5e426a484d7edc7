"""The operating point in the report: what was asked for, and what the line sees over the score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from markupsafe import Markup

from dfssd.evaluate.verdict import share
from dfssd.report import charts

ONE = "Curves: one score for all classes."


class Figure(NamedTuple):
    """A chart and what stands below it."""

    chart: Markup
    caption: str


def svg(*args: Any, **kwargs: Any) -> Markup:
    """A chart, whose texts are escaped by `charts`."""
    return Markup(charts.line_chart(*args, **kwargs))


def point_text(point: dict[str, Any], title: str, escape: dict[str, Any]) -> str:
    """What was asked for and chosen, and what test says of it, in sentences.

    Args:
        title: what a sentence calls the model. escape: its share of defective test pictures that pass, with its interval.
    """
    reached = "" if point["reachable"] else " It cannot be reached: the lowest usable score stands instead."
    return (
        f"Asked for: at most {point['max_escape']:.1%} of the defective pictures pass (--max-escape). For {title} val "
        f"chose the score {point['score']:.3f} for all classes, and the thresholds by class below, which differ from it "
        "where val lets no more pass with them and makes fewer false boxes, in cross-validation too."
        f"{reached} Test, which had no part in the choice: "
        f"{_on_test(escape, point['max_escape'])} Pictures are counted as the line sees them: "
        "letterboxed to a square, as an exported model takes them. The counts, cards and pictures of this page are those of "
        f"the thresholds by class, as dfssd predict and the exported model apply them; yolo predict takes one score, conf="
        f"{point['score']}, and finds other boxes."
    )


def _on_test(escape: dict[str, Any], most: float) -> str:
    """Does test confirm the rate that was asked for? One sentence."""
    if not escape["pictures"]:
        return "no defective picture there could check it."
    if escape["low"] > most:
        judged = "more than was asked for."
    elif escape["high"] <= most:
        judged = "it holds."
    else:
        judged = f"too few pictures to confirm or refute {most:.1%}."
    return f"{share(escape)} pass; {judged}"


def point_charts(
    results: dict[str, Any], titles: dict[str, str], point: dict[str, Any], names: Sequence[str], prose: str
) -> list[Figure]:
    """What the line sees over the score: of the model that goes there first, then of all beside each other.

    Args:
        names: classes in order. prose: what a sentence calls the model that goes to the line.
    """

    def pairs(curve: dict[str, Any], key: str, x: str = "score") -> list[tuple[float, float | None]]:
        return list(zip(curve[x], curve[key], strict=True))

    curves = {titles[m]: results[m]["test"]["curve"] for m in titles}
    best = list(titles)[-1]
    own, line = curves[titles[best]], {titles[m]: results[m]["test"]["line"] for m in titles}
    both = {"defective pictures that pass": pairs(own, "escape"), "clean pictures thrown out": pairs(own, "overkill")}
    by_class = {n: list(zip(own["score"], own["escape_by_class"][n], strict=True)) for n in names}
    dots = {t: (m["false_boxes"], m["escape"]["rate"]) for t, m in line.items() if m["escape"]["rate"] is not None}
    edge = max([3.0, *(1.05 * x for x, _ in dots.values())])  # the end that matters, and all points
    trade = {t: [p for p in pairs(c, "escape", "false_boxes") if p[0] <= edge] for t, c in curves.items()}
    chart = partial(svg, x_label="score", x_range=(0, 1))
    at = f"Dashed: {point['score']:.3f}, which val chose; thresholds by class depart from it."
    found = [
        Figure(chart(f"Test pictures and {prose} (shares)", both, mark_x=point["score"]), f"{ONE} {at}"),
        Figure(
            chart(f"Escapes by class, {prose}", by_class, mark_x=point["score"]),
            f"Of the pictures that show the class. {ONE} {at}",
        ),
        Figure(chart("Escapes, share of defective pictures", {t: pairs(c, "escape") for t, c in curves.items()}), ONE),
        Figure(chart("Overkill, share of clean pictures", {t: pairs(c, "overkill") for t, c in curves.items()}), ONE),
        Figure(
            chart("False boxes a picture", {t: pairs(c, "false_boxes") for t, c in curves.items()}, y_range=None), ONE
        ),
        Figure(
            svg("Escapes against false boxes", trade, "false boxes a picture", x_range=(0, edge), dots=dots),
            f"{ONE} Dots: each model at its thresholds by class, so a dot may lie beside its line.",
        ),
    ]
    return [one for one in found if one.chart]
