"""Where a step went wrong: the first module whose values, or whose gradient, were not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gradflow.recording.buffers import Buffer, Drained
from gradflow.recording.layers import Layers
from gradflow.recording.modules import takes_hooks, tensors_of


@dataclass(frozen=True)
class Divergence:
    """The first step whose loss or gradient was not finite, and where it began.

    `layer` is the module nearest the input whose forward value was not finite, else the module
    farthest from it whose gradient was not; None where neither was measured at that step.
    """

    step: int
    layer: str | None
    quantity: str


def non_finite(row: Mapping[str, Any], *, scaled: bool) -> str | None:
    """Which number of the table `steps` is not finite.

    Where the loss is scaled, a gradient that overflows is the scaler's to skip.
    """
    if not math.isfinite(row.get("loss", 0.0)):
        return "loss"
    if not scaled and not math.isfinite(row.get("grad_norm", 0.0)):
        return "grad_norm"
    return None


def first_divergence(
    steps: Sequence[Mapping[str, Any]],
    drained: Mapping[str, Drained],
    layers: Layers,
    buffers: Mapping[str, Buffer],
    usual: set[tuple[str, str]],
    *,
    scaled: bool,
) -> Divergence | None:
    """Of the rows of the table `steps` that left with what was drained from the buffers.

    Args:
        usual: layers and quantities of outputs that were not finite before, of which nothing came,
            as a mask's are: no origin, if there is another. Added to.
    """
    for row in steps:
        quantity = non_finite(row, scaled=scaled)
        if quantity is not None:
            _note(row["step"], drained, layers, buffers, usual)
            found = _origin(row["step"], drained, layers, buffers, usual)
            return Divergence(row["step"], *(found or (None, quantity)))
    _note(None, drained, layers, buffers, usual)
    return None


def _note(
    step: int | None,
    drained: Mapping[str, Drained],
    layers: Layers,
    buffers: Mapping[str, Buffer],
    usual: set[tuple[str, str]],
) -> None:
    """Add to `usual` what was not finite before `step`."""
    for table, found in drained.items():
        rows = layers.select(table)
        earlier = found.steps >= 0 if step is None else found.steps < step
        for column, quantity in enumerate(buffers[table].chosen):
            if quantity.reduction == "rms":
                bad = found.measured[earlier, :, column]
                bad = bad & ~np.isfinite(found.values[earlier, :, column])
                usual |= {(rows[i].layer, quantity.name) for i in np.flatnonzero(bad.any(axis=0))}


def _origin(
    step: int,
    drained: Mapping[str, Drained],
    layers: Layers,
    buffers: Mapping[str, Buffer],
    usual: set[tuple[str, str]],
) -> tuple[str, str] | None:
    """The module at which `step` went wrong: forward from the input, else backward."""
    forward: list[Any] = []
    backward: list[Any] = []
    for table, found in drained.items():
        rows = layers.select(table)
        for place in np.flatnonzero(found.steps == step):
            for column, quantity in enumerate(buffers[table].chosen):
                values = found.values[place, :, column]
                bad = found.measured[place, :, column] & ~np.isfinite(values)
                side = backward if quantity.is_gradient else forward
                if (quantity.is_gradient and quantity.is_norm) or quantity.reduction == "rms":
                    side += [
                        (layers.place(rows[i], i), rows[i].layer, quantity.name)
                        for i in np.flatnonzero(bad).tolist()
                    ]
    forward = [found for found in forward if found[1:] not in usual] or forward
    if forward:
        return _innermost(forward, layers)[1:]
    return max(backward)[1:] if backward else None


def _innermost(forward: list[Any], layers: Layers) -> Any:
    """The first, but for what is only around others that were not finite before it was."""
    first = min(forward)
    while inside := [found for found in forward if layers.is_inside(found[1], first[1])]:
        first = min(inside)
    return first


def locate_forward(
    layers: Layers, forward: Callable[[], Any], usual: set[tuple[str, str]]
) -> int | None:
    """The first owner, in order of execution, whose output is not finite in `forward()`.

    Args:
        usual: as for `first_divergence`.
    """
    found: list[int] = []

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        if not all(bool(t.isfinite().all()) for t in tensors_of(output)):
            found.append(index)

    handles = [
        module.register_forward_hook(partial(look, index), prepend=True)  # as it is recorded
        for index, module in enumerate(layers.owners)
        if takes_hooks(module)
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    before = {layer for layer, _ in usual}
    new = [index for index in found if layers.rows[index].layer not in before]
    return next(iter(new or found), None)
