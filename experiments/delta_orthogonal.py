"""Delta-orthogonal kernels keep norms through 200 linear convolutions exactly; tanh lets them fall.

Source: Xiao et al. 2018 (arXiv 1806.05393), §3.1 and algorithm 2: dynamical isometry of convolutional
networks.

Measured: the root mean square of the last convolution's output over that of the first, and the norm
of the gradient with respect to the first one's output over that with respect to the last one's; not
squared. Linear: 1 to the rounding of float64. Tanh: the square root of the length map's ratio, for
inputs of mean square q₀; the smaller they are, the longer tanh is linear.

Deviations: 200 convolutions of 3×3 with circular padding on 8×8 Gaussian inputs, 16 channels, and 32
with tanh, where theory is for many. The paper trains 10,000 layers.

Cost: 30 runs at initialisation, 30 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, exactly
from gradflow.measures import Imagined, Measure, Record, along, at_places, end_ratio, hidden
from gradflow.measures import imagined_layers

if TYPE_CHECKING:
    from torch import nn

DEPTH = 200
LENGTHS = {"tanh, q₀ = 1": 1.0, "tanh, q₀ = 0.0025": 0.0025}


def scaled(scale: float, **options: Any) -> nn.Module:
    """A chain of convolutions whose input is multiplied by `scale`."""
    from torch import Tensor, nn

    from gradflow.networks import conv_chain

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = conv_chain(**options)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.chain(scale * x)
            return y

    return Scaled()


def spec(channels: int, target: str, **args: Any) -> dict[str, Any]:
    return {
        "network": {"target": target, "args": {"depth": DEPTH, "channels": channels, **args}},
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


def root_lengths(q0: float) -> Any:
    return theory.plain_profile(DEPTH, "tanh", sigma_w2=1.0, q0=q0).length ** 0.5


def compare(arm: str) -> Comparison:
    values = root_lengths(LENGTHS[arm])
    region = about(float(values[-1] / values[0]), 0.10)
    return Comparison(f"RMS, last over first, {arm}", (arm,), Measure(kept, imagined), region, ratio=True)


FINDING = Finding(
    source="Xiao et al. 2018, arXiv 1806.05393, §3.1",
    chapter="initialisation",
    specs={
        "linear": {
            **spec(16, "gradflow.networks.conv_chain", dtype="float64"),
            "precision": "fp64",
        },
        **{
            arm: spec(32, "experiments.delta_orthogonal.scaled", activation="tanh", scale=q0**0.5)
            for arm, q0 in LENGTHS.items()
        },
    },
    comparisons=(
        Comparison(
            "RMS, last over first, linear", ("linear",), Measure(kept, imagined), exactly(1.0, 1e-12)
        ),
        Comparison(
            "gradient's norm, first over last, linear",
            ("linear",),
            end_ratio(kind="conv"),
            exactly(1.0, 1e-12),
        ),
        *(compare(arm) for arm in LENGTHS),
    ),
    recorded="not run",
    figure=Figure(
        tuple(
            Curve(arm, arm, along("output_rms", kind="conv", power=1), at_places(root_lengths(q0)))
            for arm, q0 in LENGTHS.items()
        ),
        x="layer, counted from the input",
        y="root mean square of the convolution's output",
    ),
)
