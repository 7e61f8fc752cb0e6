"""ReLU: He's initialisation keeps the gradient at any depth, Xavier's halves its square a layer.

Source: He et al. 2015b (arXiv 1502.01852), §2.2, eq. 10 and 14.

Measured: ρ, the squared growth per layer toward the input of the gradient with respect to the
pre-activations, from the slope of its logarithm over the interior layers (four left out at each
end), one forward and one backward pass from a random linear readout.

Deviations: square fully connected layers of width 512 and Gaussian inputs in place of the paper's
convolutional networks on ImageNet.

Cost: 20 runs at initialisation, 10 s.
"""

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about, exponential
from gradflow.measures import along, growth

NETWORK = {
    "network": "mlp",
    "depth": 40,
    "width": 512,
    "norm": "none",
    "skip": False,
    "data": {"name": "gaussian", "channels": 512, "size": 1},
    "batch_size": 64,
    "probe": "propagation",
}
RATES = {
    "he": theory.chi("relu", 1.0, sigma_w2=2.0),
    "xavier": theory.chi("relu", 1.0, sigma_w2=1.0),
}

FINDING = Finding(
    source="He et al. 2015b, arXiv 1502.01852, §2.2",
    chapter="initialisation",
    specs={init: {**NETWORK, "init": init} for init in RATES},
    comparisons=tuple(
        Comparison(f"ρ, {init}", (init,), growth(), about(rate, 0.03), ratio=True, unit="ρ")
        for init, rate in RATES.items()
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(init, init, along(), exponential(rate), scaled=True)
            for init, rate in RATES.items()
        ),
        x="layer, counted from the input",
        y="squared norm of the pre-activations' gradient",
    ),
)
