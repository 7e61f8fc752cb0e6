"""A highway net whose gates stand at T passes T² + (1 − T)² of the squared gradient a layer.

Source: Srivastava et al. 2015 (arXiv 1505.00387), §2.2: transform gates that start with a negative
bias let a deep network carry its input at first. The rate follows from eq. 3 for a constant gate
and a branch of χ = 1.

Measured: ρ, the squared growth per block toward the input of the gradient with respect to the
block's output, from the slope of its logarithm over the interior blocks (four left out at each
end), one forward and one backward pass from a random linear readout.

Deviations: the gates' weights start at zero, so that T = sigmoid(b) exactly; ReLU branches with He
initialisation, width 256, Gaussian inputs, none of which the paper has. A gate that stays at b = −4
costs 3.5 % of the squared gradient a layer.

Cost: 20 runs at initialisation, 10 s.
"""

import math
from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, exponential
from gradflow.measures import along, growth

DEPTH, WIDTH = 50, 256
GRADIENT = "branch_grad_norm"
"""With respect to the branch: T times that with respect to the block's output."""
BIASES = {"b = −4": -4.0, "b = −6": -6.0}


def spec(bias: float) -> dict[str, Any]:
    args = {"depth": DEPTH, "width": WIDTH, "skip": "highway", "gate_bias": bias}
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "depth": DEPTH,
        "skip": "highway",
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 64,
        "probe": "propagation",
    }


def rate(bias: float) -> float:
    return theory.highway_growth(1 / (1 + math.exp(-bias)))


FINDING = Finding(
    source="Srivastava et al. 2015, arXiv 1505.00387, §2.2",
    chapter="skips",
    specs={arm: spec(bias) for arm, bias in BIASES.items()},
    comparisons=tuple(
        Comparison(
            f"ρ, {arm}",
            (arm,),
            growth(GRADIENT, kind="block"),
            about(rate(bias), 0.002),
            ratio=True,
            unit="ρ",
        )
        for arm, bias in BIASES.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(arm, arm, along(GRADIENT, kind="block"), exponential(rate(bias)), scaled=True)
            for arm, bias in BIASES.items()
        ),
        x="block, counted from the input",
        y="squared norm of the gradient with respect to the branch",
    ),
)
