"""Should the teacher go on learning: frozen, or online at some share of the student's learning rate?"""

# 0.01 hardly moves the teacher; at 1 it learns as fast as the student and drifts furthest from what made the pseudo-labels.
ROWS = {
    "frozen": {"distill.teacher_mode": "frozen"},
    **{
        f"online, lr x {factor}": {"distill.teacher_mode": "online", "distill.teacher_lr_factor": factor}
        for factor in (0.01, 0.1, 1.0)
    },
}
SEEDS = (0, 1, 2)
