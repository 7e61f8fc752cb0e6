"""After training, layer responses are smaller in residual networks, and smaller still in deeper.

Source: He et al. 2015 (arXiv 1512.03385), §4.2 "Analysis of Layer Responses" and figure 7.

Measured: root mean square of what every two-layer branch puts out, after its last batch
normalisation and before addition and activation, on a training batch at the last recorded step; the
geometric mean over the branches, as the ratio of two networks of one seed. In plain networks it is
the output of every other layer, at the same places. Only the sign is predicted.

Deviations: root mean square in place of the standard deviation, and every second of the paper's
layers; 8×8 digits and 264 updates in place of CIFAR-10 and 64,000. Normalisation makes all
responses 1 at the start, and so few updates move most of them by less than a percent.

Cost: 20 runs trained, 4 minutes on one core; `degradation` has all of them too.
"""

import numpy as np

from gradflow.errors import GradflowError
from gradflow.findings import TRAINED_SEEDS, Comparison, Curve, Figure, Finding, below
from gradflow.measures import Array, Imagined, Measure, Record, imagined_layers, layers

DEPTHS = (20, 56)
NAMES = {"plain": False, "residual": True}


def responses(record: Record) -> Array:
    """Of each branch, from the input on, at the last step at which blocks were recorded."""
    blocks = record.table("blocks")
    if blocks is None:
        raise GradflowError("blocks: none were recorded")
    return layers(record, "blocks", "branch_rms", step=max(blocks["step"].to_pylist()))[1]


def response_ratio() -> Measure:
    """Geometric mean of the responses of the first arm over that of the second."""

    def effect(one: Record, other: Record) -> float:
        logs = [float(np.log(responses(record)).mean()) for record in (one, other)]
        return float(np.exp(logs[0] - logs[1]))

    def imagine(ratio: float) -> tuple[Imagined, ...]:
        one, other = (
            imagined_layers("branch_rms", [value] * 12, kind="block", step=260)
            for value in (ratio, 1.0)
        )
        return one, other

    return Measure(effect, imagine)


def by_branch(record: Record) -> tuple[Array, Array]:
    """Responses by place, from 0 at the first branch to 1 at the last."""
    values = responses(record)
    return np.linspace(0, 1, len(values)), values


def ratio(one: str, other: str) -> Comparison:
    return Comparison(
        f"response, {one} / {other}", (one, other), response_ratio(), below(1.0), ratio=True
    )


FINDING = Finding(
    source="He et al. 2015, arXiv 1512.03385, figure 7",
    chapter="skips",
    specs={
        f"{name} {depth}": {"depth": depth, "skip": skip}
        for name, skip in NAMES.items()
        for depth in DEPTHS
    },
    comparisons=(
        ratio("residual 20", "plain 20"),
        ratio("residual 56", "plain 56"),
        ratio("residual 56", "residual 20"),
    ),
    recorded="reproduced",
    seeds=TRAINED_SEEDS,
    figure=Figure(
        tuple(
            Curve(f"{name} {depth}", f"{name} {depth}", by_branch)
            for depth in DEPTHS
            for name in NAMES
        ),
        x="place of the branch, 0 the first and 1 the last",
        y="root mean square of the branch's output",
        log=False,
    ),
    notes="The effect is small after so few updates. At a peak rate of .1, with the median over "
    "the branches, the same seeds leave both comparisons of depth 56 undecided: [.90, 1.03] with "
    "plain networks, [.92, 1.05] with depth 20.",
)
