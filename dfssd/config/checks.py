"""Settings that cannot mean what they say: warnings for those without effect, errors for those that contradict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dfssd.config.choices import DIVERGENCES, POLICIES
from dfssd.config.sections import Config, Data, Distill, Thresholds, Train
from dfssd.errors import DfssdError

SHARES = ("share_u", "share_p", "share_f")


def settings_without_effect(config: Config, policies: Mapping[str, str] | None = None) -> list[str]:
    """Sentences on settings that were changed but cannot do anything in this combination.

    Args:
        policies: by flag the threshold policies that are at work; none: that of --threshold-policy alone.
    """
    distill, default = config.distill, Distill()
    policies = policies or {"--threshold-policy": config.thresholds.threshold_policy}
    notes = _thresholds_without_effect(config.thresholds, policies)
    if not DIVERGENCES[distill.divergence].tau and distill.feature_tau != default.feature_tau:
        notes.append(f"--feature-tau has no effect with --divergence {distill.divergence}")
    if distill.feature_schedule != "off_last_epochs" and distill.off_last != default.off_last:
        notes.append(f"--off-last has no effect with --feature-schedule {distill.feature_schedule}")
    if distill.teacher_mode == "frozen" and distill.teacher_lr_factor != default.teacher_lr_factor:
        notes.append("--teacher-lr-factor has no effect with --teacher-mode frozen")
    if distill.prediction == "mse" and distill.lambda_l not in (0, default.lambda_l):
        notes.append("--lambda-l has no effect with --prediction mse, which compares the boxes as well")
    shares = [f"--{k.replace('_', '-')}" for k in SHARES if getattr(distill, k) != getattr(default, k)]
    if distill.balance == "gradnorm" and distill.lambda_f not in (0, 1) and distill.share_f > 0:
        notes.append("--lambda-f has no effect with --balance gradnorm unless it is 0: set --share-f")
    if distill.balance == "none" and shares:
        notes.append(f"{', '.join(shares)} has no effect with --balance none")
    if distill.unlabelled_ratio == 0 and distill.lambda_u != default.lambda_u:
        notes.append("--lambda-u has no effect with --unlabelled-ratio 0")
    if distill.unlabelled_ratio == 0 and config.rounds > 1:
        notes.append(
            f"--rounds {config.rounds} has no effect with --unlabelled-ratio 0: later rounds learn from pseudo-labels"
        )
    if distill.agreement_min > 0 and config.pseudo.tta == "none" and len(config.pseudo.label_teachers) < 2:
        notes.append("--agreement-min has no effect with --tta none and one teacher: every agreement is 1")
    if config.publish_best and not config.baseline:
        notes.append("--publish-best has no effect with --no-baseline: there is nothing to compare with")
    if config.publish_best and not config.export.formats:
        notes.append("--publish-best has no effect without --formats: it chooses what is exported")
    if config.data.labels_per_class and config.data.label_fraction != Data().label_fraction:
        notes.append("--label-fraction has no effect with --labels-per-class")
    if config.train.steps and config.train.epochs_unlabelled:
        notes.append(f"--epochs-unlabelled has no effect with --steps {config.train.steps}: leave --steps out")
    if 0 < config.train.steps < 10 * config.train.warmup_steps and config.train.warmup_steps != Train().warmup_steps:
        notes.append("--warmup-steps is cut to a tenth of --steps")
    return notes


def _thresholds_without_effect(config: Thresholds, policies: Mapping[str, str]) -> list[str]:
    used = frozenset[str]().union(*(POLICIES[name].uses for name in policies.values()))
    changed = [k for k, v in config if k != "threshold_policy" and v != getattr(Thresholds(), k) and k not in used]
    at_work = " and ".join(f"{flag} {name}" for flag, name in policies.items())
    return [f"--{k.replace('_', '-')} has no effect with {at_work}" for k in changed]


def check_weights(config: Distill) -> None:
    """Settings of a term whose weight is 0 contradict each other.

    Raises:
        DfssdError: naming the term.
    """
    default = Distill()
    own = {
        "feature distillation (--lambda-f 0)": (
            config.lambda_f == 0,
            ("divergence", "feature_tau", "feature_schedule", "off_last", "taps", "teacher_taps", "share_f"),
        ),
        "prediction distillation (--lambda-p 0, --lambda-l 0)": (
            config.lambda_p == 0 and config.lambda_l == 0,
            ("prediction", "loc_tau", "loc_top", "share_p"),
        ),
        "the localisation term (--lambda-l 0)": (config.lambda_l == 0, ("loc_tau", "loc_top")),
        "distillation (--lambda-p 0, --lambda-l 0, --lambda-f 0)": (
            not config.uses_teacher,
            ("distill_teacher", "teacher_mode", "teacher_lr_factor"),
        ),
    }
    for term, (off, names) in own.items():
        changed = [f"--{n.replace('_', '-')}" for n in names if getattr(config, n) != getattr(default, n)]
        if off and changed:
            raise DfssdError(
                f"{term} is switched off, but {', '.join(changed)} was set",
                todo="give the term a weight above 0, or leave its settings at their defaults",
            )


def refuse_relative_paths_in_a_job(config: Config) -> None:
    """A submitted job runs in an unpacked copy of the working directory: what it writes there is lost with the job.

    Raises:
        DfssdError: a path of this config would lie in that copy.
    """
    if "working_dir_files" not in str(Path.cwd()):
        return
    paths = [("--storage-path", config.run.storage_path), ("--data", config.data.data)]
    paths += [("--labelled-list", config.data.labelled_list), *(("--unlabelled", p) for p in config.data.unlabelled)]
    for flag, path in paths:
        if path and "://" not in path and not Path(path).is_absolute():
            raise DfssdError(
                f"{flag} {path} is relative, and this job runs in a copy of the working directory",
                where=str(Path.cwd()),
                todo=f"give {flag} an absolute path that all nodes see, or a URI",
            )
