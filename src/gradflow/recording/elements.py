"""What single elements of a tensor say beside its norm, as 0-d tensors on its device.

None of it changes what it looks at, or waits for a device. Gradients are looked at in the number
format in which they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradflow.recording.modules import kind_of


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


_BY_FEATURE = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase,
               nn.MultiheadAttention)  # fmt: skip


def unit_axis(module: nn.Module, output: Tensor, samples: int) -> int | None:
    """Which axis of an output counts the module's units: channels, or features.

    None where that is not known: of a module of somebody's own, but for (samples, features).
    """
    last = output.dim() - 1
    if kind_of(module) == "conv":  # without an axis of samples too
        axis = last - len(module.kernel_size)  # type: ignore[arg-type]
        return axis if axis >= 0 else None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return 0 if output.dim() == module._get_no_batch_dim() else 1
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        return 1
    if isinstance(module, _BY_FEATURE):
        return last
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return last if tuple(module.normalized_shape) == output.shape[-1:] else None
    return 1 if output.dim() == 2 and len(output) == samples else None


def reached_units(gradient: Tensor, axis: int) -> Tensor:
    """Whether any gradient comes through each unit: (units,) of bool."""
    return (gradient != 0).transpose(0, axis).flatten(1).any(dim=1)


def spread(output: Tensor, samples: int) -> Tensor | None:
    """The share of an output's mean square that differs between samples, in [0, 1].

    Σ_e Var_N(y_e) / Σ_e mean_N(y_e²) over the elements e of the output of one sample, population
    variance: 1 − the mean cosine of all pairs, where norms are equal. None for one sample, and for
    an output whose first axis is not the samples; NaN for one that is zero.
    """
    if samples < 2 or output.dim() < 2 or output.shape[0] != samples:
        return None
    values = output.to(_wide(output)).flatten(1)
    values = values / values.abs().amax()
    return values.var(dim=0, correction=0).sum() / values.square().mean(dim=0).sum()


def effective_rank(gradient: Tensor) -> Tensor:
    """e to the entropy of the singular values' shares of their sum (Roy & Vetterli 2007).

    Of a tensor as a matrix (first axis, all others). NaN for one that is zero or not finite.
    """
    matrix = gradient.flatten(1).to(_wide(gradient))
    peak = matrix.abs().amax()
    is_regular = peak.isfinite() & (peak > 0)
    values = torch.linalg.svdvals(torch.where(is_regular, matrix / peak, 0.0))
    return torch.where(is_regular, torch.special.entr(values / values.sum()).sum().exp(), torch.nan)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of two tensors of one shape; NaN where either is zero."""
    one, other = one.to(_wide(one)), other.to(_wide(other))
    return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())


def _wide(tensor: Tensor) -> torch.dtype:
    """The widest format that its device has."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
