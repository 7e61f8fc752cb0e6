"""L2 norms that neither underflow at elements of 1e-30 nor overflow at 1e25 in float32.

Float64 accumulation is always right, and on a GPU as fast as memory. On a CPU float32 is two to
three times faster, but adds up one after another in each of its few lanes: where one element dwarfs
the others, 36,864 of them err by up to 2e-4, and squares leave the format from 1e19 on and below
1e-19. So float32 adds up rows of `_ROW` elements, whose error has a bound, float64 adds up the
rows, and what comes out near an end of the format is measured again, scaled.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

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
_LARGE = 2**14
"""Elements from which a call costs less than a copy."""
_CHUNK = 2**11
"""Rows that are copied together at most: 1 MB, to stay in a cache."""
_BYTES = operator.attrgetter("nbytes")


def norm(tensor: Tensor) -> Tensor:
    """L2 norm over all elements, a 0-d tensor; right for elements from 1e-154 to 1e154.

    In float64 where the device has it, elsewhere scaled by the largest element. On the CPU, where
    looking at a value costs nothing, float32 comes first, and what float64 has lost is scaled.
    """
    kind = tensor.device.type
    if kind == "mps":
        return _scaled_norm(tensor)
    is_wide = tensor.dtype == torch.float64
    if kind == "cpu" and not is_wide and tensor.numel() >= _FEW:
        quick = _exact(_row_norms(tensor))
        if _SAFE < quick.item() < math.inf:
            return quick
    found = _exact(tensor)
    if kind == "cpu" and is_wide and tensor.numel() and not 0 < found.item() < math.inf:
        return _scaled_norm(tensor)
    return found


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """`norm` of each tensor, as one vector on their device."""
    with torch.no_grad():
        return Norms(tensors)(tensors)


class Norms:
    """`norms` of tensors whose shapes and formats are those of `like`, again and again.

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
        self._sizes = list(map(_BYTES, like))
        self._count = len(like) if count is None else count
        self._device = like[0].device if like else torch.device("cpu")
        filled = [place for place, tensor in enumerate(like) if tensor.numel()]
        has_rows = [self._device.type == "cpu" and t.dtype != torch.float64 for t in like]
        self._parts = _parts([place for place in filled if has_rows[place]], like)
        self._others = [place for place in filled if not has_rows[place]]
        order = [place for part in self._parts for place in part.places]
        counts = [count for part in self._parts for count in part.counts]
        self._rows = torch.empty(sum(counts))
        lengths = [sum(part.counts) for part in self._parts]
        for part, rows in zip(self._parts, self._rows.split(lengths), strict=True):
            part.out = rows
        self._starts = np.cumsum([0, *counts[:-1]])  # of each tensor's rows
        self._groups = np.array([groups[place] for place in order], dtype=np.int64)
        self._other_groups = torch.tensor(
            [groups[i] for i in self._others], dtype=torch.int64, device=self._device
        )
        self._shares = self._other_shares = None
        if shares is not None:
            squares = np.square(shares)
            self._shares = squares[order]
            self._other_shares = torch.as_tensor(squares[self._others], device=self._device)
        known = sorted({groups[place] for place in filled})
        self._known = None if len(known) == self._count else known

    def __call__(self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None = None) -> Tensor:
        """The norms, [groups], of the tensors, or of what they are more than `less`.

        Without gradients (`torch.no_grad`). Float64, float32 where the device has none.

        Raises:
            RuntimeError: another number of tensors, other shapes, or sparse tensors.
        """
        if list(map(_BYTES, tensors)) != self._sizes:
            raise RuntimeError("Norms: tensors of other sizes than before")
        if self._device.type != "cpu":
            return self._of_others(tensors, less, 1.0)
        found = self._measure(tensors, less)
        known = found.tolist() if self._known is None else found[self._known].tolist()
        if min(known, default=1.0) > _SAFE and max(known, default=1.0) < math.inf:
            return found
        lost, over = found <= _SAFE, found.isinf()
        if lost.any():
            found = torch.where(lost, self._measure(tensors, less, _SCALE) / _SCALE, found)
        if over.any():
            found = torch.where(over, self._measure(tensors, less, 1 / _SCALE) * _SCALE, found)
        return found

    def _measure(
        self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None, scale: float = 1.0
    ) -> Tensor:
        """Norms times `scale`, on the CPU: right where these are within float32's range."""
        if not self._parts:
            return self._of_others(tensors, less, scale)
        for part in self._parts:
            part.measure(tensors, less, scale)
        squares = self._rows.numpy().astype(np.float64)
        squares *= squares
        squares = np.add.reduceat(squares, self._starts)
        squares = squares if self._shares is None else squares * self._shares
        found = np.bincount(self._groups, weights=squares, minlength=self._count)
        mine = torch.from_numpy(np.sqrt(found, out=found))
        return mine.hypot_(self._of_others(tensors, less, scale)) if self._others else mine

    def _of_others(
        self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None, scale: float
    ) -> Tensor:
        """Those times `scale` of what float64 reads, or of all on a device without it."""
        there = _at(self._others, tensors)
        if less is not None:
            there = list(map(_less, there, _at(self._others, less)))
        if self._device.type == "mps":
            return self._in_float32(there)
        found = torch.zeros(self._count, dtype=torch.float64, device=self._device)
        if there:
            there = there if scale == 1 else list(torch._foreach_mul(there, scale))
            squares = torch.stack(torch._foreach_norm(there, 2, torch.float64)).square_()
            squares = squares if self._other_shares is None else squares.mul_(self._other_shares)
            found.index_add_(0, self._other_groups, squares)
        return found.sqrt_()

    def _in_float32(self, tensors: Sequence[Tensor]) -> Tensor:
        found = [torch.zeros((), device=self._device) for _ in range(self._count)]
        for tensor, group in zip(tensors, self._other_groups.tolist(), strict=True):
            found[group] = torch.hypot(found[group], _scaled_norm(tensor))
        return torch.stack(found)


