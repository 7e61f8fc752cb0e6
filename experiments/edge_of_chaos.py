"""Gradients shrink or grow by χ₁(σ_w, σ_b) a layer: vanishing in order, exploding in chaos.

Source: Poole et al. 2016 (arXiv 1606.05340) and Schoenholz et al. 2017 (arXiv 1611.01232):
χ₁ = σ_w² E[φ'(√q* z)²], 1 on the edge between the phases.

Measured: ρ, the squared growth per layer toward the input of the gradient with respect to the
pre-activations, from the slope of its logarithm over the interior layers (eight left out at each
end, in which lengths come to their fixed point q*), one forward and one backward pass from a random
linear readout. The figure has theory layer by layer, at each layer's own length.

Deviations: 49 hidden tanh layers of width 256 with σ_b² = 0.05 and Gaussian inputs, at four
values of σ_w², where the papers have phase diagrams and images.

Cost: 40 runs at initialisation, 6 s.
"""

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import along, at_places, growth

DEPTH, WIDTH, SIGMA_B2 = 50, 256, 0.05
CRITICAL = theory.critical_sigma_w2("tanh", SIGMA_B2).sigma_w2
ARMS = {
    "ordered, σ_w² = 1": 1.0,
    "ordered, σ_w² = 1.5": 1.5,
    f"edge, σ_w² = {CRITICAL:.3f}": CRITICAL,
    "chaotic, σ_w² = 2.5": 2.5,
}
NETWORK = {
    "network": "mlp",
    "depth": DEPTH,
    "width": WIDTH,
    "norm": "none",
    "skip": False,
    "activation": "tanh",
    "init": "gaussian",
    "sigma_b": SIGMA_B2**0.5,
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": 32,
    "probe": "propagation",
}


def chi_1(sigma_w2: float) -> float:
    """At the fixed point of the length."""
    q = theory.length_fixed_point("tanh", sigma_w2=sigma_w2, sigma_b2=SIGMA_B2)
    return theory.chi("tanh", q, sigma_w2=sigma_w2)


def profile(sigma_w2: float) -> theory.Profile:
    """Of the hidden layers, from inputs of unit mean square on."""
    return theory.plain_profile(DEPTH - 1, "tanh", sigma_w2=sigma_w2, sigma_b2=SIGMA_B2)


FINDING = Finding(
    source="Poole et al. 2016, arXiv 1606.05340; Schoenholz et al. 2017, arXiv 1611.01232",
    chapter="initialisation",
    specs={arm: {**NETWORK, "sigma_w": sigma_w2**0.5} for arm, sigma_w2 in ARMS.items()},
    comparisons=tuple(
        Comparison(
            f"ρ, {arm}", (arm,), growth(trim=8), about(chi_1(sigma_w2), 0.03), ratio=True, unit="ρ"
        )
        for arm, sigma_w2 in ARMS.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(arm, arm, along(), at_places(profile(sigma_w2).gradient), scaled=True)
            for arm, sigma_w2 in ARMS.items()
        ),
        x="layer, counted from the input",
        y="squared norm of the pre-activations' gradient",
    ),
)
