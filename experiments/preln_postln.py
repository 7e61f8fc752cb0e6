"""With L layers a Transformer's last gradient starts as 1/√L with Pre-LN, and as 1 with Post-LN.

Source: Xiong et al. 2020 (arXiv 2002.04745), theorem 1: why Post-LN needs the warm-up that Pre-LN
does without.

Measured: the norm of the gradient with respect to the second map of the last feed-forward sublayer,
weight and bias; the exponent of its growth with the number of layers L = 2, 4, …, 64, by least
squares of logarithms. Theory: −1/2 with Pre-LN, 0 with Post-LN. One forward and one backward pass
from a random linear readout.

Deviations: encoders of width 64 with 4 heads and Xavier's initialisation, 16 Gaussian tokens and no
embeddings; a random linear readout of all tokens in place of the translation loss.

Cost: 120 runs at initialisation, 35 s.
"""

from functools import partial
from typing import Any

import numpy as np

from gradflow.findings import Comparison, Curve, Figure, Finding, between
from gradflow.measures import Imagined, Measure, Record, imagined_layers, layers

DEPTHS = (2, 4, 8, 16, 32, 64)
ORDERS = {"Pre-LN": "pre", "Post-LN": "post"}
EXPONENTS = {"Pre-LN": -0.5, "Post-LN": 0.0}
QUANTITY = "weight_grad_norm"


def arms(order: str) -> tuple[str, ...]:
    return tuple(f"{order}, L = {depth}" for depth in DEPTHS)


def spec(order: str, depth: int) -> dict[str, Any]:
    args = {"depth": depth, "width": 64, "order": ORDERS[order]}
    return {
        "network": {"target": "gradflow.networks.transformer", "args": args},
        "depth": depth,
        "skip": True,
        "data": {"name": "gaussian", "channels": 16, "size": 8},
        "batch_size": 16,
        "probe": "propagation",
    }


def last(record: Record) -> float:
    """The norm of the gradient in the last feed-forward sublayer."""
    _, values = layers(record, "weights", QUANTITY, kind="linear")
    return float(values[-1])


def exponent(*records: Record) -> float:
    return float(np.polyfit(np.log(DEPTHS), np.log([last(record) for record in records]), 1)[0])


def imagined(power: float) -> tuple[Imagined, ...]:
    return tuple(imagined_layers(QUANTITY, [depth**power]) for depth in DEPTHS)


def gradients(*records: Record) -> tuple[np.ndarray, np.ndarray]:
    return np.array(DEPTHS, dtype=float), np.array([last(record) for record in records])


def power_of(exponent: float, depth: np.ndarray) -> np.ndarray:
    return depth**exponent


FINDING = Finding(
    source="Xiong et al. 2020, arXiv 2002.04745, theorem 1",
    chapter="after",
    specs={
        arm: spec(order, depth)
        for order in ORDERS
        for arm, depth in zip(arms(order), DEPTHS, strict=True)
    },
    comparisons=tuple(
        Comparison(
            f"exponent of L, {order}",
            arms(order),
            Measure(exponent, imagined),
            between(expected - 0.1, expected + 0.1, expected),
        )
        for order, expected in EXPONENTS.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(order, arms(order), gradients, partial(power_of, power), scaled=True)
            for order, power in EXPONENTS.items()
        ),
        x="layers of the Transformer",
        y="norm of the gradient of the last feed-forward map",
    ),
)
