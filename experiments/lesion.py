"""Deleting one block of a trained residual net costs little accuracy, of a plain net nearly all.

Source: Veit et al. 2016 (arXiv 1605.06431), §4.1 and figure 3; §4.2 for several blocks and swaps.

Measured: accuracy over the whole training split in evaluation mode, intact minus with one block's
branch replaced by what the skip is given, mean over the ten blocks that keep the shape, which are
those that a plain network can lose; the same of the residual network with three blocks deleted, and
with two that have exchanged their parameters, means over random draws.

Deviations: 26 layers, 12 blocks, on 8×8 digits in place of 110 layers on CIFAR-10; training
accuracy in place of test error.

Cost: 10 runs trained, 2 minutes on one core (10 s each, and 8 s the lesions).
"""

import numpy as np

from gradflow import schema
from gradflow.findings import (
    TRAINED_SEEDS,
    Comparison,
    Curve,
    Figure,
    Finding,
    Region,
    above,
    below,
)
from gradflow.measures import Array, Imagined, Measure, Record, imagined_readings, reading, readings

BLOCKS = [
    f"layer{stage}.{block}.skip"
    for stage, first in ((1, 0), (2, 1), (3, 1))
    for block in range(first, 4)
]
"""Those whose output has the shape of their input."""


def lesioned(record: Record, probe: str, count: int | None = None) -> Array:
    """Accuracies with a lesion: of the blocks that keep the shape, or of `count` blocks at once."""
    layer, several, accuracy = readings(record, probe)
    if probe == "lesion_delete":
        return accuracy[np.isin(np.array(layer, dtype=str), BLOCKS)]
    return accuracy if count is None else accuracy[several == count]


def cost(probe: str, count: int | None = None) -> Measure:
    """Accuracy of the intact network minus the mean accuracy with a lesion."""

    def effect(record: Record) -> float:
        return reading(record, "lesion_none") - float(lesioned(record, probe, count).mean())

    def imagine(value: float) -> tuple[Imagined, ...]:
        size = len(BLOCKS)
        several = None if count is None else [float(count)] * size
        lesions = imagined_readings(probe, [1 - value] * size, x=several, layers=BLOCKS)
        parts = [imagined_readings("lesion_none", [1.0]), lesions]
        return (Imagined({"probes": schema.concatenate([p.tables["probes"] for p in parts])}),)

    return Measure(effect, imagine)


def by_block(record: Record) -> tuple[Array, Array]:
    values = lesioned(record, "lesion_delete")
    return np.arange(1.0, len(values) + 1), values


def costs(name: str, arm: str, measure: Measure, region: Region) -> Comparison:
    return Comparison(f"accuracy lost, {name}", (arm,), measure, region, unit="accuracy")


FINDING = Finding(
    source="Veit et al. 2016, arXiv 1605.06431, §4",
    chapter="skips",
    specs={
        name: {"depth": 26, "skip": skip, "probe": "lesion"}
        for name, skip in (("plain", False), ("residual", True))
    },
    comparisons=(
        costs("one block of the plain network", "plain", cost("lesion_delete"), above(0.6)),
        costs("one block of the residual one", "residual", cost("lesion_delete"), below(0.2)),
        costs("three blocks of it", "residual", cost("lesion_delete_several", 3), below(0.6)),
        costs("two swapped", "residual", cost("lesion_swap"), below(0.1)),
    ),
    recorded="inconclusive",
    seeds=TRAINED_SEEDS,
    figure=Figure(
        tuple(Curve(name, name, by_block) for name in ("plain", "residual")),
        x="deleted block, of those that keep the shape, from the input",
        y="training accuracy without the block",
        log=False,
    ),
    notes="The verdict is undecided because of the first block. Swaps without it cost .18 at most "
    "and mostly nothing, swaps with it .1 to .8, so that the number of the ten draws that have it "
    "decides their mean. Deleting it alone costs .4 to .8, no other block more than .3.",
)