# --- rows of float32 on the CPU -------------------------------------------------------------------


class _Part(Protocol):
    """The tensors at these `places`, as so many rows each (`counts`)."""

    places: list[int]
    counts: list[int]
    out: Tensor

    def measure(
        self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None, scale: float
    ) -> None:
        """Write the rows' norms to `out`: of the tensors (less those) times `scale`."""


def _parts(places: Sequence[int], like: Sequence[Tensor]) -> list[_Part]:
    """Each tensor in the part where it costs least: a call for each takes longer than the numbers,
    but where it has so many that a copy does."""
    vectors: list[int] = []
    large: list[int] = []
    small: dict[Any, list[int]] = {}
    for place in places:
        tensor = like[place]
        if tensor.dim() == 1 and tensor.numel() < _FEW:
            vectors.append(place)
        elif tensor.numel() >= _LARGE:
            large.append(place)
        else:
            small.setdefault((tensor.shape, tensor.dtype), []).append(place)
    order = [place for alike in small.values() for place in alike]
    parts: list[_Part] = [_Block(chunk, like) for chunk in _chunks(order, like)]
    parts += [_Vectors(vectors, like)] if vectors else []
    return parts + ([_Large(large, like)] if large else [])


class _Vectors:
    """Short vectors, one behind another: each element is a row."""

    out: Tensor

    def __init__(self, places: list[int], like: Sequence[Tensor]):
        self.places, self.counts = places, [like[place].numel() for place in places]

    def measure(
        self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None, scale: float
    ) -> None:
        _join(_at(self.places, tensors), self.out)
        if less is not None:
            self.out.sub_(torch.cat(_at(self.places, less)))
        if scale != 1:
            self.out.mul_(scale)


