"""Odd class names reach MLflow, each under a name of its own."""

import pytest
from mlflow.utils.validation import _validate_metric_name

from dfssd.runtime.metric_names import metric_name

ODD = [
    "scratch",
    "scratch/",
    "/scratch",
    "a//b",
    "+",
    "-",
    "%",
    "划痕",
    "..",
    ".",
    "",
    "a\tb",
    "rust (red)",
    "é",
    "<x>",
    "a/../b",
    "²",
]


@pytest.mark.parametrize("name", ODD)
def test_mlflow_accepts_it(name):
    _validate_metric_name(f"by_class/{metric_name(name)}/map50")
    _validate_metric_name(metric_name(f"by_class/{name}/map50"))


def test_no_two_share_a_name():
    assert len({metric_name(f"by_class/{name}/map50") for name in ODD}) == len(ODD)
    assert metric_name("time/step (s)") == "time/step s" and metric_name("metrics/mAP50(B)") == "metrics/mAP50 B"
