"""What single elements of a tensor say beside its norm, as 0-d tensors on its device.

None of it changes what it looks at, or waits for a device. Gradients are looked at in the number
format in which they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.recording.modules import kind_of

FEW = 16
"""Values to a unit below which that all are zero may be chance: 2⁻¹⁶ for one that is off half the
time."""


def largest(tensor: Tensor) -> Tensor:
    """The largest absolute value; NaN if there is one."""
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


def nonfinite(tensor: Tensor) -> Tensor:
    """How many elements are infinite or NaN."""
    return (~tensor.isfinite()).sum()


def zeros(tensor: Tensor) -> Tensor:
    """How many elements are exactly zero."""
    return (tensor == 0).sum()


def subnormals(tensor: Tensor) -> Tensor:
    """How many elements are subnormal: not zero, and below the format's smallest normal."""
    return ((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).sum()


def unit_axis(module: nn.Module, output: Tensor) -> int:
    """Which axis of an output counts the module's units: channels, or features."""
    by_channel = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    channels = kind_of(module) == "conv" or isinstance(module, by_channel)
    return 1 if channels and output.dim() > 1 else output.dim() - 1


def reached_units(gradient: Tensor, axis: int) -> Tensor | None:
    """Whether any gradient comes through each unit: (units,) of bool.

    None where a unit has fewer than FEW values (samples, times places).
    """
    units = gradient.shape[axis] if gradient.dim() > 1 else 0
    if not units or gradient.numel() < FEW * units:
        return None
    return (gradient != 0).transpose(0, axis).reshape(units, -1).any(dim=1)


def spread(output: Tensor, samples: int) -> Tensor | None:
    """The share of an output's mean square that differs between samples, in [0, 1].

    Σ_e Var_N(y_e) / Σ_e mean_N(y_e²) over the elements e of the output of one sample, population
    variance: 1 − the mean cosine of all pairs, where norms are equal. None for one sample, and for
    an output whose first axis is not the samples; NaN for one that is zero.
    """
    if samples < 2 or output.dim() < 2 or output.shape[0] != samples:
        return None
    values = (output.float() if output.device.type == "mps" else output.double()).flatten(1)
    values = values / values.abs().amax()
    return values.var(dim=0, correction=0).sum() / values.square().mean(dim=0).sum()


def effective_rank(gradient: Tensor) -> Tensor:
    """e to the entropy of the singular values' shares of their sum (Roy & Vetterli 2007).

    Of a tensor as a matrix (first axis, all others). NaN for one that is zero or not finite.
    """
    matrix = gradient.flatten(1).float() if gradient.element_size() < 4 else gradient.flatten(1)
    peak = matrix.abs().amax()
    is_regular = peak.isfinite() & (peak > 0)
    values = torch.linalg.svdvals(torch.where(is_regular, matrix / peak, 0.0))
    return torch.where(is_regular, torch.special.entr(values / values.sum()).sum().exp(), torch.nan)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of two tensors of one shape; NaN where either is zero."""
    wide = torch.float32 if one.device.type == "mps" else torch.float64
    one, other = one.to(wide), other.to(wide)
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())
