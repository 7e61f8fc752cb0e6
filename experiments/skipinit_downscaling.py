"""Batch norm at the end of the branch: variance grows as l + 1, and block l adds 1/(l + 1) of it.

Source: De & Smith 2020 (arXiv 2002.10444): batch normalisation downscales the residual branch,
and so biases deep residual networks to the identity.

Measured: the batch variance of what comes out of block l, averaged over units: its slope over the
blocks, by least squares; and the squared branch's share of the squared output, times l + 1,
averaged over blocks. One forward pass in training mode.

Deviations: 60 fully connected blocks x + BN(W₂φ(W₁x)) of width 256, φ ReLU, Gaussian inputs of
unit variance. Branches without normalisation double the variance: see resblock_growth.

Cost: 10 runs at initialisation, 5 s.
"""

import numpy as np

from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import (
    Imagined,
    Measure,
    Record,
    along_blocks,
    at_blocks,
    hidden,
    imagined_blocks,
    imagined_layers,
)

BLOCKS, WIDTH = 60, 256
VARIANCE = "batch_variance"


def slope(record: Record) -> float:
    values = at_blocks(record, VARIANCE)
    return float(np.polyfit(np.arange(1.0, len(values) + 1), values, 1)[0])


def share(record: Record) -> float:
    """Of the branch in its block's output, squared, times l + 1."""
    branch, stream = (
        hidden(record, name, kind="block") ** 2 for name in ("branch_rms", "skip_rms")
    )
    return float(np.mean(branch / (branch + stream) * np.arange(2.0, len(branch) + 2)))


def imagined_share(value: float) -> tuple[Imagined, ...]:
    """With shares of value/(l + 1)."""
    shares = value / np.arange(2.0, 14.0)
    streams = imagined_layers("skip_rms", np.sqrt(1 - shares), kind="block", shape="")
    blocks = streams.tables["blocks"].append_column("branch_rms", [np.sqrt(shares)])
    return (Imagined({**streams.tables, "blocks": blocks}),)


FINDING = Finding(
    source="De & Smith 2020, arXiv 2002.10444",
    chapter="normalisation",
    specs={
        "normalised branch": {
            "network": {
                "target": "gradflow.networks.chain",
                "args": {
                    "depth": BLOCKS,
                    "width": WIDTH,
                    "branch": "linear act linear norm",
                    "norm": "batch",
                    "skip": "identity",
                },
            },
            "depth": BLOCKS,
            "skip": True,
            "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
            "batch_size": 128,
            "probe": "propagation",
        }
    },
    comparisons=(
        Comparison(
            "variance a block adds",
            ("normalised branch",),
            Measure(slope, lambda v: (imagined_blocks(VARIANCE, list(v * np.arange(2.0, 14))),)),
            about(1.0, 0.03),
            unit="variance",
        ),
        Comparison(
            "share of block l, times l + 1",
            ("normalised branch",),
            Measure(share, imagined_share),
            about(1.0, 0.03),
        ),
    ),
    recorded="reproduced",
    figure=Figure(
        (
            Curve(
                "normalised branch",
                "normalised branch",
                along_blocks(VARIANCE),
                lambda block: block + 1,
            ),
        ),
        x="block, counted from the input",
        y="batch variance of the block's output",
        log=False,
    ),
)
