"""A shortcut scaled by λ multiplies the gradient by λ^L over L blocks: it vanishes or explodes.

Source: He et al. 2016 (arXiv 1603.05027), §3, eq. 8, and §3.1 ("constant scaling", λ = 0.5).

Measured: the norm of the gradient with respect to the input of a block over that with respect to
the input of the 54th block after it, with branches that are zero, so that the shortcut is alone;
one forward and one backward pass from a random linear readout.

Deviations: fully connected layers of width 128 and Gaussian inputs, at initialisation, where the
paper trains networks of 110 layers, of 54 blocks, and leaves the branches as they are (or scales
them by 1 − λ).

Cost: 30 runs at initialisation, 3 s.
"""

from collections.abc import Callable

import numpy as np

from gradflow.findings import Comparison, Curve, Figure, Finding, exactly
from gradflow.measures import Array, Imagined, Measure, Record, along, imagined_layers, layers

BLOCKS, WIDTH = 54, 128
FACTORS = (0.5, 1.0, 2.0)
ARMS = {factor: f"λ = {factor:g}" for factor in FACTORS}
NETWORK = {
    "network": "mlp",
    "depth": BLOCKS + 1 + 2,  # the gradient of one more block's input is where the 54 begin
    "width": WIDTH,
    "norm": "none",
    "order": "pre",
    "branch_scale": 0.0,
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": 32,
    "probe": "propagation",
}


def factor_of(record: Record) -> float:
    _, norms = layers(record, "blocks", "skip_grad_norm")
    return float(norms[0] / norms[-1])


def with_factor(factor: float) -> tuple[Imagined]:
    norms = np.geomspace(factor, 1.0, BLOCKS + 1)
    return (imagined_layers("skip_grad_norm", norms, kind="block"),)


def power(factor: float) -> Callable[[Array], Array]:
    """Of the squared norms, up to that of the last block."""
    return lambda block: factor ** (2 * (block.max() - block))


FINDING = Finding(
    source="He et al. 2016, arXiv 1603.05027, §3",
    chapter="skips",
    specs={
        arm: {**NETWORK, "skip": "dosed", "skip_forward": factor, "skip_backward": factor}
        for factor, arm in ARMS.items()
    },
    comparisons=tuple(
        Comparison(
            f"the gradient's factor over {BLOCKS} blocks, {arm}",
            (arm,),
            Measure(factor_of, with_factor),
            # Powers of two are exact; any rounding of float32 would be 6e-8.
            exactly(factor**BLOCKS, 1e-12 * factor**BLOCKS),
            unit="ratio of norms",
        )
        for factor, arm in ARMS.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(arm, arm, along("skip_grad_norm", kind="block"), power(factor), scaled=True)
            for factor, arm in ARMS.items()
        ),
        x="block, counted from the input",
        y="squared norm of the gradient with respect to the block's input",
    ),
)
