"""Derivatives of the output with respect to the input: Jacobian spectra, and shattering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from gradflow.errors import GradflowError
from gradflow.recording.probes.passes import (
    Reading,
    cast_copy,
    differentiable,
    output_of,
    readout,
    untouched,
    wide,
    without_gradients,
)

_ROWS = 128
"""Rows of a Jacobian to a backward pass: more gain nothing, and cost memory."""


def jacobian_spectrum(model: nn.Module, inputs: Tensor) -> list[Reading]:
    """Squared singular values of ∂y/∂x of each input, exactly: one backward pass for 128 outputs.

    Each input goes through as a batch of one, and one Jacobian at a time is in memory; its singular
    values are computed in float64. In float32 the small ones of a deep network are rounding.
    Pennington et al. 2017 (arXiv 1711.04735).

    Args:
        inputs: (N, …), floating-point. Batch norm has to be in evaluation mode.

    Returns:
        `jacobian_squared_singular_value` at `index`, which counts on from input to input: of each
        min(number of inputs' elements, of outputs') in falling order. Then, at each `input`,
        `jacobian_mean_squared_singular_value` and `jacobian_spectrum_variance`, their variance
        over their squared mean.

    Raises:
        GradflowError: a batch norm takes the statistics of the batch.
    """
    _check_batch_norms(model)
    spectra = [_spectrum(_jacobian(model, x)) for x in inputs.split(1)]
    values = enumerate(torch.cat(spectra).tolist())
    return [
        Reading("jacobian_squared_singular_value", value, x_name="index", x=float(index))
        for index, value in values
    ] + _moments([s.mean().item() for s in spectra], [spectrum_variance(s) for s in spectra])


def spectrum_variance(values: Any) -> float:
    """Var(s²)/mean(s²)² of squared singular values (an array, a tensor or a list), over all n.

    At initialisation L for L linear Gaussian layers and 0 for orthogonal ones; with ReLU 2L and L.
    Pennington et al. 2017 (arXiv 1711.04735), 2018 (arXiv 1802.09979).
    """
    squares = torch.as_tensor(values, dtype=torch.float64)
    return (squares.var(correction=0) / squares.mean().square()).item()


def jacobian_moments(
    model: nn.Module, inputs: Tensor, *, seed: int, vectors: int = 32
) -> list[Reading]:
    """Estimates of mean(s²) and Var(s²)/mean(s²)² without a Jacobian, for large models.

    With random signs v, E‖Jv‖² = tr(JᵀJ) = Σs² and E‖JᵀJv‖² = tr((JᵀJ)²) = Σs⁴ (Hutchinson 1990).
    Every input goes through as often as there are vectors, all in one batch, forward once and
    backward thrice.

    Args:
        inputs: (N, …), floating-point. Batch norm has to be in evaluation mode.
        vectors: over how many v the mean is taken.

    Returns:
        `jacobian_mean_squared_singular_value` and `jacobian_spectrum_variance` at each `input`, as
        `jacobian_spectrum` gives them.

    Raises:
        GradflowError: a batch norm takes the statistics of the batch.
    """
    _check_batch_norms(model)
    x = differentiable(inputs.repeat_interleave(vectors, dim=0))
    signs = torch.randint(2, x.shape, generator=Generator().manual_seed(seed), device="cpu")
    signs = (2 * signs - 1).to(x)
    with untouched(model):
        y = output_of(model(x))
        u = torch.zeros_like(y).requires_grad_()
        (back,) = torch.autograd.grad(y, x, u, create_graph=True)
        # Jᵀu is linear in u: its derivative in u, applied to v, is Jv.
        (tangent,) = torch.autograd.grad(back, u, signs)
        (back,) = torch.autograd.grad(y, x, tangent)
    rank = min(tangent[0].numel(), back[0].numel())
    second, fourth = (_per_input(t, len(inputs)) / rank for t in (tangent, back))
    return _moments(second.tolist(), (fourth / second.square() - 1).tolist())


def shattering(
    model: nn.Module,
    *,
    points: int = 256,
    extent: float = 2.0,
    lags: int = 15,
    shape: Sequence[int] = (1,),
    seed: int = 0,
) -> list[Reading]:
    """`gradient_autocorrelation` of dy/dt along a line of inputs t·d, at each `lag`.

    t takes `points` equal steps over [−extent, extent], all in one batch, which is what batch norm
    normalises over; y is the first output. With g the derivatives of Σy and ḡ their mean,

        Σ_i (g_i − ḡ)(g_{i+lag} − ḡ) / Σ_i (g_i − ḡ)²

    About 0 for white noise, −1/points on average. Where the g are all equal but for rounding (their
    spread below √ε of their size) they have no autocorrelation: nan. Balduzzi et al. 2017 (arXiv
    1702.08591, Fig. 1 and 2).

    Args:
        lags: up to which lag; at most points − 1.
        shape: of one input. One feature is the paper's case. Otherwise d is a random direction
            whose elements have mean square 1, so that a first layer with variances of 1/fan_in
            makes the same of t.
        seed: of the direction.
    """
    like = next(model.parameters(), torch.zeros(()))
    direction = torch.randn(tuple(shape), generator=Generator().manual_seed(seed), device="cpu")
    direction = (direction / direction.square().mean().sqrt()).to(like)
    t = torch.linspace(-extent, extent, points, dtype=torch.float64, device="cpu").to(like)
    t = differentiable(t.view(-1, *[1] * len(shape)))
    with untouched(model):
        y = output_of(model(t * direction)).reshape(points, -1)[:, 0]
        (slopes,) = torch.autograd.grad(y.sum(), t)
    found = _autocorrelation(wide(slopes.flatten()), min(lags, points - 1), slopes.dtype)
    return [
        Reading("gradient_autocorrelation", value, x_name="lag", x=float(lag))
        for lag, value in enumerate(found, 1)
    ]


def gradient_cosine(
    model: nn.Module, inputs: Tensor, *, distance: float = 1e-3, seed: int = 0
) -> list[Reading]:
    """`input_gradient_cosine` at `distance`: how alike the gradients at neighbouring inputs are.

    Each input x gets a neighbour x + δ, δ in a random direction and ‖δ‖ = distance·‖x‖. The cosine
    of ∂L/∂x at both, L one random linear readout of the output, is averaged over the inputs. The
    inputs and their neighbours are a batch each. 1 where the gradient is the same, about 0 where it
    is shattered: Balduzzi et al. 2017 (arXiv 1702.08591). nan where a gradient is zero, or cut off
    from the input. What is in half precision is measured on a copy in float32: there, neighbours
    round to one number.

    Args:
        inputs: (N, …), floating-point.
        distance: relative to the norm of each input.
        seed: of readout and direction.
    """
    if torch.finfo(inputs.dtype).bits < 32:
        model, inputs = cast_copy(model, inputs, torch.float32)
    draw = Generator().manual_seed(seed)
    direction = torch.randn(inputs.shape, generator=draw, dtype=torch.float32, device="cpu")
    direction, places = direction.to(wide(inputs)), wide(inputs).flatten(1)
    lengths = places.norm(dim=1) / direction.flatten(1).norm(dim=1)
    shift = distance * lengths.view(-1, *[1] * (inputs.dim() - 1)) * direction
    first, second = (
        _readout_gradient(model, x, seed).flatten(1)
        for x in (inputs, (wide(inputs) + shift).to(inputs.dtype))
    )
    cosine = functional.cosine_similarity(_unit(first), _unit(second), dim=1, eps=0)
    return [Reading("input_gradient_cosine", cosine.mean().item(), None, "distance", distance)]


def _readout_gradient(model: nn.Module, inputs: Tensor, seed: int) -> Tensor:
    """Zero where the output does not depend on the input, or the way back is cut."""
    x = differentiable(inputs)
    with untouched(model), without_gradients(model):
        y = output_of(model(x))
        if y.requires_grad:
            y.backward(readout(y, seed))  # reentrant checkpointing refuses `autograd.grad`
    return torch.zeros_like(wide(inputs)) if x.grad is None else wide(x.grad)


def _unit(rows: Tensor) -> Tensor:
    """Scaled by their largest elements: squares of small ones would underflow."""
    return rows / rows.abs().amax(dim=1, keepdim=True)


def _check_batch_norms(model: nn.Module) -> None:
    """With the statistics of a batch, an output is no function of its own input alone."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise GradflowError(
                f"{name or type(module).__name__}: a Jacobian needs batch norm in evaluation mode, "
                "with running statistics"
            )


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """∂y/∂x of a batch of one: [elements of y, elements of x]."""
    x = differentiable(x)
    with untouched(model):
        y = output_of(model(x))
        rows: list[Tensor] = []
        for places in torch.arange(y.numel(), device=y.device).split(_ROWS):
            units = functional.one_hot(places, y.numel()).to(y).view(-1, *y.shape)
            rows += torch.autograd.grad(y, x, units, retain_graph=True, is_grads_batched=True)
    return torch.cat(rows).flatten(1)


