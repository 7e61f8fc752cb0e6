"""Numbers of single tensors that a diagnosis needs beside norms; 0-d or None where there are none.

None of them changes what it looks at. Gradients are looked at in their own number format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradflow.recording.modules import kind_of

FEW = 16
"""Values to a unit below which that all are zero may be chance: 2⁻¹⁶ for one that is off half the
time."""
FLAT = 0.05
"""An activation is flat where its slope is below this share of its largest."""


def subnormals(tensor: Tensor) -> Tensor:
    """Whether each element is subnormal: not zero, and below the format's smallest normal."""
    return (tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)


def unit_axis(module: nn.Module, output: Tensor) -> int:
    """Which axis of an output counts the module's units: channels, or features."""
    by_channel = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
    channels = kind_of(module) == "conv" or isinstance(module, by_channel)
    return 1 if channels and output.dim() > 1 else output.dim() - 1


def alive_units(gradient: Tensor, axis: int) -> Tensor | None:
    """Whether any gradient comes through each unit: (units,) of bool.

    None where a unit has fewer than FEW values (samples, times places).
    """
    units = gradient.shape[axis]
    if gradient.dim() < 2 or gradient.numel() < FEW * units:
        return None
    return (gradient != 0).transpose(0, axis).reshape(units, -1).any(dim=1)


def output_spread(output: Tensor, samples: int) -> float | None:
    """The share of an output's mean square that differs between samples, in [0, 1].

    Σ_e Var_N(y_e) / Σ_e mean_N(y_e²) over the elements e of the output of one sample, population
    variance: 1 − the mean cosine of all pairs, where norms are equal. None for one sample, for an
    output whose first axis is not the samples, and for one that is zero.
    """
    if samples < 2 or output.dim() < 2 or output.shape[0] != samples:
        return None
    values = (output.float() if output.device.type == "mps" else output.double()).flatten(1)
    largest = values.abs().amax()
    if not largest > 0:
        return None
    values = values / largest
    share = values.var(dim=0, correction=0).sum() / values.square().mean(dim=0).sum()
    return float(share)


class Slopes(TorchDispatchMode):
    """While active, tells `note(flat elements, elements)` of every tanh, sigmoid and hardtanh.

    However they are written: as a module, a function, or inside another module's own code, unless
    that is one fused operation, as an LSTM can be.
    """

    def __init__(self, note: Callable[[float, int], None]):
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        slope = _SLOPES.get(func.overloadpacket.__name__.rstrip("_"))
        if slope is not None and isinstance(result, Tensor) and result.numel():
            share = slope(result.detach(), *args[1:])
            if share is not None:
                self._note(float((share < FLAT).sum()), result.numel())
        return result


def _of_hardtanh(y: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor | None:
    """Two-sided ones alone: ReLU6's left side is off, not saturated."""
    return None if low >= 0 else ((y > low) & (y < high)).float()


_SLOPES: dict[str, Callable[..., Tensor | None]] = {
    "tanh": lambda y: 1 - y.float().square(),
    "sigmoid": lambda y: 4 * y.float() * (1 - y.float()),
    "hardtanh": _of_hardtanh,
}
"""Slope over the largest slope, from an activation's value."""
