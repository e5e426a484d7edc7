"""Which small network to ship: n and s of YOLOv8, YOLO11 and YOLO26, each taught by the next larger of its family."""

_FAMILIES = ("yolov8", "yolo11", "yolo26")
_TEACHER = {"n": "s", "s": "m"}

ROWS = {
    f"{family}{size}": {
        "models.student": f"{family}{size}.yaml",
        "models.teacher": f"{family}{_TEACHER[size]}.yaml",
    }
    for family in _FAMILIES
    for size in ("n", "s")
}
SEEDS = (0, 1, 2)