class _Block:
    """Small tensors, copied into rows, each into its own; what one does not fill is 0.

    Those of one shape that fill rows follow each other and are copied together.
    """

    out: Tensor

    def __init__(self, places: list[int], like: Sequence[Tensor]):
        self.places, self.counts = places, [_count(like[place]) for place in places]
        self._rows = torch.zeros(sum(self.counts), _ROW)
        self._joined: list[tuple[list[int], Tensor]] = []
        self._single: list[int] = []
        self._copies: list[Tensor] = []
        first = 0
        for _, group in groupby(places, lambda place: (like[place].shape, like[place].dtype)):
            alike = list(group)
            if len(alike) > 1 and like[alike[0]].numel() % _ROW == 0:
                self._joined.append((alike, self._lay(first, torch.cat(_at(alike, like)))))
            else:
                count = _count(like[alike[0]])
                self._single += alike
                self._copies += [
                    self._lay(first + i * count, like[place]) for i, place in enumerate(alike)
                ]
            first += sum(_count(like[place]) for place in alike)

    def _lay(self, row: int, tensor: Tensor) -> Tensor:
        """Place for such a tensor from that row on, in its own order: so a copy costs least."""
        strides = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape).stride()
        return self._rows.as_strided(tensor.shape, strides, row * _ROW)

    def measure(
        self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None, scale: float
    ) -> None:
        for alike, values in self._joined:
            _join(_at(alike, tensors), values)
        if self._single:
            torch._foreach_copy_(self._copies, _at(self._single, tensors))
        if less is not None:
            for alike, values in self._joined:
                values.sub_(torch.cat(_at(alike, less)))
            if self._single:
                torch._foreach_sub_(self._copies, _at(self._single, less))
        if scale != 1:
            self._rows.mul_(scale)
        torch.linalg.vector_norm(self._rows, dim=1, out=self.out)


class _Large:
    """Tensors that are read where they lie."""

    out: Tensor

    def __init__(self, places: list[int], like: Sequence[Tensor]):
        self.places, self.counts = places, [_count(like[place]) for place in places]

    @cached_property
    def _rows(self) -> tuple[Tensor, ...]:
        return self.out.split(self.counts)

    def measure(
        self, tensors: Sequence[Tensor], less: Sequence[Tensor] | None, scale: float
    ) -> None:
        for place, rows in zip(self.places, self._rows, strict=True):
            tensor = tensors[place] if less is None else _less(tensors[place], less[place])
            _row_norms(tensor if scale == 1 else tensor.float() * scale, rows)


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


def _join(tensors: list[Tensor], into: Tensor) -> None:
    """Copy tensors of one shape, but for the first axis, one behind another.

    Raises:
        RuntimeError: they are of other shapes than what is to hold them.
    """
    shape = into.shape
    if torch.cat(tensors, out=into).shape != shape:
        raise RuntimeError("Norms: tensors of other shapes than before")


def _less(tensor: Tensor, other: Tensor) -> Tensor:
    """Their difference, exact in half precision too."""
    return tensor.float() - other.float() if tensor.element_size() < 4 else tensor - other


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


def _row_norms(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    """Norms in float32 of a tensor's rows, of which the last may be shorter."""
    if not _is_dense(tensor):
        tensor = tensor.contiguous()
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    count, rest = divmod(tensor.numel(), _ROW)
    out = tensor.new_empty(_count(tensor)) if out is None else out
    # In the order in which the elements lie: without a copy in any memory format.
    whole = tensor.as_strided((count, _ROW), (_ROW, 1))
    torch.linalg.vector_norm(whole, dim=1, out=out[:count] if rest else out)
    if rest:
        last = tensor.as_strided((rest,), (1,), tensor.storage_offset() + count * _ROW)
        torch.linalg.vector_norm(last, out=out[count])
    return out


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
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    largest = wide.abs().amax()
    usable = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
    return torch.linalg.vector_norm(wide / usable) * usable
