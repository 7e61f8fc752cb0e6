"""Flat gradient norms do not suffice: a deep plain He net fails to fit what its residual twin fits.

Source: He et al. 2015 (arXiv 1512.03385), §4.1, who find no vanishing gradients where plain
networks degrade; Balduzzi et al. 2017 (arXiv 1702.08591), who look beyond the norms.

Measured: norm (not squared) of the gradient with respect to the first hidden pre-activations over
that to the last, at initialisation; accuracy over the whole training split in evaluation mode after
100 updates, of the plain network at the best of four learning rates.

Deviations: a fully connected network of 52 layers, width 256, without normalisation, on 8×8 digits;
the residual twin, y = relu(x + F(x)/√50) from equal parameters, at one rate alone.

Cost: 50 runs trained, 3 minutes on one core (4 s each).
"""

from typing import Any

from gradflow.findings import Comparison, Curve, Figure, Finding, above, between, exponential
from gradflow.measures import along, best_difference, end_ratio, metric

BLOCKS = 50
NETWORK: dict[str, Any] = {
    "network": "mlp",
    "depth": BLOCKS + 2,
    "norm": "none",
    "init": "he",
    "max_steps": 100,
}
PLAIN: dict[str, dict[str, Any]] = {
    f"plain, rate {rate:g}": {**NETWORK, "skip": False, "lr": rate}
    for rate in (0.0005, 0.002, 0.005, 0.02)
}
RESIDUAL = {**NETWORK, "skip": True, "branch_scale": BLOCKS**-0.5, "lr": 0.02}
FIRST = next(iter(PLAIN))

FINDING = Finding(
    source="He et al. 2015, arXiv 1512.03385, §4.1; Balduzzi et al. 2017, arXiv 1702.08591",
    chapter="skips",
    specs={**PLAIN, "residual": RESIDUAL},
    comparisons=(
        Comparison(
            "gradient at the first hidden layer / at the last, plain, at initialisation",
            (FIRST,),
            end_ratio(),
            between(1 / 3, 3, theory=1.0),
            ratio=True,
            unit="norm",
        ),
        Comparison("residual", ("residual",), metric(), above(0.95), unit="accuracy"),
        Comparison(
            "residual − plain at its best rate",
            ("residual", *PLAIN),
            best_difference(1, len(PLAIN)),
            above(0.2),
            unit="accuracy",
        ),
    ),
    recorded="reproduced",
    figure=Figure(
        (
            Curve("plain", FIRST, along(power=1), exponential(1.0), scaled=True),
            Curve("residual", "residual", along(power=1)),
        ),
        x="layer, counted from the input",
        y="norm of the pre-activations' gradient at initialisation",
    ),
)
