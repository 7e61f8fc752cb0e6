"""What led to a step that went wrong, in words, from the table `flight`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from gradflow.store import Run

GREW = 10.0
"""A number has left its range where it stays above this times its median over the first half of the
steps that were kept."""
_FORWARD = ("output_rms", "skip_rms", "branch_rms", "output_max")
_SIZES = ("_norm", "_rms", "_max")
"""Endings of what may grow: shares, cosines and counts say nothing, tenfold what they were."""


def story(flight: pd.DataFrame, divergence: Mapping[str, Any] | None = None) -> list[str]:
    """Sentences: the first number that is not finite, with step, module and quantity, then what led
    to it: what grew first in the steps before, and the total's way. Of each event in turn, where
    there are steps between them that were not kept.

    Args:
        flight: the table `flight`, with the modules' `position`.
        divergence: the run's, if it has one: it knows which modules are inside others.
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
    steps = np.unique(frame["step"])
    windows = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)
    return [
        sentence
        for window in windows
        for sentence in _event(frame[frame["step"].isin(window)], divergence or {})
    ]


def _event(frame: pd.DataFrame, divergence: Mapping[str, Any]) -> list[str]:
    """Of steps one after another."""
    last, first = frame["step"].max(), frame["step"].min()
    sentences = [_first_not_finite(frame, divergence)]
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
    return pd.DataFrame(
        {
            "step": [int(frame["step"].max())],
            "story": [" ".join(story(frame, run.record.get("divergence")))],
        }
    )


def _first_not_finite(frame: pd.DataFrame, divergence: Mapping[str, Any]) -> str:
    last, step = frame["step"].max(), _step(frame)
    if step is None:
        return f"Step {last}, the last that was kept: all its numbers are finite."
    is_bad = ~np.isfinite(frame["value"])
    # A mask's infinities, say: what was so all along is no beginning.
    before = frame.assign(bad=is_bad)[frame["step"] < step].groupby(["layer", "quantity"])["bad"]
    always = set(before.all()[lambda bad: bad].index)
    here, bad = frame[frame["step"] == step], frame[is_bad & (frame["step"] == step)]
    known = np.array([p in always for p in zip(bad["layer"], bad["quantity"], strict=True)], bool)
    if known.all() and not (bad["layer"] == "").any():
        return f"Step {step}: what is not finite was not in the steps before either."
    bad = bad[~known] if not known.all() else bad
    layers = bad[bad["layer"] != ""].sort_values("position", kind="stable")
    weights = layers[layers["quantity"] == "weight_norm"]
    if len(weights):
        return _told(step, weights.iloc[0], "in the parameters, before the step")
    forward = layers[layers["quantity"].isin(_FORWARD)]
    if len(forward):
        found = forward.iloc[0]
        if divergence.get("step") == step and divergence.get("quantity") in _FORWARD:
            inner = forward[forward["layer"] == divergence["layer"]]
            found = inner.iloc[0] if len(inner) else found
        return _told(step, found, "in the forward pass")
    outputs = here["quantity"].isin(_FORWARD).any()
    finite = ", all outputs being finite" if outputs else "; outputs were not measured"
    totals = bad[bad["layer"] == ""]
    if "loss" in set(totals["quantity"]) and (outputs or layers.empty):
        value = totals.loc[totals["quantity"] == "loss", "value"].iloc[0]
        return (
            f"Step {step}: the loss is the first that is not finite ({value:g}){finite}: look at "
            "what makes the loss of the last module's output."
        )
    if layers.empty:
        names = " and ".join(bad["quantity"])
        return f"Step {step}: {names} not finite; no layer's number was measured that is not."
    return _told(step, layers.iloc[-1], f"in the backward pass{finite}")


def _told(step: int, found: pd.Series, where: str) -> str:
    return (
        f"Step {step}: {found['quantity']} of {found['layer']} is the first that is not finite "
        f"({found['value']:g}), {where}."
    )


def _step(frame: pd.DataFrame) -> int | None:
    """At which it went wrong: the loss first, else what is so up to the end; a gradient that a
    scaler skipped on the way is neither."""
    totals = frame[(frame["layer"] == "") & frame["quantity"].isin(["loss", "grad_norm"])]
    is_bad = ~np.isfinite(totals["value"])
    losses = totals[is_bad & (totals["quantity"] == "loss")]
    if len(losses):
        return int(losses["step"].min())
    bad = set(totals[is_bad]["step"])
    step = int(frame["step"].max())
    if step not in bad:
        here = frame[frame["step"] == step]
        return None if np.isfinite(here["value"]).all() else step
    while step - 1 in bad:
        step -= 1
    return step


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
        if layer and not str(quantity).endswith(_SIZES):
            continue
        left = _left(part, middle)
        if left is not None:
            grown.append((*left, part["position"].iloc[0], layer, quantity))
    if not grown:
        return f"In the steps before, no number grew {GREW:g}-fold."
    step, factor, _, layer, quantity = min(grown, key=lambda found: (found[0], -found[1]))
    strongest = max(grown, key=lambda found: found[1])
    others = sum(found[0] == step for found in grown) - 1
    also = f" and {others} other{'s' * (others > 1)}" if others else ""
    sentence = (
        f"First to grow more than {GREW:g}-fold and stay there: {_name(layer, quantity)}{also}, "
        f"from step {step} on ({factor:.3g}-fold by the last step)"
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
