"""Settings that no record of a stage holds, because its result does not depend on them."""

from __future__ import annotations

from dfssd.config.sections import section

# Read by stages, but no part of a result: they change speed, resources, what is said, or what is tolerated.
FREE = frozenset(
    (
        *section("run", "seed"),
        *("data.bad_limit", "data.max_side", "data.update"),
        *("train.log_every", "train.compile", "train.loader_workers", "train.checkpoint_min", "train.profile_steps"),
        *("train.cache_gib", "train.decoded_dir", "train.cache_dir", "train.cache_dir_gib"),
        "train.epochs_unlabelled",  # what it comes to counts: the steps
        *("pseudo.label_batch", "pseudo.num_actors", "pseudo.unreadable_limit"),
    )
)

# Read by one stage without counting for it (`StageRow.free`): its own record does not hold them either.
UNRECORDED = FREE | {
    *("train.steps", "train.teacher_steps", "mean_teacher.mean_teacher"),
    *("evaluate.latency_repeats", "export.register_as", "publish_best"),
}
