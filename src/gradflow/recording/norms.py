"""L2 norms that neither underflow at elements of 1e-30 nor overflow at 1e25 in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# In float32 `vector_norm` adds up one after another: at 2**16 elements it errs by 2e-4 in the worst
# case, where one element dwarfs the others; `sum` adds up in cascades. Up to so many elements they
# err by less than 1e-6. Where the norm is above the bound and finite, no square overflowed, and
# those that underflowed cannot matter.
_PLAIN_ELEMENTS = 2**7
_FAST_ELEMENTS = 2**17
_SAFE = 1e-12


def norm(tensor: Tensor) -> Tensor:
    """L2 norm over all elements, a 0-d tensor; right for elements from 1e-154 to 1e154.

    In float64 where the device has it; elsewhere scaled by the largest element.
    """
    if tensor.device.type != "mps":
        return torch.linalg.vector_norm(tensor, dtype=torch.float64)
    largest = tensor.abs().amax().float()
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(tensor.float() / usable) * usable


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of each tensor, as one vector on their device.

    On the CPU, where looking at a value costs nothing, float32 comes first, and what is large or
    near the ends of float32 is computed in float64.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if tensors[0].device.type != "cpu":
        return torch.stack([norm(tensor) for tensor in tensors])
    quick = torch.stack([_float32_norm(tensor) for tensor in tensors])
    values = quick.double()
    for index in (~((quick > _SAFE) & (quick < torch.inf))).nonzero().flatten().tolist():
        values[index] = norm(tensors[index])
    return values


_UNKNOWN = torch.tensor(torch.nan, dtype=torch.float32, device="cpu")


def _float32_norm(tensor: Tensor) -> Tensor:
    """The norm as float32 has it; NaN, which is then computed again, where that is too coarse."""
    if tensor.numel() > _FAST_ELEMENTS or tensor.dtype == torch.float64:
        return _UNKNOWN
    if tensor.numel() <= _PLAIN_ELEMENTS:
        return torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return tensor.float().square().sum().sqrt()
