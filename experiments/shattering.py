"""Gradients of deep plain nets with batch norm shatter into white noise, in residual nets slowly.

Source: Balduzzi et al. 2017 (arXiv 1702.08591), Fig. 1 and 2.

Measured: the autocorrelation at lag 1 of dy/dx over 256 equal steps of a one-dimensional input over
[−2, 2], y the network's first output; all points make one batch, over which batch normalisation
takes its statistics.

Deviations: width 200, He initialisation, one output of ten; residual networks are of pre-activation
blocks of one linear map, times β = 0.1. Networks without batch normalisation have Gaussian biases
of deviation 0.5: without any, all kinks are at 0 and nothing can shatter.

Cost: 80 runs at initialisation and 55 shown beside them, 9 s.
"""

from typing import Any

import numpy as np

from gradflow.findings import Comparison, Curve, Figure, Finding, above, below
from gradflow.measures import (
    Array,
    Measure,
    Record,
    imagined_readings,
    reading,
    single_reading,
)

PROBE = "gradient_autocorrelation"
NETWORK = {
    "network": "mlp",
    "width": 200,
    "data": {"name": "gaussian", "channels": 1, "size": 1},
    "record": "none",
    "probe": {"name": "shattering", "points": 256, "extent": 2.0},
}
RESIDUAL = {"norm": "batch", "skip": True, "order": "pre"}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({"norm": "batch", "skip": False}, (1, 2, 4, 8, 16)),
    "residual, β = 0.1": ({**RESIDUAL, "branch_scale": 0.1}, (4, 16, 50)),
    "residual, β = 1": (RESIDUAL, (4, 16, 50)),
    "plain without batch norm": (
        {"norm": "none", "skip": False, "init": "gaussian", "sigma_w": 2**0.5, "sigma_b": 0.5},
        (1, 8, 24, 50),
    ),
}
"""A family's keys, and its numbers of hidden layers or of blocks."""
LAG_1 = single_reading(PROBE, 1.0)
DIFFERENCE = Measure(
    lambda one, other: reading(one, PROBE, 1.0) - reading(other, PROBE, 1.0),
    lambda value: (
        imagined_readings(PROBE, [value], x=[1.0]),
        imagined_readings(PROBE, [0.0], x=[1.0]),
    ),
)


def label(family: str, layers: int) -> str:
    return f"{family}, {layers} layer{'s' * (layers > 1)}"


def spec(family: str, layers: int) -> dict[str, Any]:
    keys, _ = FAMILIES[family]
    # A residual network has a first map before its blocks; both have a readout.
    return {**NETWORK, **keys, "depth": layers + (2 if keys["skip"] else 1)}


def curve(family: str) -> Curve:
    _, depths = FAMILIES[family]

    def read(*records: Record) -> tuple[Array, Array]:
        values = [reading(record, PROBE, 1.0) for record in records]
        return np.array(depths, float), np.array(values)

    return Curve(family, tuple(label(family, layers) for layers in depths), read)


SPECS = {
    label(family, layers): spec(family, layers)
    for family, (_, depths) in FAMILIES.items()
    for layers in depths
}
COMPARISONS = (
    Comparison("plain, 1 layer", ("plain, 1 layer",), LAG_1, above(0.7), unit="autocorrelation"),
    Comparison(
        "plain, 16 layers", ("plain, 16 layers",), LAG_1, below(0.1), unit="autocorrelation"
    ),
    Comparison(
        "residual less plain, 16 layers",
        ("residual, β = 0.1, 16 layers", "plain, 16 layers"),
        DIFFERENCE,
        above(0.5),
        unit="autocorrelation",
    ),
    Comparison(
        "residual, 50 layers",
        ("residual, β = 0.1, 50 layers",),
        LAG_1,
        above(0.7),
        unit="autocorrelation",
    ),
)
COMPARED = {arm for comparison in COMPARISONS for arm in comparison.arms}

FINDING = Finding(
    source="Balduzzi et al. 2017, arXiv 1702.08591",
    chapter="after",
    specs=SPECS,
    comparisons=COMPARISONS,
    recorded="reproduced",
    seeds=20,
    beside={arm: 5 for arm in SPECS if arm not in COMPARED},
    figure=Figure(
        tuple(map(curve, FAMILIES)),
        x="hidden layers, or blocks",
        y="autocorrelation of dy/dx at lag 1",
        log=False,
    ),
    notes="Without batch normalisation plain networks shatter far more slowly than the paper's "
    "2^(−L), for which it takes the layers' activation patterns as independent. The factor β "
    "matters: with β = 1 residual networks of 50 blocks lose half of their autocorrelation.",
)
