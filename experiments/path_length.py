"""Residual nets send most gradient through short paths when branches are scaled or normalised.

Source: Veit et al. 2016 (arXiv 1605.06431): residual networks act as ensembles of paths of
binomial length, and most of the gradient comes through the short ones.

Measured: the mean length, in branches, of the paths that carry the squared gradient to the first
block's input: d ln G/d ln s² at s = 1, G = ‖∂L/∂x_0‖², s a factor on the gradient through every
branch; from a random linear readout, by a central difference in float64.

Deviations: 54 blocks of width 128 without stem and readout, at initialisation, batch 64 and
Gaussian inputs; all lengths at once by a derivative, where the paper samples paths of one length in
a trained network. Branches: one linear map without normalisation, the same times 1/√54, and two
linear maps with batch normalisation.

Cost: 30 runs at initialisation, 7 s.
"""

from typing import Any

import numpy as np

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import Array, Record, at_places, layers, single_reading

BLOCKS, WIDTH = 54, 128
BRANCHES: dict[str, dict[str, Any]] = {
    "unscaled": {"branch": "act linear"},
    "scaled by 1/√54": {"branch": "act linear", "branch_scale": BLOCKS**-0.5},
    "batch norm, two linear maps": {"branch": "norm act linear norm act linear", "norm": "batch"},
}
PROFILES = {
    "unscaled": theory.residual_profile(BLOCKS, "relu", sigma_w2=2.0),
    "scaled by 1/√54": theory.residual_profile(
        BLOCKS, "relu", sigma_w2=2.0, branch_scale=BLOCKS**-0.5
    ),
    "batch norm, two linear maps": theory.residual_profile(
        BLOCKS, "relu", branch="WfBWfB", sigma_w2=2.0
    ),
}


def spec(branch: dict[str, Any]) -> dict[str, Any]:
    args = {"depth": BLOCKS, "width": WIDTH, "skip": "identity", **branch}
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 64,
        "probe": "path_length",
    }


def shares(record: Record) -> tuple[Array, Array]:
    """Of each block but the first, the share of its squared gradient that came by the branch."""
    _, norms = layers(record, "blocks", "skip_grad_norm")
    return np.arange(2.0, len(norms) + 1), 1 - (norms[1:] / norms[:-1]) ** 2


FINDING = Finding(
    source="Veit et al. 2016, arXiv 1605.06431",
    chapter="skips",
    specs={arm: spec(branch) for arm, branch in BRANCHES.items()},
    comparisons=tuple(
        Comparison(
            f"mean path length, {arm}",
            (arm,),
            single_reading("path_length"),
            about(theory.mean_path_length(profile.growth), 0.12),
            unit="branches",
        )
        for arm, profile in PROFILES.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(arm, arm, shares, at_places(1 - 1 / profile.growth))
            for arm, profile in PROFILES.items()
        ),
        x="block, counted from the input",
        y="share of the squared gradient that comes through the branch",
        log=False,
        note="The mean path length is the sum of the shares over all blocks.",
    ),
    notes="At initialisation, without scale or normalisation, the gradient does come through paths "
    "of half the depth, as many as there are: short paths carry it only where branches are small.",
)
