"""ln ‖output‖² of a ReLU net has a variance of Σ 5/width over initialisations: depth over width.

Source: Hanin & Rolnick 2018 (arXiv 1803.01719), on the spread of activation lengths, and Hanin 2018
(arXiv 1801.03744), on that of gradients: both grow with Σ 1/n_l, depth over width.

Measured: ln(‖x_L‖²/‖x_0‖²) of 250 or 400 networks a run, at one input: its variance, and the
exponential of its median, which is the ratio's. (The ratio's mean is 1, and comes from networks too
rare to be seen.)

Deviations: layers of equal width 100, He initialisation, a Gaussian input; theory is the leading
order in 1/n, with which the logarithm is Gaussian of mean −variance/2.

Cost: 20 runs at initialisation, of 250 or 400 networks each, 45 s.
"""

from functools import partial
from typing import Any

import numpy as np
from scipy.special import ndtri

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import Array, Imagined, Measure, Record, imagined_readings, readings

WIDTH = 100
NETWORKS = {5: 400, 20: 250}
"""Depth -> networks a run."""
DEPTHS = {f"L = {depth}": depth for depth in NETWORKS}
PROBE = "log_length_ratio"
STANDARD = np.random.default_rng(0).standard_normal(250)


def spec(depth: int) -> dict[str, Any]:
    return {
        "network": {
            "target": "gradflow.networks.chain",
            "args": {"depth": depth, "width": WIDTH},
        },
        "depth": depth,
        "skip": False,
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "probe": {"name": "length_ratio", "networks": NETWORKS[depth]},
    }


def logs(record: Record) -> Array:
    return readings(record, PROBE)[2]


def imagined(shift: float, scale: float) -> tuple[Imagined, ...]:
    """Logarithms with that median and standard deviation."""
    numbers = STANDARD - np.median(STANDARD)
    return (imagined_readings(PROBE, list(shift + scale * numbers / STANDARD.std(ddof=1))),)


VARIANCE = Measure(
    lambda record: float(logs(record).var(ddof=1)), lambda value: imagined(0.0, value**0.5)
)
MEDIAN = Measure(
    lambda record: float(np.exp(np.median(logs(record)))),
    lambda value: imagined(float(np.log(value)), 1.0),
)


def variance(arm: str) -> float:
    return theory.log_length_variance([WIDTH] * DEPTHS[arm])


def quantiles(record: Record) -> tuple[Array, Array]:
    """Of the standard normal, and of the logarithms."""
    shares = np.linspace(0.02, 0.98, 49)
    return ndtri(shares), np.quantile(logs(record), shares)


def normal(variance: float, z: Array) -> Array:
    return -variance / 2 + variance**0.5 * z


FINDING = Finding(
    source="Hanin & Rolnick 2018, arXiv 1803.01719; Hanin 2018, arXiv 1801.03744",
    chapter="initialisation",
    specs={arm: spec(depth) for arm, depth in DEPTHS.items()},
    comparisons=(
        *(
            Comparison(
                f"variance of the logarithm, {arm}",
                (arm,),
                VARIANCE,
                about(variance(arm), 0.20),
                ratio=True,
            )
            for arm in DEPTHS
        ),
        Comparison(
            "median of the ratio, L = 20",
            ("L = 20",),
            MEDIAN,
            about(float(np.exp(-variance("L = 20") / 2)), 0.15),
            ratio=True,
        ),
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(Curve(arm, arm, quantiles, partial(normal, variance(arm))) for arm in DEPTHS),
        x="quantile of the standard normal distribution",
        y="quantile of ln(‖x_L‖²/‖x_0‖²) over networks",
        log=False,
    ),
)
