"""Which paths the gradient takes: through branches, or past them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.recording.modules import wrap_terms
from gradflow.recording.probes.passes import (
    Reading,
    blocks_of,
    cast_copy,
    differentiable,
    output_of,
    readout,
    untouched,
)

Terms = Callable[[Tensor, Tensor], Any]


@contextlib.contextmanager
def around_terms(
    model: nn.Module, around: Callable[[Terms, Tensor, Tensor], Any]
) -> Iterator[None]:
    """In this block every block's `terms` go through `around(original, x, branch)`.

    Raises:
        GradflowError: there is no block.
    """
    with contextlib.ExitStack() as undo:
        for block in blocks_of(model).values():
            undo.callback(wrap_terms(block, around))
        yield


@contextlib.contextmanager
def scaled_branch_gradient(model: nn.Module, scale: float) -> Iterator[None]:
    """In this block gradients through each branch r are multiplied: r → sg(r) + scale·(r − sg(r)).

    sg stops the gradient. The outputs stay what they are, exactly where r is finite.

    Raises:
        GradflowError: the model has no block.
    """

    def scaled(terms: Terms, x: Tensor, branch: Tensor) -> Any:
        held = branch.detach()
        return terms(x, held + scale * (branch - held))

    with around_terms(model, scaled):
        yield


def path_length(
    model: nn.Module, inputs: Tensor, *, seed: int, step: float = 1e-4
) -> list[Reading]:
    """`path_length`: through how many branches the gradient passes on average.

    A path through k branches carries the factor s^k where the gradient through every branch is
    scaled by s. With G(s) = ‖∂L/∂x₀‖², x₀ what the first block is given and L a random linear
    readout, the mean length, weighted by what it gives to G, is d ln G/d ln s² at s = 1; here a
    central difference in float64, on a copy of the model. Veit et al. 2016 (arXiv 1605.06431).

    n blocks x + r of independent branches have n/2; Σ(ρ − 1)/ρ in general, ρ a block's growth of
    the squared gradient. Where the first block's skip is a projection, x₀ is what comes out of it,
    and that block's branch is not on the way.

    Args:
        seed: of the readout; see `propagate`.
        step: half the difference, in ln s.

    Raises:
        GradflowError: the model has no block.
    """
    twin, inputs = cast_copy(model, inputs, torch.float64)
    more, less = (_log_gradient(twin, inputs, math.exp(d), seed) for d in (step, -step))
    return [Reading("path_length", (more - less) / (4 * step))]


def _log_gradient(model: nn.Module, inputs: Tensor, scale: float, seed: int) -> float:
    """ln ‖∂L/∂x₀‖² with the branches' gradients scaled."""
    given: list[Tensor] = []

    def note(terms: Terms, x: Tensor, branch: Tensor) -> Any:
        given.append(x)
        return terms(x, branch)

    with untouched(model), scaled_branch_gradient(model, scale), around_terms(model, note):
        output = output_of(model(differentiable(inputs)))
        (gradient,) = torch.autograd.grad(output, given[0], readout(output, seed))
    return gradient.square().sum().log().item()
