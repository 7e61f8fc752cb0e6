"""How deep the numbers of a floating-point format reach."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import GradflowError
from gradflow.recording.modules import kind_of
from gradflow.recording.probes.passes import Reading, cast_copy, differentiable, readout, untouched


def underflow_depth(
    model: nn.Module, inputs: Tensor, dtype: torch.dtype, *, seed: int
) -> list[Reading]:
    """At which depth the numbers of a format become zero or infinite, in a chain of layers.

    A copy of the model in `dtype` makes one forward pass. Layers are its convolutions and linear
    maps, in order of execution, and its first k layers are taken for a network of depth k: from a
    random linear readout of what layer k puts out the gradient goes back to what the first one puts
    out. Depths are found by bisection: what happens at one depth is taken to happen at all beyond.
    Micikevicius et al. 2018 (arXiv 1710.03740, §3) has the formats' limits.

    Args:
        dtype: float16, bfloat16, float32 or float64.
        seed: of the readouts; see `propagate`.

    Returns:
        Depths from 1, nan where it never happens. `first_overflow`: an output is not finite.
        `first_all_zero_gradient`: no element of the gradient differs from zero, by its own
        underflow or because the outputs before are zero. `first_overflow_gradient`: some element is
        not finite. Gradients are looked at only where the outputs are finite.

    Raises:
        GradflowError: the model has no such layer.
    """
    twin, inputs = cast_copy(model, inputs, dtype)
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        outputs.append(output)
        return output.clone()  # what an activation that works in place may overwrite

    for module in twin.modules():
        if kind_of(module) in ("conv", "linear"):
            module.register_forward_hook(keep)
    with untouched(twin):
        twin(differentiable(inputs))
        if not outputs:
            raise GradflowError("underflow_depth: the model has no convolution and no linear layer")

        @functools.cache
        def gradient(depth: int) -> tuple[bool, bool]:
            """Whether it is all zero, and whether some of it is not finite."""
            last = outputs[depth - 1]
            (found,) = torch.autograd.grad(last, outputs[0], readout(last, seed), retain_graph=True)
            return not found.any(), _overflowed(found)

        overflow = _first(len(outputs), lambda depth: _overflowed(outputs[depth - 1]))
        finite = len(outputs) if math.isnan(overflow) else int(overflow) - 1
        zero = _first(finite, lambda depth: gradient(depth)[0])
        burst = _first(finite, lambda depth: gradient(depth)[1])
    return [
        Reading("first_overflow", overflow),
        Reading("first_all_zero_gradient", zero),
        Reading("first_overflow_gradient", burst),
    ]


def _first(depth: int, happens: Callable[[int], bool]) -> float:
    """The least of 1, …, depth at which it happens, if it does at all beyond; else nan."""
    place = bisect_left(range(1, depth + 1), True, key=happens)
    return float(place + 1) if place < depth else math.nan


def _overflowed(tensor: Tensor) -> bool:
    return not tensor.isfinite().all()
