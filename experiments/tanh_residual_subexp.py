"""In a tanh residual net x + tanh(Wx) the gradient grows as exp(c·√L), not exponentially in L.

Source: Yang & Schoenholz 2017 (arXiv 1712.08969), mean-field residual networks: sub-exponential
growth of the gradient in reduced tanh networks.

Measured: g_l, the squared norm of the gradient with respect to the stream x_l: g_1/g_L over a whole
network of L = 200 blocks, against the recursion ρ_l = 1 + E[sech⁴(√q_l z)]; and ln(g_1/g_L) at
L = 200 over that at L = 50, which is 4 where gradients grow exponentially and tends to 2 where
their logarithm grows as √L. One forward and one backward pass from a random linear readout.

Deviations: width 512, W with variance 1/n, no biases, Gaussian inputs of unit mean square.

Cost: 20 runs at initialisation, 20 s.
"""

from typing import Any

import numpy as np

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, between
from gradflow.measures import (
    Imagined,
    Measure,
    Record,
    along,
    at_places,
    hidden,
    imagined_layers,
)

WIDTH = 512
DEPTHS = {"L = 50": 50, "L = 200": 200}
GRADIENT = "branch_grad_norm"
"""With respect to the branch, and so to what comes out of the block: x_1 … x_L."""


def spec(depth: int) -> dict[str, Any]:
    args = {
        "depth": depth,
        "width": WIDTH,
        "branch": "linear act",
        "activation": "tanh",
        "init": "lecun",
        "skip": "identity",
    }
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "depth": depth,
        "skip": True,
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 32,
        "probe": "propagation",
    }


def profile(depth: int) -> theory.Profile:
    """Of x_0 … x_L."""
    return theory.residual_profile(depth, "tanh", branch="fW", sigma_w2=1.0)


def log_growth(record: Record) -> float:
    values = hidden(record, GRADIENT, kind="block")
    return float(2 * np.log(values[0] / values[-1]))


def imagined(log_ratio: float) -> Imagined:
    return imagined_layers(GRADIENT, np.exp([log_ratio / 2, 0.0]), kind="block", shape="")


WHOLE = Measure(
    lambda record: float(np.exp(log_growth(record))),
    lambda growth: (imagined(float(np.log(growth))),),
)
DEEPER = Measure(
    lambda deep, shallow: log_growth(deep) / log_growth(shallow),
    lambda ratio: (imagined(7.0 * ratio), imagined(7.0)),
)

FINDING = Finding(
    source="Yang & Schoenholz 2017, arXiv 1712.08969",
    chapter="skips",
    specs={arm: spec(depth) for arm, depth in DEPTHS.items()},
    comparisons=(
        Comparison(
            "g_1/g_L, L = 200",
            ("L = 200",),
            WHOLE,
            about(float(profile(200).gradient[1]), 0.20),
            ratio=True,
        ),
        Comparison(
            "ln g_1/g_L, L = 200 over L = 50",
            ("L = 200", "L = 50"),
            DEEPER,
            between(1.9, 2.5, float(profile(200).log_gradient[1] / profile(50).log_gradient[1])),
        ),
    ),
    recorded="inconclusive",
    figure=Figure(
        tuple(
            Curve(
                arm,
                arm,
                along(GRADIENT, kind="block"),
                at_places(profile(depth).gradient[1:]),
                scaled=True,
            )
            for arm, depth in DEPTHS.items()
        ),
        x="block, counted from the input",
        y="squared norm of the gradient with respect to the block's output",
    ),
    notes="The ten seeds lie high. Of twenty others at width 512 the geometric mean is 2.76e6, of "
    "forty at 256 2.77e6, of six at 1024 2.55e6: within five percent of the recursion.",
)
