"""What led to a step that went wrong, in words, from the table `flight`."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pandas as pd

from gradflow.store import Run

GREW = 10.0
"""A number has left its range where it stays above this times its median over the first half of the
steps that were kept."""
_FORWARD = ("output_rms", "skip_rms", "branch_rms", "output_max", "output_nonfinite")


def story(flight: pd.DataFrame) -> list[str]:
    """Sentences: the first number that is not finite, with step, module and quantity, then what led
    to it: what grew first in the steps before, and the total's way.

    Args:
        flight: the table `flight`, with the modules' `position`; of the last event in it.
    """
    if flight.empty:
        return []
    frame = flight.assign(
        layer=flight["layer"].astype(object).where(flight["layer"].notna(), ""),
        quantity=flight["quantity"].astype(str),
        step=flight["step"].astype(int),
        value=flight["value"].to_numpy(float, na_value=np.nan),
        position=flight["position"].to_numpy(float, na_value=-1.0),
    )
    last, first = frame["step"].max(), frame["step"].min()
    sentences = [_first_not_finite(frame)]
    before = frame[np.isfinite(frame["value"])]
    if first == last:
        return [*sentences, "It is the first step that was kept: nothing led to it."]
    sentences.append(_totals(before))
    sentences.append(_first_grown(before))
    return [sentence for sentence in sentences if sentence]


def stories(run: Run) -> pd.DataFrame:
    """A run's story as a frame of one row, step and story; none where nothing went wrong.

    Raises:
        StoreError: a table is damaged.
    """
    frame = run.with_modules("flight")
    if frame.empty:
        return pd.DataFrame()
    return pd.DataFrame({"step": [int(frame["step"].max())], "story": [" ".join(story(frame))]})


def _first_not_finite(frame: pd.DataFrame) -> str:
    bad = frame[~np.isfinite(frame["value"])]
    if bad.empty:
        return f"Step {frame['step'].max()}: the rule held; all numbers are finite."
    step = bad["step"].min()
    bad = bad[bad["step"] == step]
    layers = bad[bad["layer"] != ""]
    if layers.empty:
        names = " and ".join(bad["quantity"])
        return f"Step {step}: {names} not finite; no layer's number was measured that is not."
    forward = layers[layers["quantity"].isin(_FORWARD)]
    if len(forward):
        found = forward.sort_values("position", kind="stable").iloc[0]
        where = "in the forward pass"
    else:
        found = layers.sort_values("position", kind="stable").iloc[-1]
        where = "in the backward pass, all outputs being finite"
    return (
        f"Step {step}: {found['quantity']} of {found['layer']} is the first that is not finite "
        f"({found['value']:g}), {where}."
    )


def _totals(frame: pd.DataFrame) -> str:
    """Loss and total gradient norm over the steps before."""
    told = []
    for name in ("loss", "grad_norm"):
        part = frame[(frame["layer"] == "") & (frame["quantity"] == name)].sort_values("step")
        if len(part) > 1:
            start, end = part["value"].iloc[0], part["value"].iloc[-1]
            told.append(f"{name} went from {start:.3g} to {end:.3g}")
    steps = frame["step"].nunique()
    return f"In the {steps} steps up to it, {' and '.join(told)}." if told else ""


def _first_grown(frame: pd.DataFrame) -> str:
    """Which series left its range first, and where the strongest growth was."""
    middle = frame["step"].min() + (frame["step"].max() - frame["step"].min() + 1) // 2
    grown = []
    for (layer, quantity), part in frame.groupby(["layer", "quantity"], sort=False):
        left = _left(part, middle)
        if left is not None:
            grown.append((*left, part["position"].iloc[0], layer, quantity))
    if not grown:
        return f"In the steps before, no number grew {GREW:g}-fold."
    step, factor, _, layer, quantity = min(grown, key=lambda found: (found[0], -found[1]))
    strongest = max(grown, key=lambda found: found[1])
    sentence = (
        f"First to grow more than {GREW:g}-fold and stay there: {_name(layer, quantity)}, from "
        f"step {step} on ({factor:.3g}-fold by the last step)"
    )
    if strongest[3:] != (layer, quantity):
        sentence += f"; most: {_name(*strongest[3:])} ({strongest[1]:.3g}-fold)"
    return f"{sentence}."


def _left(part: pd.DataFrame, middle: int) -> tuple[int, float] | None:
    """From which step on, and how far, a series is above GREW times what it was."""
    usual = part.loc[part["step"] < middle, "value"].abs().median()
    if not usual > 0:
        return None
    ordered = part.sort_values("step")
    factors = ordered["value"].abs().to_numpy() / usual
    above = factors > GREW
    if not above[-1]:
        return None
    start = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
    return int(ordered["step"].iloc[start]), float(factors[-1])


def _name(layer: Hashable, quantity: Hashable) -> str:
    return f"{quantity} of {layer}" if layer else str(quantity)
