"""A deep net's Jacobian has widely spread singular values; orthogonal weights spread them less.

Source: Pennington et al. 2017 (arXiv 1711.04735) and 2018 (arXiv 1802.09979): the variance of the
squared singular values s² grows in proportion to depth, and less by L with orthogonal weights.

Measured: Var(s²)/mean(s²)² over the singular values s of the input-output Jacobian at one input, in
training mode. Theory for L layers: linear, Gaussian L and orthogonal 0; ReLU, Gaussian 2L and
orthogonal L.

Deviations: L = 10 layers of width 400, each with its activation after it, Gaussian inputs.

Cost: 40 runs at initialisation, 5 s.
"""

from typing import Any

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, exactly
from gradflow.measures import Array, Record, readings, single_reading

DEPTH, WIDTH = 10, 400
INITS = {"linear": {"Gaussian": "lecun", "orthogonal": "orthogonal"},
         "relu": {"Gaussian": "he", "orthogonal": "orthogonal"}}  # fmt: skip
ARMS = {f"{phi}, {kind}": (phi, kind) for phi, kinds in INITS.items() for kind in kinds}


def spec(activation: str, kind: str) -> dict[str, Any]:
    args = {
        "depth": DEPTH,
        "width": WIDTH,
        "activation": activation,
        "init": INITS[activation][kind],
    }
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "depth": DEPTH,
        "skip": False,
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": 1,
        "probe": "jacobian",
    }


def compare(arm: str) -> Comparison:
    activation, kind = ARMS[arm]
    name, measure = f"Var s²/mean², {arm}", single_reading("jacobian_spectrum_variance", 0.0)
    if arm == "linear, orthogonal":
        return Comparison(name, (arm,), measure, exactly(0.0, 1e-10))
    expected = theory.jacobian_variance(activation, DEPTH, orthogonal=kind == "orthogonal")
    return Comparison(name, (arm,), measure, about(expected, 0.15), ratio=True)


def spectrum(record: Record) -> tuple[Array, Array]:
    """The largest quarter: a deep ReLU network's smallest are rounding."""
    _, index, values = readings(record, "jacobian_squared_singular_value")
    return index[: WIDTH // 4] + 1, values[: WIDTH // 4]


FINDING = Finding(
    source="Pennington et al. 2017, arXiv 1711.04735; 2018, arXiv 1802.09979",
    chapter="initialisation",
    specs={arm: spec(*parts) for arm, parts in ARMS.items()},
    comparisons=tuple(compare(arm) for arm in ARMS),
    recorded="reproduced",
    figure=Figure(
        tuple(Curve(arm, arm, spectrum) for arm in ARMS),
        x="singular value, the largest first",
        y="squared singular value of the Jacobian",
    ),
)
