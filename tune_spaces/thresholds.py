"""Which candidates become pseudo-labels: the policy of the threshold, and how low it may go."""

from dfssd.config.choices import POLICIES as _POLICIES

# Below 0.1 the candidates are mostly wrong on every set measured; above 0.9 hardly one is left. For `fixed` tau is the
# threshold itself, for `precision` what it asks for, for the other policies the lowest one that they may set.
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

ROWS = {
    f"{policy}, {'tau' if row.varied.startswith('tau') else 'asked'} {level}": {
        "thresholds.threshold_policy": policy,
        f"thresholds.{row.varied}": level,
    }
    for policy, row in _POLICIES.items()
    if row.varied
    for level in _LEVELS
} | {policy: {"thresholds.threshold_policy": policy} for policy, row in _POLICIES.items() if not row.varied}
X = tuple(dict.fromkeys(f"thresholds.{row.varied}" for row in _POLICIES.values() if row.varied))
SEEDS = (0, 1, 2)
