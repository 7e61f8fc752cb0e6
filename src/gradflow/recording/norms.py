"""L2 norms that neither underflow at elements of 1e-30 nor overflow at 1e25 in float32.

Float64 accumulation is always right, and on a GPU as fast as memory. On a CPU float32 is two to
three times faster, but adds up one after another in each of its few lanes: where one element dwarfs
the others, 36,864 of them err by up to 2e-4, and squares leave the format from 1e19 on and below
1e-19. So float32 adds up rows of `_ROW` elements, whose error has a bound, float64 adds up the
rows, and what comes out near an end of the format is measured again, scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gradflow.errors import SpecError

_ROW = 128
"""Elements a row. With 4 lanes (the fewest) 32 of them are added up one after another, each time
with a relative error of at most 2⁻²⁴: that is at most 1e-6 of the norm, wherever the large elements
stand."""
_FEW = 2**13
"""Elements of a single tensor below which float64, which is exact, costs no more."""
_SAFE = 1e-12
"""A norm above this has lost nothing that matters to squares that underflowed."""
_SCALE = 2.0**100
"""What is below is measured again times this, and what overflowed divided by it. Both are exact,
and all squares are then within the format, from the smallest subnormal to the largest number."""
_LARGE = 2**15
"""Elements from which a call costs less than a copy."""
_CHUNK = 2**11
"""Rows that are copied together at most: 1 MB, to stay in a cache."""


def norm(tensor: Tensor) -> Tensor:
    """L2 norm over all elements, a 0-d tensor; right for elements from 1e-154 to 1e154.

    In float64 where the device has it, elsewhere scaled by the largest element. On the CPU, where
    looking at a value costs nothing, float32 comes first.
    """
    kind = tensor.device.type
    if kind == "mps":
        return _scaled_norm(tensor)
    if kind == "cpu" and tensor.dtype != torch.float64 and tensor.numel() >= _FEW:
        quick = _exact(_row_norms(tensor))
        if _SAFE < quick.item() < math.inf:
            return quick
    return _exact(tensor)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of each tensor, as one vector on their device."""
    with torch.no_grad():
        return Norms(tensors)(tensors)


class Norms:
    """`norms` of tensors whose shapes and formats are those of `like`, again and again.

    On the CPU small ones are first copied together into rows: a call for each would cost more than
    the numbers.

    Args:
        groups: of each tensor the number of its group, whose tensors have one norm together,
            √Σ²; by default each has its own.
        count: how many groups there are, those without a tensor included: their norm is 0.
        shares: what each tensor's norm counts by; by default 1.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        groups: Sequence[int] | None = None,
        count: int | None = None,
        shares: Sequence[float] | None = None,
    ):
        groups = range(len(like)) if groups is None else groups
        self._like, self._count = len(like), len(like) if count is None else count
        self._device = like[0].device if like else torch.device("cpu")
        single = list(range(len(like)))
        self._chunks: list[tuple[list[int], _Rows]] = []
        self._large: list[int] = []
        if self._device.type == "cpu":
            narrow = [i for i in single if like[i].dtype != torch.float64]
            single = [i for i in single if like[i].dtype == torch.float64]
            self._large = [i for i in narrow if like[i].numel() >= _LARGE]
            small = [i for i in narrow if like[i].numel() < _LARGE]
            self._chunks = [(at, _Rows([like[i] for i in at])) for at in _chunks(small, like)]
        self._single = single
        order = [i for places, _ in self._chunks for i in places] + self._large
        tensors = [i for i in order for _ in range(_count(like[i]))] + self._single
        self._groups = torch.tensor([groups[i] for i in tensors], dtype=torch.int64)
        self._groups = self._groups.to(self._device)
        self._shares = None
        if shares is not None:
            squares = torch.tensor([shares[i] ** 2 for i in tensors], dtype=torch.float64)
            self._shares = squares.to(self._device)
        filled = {group for group, tensor in zip(groups, like, strict=True) if tensor.numel()}
        self._is_filled = np.array([group in filled for group in range(self._count)], bool)

    def __call__(self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None = None) -> Tensor:
        """The norms, [groups], of the tensors, or of what they are more than `less`.

        Without gradients (`torch.no_grad`). Float64, float32 where the device has none.

        Raises:
            ValueError: another number of tensors than there were.
            RuntimeError: other shapes, or sparse tensors.
        """
        if len(tensors) != self._like:
            raise ValueError(f"Norms: {len(tensors)} tensors, {self._like} were expected")
        if self._device.type != "cpu":
            pairs = zip(tensors, less or (), strict=less is not None)
            return self._measure([_less(*pair) for pair in pairs] if less else tensors)
        found = self._measure(tensors, less=less)
        values = found.numpy()
        lowest = values.min(initial=math.inf, where=self._is_filled)
        if lowest > _SAFE and values.max(initial=0.0) < math.inf:
            return found
        is_small, is_over = found <= _SAFE, found.isinf()
        if lowest <= _SAFE:
            found = torch.where(is_small, self._measure(tensors, _SCALE, less) / _SCALE, found)
        if is_over.any():
            found = torch.where(is_over, self._measure(tensors, 1 / _SCALE, less) * _SCALE, found)
        return found

    def _measure(
        self, tensors: Sequence[Tensor], scale: float = 1.0, less: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Norms times `scale`: right where these are within float32's range."""
        if self._device.type == "mps":
            return self._in_float32(tensors)
        parts = [
            chunk.norms(_at(places, tensors), scale, _at(places, less) if less else None)
            for places, chunk in self._chunks
        ]
        large, single = _at(self._large, tensors), _at(self._single, tensors)
        if less is not None:
            large = list(map(_less, large, _at(self._large, less)))
            single = list(map(_less, single, _at(self._single, less)))
        parts += [_row_norms(_times(tensor, scale)) for tensor in large]
        if single:
            parts.append(torch.stack(torch._foreach_norm(single, 2, torch.float64)) * scale)
        found = torch.zeros(self._count, dtype=torch.float64, device=self._device)
        if parts:
            squares = torch.cat(parts).double().square_()
            squares = squares if self._shares is None else squares.mul_(self._shares)
            found.index_add_(0, self._groups, squares)
        return found.sqrt_()

    def _in_float32(self, tensors: Sequence[Tensor]) -> Tensor:
        found = [torch.zeros((), device=self._device) for _ in range(self._count)]
        for tensor, group in zip(tensors, self._groups.tolist(), strict=True):
            found[group] = torch.hypot(found[group], _scaled_norm(tensor))
        return torch.stack(found)


