"""Leaky ReLUs whose slope is tailored to the depth keep two inputs apart where ReLU collapses them.

Source: Martens et al. 2021 (arXiv 2110.01765), the idea; Zhang et al. 2022 (arXiv 2203.08120),
tailored rectifiers: the slope is set so that the network's map of cosines takes 0 to 0.9.

Measured: the cosine of the activations of two inputs after all L layers, inputs orthogonal at the
start; mean over 16 pairs. Theory is 0.9 at each L with the slope for that L, and 0.989 for ReLU at
L = 50.

Deviations: fully connected layers of width 1024 and Gaussian inputs, where the papers train deep
convolutional networks.

Cost: 40 runs at initialisation, 50 s.
"""

from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, between
from gradflow.measures import along_blocks, at_places, block_reading

WIDTH, COSINE = 1024, 0.9
DEPTHS = (20, 50, 100)
SLOPES = {f"L = {depth}, tailored": (depth, theory.tailored_slope(depth, COSINE))
          for depth in DEPTHS} | {"L = 50, ReLU": (50, 0.0)}  # fmt: skip


def spec(depth: int, slope: float) -> dict[str, Any]:
    args = {
        "depth": depth,
        "width": WIDTH,
        "activation": "leaky_relu",
        "negative_slope": slope,
    }
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "depth": depth,
        "skip": False,
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 32,
        "probe": {"name": "cosine", "cosine": 0.0},
    }


def profile(arm: str) -> Any:
    """Cosines after each layer."""
    depth, slope = SLOPES[arm]
    sigma_w2 = theory.sigmas("he", "leaky_relu", negative_slope=slope).sigma_w2
    return theory.cosine_profile(depth, "leaky_relu", sigma_w2=sigma_w2, negative_slope=slope)[1:]


def compare(arm: str) -> Comparison:
    depth, slope = SLOPES[arm]
    expected = float(profile(arm)[-1])
    near = {100: 0.05}.get(depth, 0.03) if slope else 0.01
    return Comparison(
        f"cosine, {arm}",
        (arm,),
        block_reading("cosine", depth),
        between(expected - near, expected + near, expected),
        slow=depth == 100,
    )


FINDING = Finding(
    source="Martens et al. 2021, arXiv 2110.01765; Zhang et al. 2022, arXiv 2203.08120",
    chapter="initialisation",
    specs={arm: spec(*sizes) for arm, sizes in SLOPES.items()},
    comparisons=tuple(compare(arm) for arm in SLOPES),
    recorded="reproduced",
    figure=Figure(
        tuple(Curve(arm, arm, along_blocks("cosine"), at_places(profile(arm))) for arm in SLOPES),
        x="layer, counted from the input",
        y="cosine of two inputs' activations",
        log=False,
    ),
)
