"""Which candidates become pseudo-labels: the policy of the threshold, and how low it may go."""

from dfssd.config.choices import POLICIES as _POLICIES

# Below 0.1 the candidates are mostly wrong on every set measured; above 0.9 hardly one is left. For `fixed` tau is the
# threshold itself, for the other policies the lowest one that they may set.
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
_KEY = {"fixed": "thresholds.tau"}

ROWS = {
    f"{policy}, tau {tau}": {"thresholds.threshold_policy": policy, _KEY.get(policy, "thresholds.tau_min"): tau}
    for policy in _POLICIES
    for tau in _LEVELS
}
X = ("thresholds.tau", "thresholds.tau_min")
SEEDS = (0, 1, 2)
