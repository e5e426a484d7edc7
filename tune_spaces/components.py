"""What each part of the method brings: labels alone, then pseudo-labels, features, predictions, all."""

# Each row switches terms off by their weights, so that steps, batches and the order of images stay the same.
_OFF = {"lambda_p": "distill.lambda_p", "lambda_l": "distill.lambda_l", "lambda_f": "distill.lambda_f"}
_PREDICTION = {_OFF["lambda_p"]: 0.0, _OFF["lambda_l"]: 0.0}
_FEATURE = {_OFF["lambda_f"]: 0.0}

ROWS = {
    "labels alone": {"method": "label_only"},
    "+ pseudo-labels": {**_PREDICTION, **_FEATURE},
    "+ features": _PREDICTION,
    "+ predictions": _FEATURE,
    "all": {},
}
SEEDS = (0, 1, 2)  # three is the least from which a standard deviation says anything
