"""Sigmoid networks shrink the gradient's norm below a quarter at every layer.

Source: Hochreiter 1991 (diploma thesis), Bengio et al. 1994 (IEEE Transactions on Neural Networks
5), Glorot & Bengio 2010 (AISTATS): the sigmoid's derivative is at most 1/4.

Measured: growth per layer toward the input of the gradient with respect to the pre-activations, as
a norm and squared (ρ), from the slope of its logarithm over the interior layers (four left out at
each end), one forward and one backward pass from a random linear readout.

Deviations: square fully connected layers of width 256 with Xavier initialisation and Gaussian
inputs, where the sources have recurrent networks or images.

Cost: 10 runs at initialisation, and one shown beside them, 1 s.
"""

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, below
from gradflow.measures import along, at_places, growth

DEPTH, WIDTH = 24, 256
NETWORK = {
    "network": "mlp",
    "depth": DEPTH,
    "width": WIDTH,
    "norm": "none",
    "skip": False,
    "init": "xavier",
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": 64,
    "probe": "propagation",
}
PROFILES = {
    name: theory.plain_profile(DEPTH - 1, name, sigma_w2=1.0) for name in ("sigmoid", "tanh")
}
LENGTH = theory.length_fixed_point("sigmoid", sigma_w2=1.0)
RATE = theory.chi("sigmoid", LENGTH, sigma_w2=1.0)

FINDING = Finding(
    source="Hochreiter 1991; Bengio et al. 1994; Glorot & Bengio 2010, AISTATS",
    chapter="vanishing",
    specs={name: {**NETWORK, "activation": name} for name in PROFILES},
    comparisons=(
        Comparison(
            "growth of the norm, sigmoid",
            ("sigmoid",),
            growth(squared=False),
            below(0.25, theory=RATE**0.5),
            ratio=True,
            unit="norm",
        ),
        Comparison("ρ, sigmoid", ("sigmoid",), growth(), about(RATE, 0.03), ratio=True, unit="ρ"),
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(name, name, along(), at_places(profile.gradient), scaled=True)
            for name, profile in PROFILES.items()
        ),
        x="layer, counted from the input",
        y="squared norm of the pre-activations' gradient",
    ),
    beside={"tanh": 1},
    notes="tanh with the same initialisation, drawn beside it, shrinks the gradient by ever less "
    "as the signal fades: no exponential fits, and none is fitted.",
)
