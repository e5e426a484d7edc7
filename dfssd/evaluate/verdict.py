"""What a measurement means, in sentences: escapes and rejects at the operating point, and what cannot be said."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dfssd.evaluate.intervals import trials_needed

CLEAN_PICTURES = 30  # clean pictures below which overkill is said not to be measurable


def share(rate: dict[str, Any]) -> str:
    """'3 of 75 (4.0 %, 0.8 to 11.2)'; 'none to measure' without a picture."""
    if not rate["pictures"]:
        return "none to measure"
    return (
        f"{rate['count']} of {rate['pictures']} "
        f"({100 * rate['rate']:.1f} %, {100 * rate['low']:.1f} to {100 * rate['high']:.1f})"
    )


def escapes_in_words(results: dict[str, Any], models: dict[str, str], split: str = "test") -> list[str]:
    """Lines: escapes and rejects of each model on a split at its own operating point, then what cannot be said.

    Args:
        results: as `measure` returns them.
        models: names in `results` and what to call them, the most important last.
    """
    shown = [name for name in models if results[name].get(split, {}).get("line")]
    if not shown:
        return []
    point = results[shown[-1]]["operating_point"]
    lines = [
        f"At scores chosen on val for at most {point['max_escape']:.1%} escapes (defective, nothing found), on {split}:"
    ]
    width = max(len(models[name]) for name in shown)
    for name in shown:
        line = results[name][split]["line"]
        lines.append(
            f"  {models[name]:{width}}  lets {share(line['escape'])} defective pictures pass, "
            f"rejects {share(line['overkill'])} clean ones; {line['false_boxes']:.2f} false boxes a picture"
        )
    notes = [note[0].upper() + note[1:].rstrip(".") + "." for note in point["notes"]]
    notes += doubts(results[shown[-1]][split]["line"], point["max_escape"], split)
    return lines + [f"  {note}" for note in dict.fromkeys(notes)]


def doubts(measured: dict[str, Any], max_escape: float, split: str) -> list[str]:
    """Plain sentences on what the pictures of a split are too few to say."""
    notes = []
    escape, overkill = measured["escape"], measured["overkill"]
    if overkill["pictures"] < CLEAN_PICTURES:
        count = overkill["pictures"]
        who = f"{count} clean {split} picture{'s' * (count != 1)}" if count else f"No clean {split} picture:"
        said = f"{who} cannot measure overkill" if count else f"{who} overkill cannot be measured"
        more = f" (the interval is {overkill['low']:.0%} to {overkill['high']:.0%})" if count else ""
        notes.append(f"{said}{more}; add pictures without defects, with empty label files.")
    needed = trials_needed(max_escape)
    if escape["groups"] < needed:
        count = escape["pictures"]
        takes = f"that takes {needed} without an escape" if math.isfinite(needed) else "no number of pictures can"
        notes.append(
            f"{count} defective {split} picture{'s' * (count != 1)} ({escape['groups']} apart from near-duplicates) cannot "
            f"confirm an escape rate of {max_escape:.1%}: {takes}."
        )
    return notes


def equal_footing(results: dict[str, Any]) -> str:
    """Escapes of both students where the label-only one makes as many false boxes as the student; '' without both."""
    if not all(results.get(m, {}).get("test", {}).get("curve") for m in ("student", "label_only")):
        return ""
    own, base = (results[m]["test"]["curve"] for m in ("student", "label_only"))
    if None in own["escape"]:
        return ""
    budget = float(results["student"]["test"]["line"]["false_boxes"])  # as the sentences and the table above say
    passed = [_escape_at(c, budget) for c in (own, base)]
    return (
        f"At equal false boxes ({budget:.2f} a test picture, as the student makes) and one score for all classes the student "
        f"lets {passed[0]:.1%} of the defective pictures pass, the label-only student {passed[1]:.1%}."
    )


def _escape_at(curve: dict[str, Any], budget: float) -> float:
    """Share of defective pictures that pass at so many false boxes a picture: these fall with the score, escapes rise."""
    return float(np.interp(budget, curve["false_boxes"][::-1], curve["escape"][::-1]))


def common_point(results: dict[str, Any]) -> str:
    """Escapes of several files at as many false boxes as the first makes at its operating point: their own points may have
    been chosen on other pictures, or for other rates. '' of one file, or without a defective picture.
    """
    if len(results) < 2 or any(None in one["curve"]["escape"] for one in results.values()):
        return ""
    first, one = next(iter(results.items()))
    budget = float(one["line"]["false_boxes"])
    shares = ", ".join(f"{file} {_escape_at(own['curve'], budget):.1%}" for file, own in results.items())
    return (
        f"At equal false boxes ({budget:.2f} a picture, as {first} makes) and one score for all classes so many of the "
        f"defective pictures pass: {shares}."
    )


def disagreement(results: dict[str, Any]) -> str:
    """One line where mAP on val and escapes on test point to different students; '' where they do not."""
    lines = [results.get(m, {}).get("test", {}).get("line") for m in ("student", "label_only")]
    if "gate" not in results or None in lines:
        return ""
    own, base = (line["escape"] for line in lines)
    gain = results["gate"]["map50_95"]["difference"]
    if not own["pictures"] or gain == 0 or own["rate"] == base["rate"] or (gain > 0) == (own["rate"] < base["rate"]):
        return ""
    worse = "higher" if gain > 0 else "lower"
    return (
        f"NOTE: mAP and escapes disagree: mAP50-95 of the distilled student is {worse} on val, but at its own operating "
        f"point {own['count']} of {own['pictures']} defective test pictures pass, with the label-only student "
        f"{base['count']}. Look at both, and at the false boxes below, before one of them goes to the line."
    )


def labels_in_words(results: dict[str, Any]) -> str:
    """One line: whose labels were used; '' of a measurement that does not say."""
    labels = results.get("labels")
    if not labels:
        return ""
    train, val = labels["train"], labels["val"]
    how = "val is a part of the labels" if labels["from_labels"] else "--val-from-labels would make it a part of them"
    return (
        f"Labels used: those of {train} train + {val} val images, {train + val} in all: val chose weights and thresholds "
        f"({how}). Labels of test only measure."
    )


def on_test(results: dict[str, Any]) -> str:
    """One line: student against label-only student on test, which chose nothing, with best and last weights; '' without
    both."""
    if not {"student", "label_only"} <= set(results):
        return ""
    own, base = results["student"], results["label_only"]
    text = f"On test, which chose nothing: {_points(own['test'], base['test'])}"
    if "last" in own and "last" in base:
        last = _points(own["last"]["test"], base["last"]["test"])
        text += f"; with the weights of the last step, which nothing chose, {last}"
    return f"{text}. (Val chose the weights of both, so its differences flatter.)"


def _points(own: dict[str, Any], base: dict[str, Any]) -> str:
    return ", ".join(
        f"{label} {100 * (own[key] - base[key]):+.1f} points"
        for key, label in (("map50", "mAP50"), ("map50_95", "mAP50-95"))
    )
