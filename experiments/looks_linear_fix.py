"""Mirrored activations with orthogonal maps start a plain ReLU net linear: deep ones then train.

Source: Balduzzi et al. 2017 (arXiv 1702.08591), §4, the "looks linear" initialisation; concatenated
ReLUs are of Shang et al. 2016 (arXiv 1603.05201).

Measured: at initialisation the root mean square of the pre-activations, and the norm of the
gradient with respect to them, of the first hidden layer over that of the last, in double precision,
one forward and one backward pass from a random linear readout; and accuracy over the whole training
split in evaluation mode after 100 updates, beside a He-initialised ReLU network at the best of four
learning rates.

Deviations: fully connected networks of width 256 without normalisation on 8×8 digits, 200 layers
where nothing is trained and 52 where it is, at one rate. The mirrored network has twice the
weights of the ReLU network.

Cost: 60 runs, 50 of them trained; 4 minutes on one core, of which the 40 runs of the ReLU network,
3 minutes, are those of `degradation_without_vanishing`.
"""

from typing import Any

from gradflow.findings import Comparison, Curve, Figure, Finding, above, exactly
from gradflow.measures import best_difference, end_ratio, metric, running_accuracy

NETWORK: dict[str, Any] = {"network": "mlp", "norm": "none", "skip": False}
MIRRORED = {**NETWORK, "activation": "crelu", "init": "looks_linear"}
HE: dict[str, dict[str, Any]] = {
    f"He, rate {rate:g}": {**NETWORK, "depth": 52, "init": "he", "max_steps": 100, "lr": rate}
    for rate in (0.0005, 0.002, 0.005, 0.02)
}
AT_START, TRAINED = "looks linear, 200 layers", "looks linear"
ROUNDING = 1e-12

FINDING = Finding(
    source="Balduzzi et al. 2017, arXiv 1702.08591, §4",
    chapter="initialisation",
    specs={
        AT_START: {**MIRRORED, "depth": 200, "precision": "fp64", "probe": "propagation"},
        TRAINED: {**MIRRORED, "depth": 52, "max_steps": 100, "lr": 0.005},
        **HE,
    },
    comparisons=(
        *(
            Comparison(
                f"{what} at the first hidden layer / at the last, of 200",
                (AT_START,),
                end_ratio(quantity),
                exactly(1.0, ROUNDING),
                unit="norm",
            )
            for what, quantity in (("length", "output_rms"), ("gradient", "output_grad_norm"))
        ),
        Comparison(TRAINED, (TRAINED,), metric(), above(0.9), unit="accuracy"),
        Comparison(
            f"{TRAINED} − He at its best rate",
            (TRAINED, *HE),
            best_difference(1, len(HE)),
            above(0.2),
            unit="accuracy",
        ),
    ),
    recorded="reproduced",
    figure=Figure(
        tuple(Curve(name, name, running_accuracy) for name in (TRAINED, *HE)),
        x="update",
        y="accuracy of the last ten training batches",
        log=False,
    ),
)
