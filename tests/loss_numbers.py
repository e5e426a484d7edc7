"""All loss terms of fixed, seeded batches in fp32 on one thread: what a change of the code around them must not move.

    python tests/loss_numbers.py            compare with tests/loss_numbers.json and print the largest difference
    python tests/loss_numbers.py --write    make the file anew (after a change that is meant to move the numbers)

Each case is a student, a teacher and seven images of 64 px: three labelled ones, and four unlabelled ones with sure and
uncertain candidates, without any candidate, and with the area of such an image beside a candidate (as a mosaic leaves it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from small import terms_of
from ultralytics.utils.torch_utils import ModelEMA

from dfssd.config import Distill
from dfssd.distill.criterion import Criterion
from dfssd.models.yolo.detection_loss import DetectionLoss
from dfssd.models.yolo.detector import Teacher, build_detector
from dfssd.models.yolo.pair import pair
from dfssd.pseudo.selection import Rules, targets_of
from dfssd.pseudo.thresholds import EmaThreshold, FixedThreshold
from dfssd.runtime.worker_group import WorkerGroup
from dfssd.train.student import Student

NAMES = ["a", "b", "c"]
PLACE = Path(__file__).with_suffix(".json")
LABELLED, IMAGES, SIDE = 3, 7, 64
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no balance": {"balance": "none"},
    "hw_js": {"divergence": "hw_js"},
    "mgd": {"divergence": "mgd", "balance": "none"},
    "score_l2 and mse": {"divergence": "score_l2", "prediction": "mse"},
    "online teacher": {"teacher_mode": "online"},
    "uncertain as background": {"uncertain": "background", "score_power": 2.0},
    "agreement": {"agreement_min": 0.6, "balance": "none"},
    "inner_focaler_eiou": {"box_loss": "inner_focaler_eiou", "balance": "none"},
    "ema": {"policy": "ema", "balance": "none"},
    "label_only": {"label_only": True},
    "yolo26": {"spec": "yolo26n.yaml", "teacher": "yolo26s.yaml"},
    "yolo26 taught by yolov8": {"spec": "yolo26n.yaml"},
    "yolo11 label_only": {"spec": "yolo11n.yaml", "label_only": True},
}


def boxes() -> dict[str, torch.Tensor]:
    """The collated boxes of the batch, sorted by image."""
    g = torch.Generator().manual_seed(5)
    counts = [4, 0, 2, 9, 5, 0, 2]
    n = sum(counts)
    image = torch.arange(float(IMAGES)).repeat_interleave(torch.tensor(counts))
    centre, size = 0.2 + 0.6 * torch.rand(n, 2, generator=g), 0.05 + 0.4 * torch.rand(n, 2, generator=g)
    score = torch.where(image < LABELLED, torch.ones(n), 0.1 + 0.89 * torch.rand(n, generator=g))
    agreement = torch.where(image < LABELLED, torch.ones(n), 0.3 + 0.7 * torch.rand(n, generator=g))
    batch = {
        "cls": torch.randint(0, 3, (n,), generator=g).float(),
        "bboxes": torch.cat([centre, size], 1),
        "batch_idx": image,
        "score": score,
        "agreement": agreement,
    }
    batch["cls"][-1], batch["score"][-1] = 0.0, 0.0  # the area of an image without candidates
    return batch


@torch.no_grad()
def surer(head: Any) -> None:
    """Raise all class logits: of fresh weights the target scores add up to less than 1, where the normaliser is held."""
    for branch in ("cv3", "one2one_cv3"):
        for block in getattr(head, branch, None) or ():
            block[-1].bias += 6


def compute(case: dict[str, Any]) -> list[dict[str, float]]:
    """The numbers of two steps of a case: loss terms, counts, norms of gradients, thresholds."""
    c = dict(case)
    spec, taught_by = c.pop("spec", "yolov8n.yaml"), c.pop("teacher", "yolov8s.yaml")
    box_loss, moving, alone = c.pop("box_loss", "ciou"), c.pop("policy", "") == "ema", c.pop("label_only", False)
    torch.manual_seed(3)
    detector, config = build_detector(spec, NAMES, SIDE), Distill(**c)
    online = teacher = pairing = None
    student = Student(detector)
    if not alone:
        network = build_detector(taught_by, NAMES, SIDE)
        if config.teacher_mode == "online":
            online = network.train()
            teacher = Teacher(ModelEMA(online, decay=0.998, tau=100).ema, torch.device("cpu"), frozen=False)
        else:
            teacher = Teacher(network, torch.device("cpu"))
        pairing = pair(teacher, detector.model[-1], NAMES, config.prediction)
        student = Student(detector, teacher.channels, (), config.divergence == "mgd", online)
    student.train()
    for head in (detector.model[-1], *([online.model[-1]] if online else []), *([teacher.head] if teacher else [])):
        surer(head)
    policy = EmaThreshold(3, 0.5, 0.3) if moving else FixedThreshold(torch.tensor([0.4, 0.5, 0.6]))
    criterion = Criterion(
        DetectionLoss(detector, box_loss),
        None if alone else config,
        WorkerGroup(),
        pairing,
        student.projections.generators if student.projections is not None else None,
        DetectionLoss(online, box_loss) if online is not None else None,
    )
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    return [_step(k, student, teacher, criterion, policy, images, Rules.of(config), alone) for k in range(2)]


def _step(
    number: int,
    student: Student,
    teacher: Teacher | None,
    criterion: Criterion,
    policy: EmaThreshold | FixedThreshold,
    images: torch.Tensor,
    rules: Rules,
    alone: bool,
) -> dict[str, float]:
    torch.manual_seed(11 + number)
    targets = targets_of({**boxes(), "img": images}, LABELLED, None if alone else policy.thresholds(), rules)
    terms = terms_of(
        criterion, student(images, LABELLED), teacher(images) if teacher else None, targets, 0.3 + number / 10
    )
    if policy.learns:
        policy.update(*terms.policy.chunk(2))
    student.zero_grad()
    terms.total().backward()
    grads = [p.grad for p in student.detector.parameters() if p.grad is not None]
    squares = torch.stack([g.double().square().sum() for g in grads])
    numbers = {k: float(v.detach()) for k, v in (terms.losses | terms.counts).items()}
    numbers |= {"gradient/first layer": float(squares[0].sqrt()), "gradient/all": float(squares.sum().sqrt())}
    return numbers | {f"threshold/{k}": float(v) for k, v in enumerate(policy.thresholds())}


def differences(name: str) -> dict[str, float]:
    """Largest relative difference to the kept numbers by number, of one case."""
    kept = json.loads(PLACE.read_text())[name]
    found: dict[str, float] = {}
    for got, want in zip(compute(CASES[name]), kept, strict=True):
        assert set(got) == set(want), f"{name}: {set(got) ^ set(want)}"
        for key, value in want.items():
            found[key] = max(found.get(key, 0.0), abs(got[key] - value) / max(abs(value), 1e-12))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--write" in sys.argv:
        PLACE.write_text(json.dumps({name: compute(case) for name, case in CASES.items()}, indent=1))
    else:
        for case in CASES:
            apart = differences(case)
            worst = max(apart, key=lambda k: apart[k])
            equal = sum(v == 0 for v in apart.values())
            print(f"{case:28} {equal} of {len(apart)} bit-equal, largest difference {apart[worst]:.1e} ({worst})")
