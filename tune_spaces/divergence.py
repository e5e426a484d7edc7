"""How feature maps are compared: every divergence on its own, without the prediction terms."""

from dfssd.config.choices import DIVERGENCES as _DIVERGENCES

# `score_l2` is what Ultralytics' distill_model does, and belongs beside the seven of the papers. With the automatic balance
# all of them push with the same share of the supervised gradient, so that it is the direction that is compared.
SPACE = {"distill.divergence": list(_DIVERGENCES)}
BASE = {"distill.lambda_p": 0.0, "distill.lambda_l": 0.0}
SEEDS = (0, 1, 2)
