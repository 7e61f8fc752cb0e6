"""Batch normalisation makes a plain ReLU net's gradients explode by π/(π − 1) a layer at any σ_w.

Source: Yang et al. 2019 (arXiv 1902.08129), a mean-field theory of batch normalisation. The
exact rate at a finite batch is gradflow's own form of it: `theory.batch_norm_growth`.

Measured: ρ, the squared growth per layer toward the input of the gradient with respect to the
pre-activations, from the slope of its logarithm over the interior layers (four left out at each
end), one forward and one backward pass from a random linear readout, in training mode.

Deviations: fully connected layers of width 512, 29 of them and 59 at batch 8, and Gaussian inputs.
The limit of large batches is taken to begin at 128.

Cost: 60 runs at initialisation, 24 s; 10 of them, of batch 512, take 8 s.
"""

from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import along, at_places, growth

WIDTH = 512
NETWORK = {
    "network": "mlp",
    "depth": 30,
    "width": WIDTH,
    "norm": "batch",
    "skip": False,
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "probe": "propagation",
}
LIMIT = theory.batch_norm_growth("relu")
LARGE: dict[str, dict[str, Any]] = {
    "batch 128": {"batch_size": 128},
    "batch 128, σ_w = 0.5": {"batch_size": 128, "init": "gaussian", "sigma_w": 0.5},
    "batch 128, σ_w = 3": {"batch_size": 128, "init": "gaussian", "sigma_w": 3.0},
    "batch 512": {"batch_size": 512},
}
SMALL: dict[str, dict[str, Any]] = {
    "batch 32": {"batch_size": 32},
    "batch 8": {"batch_size": 8, "depth": 60},
}
ARMS = {name: {**NETWORK, **keys} for name, keys in (LARGE | SMALL).items()}


def compare(arm: str, rate: float, share: float) -> Comparison:
    region, slow = about(rate, share), arm == "batch 512"
    return Comparison(f"ρ, {arm}", (arm,), growth(), region, ratio=True, unit="ρ", slow=slow)


def curve(arm: str) -> Curve:
    keys = ARMS[arm]
    profile = theory.plain_profile(
        keys["depth"] - 1, "relu", sigma_w2=2.0, norm="batch", batch=keys["batch_size"]
    )
    return Curve(arm, arm, along(), at_places(profile.gradient), scaled=True)


FINDING = Finding(
    source="Yang et al. 2019, arXiv 1902.08129",
    chapter="exploding",
    specs=ARMS,
    comparisons=(
        *(compare(arm, LIMIT, 0.02) for arm in LARGE),
        *(
            compare(arm, theory.batch_norm_growth("relu", batch=keys["batch_size"]), 0.03)
            for arm, keys in SMALL.items()
        ),
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(curve(arm) for arm in ("batch 512", "batch 32", "batch 8")),
        x="layer, counted from the input",
        y="squared norm of the pre-activations' gradient",
    ),
    notes="In evaluation mode with its fresh running statistics batch normalisation is the "
    "identity, and the explosion is gone.",
)
