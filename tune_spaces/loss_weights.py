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
# With 1680 steps these take some 40 % of the steps of full trials and end about a point of val mAP50 below the
# best; GRACE 0.3 with REDUCTION 2 takes half and finds it nine times in ten (docs/results.md). It is the step that counts:
# strong terms are ahead at first, and the order shows from some 500 steps on.
GRACE = 0.2
REDUCTION = 4
