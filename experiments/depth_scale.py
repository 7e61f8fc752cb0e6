"""In the ordered phase a network is trainable to about six depth scales ξ, and not much beyond.

Source: Schoenholz et al. 2017 (arXiv 1611.01232), §4 and figure 5: 6ξ, ξ = −1/ln χ₁.

Measured: accuracy over the whole training split in evaluation mode after 120 updates, of tanh
networks with σ_w² = 1, σ_b² = .05, where 6ξ = 21.8 layers; depths 8 and 20, below that, and 40 and
80, about twice and four times as much. Trainable is 90 %, not trainable is less than half of the
way from chance to all.

Deviations: width 256 and 8×8 digits in place of 300 and MNIST, SGD with momentum and a one-cycle
schedule with a peak rate of .02.

Cost: 40 runs trained, 2 minutes on one core (1 s at depth 8, 7 s at 80).
"""

import math

from gradflow import theory
from gradflow.findings import Comparison, Curve, Figure, Finding, above, below
from gradflow.measures import metric, over_arms

SIGMA_W2, SIGMA_B2 = 1.0, 0.05
TRAINABLE, UNTRAINABLE = (8, 20), (40, 80)
DEPTHS = (*TRAINABLE, *UNTRAINABLE)
REACH = 6 * theory.depth_scale("tanh", sigma_w2=SIGMA_W2, sigma_b2=SIGMA_B2)

ARMS = {depth: f"depth {depth}" for depth in DEPTHS}

FINDING = Finding(
    source="Schoenholz et al. 2017, arXiv 1611.01232, §4",
    chapter="vanishing",
    specs={
        name: {
            "network": "mlp",
            "depth": depth,
            "norm": "none",
            "skip": False,
            "activation": "tanh",
            "init": "gaussian",
            "sigma_w": math.sqrt(SIGMA_W2),
            "sigma_b": math.sqrt(SIGMA_B2),
            "max_steps": 120,
        }
        for depth, name in ARMS.items()
    },
    comparisons=tuple(
        Comparison(
            ARMS[depth],
            (ARMS[depth],),
            metric(),
            above(0.9) if depth < REACH else below(0.55),
            unit="accuracy",
            slow=depth == max(DEPTHS),
        )
        for depth in DEPTHS
    ),
    recorded="reproduced",
    figure=Figure(
        (Curve("σ_w² = 1, σ_b² = .05", tuple(ARMS.values()), over_arms(DEPTHS)),),
        x="depth",
        y="training accuracy after 120 updates",
        log=False,
        note=f"6ξ = {REACH:.1f} layers.",
    ),
    notes="The number 6 is the paper's observation, not a closed form: it moves with the updates.",
)
