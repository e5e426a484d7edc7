"""Which candidates become pseudo-labels: the policy of the threshold, and how low it may go."""

from dfssd.config.choices import POLICIES as _POLICIES

# Below 0.1 the candidates are mostly wrong on every set measured; above 0.9 hardly one is left. For `fixed` tau is the
# threshold itself, for `precision` what it asks for, for the other policies the lowest one that they may set.
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
_KEYS = ("tau_min", "tau", "precision")  # of these the first that a policy reads is varied

ROWS = {
    f"{policy}, {'asked' if key == 'precision' else 'tau'} {level}": {
        "thresholds.threshold_policy": policy,
        f"thresholds.{key}": level,
    }
    for policy, row in _POLICIES.items()
    for key in [next(key for key in _KEYS if key in row.uses)]
    for level in _LEVELS
}
X = tuple(f"thresholds.{key}" for key in _KEYS)
SEEDS = (0, 1, 2)
