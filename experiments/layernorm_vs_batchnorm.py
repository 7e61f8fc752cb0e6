"""Layer norm keeps a plain ReLU net's gradient; with batch norm even a tanh net's explodes.

Source: Yang et al. 2019 (arXiv 1902.08129), for batch normalisation, which explodes whatever the
activation, the less the nearer that is to linear. That layer normalisation keeps ReLU's gradient
follows from its Jacobian in wide layers: `theory.layer_norm_growth`.

Measured: ρ, the squared growth per layer toward the input of the gradient with respect to the
pre-activations, from the slope of its logarithm over the interior layers (four left out at each
end), one forward and one backward pass from a random linear readout, in training mode.

Deviations: 29 fully connected layers of width 512, batch 128 and Gaussian inputs; tanh against its
limit of large batches, the linear network against its exact value at this batch.

Cost: 30 runs at initialisation, and one shown beside them, 10 s.
"""

from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import along, at_places, growth

DEPTH, WIDTH, BATCH = 30, 512, 128
NETWORK = {
    "network": "mlp",
    "depth": DEPTH,
    "width": WIDTH,
    "skip": False,
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": BATCH,
    "probe": "propagation",
}
ARMS: dict[str, dict[str, Any]] = {
    "layer norm, relu": {"norm": "layer", "activation": "relu"},
    "batch norm, tanh": {"norm": "batch", "activation": "tanh"},
    "batch norm, linear": {"norm": "batch", "activation": "linear"},
    "batch norm, relu": {"norm": "batch", "activation": "relu"},
}
RATES = {
    "layer norm, relu": (theory.layer_norm_growth("relu"), 0.03),
    "batch norm, tanh": (theory.batch_norm_growth("tanh"), 0.03),
    "batch norm, linear": (theory.batch_norm_growth("linear", batch=BATCH), 0.02),
}
"""Theory's ρ, and the share of it that the region spans on either side."""


def curve(arm: str) -> Curve:
    batch = None if arm == "batch norm, tanh" else BATCH
    profile = theory.plain_profile(DEPTH - 1, **ARMS[arm], sigma_w2=2.0, batch=batch)
    return Curve(arm, arm, along(), at_places(profile.gradient), scaled=True)


FINDING = Finding(
    source="Yang et al. 2019, arXiv 1902.08129",
    chapter="normalisation",
    specs={arm: {**NETWORK, **keys} for arm, keys in ARMS.items()},
    comparisons=tuple(
        Comparison(f"ρ, {arm}", (arm,), growth(), about(rate, share), ratio=True, unit="ρ")
        for arm, (rate, share) in RATES.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(map(curve, ARMS)),
        x="layer, counted from the input",
        y="squared norm of the pre-activations' gradient",
    ),
    beside={"batch norm, relu": 1},
    notes="Without nonlinearity batch normalisation at batch B still multiplies by (B − 2)/(B − 3) "
    "a layer, 1.008 at 128: the explosion is that of the nonlinearity and the batch together.",
)
