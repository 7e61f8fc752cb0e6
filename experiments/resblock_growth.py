"""Residual blocks grow both passes by 1 + α²: with α = 1/√L a whole network by (1 + 1/L)^L, near e.

Source: Taki 2017 (arXiv 1709.02956), initialisation of residual networks; Hanin & Rolnick 2018
(arXiv 1803.01719), residual branches scaled down. Blocks are x + αW₂φ(W₁x), φ ReLU, W₁ with He's
variance 2/n, W₂ with 1/n.

Measured: growth to the power L of the squared norm of the stream x_l (forward), and of the gradient
with respect to it (backward, toward the input), from the first to the last of the L places that are
recorded; theory is (1 + α²)^L. With α = 1 the growth per block, theory 2. One forward and one
backward pass from a random linear readout.

Deviations: fully connected blocks of width 256 and Gaussian inputs. The claim that the growth stays
below e at every L is measured at three depths.

Cost: 40 runs at initialisation, 15 s.
"""

from typing import Any

import numpy as np

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import Imagined, Measure, Record, along, at_places, hidden, imagined_layers

WIDTH = 256
DEPTHS = (16, 64, 128)
UNSCALED = "α = 1, L = 32"
ARMS = {f"α = 1/√L, L = {depth}": (depth, depth**-0.5) for depth in DEPTHS} | {UNSCALED: (32, 1.0)}
FORWARD, BACKWARD = "skip_rms", "branch_grad_norm"
"""Of the stream x_0 … x_{L−1}, into the blocks; with respect to the branch, α times that with
respect to x_1 … x_L, out of them."""


def spec(depth: int, alpha: float) -> dict[str, Any]:
    args = {
        "depth": depth,
        "width": WIDTH,
        "branch": "linear act linear",
        "skip": "identity",
        "branch_scale": alpha,
        "init": ["he", "lecun"],
    }
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "depth": depth,
        "skip": True,
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 64,
        "probe": "propagation",
    }


def whole(quantity: str, blocks: int) -> Measure:
    """Growth of the squared quantity over so many blocks, in the direction of its pass."""
    sign = 1.0 if quantity == FORWARD else -1.0

    def effect(record: Record) -> float:
        values = hidden(record, quantity, kind="block")
        return float((values[-1] / values[0]) ** (sign * 2 * blocks / (len(values) - 1)))

    def imagine(growth: float) -> tuple[Imagined, ...]:
        values = growth ** (sign * np.arange(9.0) / (2 * blocks))
        return (imagined_layers(quantity, values, kind="block", shape=""),)

    return Measure(effect, imagine)


def profile(arm: str) -> theory.Profile:
    depth, alpha = ARMS[arm]
    return theory.residual_profile(
        depth, "relu", branch="WfW", sigma_w2=(2.0, 1.0), branch_scale=alpha
    )


def compare(arm: str, way: str) -> Comparison:
    """Over the whole network, or with α = 1 over one block."""
    depth, alpha = ARMS[arm]
    blocks = 1 if arm == UNSCALED else depth
    region = about((1 + alpha**2) ** blocks, 0.05 if arm == UNSCALED else 0.10)
    measure = whole(FORWARD if way == "forward" else BACKWARD, blocks)
    return Comparison(f"{way}, {arm}", (arm,), measure, region, ratio=True, unit="ρ")


FINDING = Finding(
    source="Taki 2017, arXiv 1709.02956; Hanin & Rolnick 2018, arXiv 1803.01719",
    chapter="skips",
    specs={arm: spec(*sizes) for arm, sizes in ARMS.items()},
    comparisons=tuple(compare(arm, way) for arm in ARMS for way in ("forward", "backward")),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(
                arm,
                arm,
                along(BACKWARD, kind="block"),
                at_places(profile(arm).gradient[1:]),
                scaled=True,
            )
            for arm in ARMS
        ),
        x="block, counted from the input",
        y="squared norm of the gradient with respect to the branch",
    ),
)