class _Rows:
    """Rows into which tensors are copied, each in rows of its own; what it does not fill is 0."""

    def __init__(self, like: Sequence[Tensor]):
        counts = [_count(tensor) for tensor in like]
        self._rows = torch.zeros(sum(counts), _ROW)
        self._parts = []
        for tensor, rows in zip(like, self._rows.split(counts), strict=True):
            # In the tensor's own order a copy costs least.
            strides = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape).stride()
            self._parts.append(rows.as_strided(tensor.shape, strides, rows.storage_offset()))

    def norms(self, tensors: list[Tensor], scale: float, less: list[Tensor] | None) -> Tensor:
        """In float32, [rows], of the tensors (less those) times `scale`."""
        torch._foreach_copy_(self._parts, tensors)
        if less is not None:
            torch._foreach_sub_(self._parts, less)
        if scale != 1:
            self._rows.mul_(scale)
        return torch.linalg.vector_norm(self._rows, dim=1)


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


def _at(places: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[i] for i in places]


def _less(tensor: Tensor, other: Tensor) -> Tensor:
    """Their difference, exact in half precision too."""
    return tensor.float() - other.float() if tensor.element_size() < 4 else tensor - other


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor.float() * scale


def _count(tensor: Tensor) -> int:
    """How many rows it makes."""
    return -(-tensor.numel() // _ROW)


def _chunks(places: Sequence[int], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    chunk: list[int] = []
    rows = 0
    for place in places:
        count = _count(tensors[place])
        if chunk and rows + count > _CHUNK:
            yield chunk
            chunk, rows = [], 0
        chunk.append(place)
        rows += count
    if chunk:
        yield chunk


def _row_norms(tensor: Tensor) -> Tensor:
    """Norms in float32 of a tensor's rows, of which the last may be shorter."""
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    count, rest = divmod(tensor.numel(), _ROW)
    # In the order in which the elements lie: without a copy in any memory format.
    norms = torch.linalg.vector_norm(tensor.as_strided((count, _ROW), (_ROW, 1)), dim=1)
    if not rest:
        return norms
    start = tensor.storage_offset() + count * _ROW
    last = tensor.as_strided((rest,), (1,), start)
    return torch.cat([norms, torch.linalg.vector_norm(last).view(1)])


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in any order."""
    if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
        return True
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != size:
            return False
        size *= length
    return True


def _scaled_norm(tensor: Tensor) -> Tensor:
    largest = tensor.abs().amax().float()
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(tensor.float() / usable) * usable
