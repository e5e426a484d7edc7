"""Settings of a run: where it lives, its data and its models. The others are in `config`, which has all of them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(Section):
    """Where the run lives and what it may use. Nothing here changes a result but `seed`."""

    storage_path: str = Field("runs", description="Folder or URI (s3://, gs://) that holds all runs.")
    run_name: str = Field("run", description="Name of this run; the same pair of path and name again resumes it.")
    overwrite: bool = Field(False, description="Replace stages whose settings or inputs differ from what is there.")
    dry_run: bool = Field(False, description="Check storage, data, weights and resources, print the plan and stop.")
    seed: int = Field(0, description="Seed of split, order of samples, augmentation and initial weights.")
    num_workers: str = Field(
        "1",
        description="Training workers, which share each global batch: a number, LOW:HIGH (as many of these as the cluster "
        "holds, following its size), or auto (one a GPU; without GPUs one a node).",
    )
    cpus_per_worker: int = Field(0, ge=0, description="CPU cores a worker; 0: all there are, shared evenly.")
    gpu: Literal["auto", "never", "require"] = Field(
        "auto", description="A GPU a worker: where the cluster has them, never, or not without."
    )
    wait_min: float = Field(
        0.0, ge=0, description="Minutes to wait for nodes that an autoscaler is still to start, before giving up."
    )
    experiment: str = Field("dfssd", description="MLflow experiment.")

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> str:
        text = str(value)
        if text != "auto" and not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", text):
            raise ValueError(f"{text!r} is no number of workers: give 2, 1:4 or auto")
        low, high = (int(part) for part in (text.split(":") * 2)[:2]) if text != "auto" else (1, 1)
        if low > high:
            raise ValueError(f"{text!r} begins above its end: give {high}:{low}")
        return text

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most training workers; of auto (1, 1) until a cluster is known (`cluster.with_workers`)."""
        if self.num_workers == "auto":
            return 1, 1
        low, *high = (int(part) for part in self.num_workers.split(":"))
        return low, high[0] if high else low

    @property
    def elastic(self) -> bool:
        """May the number of workers change on the way?"""
        return self.workers[0] < self.workers[1]


class Data(Section):
    """What `prepare` reads and how it splits."""

    data: str = Field("", description="Folder or file with images and labels: data.yaml, YOLO, VOC, COCO or CR7-DET.")
    format: Literal["auto", "yolo", "voc", "coco", "cr7-det"] = Field("auto", description="Format of --data.")
    names: tuple[str, ...] = Field((), description="Class names in order of their id, where the data has none.")
    unlabelled: tuple[str, ...] = Field((), description="Further folders with images that have no labels.")
    missing_labels: Literal["unlabelled", "background"] = Field(
        "unlabelled", description="What an image without a label file is: unlabelled, or known to be defect-free."
    )
    split: Literal["grouped", "random", "given"] = Field(
        "grouped", description="grouped: near-duplicates stay together; random: leaks; given: the data's own."
    )
    split_shares: tuple[float, float, float] = Field((0.8, 0.1, 0.1), description="Shares of train, val, test.")
    label_fraction: float = Field(0.1, gt=0, le=1, description="Share of the train images whose labels may be used.")
    labels_per_class: int = Field(0, ge=0, description="Labelled images per class instead of a fraction; 0: off.")
    labelled_list: str = Field("", description="Text file naming the labelled images, one a line, instead of both.")
    near_duplicate: float = Field(
        0.93,
        gt=0,
        le=1,
        description="Correlation (0..1) of shading-free thumbnails from which two images are one group.",
    )
    max_group_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="Largest group as a share of all images; larger ones are cut at a higher correlation.",
    )
    bad_limit: float = Field(0.01, ge=0, le=1, description="Share of unusable files (0..1) above which prepare stops.")
    max_side: int = Field(16384, gt=0, description="Largest accepted width or height (px).")


class Models(Section):
    """Which networks."""

    teacher: str = Field("yolov8s.yaml", description="Teacher: an Ultralytics detection yaml or .pt.")
    student: str = Field("yolov8n.yaml", description="Student: an Ultralytics detection yaml or .pt.")
