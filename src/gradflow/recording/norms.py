"""L2 norms that neither underflow at elements of 1e-30 nor overflow at 1e25 in float32.

Float64 accumulation is always right, and on a GPU as fast as memory. On a CPU float32 is two to
three times faster, but adds up one after another in each of its few lanes: where one element dwarfs
the others, 36,864 of them err by up to 2e-4, and squares leave the format from 1e19 on and below
1e-19. So float32 adds up rows of at most `_ROW` elements, whose error has a bound, float64 adds up
the rows, and what comes out near an end of the format is computed again in float64.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradflow.errors import SpecError

_ROW = 128
"""Elements a row at most. With 4 lanes (the fewest) 32 of them are added up one after another, each
time with a relative error of at most 2⁻²⁴: that is at most 1e-6 of the norm, wherever the large
elements stand."""
_SHORT = 8
"""Elements a row at least; below it float64 is no slower."""
_FEW = 2**13
"""Elements of a single tensor below which float64, which is exact, costs no more."""
_SAFE = 1e-12
"""A norm above this has lost nothing that matters to squares that underflowed."""
_LIFT = 2.0**64
"""What is below is measured again times this, which is exact: a gradient that vanishes is what one
looks for, and float64 would cost several times as much."""
_COPIED = 2**14
"""Elements up to which it is faster to copy tensors of one shape together than to ask for each."""


def norm(tensor: Tensor) -> Tensor:
    """L2 norm over all elements, a 0-d tensor; right for elements from 1e-154 to 1e154.

    In float64 where the device has it, elsewhere scaled by the largest element. On the CPU, where
    looking at a value costs nothing, float32 comes first.
    """
    kind = tensor.device.type
    if kind == "mps":
        return _scaled_norm(tensor)
    if kind == "cpu" and tensor.dtype != torch.float64 and tensor.numel() >= _FEW:
        quick = _quick(tensor)
        if _SAFE < quick.item() < math.inf:
            return quick
    return _exact(tensor)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of each tensor, as one vector on their device."""
    return Norms(tensors)(tensors)


class Norms:
    """`norms` of tensors whose shapes and formats are those of `like`, again and again.

    Those of one shape are measured together: for small tensors a call costs more than the numbers.
    """

    def __init__(self, like: Sequence[Tensor]):
        self._like = len(like)
        self._device = like[0].device if like else torch.device("cpu")
        groups: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        for place, tensor in enumerate(like):
            groups.setdefault((tensor.shape, tensor.dtype), []).append(place)
        self._groups = [(places, like[places[0]].numel()) for places in groups.values()]
        order = itertools.chain.from_iterable(groups.values())
        self._places = torch.tensor(list(order), dtype=torch.int64).argsort()

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norms, [tensors]; float64, float32 where the device has no float64."""
        if len(tensors) != self._like:
            raise ValueError(f"Norms: {len(tensors)} tensors, {self._like} were expected")
        if self._device.type == "mps":
            return torch.stack([_scaled_norm(tensor) for tensor in tensors])
        if self._device.type != "cpu":
            return torch.stack(torch._foreach_norm(list(tensors), 2, torch.float64))
        if not tensors:
            return torch.zeros(0, dtype=torch.float64)
        parts = [_together([tensors[i] for i in at], count) for at, count in self._groups]
        found = torch.cat(parts)[self._places]
        is_small = (found <= _SAFE).tolist()
        for places, count in self._groups if any(is_small) else ():
            small = [place for place in places if is_small[place]]
            if small and tensors[small[0]].dtype == torch.float32:
                lifted = _together([tensors[place] for place in small], count, _LIFT)
                found[small] = torch.where(lifted > _SAFE, lifted / _LIFT, 0.0)
        for place in ((found <= _SAFE / _LIFT) | ~found.isfinite()).nonzero().flatten().tolist():
            found[place] = _exact(tensors[place])
        return found


def check_group(world: int) -> None:
    """Raise SpecError where torch.distributed's default group is not of that size."""
    if world > 1 and not (dist.is_initialized() and dist.get_world_size() == world):
        raise SpecError(f"ranks: torch.distributed has no group of {world}")


def gather(tensor: Tensor, world: int) -> Tensor:
    """The tensor of each of the `world` ranks that call this, [world, *shape].

    The same shape on all; over torch.distributed's default group.
    """
    everyone = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(everyone, tensor)
    return torch.stack(everyone)


def _exact(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _quick(tensor: Tensor) -> Tensor:
    """Right within float32's range."""
    rows = _row_norms(_flat(tensor))
    return _exact(tensor if rows is None else rows)


def _together(tensors: list[Tensor], count: int, scale: float = 1.0) -> Tensor:
    """Norms, times `scale`, of tensors of one shape with `count` elements each.

    Right where these are within float32's range.
    """
    if tensors[0].dtype == torch.float64 or not count:
        return torch.stack([_exact(tensor) * scale for tensor in tensors])
    if len(tensors) == 1 or count > _COPIED or not tensors[0].dim():
        return torch.stack([_quick(_times(tensor, scale)) for tensor in tensors])
    rows = _row_norms(_flat(_times(torch.cat(tensors), scale)), count)
    if rows is None:
        return torch.stack([_exact(tensor) * scale for tensor in tensors])
    return torch.linalg.vector_norm(rows.view(len(tensors), -1), dim=1, dtype=torch.float64)


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension; without a copy where they lie densely, in any order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return tensor.reshape(-1)


def _row_norms(flat: Tensor, count: int = 0) -> Tensor | None:
    """Norms in float32 of the rows that make up each `count` elements; None if none are short."""
    length = _row_length(count or len(flat))
    if length is None:
        return None
    if flat.dtype != torch.float32:
        flat = flat.float()
    return torch.linalg.vector_norm(flat.view(-1, length), dim=1)


@functools.cache
def _row_length(count: int) -> int | None:
    """The longest row of at most `_ROW` elements that divides `count` without a rest."""
    if 0 < count <= _ROW:
        return count
    return next((n for n in range(_ROW, _SHORT - 1, -1) if count and count % n == 0), None)


def _scaled_norm(tensor: Tensor) -> Tensor:
    largest = tensor.abs().amax().float()
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(tensor.float() / usable) * usable
