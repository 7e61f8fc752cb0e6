"""L2 norms that neither underflow at elements of 1e-30 nor overflow at 1e25 in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A float32 sum of squares over this many elements errs by less than 1e-6; and where the norm lies
# between these bounds, elements whose squares under- or overflow cannot matter.
_FAST_ELEMENTS = 2**16
_SAFE = (1e-12, 1e15)


def norm(tensor: Tensor) -> Tensor:
    """L2 norm over all elements, a 0-d tensor, exact over the whole range of the tensor's format.

    In float64 where the device has it; elsewhere scaled by the largest element.
    """
    if tensor.device.type != "mps":
        return torch.linalg.vector_norm(tensor, dtype=torch.float64)
    largest = tensor.abs().amax().float()
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(tensor.float() / usable) * usable


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of each tensor, as one vector on their device.

    On the CPU, where looking at a value costs nothing, float32 comes first and what lies near its
    ends is computed again in float64.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if tensors[0].device.type != "cpu":
        return torch.stack([norm(tensor) for tensor in tensors])
    values = torch.stack([_fast_norm(tensor) for tensor in tensors])
    unsafe = ~((values > _SAFE[0]) & (values < _SAFE[1]))
    for index in unsafe.nonzero().flatten().tolist():
        values[index] = norm(tensors[index])
    return values


def _fast_norm(tensor: Tensor) -> Tensor:
    if tensor.numel() > _FAST_ELEMENTS or tensor.dtype == torch.float64:
        return norm(tensor)
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).double()
