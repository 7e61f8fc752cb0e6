"""Branches that start at zero pass the gradient to every block with its norm unchanged, exactly.

Source: Zhang et al. 2019 (Fixup, arXiv 1901.09321), De & Smith 2020 (SkipInit, arXiv 2002.10444),
Bachlechner et al. 2020 (ReZero, arXiv 2003.04887).

Measured: the largest over the smallest of the norms of the gradient with respect to the inputs of
50 residual blocks; one forward and one backward pass from a random linear readout.

Deviations: fully connected layers of width 128 without normalisation, batch 32 and Gaussian inputs;
ReZero's learnt factor at its start, and a constant factor of zero in its place.

Cost: 20 runs at initialisation, and one shown beside them, 2 s.
"""

from typing import Any

import numpy as np

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, exactly
from gradflow.measures import Array, Imagined, Measure, Record, along, imagined_layers, layers

BLOCKS, WIDTH = 50, 128
NETWORK = {
    "network": "mlp",
    "depth": BLOCKS + 2,
    "width": WIDTH,
    "norm": "none",
    "order": "pre",
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": 32,
    "probe": "propagation",
}
ZERO: dict[str, dict[str, Any]] = {
    "ReZero": {"skip": "rezero"},
    "branches times zero": {"skip": True, "branch_scale": 0.0},
}
USUAL = "branches as usual"
ROUNDING = 1e-12
"""Far below float32's, 6e-8: norms that are recorded in it agree to this where they are equal."""


def spread(record: Record) -> float:
    _, norms = layers(record, "blocks", "skip_grad_norm")
    return float(norms.max() / norms.min())


def with_spread(ratio: float) -> tuple[Imagined]:
    norms: Array = np.array([ratio, *[1.0] * (BLOCKS - 1)])
    return (imagined_layers("skip_grad_norm", norms, kind="block"),)


def curve(arm: str) -> Curve:
    rate = theory.residual_profile(1, "relu", sigma_w2=2.0).growth[0] if arm == USUAL else 1.0
    read = along("skip_grad_norm", kind="block")
    return Curve(arm, arm, read, lambda block: rate ** (block.max() - block), scaled=True)


FINDING = Finding(
    source="arXiv 1901.09321 (Fixup); arXiv 2002.10444 (SkipInit); arXiv 2003.04887 (ReZero)",
    chapter="skips",
    specs={arm: {**NETWORK, **keys} for arm, keys in (ZERO | {USUAL: {"skip": True}}).items()},
    comparisons=tuple(
        Comparison(
            f"largest over smallest gradient, {arm}",
            (arm,),
            Measure(spread, with_spread),
            exactly(1.0, ROUNDING),
            unit="ratio of norms",
        )
        for arm in ZERO
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(map(curve, (USUAL, *ZERO))),
        x="block, counted from the input",
        y="squared norm of the gradient with respect to the block's input",
    ),
    beside={USUAL: 1},
)
