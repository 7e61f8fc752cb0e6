"""Delta-orthogonal kernels keep norms through 200 linear convolutions exactly; tanh lets them fall.

Source: Xiao et al. 2018 (arXiv 1806.05393), algorithm 2: dynamical isometry of deep convolutional
networks.

Measured: the root mean square of the last convolution's output over that of the first, and the norm
of the gradient with respect to the first one's output over that with respect to the last one's; not
squared. Linear: 1 to the rounding of float64. Tanh: the square root of the length map's ratio, for
inputs of mean square q₀; the smaller they are, the longer tanh is linear.

Deviations: 200 convolutions of 3×3 with circular padding on 8×8 Gaussian inputs, of 16 channels,
and of 32 with tanh, where theory is for many. The paper trains 10,000 layers.

Cost: 30 runs at initialisation, 20 s.
"""

from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, exactly
from gradflow.measures import (
    Imagined,
    Measure,
    Record,
    along,
    at_places,
    end_ratio,
    hidden,
    imagined_layers,
)

CHAIN = "gradflow.networks.conv_chain"
DEPTH = 200
LENGTHS = {"tanh, q₀ = 1": 1.0, "tanh, q₀ = 0.0025": 0.0025}


def spec(channels: int, **args: Any) -> dict[str, Any]:
    return {
        "network": {"target": CHAIN, "args": {"depth": DEPTH, "channels": channels, **args}},
        "depth": DEPTH,
        "skip": False,
        "data": {"name": "gaussian", "channels": channels, "size": 8},
        "batch_size": 8,
        "probe": "propagation",
    }


def kept(record: Record) -> float:
    values = hidden(record, "output_rms", kind="conv")
    return float(values[-1] / values[0])


def imagined(ratio: float) -> tuple[Imagined, ...]:
    return (imagined_layers("output_rms", [1.0, ratio], kind="conv"),)


KEPT = Measure(kept, imagined)


def root_lengths(q0: float) -> Any:
    return theory.plain_profile(DEPTH, "tanh", sigma_w2=1.0, q0=q0).length ** 0.5


def compare(arm: str) -> Comparison:
    values = root_lengths(LENGTHS[arm])
    region = about(float(values[-1] / values[0]), 0.10)
    return Comparison(f"RMS, last over first, {arm}", (arm,), KEPT, region, ratio=True)


FINDING = Finding(
    source="Xiao et al. 2018, arXiv 1806.05393",
    chapter="initialisation",
    specs={
        "linear": {
            **spec(16, dtype="float64"),
            "precision": "fp64",
        },
        **{arm: spec(32, activation="tanh", scale=q0**0.5) for arm, q0 in LENGTHS.items()},
    },
    comparisons=(
        Comparison(
            "RMS, last over first, linear",
            ("linear",),
            KEPT,
            exactly(1.0, 1e-12),
        ),
        Comparison(
            "gradient's norm, first over last, linear",
            ("linear",),
            end_ratio(kind="conv"),
            exactly(1.0, 1e-12),
        ),
        *(compare(arm) for arm in LENGTHS),
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(arm, arm, along("output_rms", kind="conv", power=1), at_places(root_lengths(q0)))
            for arm, q0 in LENGTHS.items()
        ),
        x="layer, counted from the input",
        y="root mean square of the convolution's output",
    ),
)
