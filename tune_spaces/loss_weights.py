"""How hard each term pulls: a search over the shares of the automatic balance, with early stopping."""

from ray import tune

# Shares of the supervised gradient. Below 0.05 a term is as good as off; from 2 on it drowns the labels.
SPACE = {
    "distill.share_p": tune.loguniform(0.05, 2.0),
    "distill.share_f": tune.loguniform(0.05, 2.0),
    "distill.lambda_u": tune.uniform(0.25, 2.0),  # the pseudo-label loss is not balanced: its own weight
}
SEARCH = "optuna"
TRIALS = 24
SCHEDULER = "asha"
GRACE = 0.2  # a tenth is warm-up, and the order of trials shows from some 300 steps on: raise it for runs below 1500
REDUCTION = 4  # a quarter goes on each time (docs/results.md)