def _spectrum(jacobian: Tensor) -> Tensor:
    """Squared singular values, in falling order, in float64 on the CPU; nan if it is not finite."""
    jacobian = jacobian.cpu().double()
    if not jacobian.isfinite().all():
        return torch.full((min(jacobian.shape),), torch.nan, dtype=torch.float64)
    return torch.linalg.svdvals(jacobian).square()


def _per_input(vectors: Tensor, inputs: int) -> Tensor:
    """Squared norms, averaged over the vectors of each input."""
    return wide(vectors).flatten(1).square().sum(dim=1).view(inputs, -1).mean(dim=1)


def _moments(means: list[float], variances: list[float]) -> list[Reading]:
    return [
        Reading(name, value, x_name="input", x=float(number))
        for name, values in {
            "jacobian_mean_squared_singular_value": means,
            "jacobian_spectrum_variance": variances,
        }.items()
        for number, value in enumerate(values)
    ]


def _autocorrelation(series: Tensor, lags: int, dtype: torch.dtype) -> list[float]:
    centred = series - series.mean()
    power = centred.square().sum()
    if not power > torch.finfo(dtype).eps * series.square().sum():
        return [torch.nan] * lags
    return [((centred[lag:] * centred[:-lag]).sum() / power).item() for lag in range(1, lags + 1)]
