"""benchmarks/semi_supervised.py: settings by place, and a copy of a data set has one size."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import semi_supervised


def test_what_is_given_once_holds_for_all_settings():
    assert semi_supervised.spread(data=["a"], imgsz=[128, 192]) == [("a", 128), ("a", 192)]
    with pytest.raises(SystemExit, match="--label-fraction is given 2 times: give it once, or 3 times"):
        semi_supervised.spread(data=["a", "b", "c"], label_fraction=[0.1, 0.2])


def test_two_copies_are_not_written_into_one_folder():
    assert semi_supervised.copies(Namespace(data=["x/a", "x/a", "b"], imgsz=[64])) == [("x/a", 64), ("b", 64)]
    for data, imgsz in ((["a"], [64, 96]), (["x/a", "y/a"], [64])):
        with pytest.raises(SystemExit, match="the copy of a is of one folder and size"):
            semi_supervised.copies(Namespace(data=data, imgsz=imgsz))
