"""The one truth about settings: sections of frozen models, with a description and a unit for every field.

The command lines of the jobs, the MLflow parameters and the keys of a sweep (`section.field`) derive from here. Field
names are unique over all sections, because the command line drops the section: `--label-fraction`, `--imgsz`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dfssd.config.choices import (
    BALANCE,
    BOX_LOSSES,
    DIVERGENCES,
    EXPORT_FORMATS,
    FEATURE_SCHEDULE,
    FORMATS,
    GPU,
    IN_LOOP_POLICIES,
    MISSING_LABELS,
    POLICIES,
    PRECISIONS,
    PREDICTION,
    SILENCE,
    SPLIT,
    TEACHER_MODE,
    TTA,
    BalanceRule,
    Choice,
    ExportFormat,
    FeatureSchedule,
    Gpu,
    MissingLabels,
    Prediction,
    Silence,
    Split,
    TeacherMode,
    Tta,
    floors,
    in_words,
    readers,
    temperatures,
)


def split_layers(value: Any) -> Any:
    """Let layers be written as in papers: "15,18,21" beside a list."""
    words = [value] if isinstance(value, str) else value
    return tuple(
        part for word in words for part in (word.split(",") if isinstance(word, str) else [word]) if part != ""
    )


Layers = Annotated[tuple[int, ...], BeforeValidator(split_layers)]


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(Section):
    """Where the run lives and what it may use. Nothing here changes a result but `seed`."""

    storage_path: str = Field("runs", description="Folder or URI (s3://, gs://) that holds all runs.")
    run_name: str = Field("run", description="Name of this run; the same pair of path and name again resumes it.")
    overwrite: bool = Field(False, description="Replace stages whose settings or inputs differ from what is there.")
    dry_run: bool = Field(False, description="Check storage, data, weights and resources, print the plan and stop.")
    seed: int = Field(0, ge=0, description="Seed of split, order of samples, augmentation and initial weights.")
    num_workers: str = Field(
        "1",
        description="Training workers, which share each global batch: a number, LOW:HIGH (as many of these as the cluster "
        "holds, following its size), or auto (one a GPU; without GPUs one a node).",
    )
    cpus_per_worker: int = Field(0, ge=0, description="CPU cores a worker; 0: all there are, shared evenly.")
    gpu: Annotated[Gpu, Choice(GPU)] = Field("auto", description=f"A GPU a worker. {in_words(GPU)}.")
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

    data: str = Field("", description="Folder, data.yaml or .zip with images and labels (docs/data.md).")
    format: Annotated[str, Choice(FORMATS)] = Field("auto", description=f"Format of --data. {in_words(FORMATS)}.")
    names: tuple[str, ...] = Field(
        (), description="Class names in order of their id where the data has none; else the order of its own names."
    )
    update: bool = Field(
        False,
        description="Where images or labels have changed: make the next version of the manifest, in which every earlier "
        "image keeps its split.",
    )
    unlabelled: tuple[str, ...] = Field((), description="Further folders with images that have no labels.")
    missing_labels: Annotated[MissingLabels, Choice(MISSING_LABELS)] = Field(
        "unlabelled", description=f"What an image without a label file is. {in_words(MISSING_LABELS)}."
    )
    split: Annotated[Split, Choice(SPLIT)] = Field(
        "grouped", description=f"How images come to train, val and test. {in_words(SPLIT)}."
    )
    split_shares: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1), description="Shares of train, val, test [each from 0, together 1]."
    )
    label_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the train images whose labels may be used; the others are hidden, for research. 0: all.",
    )
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
    max_side: int = Field(65536, gt=0, description="Largest accepted width or height (px).")
    white_level: float = Field(
        0.0,
        ge=0,
        description="Value that becomes white in pictures of more than 8 bits; 0: the smallest of 255, 1023, 4095, 16383 "
        "and 65535 (float: also 1) that none exceeds.",
    )
    val_from_labels: bool = Field(
        False,
        description="Take val out of the labelled images, which are then chosen among train and val: 300 labels are 300.",
    )

    @property
    def hides_labels(self) -> bool:
        """Are labels of train images hidden, for research?"""
        return bool(0 < self.label_fraction < 1 or self.labels_per_class or self.labelled_list)


class Models(Section):
    """Which networks."""

    teacher: str = Field("yolov8s.yaml", description="Teacher: an Ultralytics detection yaml or .pt.")
    student: str = Field("yolov8n.yaml", description="Student: an Ultralytics detection yaml or .pt.")


class Train(Section):
    """The training loop, the same for teacher, label-only baseline and student."""

    imgsz: int = Field(640, ge=32, multiple_of=32, description="Side of the square network input (px).")
    batch: int = Field(16, ge=1, description="Labelled images in a global batch.")
    steps: int = Field(
        0,
        ge=0,
        description="Optimiser steps of the student and of the label-only baseline; 0: from the size of the data, so that "
        "each unlabelled image is seen 20 times (1000 to 20000 steps), or --epochs-unlabelled times; the run says how many.",
    )
    teacher_steps: int = Field(0, ge=0, description="Optimiser steps of the teacher; 0: as many as --steps.")
    teacher_patience: int = Field(
        0, ge=0, description="Validations without a better one after which the teacher stops; 0: never."
    )
    lr: float = Field(0.002, gt=0, description="Peak learning rate (AdamW).")
    lr_final: float = Field(0.01, ge=0, le=1, description="Learning rate at the last step, as a share of the peak.")
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up; at most a tenth of all are used.")
    weight_decay: float = Field(0.0005, ge=0, description="AdamW weight decay, on weights only.")
    grad_clip: float = Field(10.0, gt=0, description="Largest norm of the gradient.")
    ema_decay: float = Field(0.998, ge=0, lt=1, description="Decay of the weight average, reached over some 100 steps.")
    amp: Annotated[str, Choice(PRECISIONS)] = Field(
        "auto", description=f"Precision of the forward pass. {in_words(PRECISIONS)}."
    )
    mosaic: float = Field(1.0, ge=0, le=1, description="Probability of a mosaic.")
    close_mosaic: float = Field(0.1, ge=0, le=1, description="Share of the steps, at the end, without mosaic.")
    scale: float = Field(0.5, ge=0, lt=1, description="Random scale gain (+/- share).")
    translate: float = Field(0.1, ge=0, le=1, description="Random shift (share of the side).")
    fliplr: float = Field(0.5, ge=0, le=1, description="Probability of a left-right flip.")
    mixup: float = Field(0.0, ge=0, le=1, description="Probability of a mixup.")
    repeat_threshold: float = Field(
        0.0, ge=0, le=1, description="Share of images below which a class is seen more often (LVIS); 0: off."
    )
    flipud: float = Field(0.0, ge=0, le=1, description="Probability of an up-down flip.")
    hsv: tuple[float, float, float] = Field(
        (0.015, 0.7, 0.4), description="Random hue, saturation, value gains [each from 0 to 1]."
    )
    val_every: int = Field(0, ge=0, description="Steps between validations and checkpoints; 0: a tenth of all.")
    log_every: int = Field(20, ge=1, description="Steps between two lines of progress.")
    loader_workers: int = Field(-1, ge=-1, description="Processes that load images, per worker; -1: as the step needs.")
    cache_gib: float = Field(
        16.0,
        ge=0,
        description="Most decoded images kept on each machine's disk, for all processes there (GiB); 0: none.",
    )
    decoded_dir: str = Field(
        "", description="Folder on each machine for decoded images; '': the one for temporary files."
    )
    cache_dir: str = Field("", description="Folder on each machine for files fetched from s3:// or gs://; '': none.")
    cache_dir_gib: float = Field(20.0, gt=0, description="Most that is kept in --cache-dir, per machine (GiB).")
    box_loss: Annotated[str, Choice(BOX_LOSSES)] = Field(
        "ciou", description=f"Box regression loss. {in_words(BOX_LOSSES)}."
    )
    compile: bool = Field(False, description="Compile the networks with torch.compile: minutes at first, then faster.")
    micro_batch: int = Field(
        0,
        ge=0,
        description="Labelled images in a micro-batch, the unit that a worker computes at a time and that batch norm sees; "
        "unlabelled ones come in the batch's ratio. 0: the share of the most workers that may come, halved at the start "
        "where a GPU's memory does not hold it.",
    )
    tf32: bool = Field(
        True, description="What fp32 means in training on NVIDIA cards from Ampere on: products in TF32, or exact."
    )
    checkpoint_min: float = Field(
        5.0, ge=0, description="Minutes between checkpoints, beside those at validations; 0: only those."
    )
    profile_steps: int = Field(
        0, ge=0, description="Steps to trace with torch.profiler, into the stage's folder as profile.json; 0: none."
    )
    epochs_unlabelled: float = Field(
        0.0,
        ge=0,
        description="Times that each unlabelled image is seen under --steps 0; 0: 20, within 1000 to 20000 steps.",
    )


class Pseudo(Section):
    """How the teacher labels the unlabelled images."""

    label_teachers: tuple[str, ...] = Field(
        (), description="Weights (.pt) that label instead of the run's own teacher; several are an ensemble."
    )
    tta: Annotated[Tta, Choice(TTA)] = Field("flips", description=f"What of an image is labelled. {in_words(TTA)}.")
    floor: float = Field(0.05, gt=0, lt=1, description="Lowest score of a candidate box that is kept.")
    label_batch: int = Field(0, ge=0, description="Images in one forward pass of the labelling teacher; 0: automatic.")
    num_actors: int = Field(0, ge=0, description="Labelling actors (processes); 0: one a GPU, or one for 8 CPUs.")
    nms_iou: float = Field(0.65, gt=0, le=1, description="IoU above which two candidates of a class are one.")
    fuse_iou: float = Field(0.55, gt=0, le=1, description="IoU above which boxes of several forms or teachers are one.")
    max_candidates: int = Field(100, ge=1, description="Most candidates an image.")
    unreadable_limit: float = Field(0.01, ge=0, le=1, description="Share of unreadable images (0..1) that is accepted.")


class Thresholds(Section):
    """Which candidates become pseudo-labels."""

    threshold_policy: Annotated[str, Choice(POLICIES)] = Field(
        "gmm", description=f"How class thresholds are set. {in_words(POLICIES)}."
    )
    tau: float = Field(0.5, gt=0, lt=1, description=f"A threshold for all classes. Read by {readers('tau')}.")
    precision: float = Field(
        0.7,
        gt=0,
        lt=1,
        description="Share of right pseudo-labels that is asked of each class, with 95 % confidence, on val. "
        f"Read by {readers('precision')}.",
    )
    tau_min: float = Field(
        0.0, ge=0, lt=1, description=f"Lowest threshold of a policy that sets them itself; 0: {floors()}."
    )
    tau_max: float = Field(
        0.95,
        gt=0,
        le=1,
        description=f"Highest threshold of a policy that sets them itself. Read by {readers('tau_max')}.",
    )
    tau_decay: float = Field(
        0.999, ge=0, lt=1, description=f"Decay of an average of confidences. Read by {readers('tau_decay')}."
    )

    def lowest(self, policy: str = "") -> float:
        """Lowest threshold of a policy, by default of the chosen one."""
        return self.tau_min or POLICIES[policy or self.threshold_policy].floor


class Distill(Section):
    """The method: L = L_sup + lambda_u L_pse + lambda_p L_cls + lambda_l L_loc + lambda_f s(t) L_feat."""

    distill_teacher: str = Field("", description="Weights (.pt) to distil from instead of the run's own teacher.")
    teacher_mode: Annotated[TeacherMode, Choice(TEACHER_MODE)] = Field(
        "frozen", description=f"What the teacher does meanwhile. {in_words(TEACHER_MODE)}."
    )
    teacher_amp: Annotated[str, Choice(PRECISIONS)] = Field(
        "auto",
        description="Precision of the teacher's pass, whatever --amp is; auto: as --amp auto.",
    )
    teacher_lr_factor: float = Field(0.1, gt=0, description="Learning rate of an online teacher, as a share of --lr.")

    unlabelled_ratio: float = Field(1.0, ge=0, description="Unlabelled images in a batch for each labelled one.")
    score_power: float = Field(1.0, ge=0, description="gamma in the weight score**gamma of a pseudo-label; 0: all 1.")
    uncertain: Annotated[Silence, Choice(SILENCE)] = Field(
        "ignore",
        description=f"What a candidate below its threshold says. {in_words(SILENCE)}, which does harm.",
    )
    silent: Annotated[Silence, Choice(SILENCE)] = Field(
        "ignore", description=f"What an unlabelled image without any candidate says. {in_words(SILENCE)}."
    )
    student_view: float = Field(
        0.0,
        ge=0,
        le=3,
        description="Strength of the student's strong view of unlabelled images (see --strong-view); 0: none.",
    )
    fade: float = Field(
        0.02,
        ge=0,
        description="Lead over its teacher (val mAP50-95, 0..1) at which the student learns from its own average instead; "
        "0: the teacher's terms never fade.",
    )
    agreement_min: float = Field(
        0.0, ge=0, le=1, description="Agreement under flips from which a pseudo-label teaches its box; 0: always."
    )
    lambda_u: float = Field(1.0, ge=0, description="Weight of the pseudo-label loss.")
    prediction: Annotated[Prediction, Choice(PREDICTION)] = Field(
        "soft", description=f"What of the teacher's predictions is compared. {in_words(PREDICTION)}."
    )
    lambda_p: float = Field(1.0, ge=0, description="Weight of the prediction distillation's class term, or of mse.")
    lambda_l: float = Field(1.0, ge=0, description="Weight of the prediction distillation's localisation term.")
    loc_tau: float = Field(10.0, gt=0, description="Temperature of the DFL bins in the localisation term.")
    loc_top: float = Field(
        0.05, gt=0, le=1, description="Share of an image's anchor points that the localisation term looks at."
    )
    lambda_f: float = Field(1.0, ge=0, description="Weight of the feature distillation.")
    divergence: Annotated[str, Choice(DIVERGENCES)] = Field(
        "pkd", description=f"How two feature maps are compared. {in_words(DIVERGENCES)}."
    )
    feature_tau: float = Field(
        0.0, ge=0, description=f"Temperature of the softmax, where there is one; 0: {temperatures()}."
    )
    feature_schedule: Annotated[FeatureSchedule, Choice(FEATURE_SCHEDULE)] = Field(
        "constant", description=f"s(t), by the share of the steps. {in_words(FEATURE_SCHEDULE)}."
    )
    off_last: float = Field(0.1, ge=0, le=1, description="Share of the steps that 'off_last_epochs' switches off.")
    taps: Layers = Field((), description="Student's layers to compare, by number; none: the neck's outputs.")
    teacher_taps: Layers = Field((), description="Teacher's layers, pairwise with --taps; none: the same.")
    balance: Annotated[BalanceRule, Choice(BALANCE)] = Field(
        "gradnorm", description=f"How the terms are weighted. {in_words(BALANCE)}."
    )
    share_u: float = Field(0.0, ge=0, description="Share of the pseudo-label loss under gradnorm; 0: not balanced.")
    share_p: float = Field(
        0.5, ge=0, description="Share of the prediction distillation under gradnorm; 0: not balanced."
    )
    share_f: float = Field(0.5, ge=0, description="Share of the feature distillation under gradnorm; 0: not balanced.")

    @property
    def uses_teacher(self) -> bool:
        """Does any enabled term look at the teacher?"""
        return self.lambda_p > 0 or self.lambda_f > 0 or (self.lambda_l > 0 and self.prediction == "soft")


class MeanTeacher(Section):
    """The stage `mean_teacher`: the teacher goes on with labelled and unlabelled images, which its average labels."""

    mean_teacher: bool = Field(
        True, description="Let the teacher learn from the unlabelled images before it labels them."
    )
    mean_teacher_steps: int = Field(0, ge=0, description="Its optimiser steps; 0: as many as the teacher's.")
    mean_teacher_lr: float = Field(0.0005, gt=0, description="Its peak learning rate: the teacher has learnt already.")
    mean_teacher_decay: float = Field(0.998, gt=0, lt=1, description="Decay of the weight average that labels.")
    mean_teacher_policy: Annotated[str, Choice(IN_LOOP_POLICIES)] = Field(
        "match",
        description=f"How its class thresholds follow from the scores of the last steps. {in_words(IN_LOOP_POLICIES)}.",
    )
    mean_teacher_power: float = Field(0.5, ge=0, description="Weight of a pseudo-label: its score to this power.")
    mean_teacher_weight: float = Field(1.0, gt=0, description="Weight of its pseudo-label loss.")
    strong_view: float = Field(
        1.0,
        ge=0,
        le=3,
        description="Strength of noise, contrast, blur and grey patches in what it learns from; 0: none.",
    )


class Evaluate(Section):
    """How the finished models are measured."""

    latency_repeats: int = Field(
        30, ge=3, description="Timed single-image passes a model; the report has median and 95th percentile."
    )
    sample_images: int = Field(12, ge=0, description="Test images drawn with their detections.")
    max_escape: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="Share of defective pictures (0..1) that may pass unseen; val chooses the scores for it.",
    )


class Export(Section):
    """Files for the machine at the line."""

    formats: tuple[Annotated[ExportFormat, Choice(EXPORT_FORMATS)], ...] = Field(
        ("onnx",),
        description=f"What is written. {in_words(EXPORT_FORMATS)}. They are added to what is there. Without any "
        "(--formats alone) the pipeline exports nothing.",
    )
    nms_inside: bool = Field(
        False, description="Put NMS into the model: (n,7) rows [picture, x1, y1, x2, y2, score, class] come out."
    )
    int8: bool = Field(False, description="Also int8, calibrated on unlabelled pictures; what it loses is said.")
    calibration_pictures: int = Field(128, ge=8, description="Unlabelled pictures that int8 is calibrated on.")
    parity_pictures: int = Field(
        200, ge=1, description="Labelled test and val pictures at most on which the files must equal the network."
    )
    register_as: str = Field(
        "",
        description="Register the exported model in MLflow under this name; champion where it beats the present one on val "
        "of the same data set.",
        json_schema_extra={"flag": "register"},
    )


class Config(Section):
    """Everything; each job shows the sections it uses."""

    run: Run = Run()
    data: Data = Data()
    models: Models = Models()
    train: Train = Train()
    pseudo: Pseudo = Pseudo()
    thresholds: Thresholds = Thresholds()
    distill: Distill = Distill()
    mean_teacher: MeanTeacher = MeanTeacher()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    baseline: bool = Field(True, description="Also train the label-only student for as many steps, as a gate.")
    publish_best: bool = Field(
        False, description="Where the label-only student is better on val, export it and not the distilled one."
    )
    rounds: int = Field(
        1,
        ge=1,
        le=5,
        description="Rounds of teacher and labels; from the second on it also learns from its own labels.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.run.workers[1] > self.most_workers():
            raise ValueError(
                f"--num-workers {self.run.num_workers}: each worker needs a labelled and an unlabelled image of a batch, "
                f"which holds {self.train.batch} and {self.unlabelled_batch()}"
            )
        if not self.run.workers[1] <= self.micro_batches() <= self.most_workers():
            low, high = -(-self.train.batch // self.most_workers()), -(-self.train.batch // self.run.workers[1])
            raise ValueError(
                f"--micro-batch {self.train.micro_batch} cuts a batch of {self.train.batch} into {self.micro_batches()}: it "
                f"takes at least one for each of {self.run.workers[1]} workers, and at most {self.most_workers()}, so that "
                f"each has a labelled and an unlabelled image: give {low} to {high}"
            )
        if abs(sum(self.data.split_shares) - 1) > 1e-6 or min(self.data.split_shares) < 0:
            raise ValueError(f"--split-shares {self.data.split_shares} must be from 0 and add up to 1")
        if not all(0 <= gain <= 1 for gain in self.train.hsv):
            raise ValueError(f"--hsv {self.train.hsv}: each must be from 0 to 1")
        if self.thresholds.lowest() > self.thresholds.tau_max:
            raise ValueError(f"--tau-min {self.thresholds.lowest()} is above --tau-max {self.thresholds.tau_max}")
        taps, others = self.distill.taps, self.distill.teacher_taps
        if others and len(taps) != len(others):
            raise ValueError(
                f"--teacher-taps names {len(others)} layers, --taps {len(taps)}: they are compared in pairs"
            )
        if self.data.labels_per_class and self.data.labelled_list:
            raise ValueError("--labels-per-class and --labelled-list exclude each other")
        return self

    def unlabelled_batch(self) -> int:
        """Unlabelled images in a global batch."""
        return round(self.train.batch * self.distill.unlabelled_ratio)

    def most_workers(self) -> int:
        """Workers that a global batch has images for."""
        return min(self.train.batch, self.unlabelled_batch() or self.train.batch)

    def micro_batches(self) -> int:
        """Micro-batches that a global batch is cut into."""
        size = self.train.micro_batch
        return -(-self.train.batch // size) if size else self.run.workers[1]

    def teacher_steps(self) -> int:
        """Optimiser steps of the teacher."""
        return self.train.teacher_steps or self.train.steps

    def mean_teacher_steps(self) -> int:
        """Optimiser steps of the mean teacher."""
        return self.mean_teacher.mean_teacher_steps or self.teacher_steps()


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def section(name: str, *without: str) -> tuple[str, ...]:
    """Dotted keys of a section, without some of its fields."""
    fields = SECTIONS[name].model_fields
    assert set(without) <= set(fields), f"{without} are fields of {name}"
    return tuple(f"{name}.{field}" for field in fields if field not in without)


def all_keys() -> tuple[str, ...]:
    """Dotted keys of all settings, in order; the pipeline's own have no section."""
    return tuple(key for name in Config.model_fields for key in (section(name) if name in SECTIONS else (name,)))
