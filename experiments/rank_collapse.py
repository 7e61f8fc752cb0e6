"""Attention makes all tokens alike, with skips more slowly; skips with 1/√L branches keep them apart.

Source: Dong et al. 2021 (arXiv 2103.03404), §2: pure attention loses rank with depth; Noci et al. 2022
(arXiv 2206.03126), §3: residual branches scaled by 1/√L keep it.

Measured: the mean cosine of two different tokens after each layer: 1 is collapse.

Deviations: attention alone (Dong et al.'s case; Noci et al. have feed-forward sublayers), L = 24
layers of width 64 with 4 heads, without layer normalisation, Xavier's initialisation, 16 Gaussian
tokens. Values are those of these networks; theory here is the limit 1 only.

Cost: 30 runs at initialisation, 5 s.
"""

from typing import Any

from gradflow.findings import Comparison, Curve, Figure, Finding, above, below
from gradflow.measures import along_blocks, block_reading

DEPTH, PROBE = 24, "token_cosine"
SKIPS: dict[str, dict[str, Any]] = {
    "no skip": {"skip": "none"},
    "skip": {"skip": "identity"},
    "skip, branch 1/√L": {"skip": "identity", "branch_scale": DEPTH**-0.5},
}


def spec(skip: dict[str, Any]) -> dict[str, Any]:
    args = {"depth": DEPTH, "width": 64, "norm": "none", "feedforward": False, **skip}
    return {
        "network": {"target": "gradflow.networks.transformer", "args": args},
        "depth": DEPTH,
        "skip": skip["skip"],
        "data": {"name": "gaussian", "channels": 16, "size": 8},
        "batch_size": 16,
        "probe": PROBE,
    }


FINDING = Finding(
    source="Dong et al. 2021, arXiv 2103.03404; Noci et al. 2022, arXiv 2206.03126",
    chapter="after",
    specs={arm: spec(skip) for arm, skip in SKIPS.items()},
    comparisons=(
        Comparison("no skip, layer 4", ("no skip",), block_reading(PROBE, 4), above(0.99)),
        Comparison("skip, layer 4", ("skip",), block_reading(PROBE, 4), below(0.9)),
        Comparison("skip, layer 24", ("skip",), block_reading(PROBE, DEPTH), above(0.99)),
        Comparison(
            "skip, branch 1/√L, layer 24",
            ("skip, branch 1/√L",),
            block_reading(PROBE, DEPTH),
            below(0.2),
        ),
    ),
    recorded="not run",
    figure=Figure(
        tuple(Curve(arm, arm, along_blocks(PROBE)) for arm in SKIPS),
        x="layer, counted from the input",
        y="mean cosine of different tokens",
        log=False,
    ),
)
