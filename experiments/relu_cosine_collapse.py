"""Deep ReLU nets make any two inputs parallel: orthogonal ones have a cosine of 0.97 at layer 30.

Source: Poole et al. 2016 (arXiv 1606.05340), eq. 5, and Hayou et al. 2019 (arXiv 1902.06853); the
map of cosines in closed form is Cho & Saul's 2009.

Measured: the cosine of two inputs' activations after l layers, of inputs orthogonal at the start;
mean over 32 pairs.

Deviations: fully connected layers with He initialisation, 10 of width 2048 and 30 of width 1024,
and Gaussian inputs.

Cost: 20 runs at initialisation, 20 s.
"""

from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, between
from gradflow.measures import along_blocks, at_places, block_reading

WIDTHS = {10: 2048, 30: 1024}
"""Depth -> width; the networks' spread is as 1/√width, and least at great depth."""
COSINES = theory.cosine_profile(30, "relu", sigma_w2=2.0)
"""At the input and after each layer."""


def spec(depth: int) -> dict[str, Any]:
    width = WIDTHS[depth]
    return {
        "network": {
            "target": "gradflow.networks.chain",
            "args": {"depth": depth, "width": width},
        },
        "depth": depth,
        "skip": False,
        "data": {"name": "gaussian", "channels": width, "size": 1},
        "batch_size": 64,
        "probe": {"name": "cosine", "cosine": 0.0},
    }


def compare(depth: int) -> Comparison:
    expected = float(COSINES[depth])
    return Comparison(
        f"cosine after layer {depth}",
        (f"{depth} layers",),
        block_reading("cosine", depth),
        between(expected - 0.02, expected + 0.02, expected),
    )


FINDING = Finding(
    source="Poole et al. 2016, arXiv 1606.05340; Hayou et al. 2019, arXiv 1902.06853",
    chapter="initialisation",
    specs={f"{depth} layers": spec(depth) for depth in WIDTHS},
    comparisons=tuple(compare(depth) for depth in WIDTHS),
    recorded="reproduced",
    figure=Figure(
        (Curve("ReLU", "30 layers", along_blocks("cosine"), at_places(COSINES[1:])),),
        x="layer, counted from the input",
        y="cosine of two inputs' activations",
        log=False,
    ),
)
