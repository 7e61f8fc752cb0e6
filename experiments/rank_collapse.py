"""Attention makes all tokens alike; skips delay that, and 1/√L branches beside skips prevent it.

Source: Dong et al. 2021 (arXiv 2103.03404): pure attention loses rank with depth; Noci et al. 2022
(arXiv 2206.03126): residual branches scaled by 1/√L keep it.

Measured: the mean cosine of two different tokens after each layer: 1 is collapse. Theory is that of
attention to all tokens alike, which random queries and keys come near: a layer adds to each token a
random map of the tokens' mean, of the mean's squared length.

Deviations: attention alone (Dong et al.'s case; Noci et al. have feed-forward sublayers), L = 24
layers of width 64 with 4 heads, without layer normalisation, Xavier's initialisation, 16 Gaussian
tokens.

Cost: 30 runs at initialisation, 5 s.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradflow.findings import Comparison, Curve, Figure, Finding, Region, above, below
from gradflow.measures import along_blocks, block_reading

DEPTH, TOKENS, PROBE = 24, 16, "token_cosine"
SCALED = "skip, branch 1/√L"
SKIPS: dict[str, dict[str, Any]] = {
    "no skip": {"skip": "none"},
    "skip": {"skip": "identity"},
    SCALED: {"skip": "identity", "branch_scale": DEPTH**-0.5},
}


def spec(skip: dict[str, Any]) -> dict[str, Any]:
    args = {"depth": DEPTH, "width": 64, "norm": "none", "feedforward": False, **skip}
    return {
        "network": {"target": "gradflow.networks.transformer", "args": args},
        "depth": DEPTH,
        "skip": skip["skip"],
        "data": {"name": "gaussian", "channels": TOKENS, "size": 8},
        "batch_size": 16,
        "probe": PROBE,
    }


def uniform(arm: str, layer: NDArray[Any]) -> NDArray[Any]:
    """Cosine of different tokens where all are attended to alike, orthogonal at the start.

    The mean of T tokens has 1/T of a token's mean square at first, and 1 + β² of what it had after
    each layer with a skip; the deviations from it stay. Without a skip the mean alone stays.
    """
    if arm == "no skip":
        return np.ones_like(layer)
    branch_scale = SKIPS[arm].get("branch_scale", 1.0)
    mean = (1 + branch_scale**2) ** layer / TOKENS
    share = mean / (mean + 1 - 1 / TOKENS)
    return (TOKENS * share - 1) / (TOKENS - 1)


def compare(
    arm: str, layer: int, region: Callable[[float, float], Region], end: float
) -> Comparison:
    theory = float(uniform(arm, np.array(float(layer))))
    return Comparison(
        f"{arm}, layer {layer}", (arm,), block_reading(PROBE, layer), region(end, theory)
    )


FINDING = Finding(
    source="Dong et al. 2021, arXiv 2103.03404; Noci et al. 2022, arXiv 2206.03126",
    chapter="after",
    specs={arm: spec(skip) for arm, skip in SKIPS.items()},
    comparisons=(
        compare("no skip", 4, above, 0.99),
        compare("skip", 4, below, 0.9),
        compare("skip", DEPTH, above, 0.99),
        compare(SCALED, DEPTH, below, 0.2),
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(Curve(arm, arm, along_blocks(PROBE), partial(uniform, arm)) for arm in SKIPS),
        x="layer, counted from the input",
        y="mean cosine of different tokens",
        log=False,
    ),
)
