"""PyTorch's default U(±1/√n) divides the gradient's square by 6 a ReLU layer, by 3 a tanh layer.

Source: Glorot & Bengio 2010 (AISTATS, "Understanding the difficulty of training deep feedforward
neural networks"), §4.2.1: their "standard" initialisation, with n·Var W = 1/3, is what
`torch.nn.Linear` does by default.

Measured: ρ, the squared growth per layer toward the input of the gradient with respect to the
pre-activations, from the slope of its logarithm over the interior layers (four left out at each
end), one forward and one backward pass from a random linear readout.

Deviations: square fully connected layers of width 512, Gaussian inputs and 39 hidden layers in
place of the paper's five on images; ReLU beside its tanh; biases are drawn like the weights, as
PyTorch does, where the paper has zeros.

Cost: 20 runs at initialisation, 6 s.
"""

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import along, at_places, growth

DEPTH, WIDTH = 40, 512
ACTIVATIONS = ("relu", "tanh")
NETWORK = {
    "network": "mlp",
    "depth": DEPTH,
    "width": WIDTH,
    "norm": "none",
    "skip": False,
    "init": "pytorch",
    "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
    "batch_size": 32,
    "probe": "propagation",
}
SIGMAS = theory.sigmas("pytorch", "relu", width=WIDTH)


def profile(activation: str) -> theory.Profile:
    """Of the hidden layers; the readout is one more."""
    return theory.plain_profile(DEPTH - 1, activation, **SIGMAS._asdict())


FINDING = Finding(
    source="Glorot & Bengio 2010, AISTATS, §4.2.1",
    chapter="vanishing",
    specs={name: {**NETWORK, "activation": name} for name in ACTIVATIONS},
    comparisons=tuple(
        Comparison(
            f"ρ, {name}",
            (name,),
            growth(),
            # tanh is linear in the small signals that deep layers have: σ_w² itself.
            about(theory.chi(name, 0.0, sigma_w2=SIGMAS.sigma_w2), 0.03),
            ratio=True,
            unit="ρ",
        )
        for name in ACTIVATIONS
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(name, name, along(), at_places(profile(name).gradient), scaled=True)
            for name in ACTIVATIONS
        ),
        x="layer, counted from the input",
        y="squared norm of the pre-activations' gradient",
    ),
    notes="After a few layers the signal is that of the biases: all inputs look alike, and the "
    "gradient goes on shrinking by the same factor.",
)
