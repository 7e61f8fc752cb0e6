"""In residual nets with batch norm the gradient changes by O(1/L) a block: deeper is better kept.

Source: Zaeemzadeh et al. 2018 (arXiv 1805.07477): the deeper a residual network, the nearer each
block comes to preserving the gradient's norm. The constant is gradflow's, from the theory of
pre-activation batch normalisation: `theory.residual_profile`, of which p/2 over L/2 + π/(π − 1),
p = (π/(π − 1))², is the first order in 1/L.

Measured: ‖∂L/∂x_l‖/‖∂L/∂x_{l+1}‖ − 1 (norms, not squared), the median over the blocks of a network,
at L = 10, 30 and 100 blocks; one forward and one backward pass from a random linear readout.

Deviations: blocks x + W₂relu(BN(W₁relu(BN(x)))) of width 192 without stem and readout, batch 128
and Gaussian inputs of unit variance, where the paper has convolutional networks and training.

Cost: 30 runs at initialisation, 10 s; the 10 of 100 blocks take 7 s.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, between
from gradflow.measures import Array, Imagined, Measure, Record, imagined_layers, layers

WIDTH, BLOCKS = 192, (10, 30, 100)
ARMS = {blocks: f"{blocks} blocks" for blocks in BLOCKS}


def spec(blocks: int) -> dict[str, Any]:
    args = {
        "depth": blocks,
        "width": WIDTH,
        "branch": "norm act linear norm act linear",
        "norm": "batch",
        "skip": "identity",
    }
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 128,
        "probe": "propagation",
    }


def median_excess(norms: Array) -> float:
    """Of the norms of the gradient with respect to x_1 … x_L."""
    return float(np.median(norms[:-1] / norms[1:])) - 1


def excess(record: Record) -> float:
    return median_excess(layers(record, "blocks", "skip_grad_norm")[1])


def with_excess(value: float) -> Imagined:
    norms = (1 + value) ** np.arange(12.0)[::-1]
    return imagined_layers("skip_grad_norm", norms, kind="block")


def predicted(blocks: int) -> float:
    profile = theory.residual_profile(blocks, "relu", branch="WfBWfB", sigma_w2=2.0)
    return median_excess(profile.gradient[1:] ** 0.5)


EXCESS = Measure(excess, lambda value: (with_excess(value),))


def falling(few: int, many: int) -> Measure:
    """The exponent k of an excess that falls as L^(−k) between two depths."""
    step = math.log(many / few)
    return Measure(
        lambda one, other: math.log(excess(one) / excess(other)) / step,
        lambda k: (with_excess(0.1 * math.exp(k * step)), with_excess(0.1)),
    )


def by_depth(*records: Record) -> tuple[Array, Array]:
    return np.array(BLOCKS, float), np.array([excess(record) for record in records])


def theory_by_depth(blocks: Sequence[float] | Array) -> Array:
    return np.array([predicted(int(count)) for count in blocks])


FINDING = Finding(
    source="Zaeemzadeh et al. 2018, arXiv 1805.07477",
    chapter="skips",
    specs={arm: spec(blocks) for blocks, arm in ARMS.items()},
    comparisons=(
        *(
            Comparison(
                f"median of the ratio, less 1, {arm}",
                (arm,),
                EXCESS,
                about(predicted(blocks), 0.1),
                ratio=True,
                unit="norm",
                slow=blocks > 30,
            )
            for blocks, arm in ARMS.items()
        ),
        Comparison(
            "k in L^(−k), from 30 to 100 blocks",
            (ARMS[30], ARMS[100]),
            falling(30, 100),
            between(0.8, 1.2, theory=math.log(predicted(30) / predicted(100)) / math.log(100 / 30)),
            unit="exponent",
            slow=True,
        ),
    ),
    recorded="reproduced",
    figure=Figure(
        (Curve("median over the blocks", tuple(ARMS.values()), by_depth, theory_by_depth),),
        x="blocks L",
        y="ratio of the gradient's norms at successive blocks, less 1",
    ),
)
