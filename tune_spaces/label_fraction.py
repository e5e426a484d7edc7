"""How many labels the method is worth: labels alone against the method, from 1 % of the labels to all of them."""

# Roughly even steps on a logarithmic axis. At 1.0 nothing is unlabelled, so the method is distillation on labels alone.
_FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)

ROWS = {
    f"{name}, {100 * share:g} %": {
        "method": method,
        "data.label_fraction": share,
        **({"distill.unlabelled_ratio": 0.0} if share == 1 and method == "distill" else {}),
    }
    for name, method in (("labels alone", "label_only"), ("distilled", "distill"))
    for share in _FRACTIONS
}
X = "data.label_fraction"
SEEDS = (0, 1, 2)
