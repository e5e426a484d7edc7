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
        line: how the report draws its thresholds.
        floor: its lowest threshold where `--tau-min` is 0.
        needs: what it takes beside the scores of all candidates and the labelled rate: what those on val are worth.
        moves: does it follow batch after batch? What does so is then made by its entry in `MOVING` of
            `dfssd.pseudo.thresholds`; the report shows where it will end.
        explained: the same at more length, for docs/pseudo_labels.md.
        varied: the field of `uses`, a share (0..1), that a sweep of thresholds varies; '' sweeps it as it is.
    """

    says: str
    uses: frozenset[str]
    line: LineStyle
    floor: float = 0.1
    needs: Literal["", "val"] = ""
    moves: bool = False
    varied: str = ""
    explained: str = ""

    @property
    def in_loop(self) -> bool:
        """Can a teacher that labels inside the training loop use it? That one has the scores of the last steps alone."""
        return not self.needs and not self.moves


POLICIES = {
    "fixed": ThresholdPolicy(
        "--tau for all classes",
        frozenset({"tau"}),
        ":",
        varied="tau",
        explained="those from `--tau`, the same for every class",
    ),
    "ema": ThresholdPolicy(
        "a moving average of confidences (DFSSD)",
        frozenset({"tau_min", "tau_max", "tau_decay"}),
        "--",
        floor=0.5,
        moves=True,
        varied="tau_min",
        explained="those from the moving average of the teacher's scores for their class, 0.5 at least",
    ),
    "gmm": ThresholdPolicy(
        "a mixture of two a class, --tau where there is none",
        frozenset({"tau", "tau_min", "tau_max"}),
        "-.",
        varied="tau_min",
        explained="those for which the upper of two Gaussians, fitted to the scores of their class, is the likelier one; at "
        "most three times as many an image as there are labelled boxes",
    ),
    "match": ThresholdPolicy(
        "as many pseudo-labels an image as labels",
        frozenset({"tau_min", "tau_max"}),
        (0, (1, 2, 4, 2)),
        varied="tau_min",
        explained="as many of the best an image as there are labelled boxes of the class",
    ),
    "precision": ThresholdPolicy(
        "right as often as --precision asks, by val",
        frozenset({"precision"}),
        "-",
        needs="val",
        varied="precision",
        explained="those of classes right as often as `--precision` asks, as a lower bound from scores calibrated on val",
    ),
}
IN_LOOP_POLICIES = {name: row for name, row in POLICIES.items() if row.in_loop}


@dataclass(frozen=True)
class Option:
    """A choice that is a name and nothing else. Args: says: one line for help and documentation."""

    says: str


# `models/precision.py` has their types, `models/yolo/box_loss.py` the functions.
PRECISIONS = {
    "auto": Option("bf16 where the hardware computes it natively, else fp16 on a GPU and fp32 on a CPU"),
    "fp32": Option("TF32 in training where a card has it, unless --no-tf32"),
    "fp16": Option("with scaled gradients"),
    "bf16": Option("no scaling needed"),
}
BOX_LOSSES = {
    "ciou": Option("Complete-IoU, Ultralytics'"),
    "inner_focaler_eiou": Option("the published DFSSD's, on boxes as it meant them"),
}


@dataclass(frozen=True)
class DataFormat:
    """A layout that labels come in.

    Args:
        says: one line for help and documentation.
        json: of one whose label files are JSON, "file.name" in `dfssd.data.formats`: that file has `is_name(content)` and
            `read_name(tree, contents)`. The others are told apart by their folders (`formats/read.py`).
    """

    says: str
    json: str = ""


FORMATS = {
    "auto": DataFormat("the first that fits"),
    "yolo": DataFormat("a text file a picture, with or without a data.yaml"),
    "voc": DataFormat("Pascal VOC, an XML a picture"),
    "coco": DataFormat("COCO", json="coco.coco"),
    "cr7-det": DataFormat("as CR7-DET is published"),
    "cvat": DataFormat("CVAT for images, one XML"),
    "labelstudio": DataFormat("Label Studio", json="labelstudio.label_studio"),
    "labelme": DataFormat("labelme, a JSON a picture", json="other_formats.labelme"),
    "supervisely": DataFormat("Supervisely, a JSON a picture", json="more_formats.supervisely"),
    "via": DataFormat("VGG Image Annotator, JSON or CSV", json="more_formats.via"),
    "createml": DataFormat("CreateML", json="other_formats.createml"),
    "csv": DataFormat("TensorFlow's table"),
}

# What `dfssd.review.exports` writes.
REVIEW_FORMATS = {
    "labelstudio": Option("tasks with predictions, and the labelling configuration"),
    "cvat": Option("CVAT for images 1.1"),
    "coco": Option("one JSON"),
    "yolo": Option("a .zip of text files"),
}

# Switches: code asks for their values by name, in one or two places each, so each has a type beside its table. The type
# checker then refuses a comparison with a value that there is not, and a row whose name is none.
Gpu = Literal["auto", "never", "require"]
GPU: dict[Gpu, Option] = {
    "auto": Option("where the cluster has them"),
    "never": Option("none, whatever it has"),
    "require": Option("a run without is refused"),
}
MissingLabels = Literal["unlabelled", "background"]
MISSING_LABELS: dict[MissingLabels, Option] = {
    "unlabelled": Option("nobody has looked at it"),
    "background": Option("it is known to be defect-free"),
}
Split = Literal["grouped", "random", "given"]
SPLIT: dict[Split, Option] = {
    "grouped": Option("near-duplicates stay together"),
    "random": Option("image by image, so that it leaks"),
    "given": Option("the data's own"),
}
Tta = Literal["none", "flips"]
TTA: dict[Tta, Option] = {
    "none": Option("the image alone"),
    "flips": Option("also its three mirrored forms, fused"),
}
TeacherMode = Literal["frozen", "online"]
TEACHER_MODE: dict[TeacherMode, Option] = {
    "frozen": Option("it stays as it is"),
    "online": Option("it goes on training on the labelled images, and its weight average teaches"),
}
Silence = Literal["ignore", "background"]
SILENCE: dict[Silence, Option] = {
    "ignore": Option("nothing"),
    "background": Option("'no defect here'"),
}
Prediction = Literal["soft", "mse"]
PREDICTION: dict[Prediction, Option] = {
    "soft": Option("soft scores, and boxes by their bins"),
    "mse": Option("raw outputs, as published"),
}
FeatureSchedule = Literal["constant", "cosine", "off_last_epochs"]
FEATURE_SCHEDULE: dict[FeatureSchedule, Option] = {
    "constant": Option("1"),
    "cosine": Option("from 1 to 0.1"),
    "off_last_epochs": Option("1, and 0 for the last --off-last of the steps"),
}
BalanceRule = Literal["none", "gradnorm"]
BALANCE: dict[BalanceRule, Option] = {
    "none": Option("as they are given"),
    "gradnorm": Option("so that each term's gradient keeps its share of the supervised one"),
}
ExportFormat = Literal["onnx", "openvino", "tensorrt"]
EXPORT_FORMATS: dict[ExportFormat, Option] = {
    "onnx": Option("always, with any other"),
    "openvino": Option("where it is installed"),
    "tensorrt": Option("where it is installed, on a GPU like that at the line"),
}


def in_words(table: Mapping[Any, Divergence | ThresholdPolicy | Option | DataFormat]) -> str:
    """All choices and what they are, for help."""
    return "; ".join(f"{name}: {row.says}" for name, row in table.items())


def readers(field: str) -> str:
    """Policies that read a field of section `thresholds`, for its help."""
    return ", ".join(name for name, row in POLICIES.items() if field in row.uses)


def floors() -> str:
    """Lowest thresholds of the policies that have one, for help."""
    return ", ".join(f"{name} {row.floor:g}" for name, row in POLICIES.items() if "tau_min" in row.uses)


def temperatures() -> str:
    """Own temperatures of the divergences that have one, for help."""
    return ", ".join(f"{name} {row.tau:g}" for name, row in DIVERGENCES.items() if row.tau)


class Choice:
    """Of a setting: its value is a name in a table. For `Annotated[str, Choice(TABLE)]`, or with the type of a switch."""

    def __init__(self, table: Mapping[Any, Any]) -> None:
        self.table, self.names = table, tuple(table)

    def check(self, value: str) -> str:
        if value not in self.names:
            raise ValueError(f"{value!r} is none of {', '.join(self.names)}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))
