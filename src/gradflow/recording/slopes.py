"""Whether activations are saturated: where on their curves they are, however they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FLAT = 0.05
"""An activation is flat where its slope is below this share of its largest."""


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
