"""Plain nets' exploding gradients under batch norm are gone within 50 steps; they still fail.

Source: Yang et al. 2019 (arXiv 1902.08129), §3, for the explosion and its rate; what the first
updates do to it is gradflow's own measurement.

Measured: norm (not squared) of the gradient of the first hidden layer's weights over that of the
last's, on the batch of each step, after 0, 5 and 50 updates; accuracy over the whole training split
in evaluation mode after 100.

Deviations: a fully connected network of 52 layers, width 256, 8×8 digits, batches of 64, plain SGD
with momentum at a constant rate of .005. Theory takes the samples of a batch as decorrelated.

Cost: 10 runs trained, 1 minute on one core (6 s each).
"""

import math
from typing import Any

from gradflow import theory
from gradflow.findings import (
    TRAINED_SEEDS,
    Comparison,
    Curve,
    Figure,
    Finding,
    Region,
    above,
    below,
    between,
    exponential,
)
from gradflow.measures import along, end_ratio, metric, metric_difference

HIDDEN = 50
NETWORK: dict[str, Any] = {
    "network": "mlp",
    "depth": HIDDEN + 2,
    "norm": "batch",
    "init": "he",
    "lr": 0.005,
    "schedule": "constant",
    "max_steps": 100,
}
GRADIENT = "weight_grad_norm"
RATE = math.sqrt(theory.batch_norm_growth("relu", batch=64))
"""Growth of the norm per layer."""
EXPLOSION = RATE ** (HIDDEN - 1)


def ratio_after(updates: int, region: Region) -> Comparison:
    return Comparison(
        f"gradient of the first hidden layer / of the last, plain, after {updates} updates",
        ("plain",),
        end_ratio(GRADIENT, step=updates),
        region,
        ratio=True,
        unit="norm",
    )


FINDING = Finding(
    source="Yang et al. 2019, arXiv 1902.08129, §3",
    chapter="normalisation",
    specs={"plain": {**NETWORK, "skip": False}, "residual": {**NETWORK, "skip": True}},
    comparisons=(
        ratio_after(0, between(EXPLOSION / 1.5, EXPLOSION * 1.5, EXPLOSION)),
        ratio_after(5, below(EXPLOSION / 10)),
        ratio_after(50, below(10)),
        Comparison("plain", ("plain",), metric(), below(0.5), unit="accuracy"),
        Comparison(
            "residual − plain",
            ("residual", "plain"),
            metric_difference(),
            above(0.3),
            unit="accuracy",
            slow=True,
        ),
    ),
    recorded="reproduced",
    seeds=TRAINED_SEEDS,
    figure=Figure(
        (
            Curve("at initialisation", "plain", along(GRADIENT, power=1), exponential(RATE), True),
            *(
                Curve(f"after {updates}", "plain", along(GRADIENT, power=1, step=step))
                for step, updates in ((1, "1 update"), (5, "5 updates"), (50, "50 updates"))
            ),
        ),
        x="layer, counted from the input",
        y="norm of the weights' gradient, plain network",
    ),
    notes="Recorded once an epoch, the explosion would not be seen at all.",
)
