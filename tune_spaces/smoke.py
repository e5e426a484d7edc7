"""The smallest sweep that is one: labels alone against the method, minutes on a CPU."""

BASE = {
    "train.imgsz": 64,  # the synthetic images are 64 px
    "train.batch": 8,
    "train.steps": 150,  # the fewest that find some of the defects
    "train.teacher_steps": 300,
    "train.val_every": 30,  # five reports a trial
    "pseudo.tta": "none",  # a quarter of the labelling time
    "models.teacher": "yolov8n.yaml",
    "data.label_fraction": 0.3,
}
ROWS = {"labels alone": {"method": "label_only"}, "distilled": {"method": "distill"}}
SEEDS = (0, 1)
