"""The depth at which gradients are all zero, or overflow, follows from rate and number format.

Source: Micikevicius et al. 2018 (arXiv 1710.03740), §3, on gradients that become zero in fp16.

Measured: the least depth at which no element of the gradient of a random linear readout, with
respect to the first layer's output, differs from zero; with weights of twice He's variance the
least depth at which an element of an output or of that gradient is not finite. Theory is where the
largest element of a Gaussian gradient of the expected size leaves the format, or of a Gaussian
output; for ReLU the size is the typical network's, exp(−5/(2·width)) a layer below the mean (Hanin
& Rolnick 2018, arXiv 1803.01719).

Deviations: no training and no loss scaling; fully connected layers of width 64, a batch of 32,
Gaussian inputs, and all numbers in the format.

Cost: 120 runs at initialisation, 40 s.
"""

import math
from functools import partial
from typing import Any

import numpy as np

from gradflow import schema, theory
from gradflow.findings import Comparison, Curve, Figure, Finding, about
from gradflow.measures import (
    Array,
    Imagined,
    Measure,
    Record,
    imagined_readings,
    reading,
)

WIDTH, BATCH = 64, 32
FORMATS = ("fp16", "bf16", "fp32")
NETWORKS: dict[str, dict[str, Any]] = {
    "ReLU, Xavier": {"activation": "relu", "init": "xavier"},
    "ReLU, PyTorch's default": {"activation": "relu", "init": "pytorch"},
    "sigmoid, Xavier": {"activation": "sigmoid", "init": "xavier"},
    "ReLU, twice He's variance": {
        "activation": "relu",
        "init": "gaussian",
        "sigma_w": 2.0,
        "sigma_b": 0.0,
    },
}
ALL_ZERO = "first_all_zero_gradient"
OVERFLOWS = ("first_overflow", "first_overflow_gradient")


def growth(network: str) -> float:
    """ρ of a typical network of this width, squared per layer."""
    keys = NETWORKS[network]
    activation = keys["activation"]
    sigma_w2, sigma_b2 = theory.sigmas(width=WIDTH, **keys)
    profile = theory.plain_profile(20, activation, sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    lost = theory.log_length_variance([WIDTH]) / 2 if activation == "relu" else 0.0
    return float(profile.growth[-1]) * math.exp(-lost)


def expected(network: str, number_format: str) -> float:
    """A depth: one layer, and those that what grows or shrinks passes from there on.

    What shrinks is the gradient, from a readout of unit variance on. What grows to the end of the
    format first is the outputs: the first layer's have the mean square σ_w² already.
    """
    rms = NETWORKS[network].get("sigma_w", 1.0)
    elements = WIDTH * BATCH
    return 1 + theory.underflow_depth(growth(network), number_format, rms=rms, elements=elements)


def spec(network: str, number_format: str) -> dict[str, Any]:
    """Layers enough for depths a third above theory's."""
    layers = math.ceil(4 / 3 * expected(network, number_format)) + 4
    args = {"depth": layers, "width": WIDTH, **NETWORKS[network]}
    return {
        "network": {"target": "gradflow.networks.chain", "args": args},
        "depth": layers,
        "skip": False,
        "data": {"name": "gaussian", "channels": WIDTH, "size": 1},
        "batch_size": BATCH,
        "record": "none",
        "probe": {"name": "underflow", "format": number_format},
    }


def least_depth(record: Record, *probes: str) -> float:
    """The least of some readings; the chain's own depth, a third above theory's, where none is
    reached in it."""
    found = [reading(record, name) for name in probes]
    modules = record.table("modules")
    if np.isnan(found).all() and modules is not None:
        return float(modules["kind"].to_pylist().count("linear"))
    return float(np.nanmin(found))


def first_overflow(record: Record) -> float:
    return least_depth(record, *OVERFLOWS)


def first_zero(record: Record) -> float:
    return least_depth(record, ALL_ZERO)


def imagined_overflow(depth: float) -> tuple[Imagined, ...]:
    """Of the outputs; the gradient's was not looked for."""
    parts = [imagined_readings(OVERFLOWS[0], [depth]), imagined_readings(OVERFLOWS[1], [math.nan])]
    tables = [part.tables["probes"] for part in parts]
    return (Imagined({"probes": schema.concatenate(tables)}),)


def depth(network: str) -> Measure:
    if growth(network) > 1:
        return Measure(first_overflow, imagined_overflow)
    return Measure(first_zero, lambda depth: (imagined_readings(ALL_ZERO, [depth]),))


def compare(network: str, number_format: str) -> Comparison:
    return Comparison(
        f"{network}, {number_format}",
        (f"{network}, {number_format}",),
        depth(network),
        about(expected(network, number_format), 0.15),
        ratio=True,
        unit="layers",
        slow=expected(network, number_format) > 80,
    )


def reach(network: str, number_format: str) -> float:
    """Powers of two from 1 to the format's smallest number, or to its largest."""
    smallest, largest = theory.FORMATS[number_format]
    return math.log2(largest) if growth(network) > 1 else -math.log2(smallest)


def depths(network: str, *records: Record) -> tuple[Array, Array]:
    """Over the formats."""
    effect = depth(network).effect
    ends = np.array([reach(network, name) for name in FORMATS])
    return ends, np.array([effect(record) for record in records])


def expected_depths(network: str, _: Array) -> Array:
    return np.array([expected(network, name) for name in FORMATS])


PAIRS = [(network, number_format) for network in NETWORKS for number_format in FORMATS]

FINDING = Finding(
    source="Micikevicius et al. 2018, arXiv 1710.03740, §3",
    chapter="vanishing",
    specs={f"{network}, {name}": spec(network, name) for network, name in PAIRS},
    comparisons=tuple(compare(network, name) for network, name in PAIRS),
    recorded="reproduced",
    figure=Figure(
        tuple(
            Curve(
                network,
                tuple(f"{network}, {name}" for name in FORMATS),
                partial(depths, network),
                partial(expected_depths, network),
            )
            for network in NETWORKS
        ),
        x="powers of two from 1 to the end of the format: fp16, bf16, fp32",
        y="depth at which the gradient is all zero, or overflows",
        log=False,
    ),
    notes="Some CPUs' bf16 dot products (AVX-512 BF16) take subnormal numbers for zero: there the "
    "format ends at 2⁻¹²⁶ in place of 2⁻¹³³, and gradients are all zero 5 to 6 % earlier than "
    "theory says, inside of the regions.",
)
