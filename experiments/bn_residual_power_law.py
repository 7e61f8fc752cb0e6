"""With batch norm first in the branch the gradient is a power of the residual stream's variance.

Source: derived from Yang et al. 2019 (arXiv 1902.08129) and De & Smith 2020 (arXiv 2002.10444):
each block adds a constant to the stream's variance v, and c/v of itself to the squared gradient.

Measured: p in g ∝ v^(−p) by least squares of ln g on ln v over all blocks; g the squared norm of
the gradient with respect to a block's output, v the variance over the batch of that output, mean
over its units; one forward and one backward pass from a random linear readout.

Deviations: fully connected layers of width 256, batch 64, Gaussian inputs and He initialisation;
100 blocks of one linear map, 60 of two. Theory is the one of large batches.

Cost: 20 runs at initialisation, 8 s.
"""

from typing import Any

import numpy as np

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, between
from gradflow.measures import (
    Array,
    Imagined,
    Measure,
    Record,
    imagined_layers,
    imagined_readings,
    layers,
    readings,
)

WIDTH, TOLERANCE = 256, 0.12
NETWORK = {
    "network": "mlp",
    "width": WIDTH,
    "norm": "batch",
    "order": "pre",
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": 64,
    "probe": "propagation",
}
BLOCKS = {1: 100, 2: 60}
ARMS = {1: "one linear map a branch", 2: "two linear maps a branch"}
SPECS: dict[str, dict[str, Any]] = {
    ARMS[maps]: {**NETWORK, "branch_layers": maps, "depth": maps * blocks + 2}
    for maps, blocks in BLOCKS.items()
}


def variance_and_gradient(record: Record) -> tuple[Array, Array]:
    """ln v and g at each block's output, from the input on."""
    names, norms = layers(record, "blocks", "skip_grad_norm")
    read, _, variances = readings(record, "batch_variance")
    at = dict(zip(read, variances, strict=True))
    return np.log([at[name] for name in names]), norms**2


def exponent(record: Record) -> float:
    log_v, g = variance_and_gradient(record)
    return float(-np.polyfit(log_v, np.log(g), 1)[0])


def with_exponent(p: float) -> tuple[Imagined]:
    v = np.linspace(2.0, 40.0, 30)
    stream = imagined_layers("skip_grad_norm", v ** (-p / 2), kind="block")
    names = stream.tables["modules"]["layer"].to_pylist()
    variances = imagined_readings("batch_variance", v.tolist(), layers=names)
    return (Imagined({**stream.tables, **variances.tables}),)


def curve(maps: int) -> Curve:
    p = theory.power_law_exponent(maps)
    read = variance_and_gradient
    return Curve(ARMS[maps], ARMS[maps], read, lambda log_v: np.exp(-p * log_v), scaled=True)


FINDING = Finding(
    source="Yang et al. 2019, arXiv 1902.08129; De & Smith 2020, arXiv 2002.10444; p is derived",
    chapter="skips",
    specs=SPECS,
    comparisons=tuple(
        Comparison(
            f"p, {arm}",
            (arm,),
            Measure(exponent, with_exponent),
            between(p - TOLERANCE, p + TOLERANCE, theory=p),
            unit="exponent",
        )
        for maps, arm in ARMS.items()
        if (p := theory.power_law_exponent(maps))
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(map(curve, ARMS)),
        x="natural logarithm of the residual stream's variance over the batch",
        y="squared norm of the gradient with respect to the stream",
    ),
)
