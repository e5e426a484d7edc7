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
GRACE = 0.2  # two of ten validations: before that the learning rate is still warming up
REDUCTION = 3
