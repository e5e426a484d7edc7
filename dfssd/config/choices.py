"""Enumerations, a table each: a row says what a choice is, and what everything that knows about choices asks of it.

The choices of a flag and its help, the checks of settings, thresholds and divergences themselves, and the lines of the report
follow from here. To add a row, see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

LineStyle = str | tuple[int, tuple[int, ...]]  # as Matplotlib takes it


@dataclass(frozen=True)
class Divergence:
    """How two feature maps are compared.

    Args:
        says: one line for help and documentation.
        function: its name in `dfssd.distill.divergences`.
        tau: temperature of the softmax, that of its paper; it then compares maps that are standardised per channel, where a
            softmax would be one-hot or flat by the accident of their scale. 0: it has none, and compares raw maps.
        needs: what it takes beside the maps: the teacher's scores, or a trained generator and positions to hide.
        hierarchical: layers are weighted towards those that differ most; else their mean is taken.
    """

    says: str
    function: str
    tau: float = 0.0
    needs: Literal["", "scores", "generator"] = ""
    hierarchical: bool = False


DIVERGENCES = {
    "mse": Divergence("mean squared difference", "mse"),
    "kl": Divergence("Kullback-Leibler over channels", "kl", tau=1.0),
    "cwd": Divergence("Kullback-Leibler over each channel's positions (CWD)", "cwd", tau=4.0),
    "js": Divergence("Jensen-Shannon over each channel's positions", "js", tau=1.0),
    "hw_js": Divergence("js, layers weighted by how much they differ (DFSSD)", "js", tau=1.0, hierarchical=True),
    "mgd": Divergence("a trained generator fills in hidden positions (MGD)", "mgd", needs="generator"),
    "pkd": Divergence("1 - Pearson correlation of each channel (PKD)", "pkd"),
    "score_l2": Divergence("squared difference weighted by the teacher's scores", "score_l2_sums", needs="scores"),
}


@dataclass(frozen=True)
class ThresholdPolicy:
    """How class thresholds follow from candidates.

    Args:
        says: one line for help and documentation.
        uses: fields of section `thresholds` that it reads; the others have no effect with it.
        floor: its lowest threshold where `--tau-min` is 0.
        line: how the report draws its thresholds.
    """

    says: str
    uses: frozenset[str]
    line: LineStyle
    floor: float = 0.1


POLICIES = {
    "fixed": ThresholdPolicy("--tau for all classes", frozenset({"tau"}), ":"),
    "ema": ThresholdPolicy(
        "a moving average of confidences (DFSSD)", frozenset({"tau_min", "tau_max", "tau_decay"}), "--", floor=0.5
    ),
    "gmm": ThresholdPolicy("a mixture of two a class", frozenset({"tau", "tau_min", "tau_max"}), "-."),
    "match": ThresholdPolicy(
        "as many pseudo-labels an image as labels", frozenset({"tau_min", "tau_max"}), (0, (1, 2, 4, 2))
    ),
    "precision": ThresholdPolicy("right as often as --precision asks, by val", frozenset({"precision"}), "-"),
}


def in_words(table: Mapping[str, Divergence | ThresholdPolicy]) -> str:
    """All choices and what they are, for help."""
    return "; ".join(f"{name}: {row.says}" for name, row in table.items())


def floors() -> str:
    """Lowest thresholds of the policies that have one, for help."""
    return ", ".join(f"{name} {row.floor:g}" for name, row in POLICIES.items() if "tau_min" in row.uses)


def temperatures() -> str:
    """Own temperatures of the divergences that have one, for help."""
    return ", ".join(f"{name} {row.tau:g}" for name, row in DIVERGENCES.items() if row.tau)


class Choice:
    """Of a setting: its value is a name in a table. For `Annotated[str, Choice(TABLE)]`."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.names = tuple(table)

    def check(self, value: str) -> str:
        if value not in self.names:
            raise ValueError(f"{value!r} is none of {', '.join(self.names)}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))
