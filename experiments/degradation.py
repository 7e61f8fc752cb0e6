"""Training error rises with depth in plain networks and not in residual ones of equal parameters.

Source: He et al. 2015 (arXiv 1512.03385), §4.1, §4.2 and figure 6.

Measured: training error, 1 − accuracy over the whole training split in evaluation mode after the
last update; where not said otherwise, of each network at the learning rate that is its best, which
is chosen for every seed anew.

Deviations: 8×8 handwritten digits in place of CIFAR-10; batch 64, one-cycle schedule, 12 epochs,
that is 264 updates in place of 64,000; peak rates .002, .005, .02, .1, at depth 152 .005 and .02:
the best of two stands against the best of four where depth 152 is compared with another.

Cost: 101 runs trained, 33 minutes on one core (6 s at depth 20, 16 s at 56, 44 s at 152).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradflow.findings import (
    FIRST_SEED,
    TRAINED_SEEDS,
    Comparison,
    Curve,
    Exhibit,
    Figure,
    Finding,
    Lookup,
    above,
    below,
)
from gradflow.measures import (
    Array,
    Record,
    best_difference,
    metric_difference,
    over_arms,
    updates_to,
)

RATES = {20: (0.002, 0.005, 0.02, 0.1), 56: (0.002, 0.005, 0.02, 0.1), 152: (0.005, 0.02)}
SKIPS = {"plain": False, "residual": True}
ORDINARY = 0.02
LONGER = "plain 152, 48 epochs"
RISE, NO_RISE = above(0.05), below(0.01)
REACHED = 0.9
"""Mean training accuracy of ten batches to which the updates are counted."""


def arm(name: str, depth: int, rate: float) -> str:
    return f"{name} {depth}, rate {rate:g}"


def rates(name: str, depth: int) -> tuple[str, ...]:
    """A network at all its rates."""
    return tuple(arm(name, depth, rate) for rate in RATES[depth])


def excess(worse: tuple[str, int], better: tuple[str, int], *, rises: bool = True) -> Comparison:
    """The error of one network minus that of another, each at its best rate."""
    first, second = rates(*better), rates(*worse)
    return Comparison(
        f"error, {worse[0]} {worse[1]} − {better[0]} {better[1]}",
        (*first, *second),
        best_difference(len(first), len(second)),
        RISE if rises else NO_RISE,
        unit="error",
        slow=True,
    )


def excess_at_ordinary_rate(worse: tuple[str, int], better: tuple[str, int]) -> Comparison:
    return Comparison(
        f"error, {worse[0]} {worse[1]} − {better[0]} {better[1]}, both at rate {ORDINARY:g}",
        (arm(*better, ORDINARY), arm(*worse, ORDINARY)),
        metric_difference(),
        RISE,
        unit="error",
    )


def error_by_depth(*records: Record) -> tuple[Array, Array]:
    """The lowest error at each depth; records as `rates` names them, from depth to depth."""
    accuracy = iter([record.metrics["train_accuracy"] for record in records])
    lowest = [1 - max(next(accuracy) for _ in tried) for tried in RATES.values()]
    return np.array(list(RATES), dtype=float), np.array(lowest)


def error_of_longer_run(record: Record) -> tuple[Array, Array]:
    depth, accuracy = over_arms([152])(record)
    return depth, 1 - accuracy


def time_taken(find: Lookup) -> Exhibit | None:
    """Of every network and rate: final error, and the updates that it took to fit most images."""
    rows = []
    for name in FINDING.specs:
        seeds = range(FIRST_SEED, FIRST_SEED + FINDING.seeds)
        found = [record for seed in seeds if (record := find(name, seed)) is not None]
        if found:
            rows.append({"network": name, "seeds": len(found), **_summary(found)})
    title = f"Updates until ten batches have a mean accuracy of {REACHED:.0%}, at each rate"
    return Exhibit(None, "", {title: rows}) if rows else None


def _summary(found: Sequence[Record]) -> dict[str, Any]:
    errors = [1 - record.metrics["train_accuracy"] for record in found]
    updates = float(np.median([updates_to(record, REACHED) for record in found]))
    return {
        "mean training error": f"{np.mean(errors):.3f}",
        "median updates": f"{updates:.0f}" if np.isfinite(updates) else "not reached",
    }


FINDING = Finding(
    source="He et al. 2015, arXiv 1512.03385, §4.2",
    chapter="skips",
    specs={
        arm(name, depth, rate): {"depth": depth, "skip": skip, "lr": rate}
        for name, skip in SKIPS.items()
        for depth in RATES
        for rate in RATES[depth]
    }
    | {LONGER: {"depth": 152, "skip": False, "lr": 0.005, "epochs": 48}},
    comparisons=(
        excess_at_ordinary_rate(("plain", 56), ("plain", 20)),
        excess_at_ordinary_rate(("plain", 56), ("residual", 56)),
        excess(("plain", 56), ("plain", 20)),
        excess(("plain", 152), ("plain", 56)),
        excess(("residual", 56), ("residual", 20), rises=False),
        excess(("residual", 152), ("residual", 20), rises=False),
        excess(("plain", 56), ("residual", 56)),
        excess(("plain", 152), ("residual", 152)),
    ),
    recorded="reproduced",
    seeds=TRAINED_SEEDS,
    beside={LONGER: 1},
    figure=Figure(
        (
            *(
                Curve(name, tuple(a for depth in RATES for a in rates(name, depth)), error_by_depth)
                for name in SKIPS
            ),
            Curve(LONGER, LONGER, error_of_longer_run),
        ),
        x="depth",
        y="training error at the best learning rate",
        log=False,
        note="The run of 48 epochs, one seed, tells a network that is slow from a degraded one.",
    ),
    exhibit=time_taken,
)
