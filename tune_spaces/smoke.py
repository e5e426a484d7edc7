"""The smallest sweep that is one: labels alone against the method, minutes on a CPU."""

BASE = {
    "train.imgsz": 128,  # the side of the synthetic images
    "train.steps": 150,  # after these the students reach some 20 % of mAP50
    "train.teacher_steps": 250,
    "train.val_every": 30,  # five reports a trial
    "pseudo.tta": "none",  # a quarter of the labelling time
    "models.teacher": "yolov8n.yaml",
    "data.label_fraction": 0.3,
}
ROWS = {"labels alone": {"method": "label_only"}, "distilled": {"method": "distill"}}
SEEDS = (0, 1)
