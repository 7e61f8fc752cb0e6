"""L2 norms that neither underflow at elements of 1e-30 nor overflow at 1e25 in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# On a CPU, float32 is faster than float64 between these numbers of elements, and its `sum` of
# squares, which adds up in cascades, errs by less than 1e-6. (Its `vector_norm` adds up one after
# another, and errs by up to 2e-4 where one element dwarfs the others.) Where the norm is above the
# bound and finite, no square has overflowed, and those that underflowed do not matter.
_FASTER = range(2**13, 2**17 + 1)
_SAFE = 1e-12


def norm(tensor: Tensor) -> Tensor:
    """L2 norm over all elements, a 0-d tensor; right for elements from 1e-154 to 1e154.

    In float64 where the device has it, elsewhere scaled by the largest element. On the CPU, where
    looking at a value costs nothing, float32 comes first where it is faster.
    """
    kind = tensor.device.type
    if kind == "mps":
        return _scaled_norm(tensor)
    if kind == "cpu" and tensor.dtype != torch.float64 and tensor.numel() in _FASTER:
        quick = tensor.float().square().sum().sqrt()
        if _SAFE < quick.item() < torch.inf:
            return quick.double()
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _scaled_norm(tensor: Tensor) -> Tensor:
    largest = tensor.abs().amax().float()
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(tensor.float() / usable) * usable


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of each tensor, as one vector on their device."""
    return torch.stack([norm(t) for t in tensors]) if tensors else torch.zeros(0).double()
