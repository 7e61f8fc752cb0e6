"""Where measured values wait on the device until they leave it in chunks."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradflow.recording.norms import gather
from gradflow.recording.quantities import Quantity

Value = Tensor | float
"""What is measured: on the CPU a number, elsewhere a 0-d tensor that stays on the device; units
that are reached, for `dead`, a tensor of bool [units] anywhere."""

FLUSH_STEPS = 256
"""Steps after which a buffer is full, however small they are."""
FLUSH_SECONDS = 20.0
"""After which what waits is written, where it is written at all: a crash loses no more."""
BUFFER_BYTES = 4 * 2**20
"""Size of a table's buffer on the device at most, at least one step."""
FEW = 16
"""Values to a unit below which that all are zero may be chance: 2⁻¹⁶ for one that is off half the
time."""


def _larger(one: float, other: float) -> float:
    return other if other > one or math.isnan(other) else one


def _either(one: Tensor, other: Tensor) -> Tensor:
    return one | other if len(one) == len(other) else torch.cat([one, other])


_COMBINE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "norm": (math.hypot, torch.hypot),
    "rms": (math.hypot, torch.hypot),
    "max": (_larger, torch.maximum),
    "sum": (operator.add, operator.add),
    "share": (operator.add, operator.add),
    "mean": (operator.add, operator.add),
    "dead": (_either, _either),
}
"""Two values of one place as one, by reduction: on the CPU, elsewhere."""


class Buffer:
    """Values of one table: steps × layers × quantities on the device, emptied in chunks.

    What is measured in the course of a step stays loose until `close` makes it a row, so that rows
    are whole steps. Norms of several tensors for one value combine by hypot, which neither under-
    nor overflows.
    """

    def __init__(self, layers: int, chosen: list[Quantity], device: torch.device):
        self.chosen = chosen
        self.index = {quantity.name: column for column, quantity in enumerate(chosen)}
        rows = BUFFER_BYTES // (8 * layers * len(chosen))
        self.rows = max(1, min(FLUSH_STEPS, rows))
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._on_cpu = device.type == "cpu"
        shape = (self.rows, layers, len(chosen))
        self._values = torch.zeros(shape, dtype=self._dtype, device=device)
        self._array = self._values.numpy() if self._on_cpu else None  # the same memory
        self._measured = np.zeros(shape, dtype=bool)
        self._elements = np.zeros(shape, dtype=np.float64)
        self._seen: dict[int, Tensor] = {}  # row -> elements by rank and place, −1 for none
        self._is_gradient = torch.tensor([q.is_gradient for q in chosen], device=device)
        self._combine = {  # column -> how; ratios are never added up
            column: _COMBINE[quantity.reduction][not self._on_cpu]
            for column, quantity in enumerate(chosen)
            if quantity.reduction in _COMBINE
        }
        self._loose: dict[int, Value] = {}  # place in a row -> value
        self._counts: dict[int, int] = {}  # place in a row -> elements
        self._places: tuple[list[int], Tensor] = ([], torch.zeros(0, dtype=torch.int64))
        self.steps: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.steps) >= self.rows

    def add(self, layer: int, name: str, value: Value, elements: int) -> None:
        """Combine one tensor's value into the step under way."""
        column = self.index[name]
        place = layer * len(self.chosen) + column
        before = self._loose.get(place)
        if before is None:
            self._loose[place], self._counts[place] = value, elements
        else:
            self._loose[place] = self._combine[column](before, value)
            self._counts[place] = self._counts.get(place, 0) + elements

    def expect(self, layer: int, name: str) -> None:
        """Zero, measured, unless something is added in the course of the step."""
        zero = 0.0 if self._on_cpu else self._values.new_zeros(())
        self._loose.setdefault(layer * len(self.chosen) + self.index[name], zero)

    def close(self, step: int, world: int = 1, scale: Tensor | None = None) -> None:
        """Make what was added the row of `step`, all at once: one by one costs ten times.

        With several ranks, what was added on all of them; each calls this at the same steps.
        Where the loss was scaled by `scale`, gradients are divided by it.
        """
        if not self._loose and world == 1:
            return
        self.open(step)
        row, places = len(self.steps) - 1, list(self._loose)
        values, counts = self._values[row].view(-1), [self._counts.get(p, 0) for p in places]
        if places != self._places[0]:
            self._places = (places, torch.tensor(places, device=self._values.device))
        if places:
            values[self._places[1]] = self._joined()
        if scale is not None:
            self._values[row] /= torch.where(self._is_gradient, scale.to(values.dtype), 1.0)
        if world > 1:
            self._over_ranks(row, places, counts, world)
        else:
            self._measured[row].reshape(-1)[places] = True
            self._elements[row].reshape(-1)[places] = counts
        self.forget()

    def _joined(self) -> Tensor:
        """What was added, as one vector."""
        loose = list(self._loose.values())
        loose = [self._dead_share(v) if isinstance(v, Tensor) and v.dim() else v for v in loose]
        if self._on_cpu:
            return torch.tensor(loose, dtype=self._dtype)
        tensors = [torch.as_tensor(value, device=self._values.device) for value in loose]
        return torch.stack([tensor.to(self._dtype) for tensor in tensors])

    def _dead_share(self, reached: Tensor) -> Tensor:
        return (~reached).sum().to(self._dtype) / len(reached)

    def _over_ranks(self, row: int, places: list[int], counts: list[int], world: int) -> None:
        """Make a row of this rank's values one of all ranks', which may have measured other places.

        DDP takes the mean of the ranks' losses: to its gradient a rank's own contributes the
        `world`th part. How many elements there were stays on the device as well.
        """
        seen = torch.full((self._values[row].numel(),), -1, dtype=torch.int64)
        seen[places] = torch.tensor(counts, dtype=torch.int64)
        self._seen[row] = gather(seen.to(self._values.device), world)
        self._values[row] /= torch.where(self._is_gradient, world, 1)
        everyone = gather(self._values[row], world)
        for column, quantity in enumerate(self.chosen):
            self._values[row, :, column] = over_ranks(everyone[:, :, column], quantity.reduction)

    def forget(self) -> None:
        """Drop what was added since the last row."""
        self._loose.clear()
        self._counts.clear()

    def open(self, step: int) -> None:
        """Begin the row of `step`."""
        self.steps.append(step)

    def fill(self, name: str, values: Tensor, measured: np.ndarray, elements: Any = 1) -> None:
        """Set a quantity's values of all layers in the last row, and the elements each is of."""
        row, column = len(self.steps) - 1, self.index[name]
        if self._array is not None:
            self._array[row, :, column] = values.numpy()
        else:
            self._values[row, :, column] = values
        self._measured[row, :, column] = measured
        self._elements[row, :, column] = elements

    def current(self, name: str) -> Tensor:
        """The last row of a quantity, on the device."""
        return self._values[len(self.steps) - 1, :, self.index[name]]

    def drain(self) -> Drained:
        """What was measured so far; the buffer is then empty."""
        count = len(self.steps)
        for row, by_rank in self._seen.items():
            seen = by_rank.cpu().numpy().reshape(len(by_rank), *self._measured.shape[1:])
            self._measured[row] = (seen >= 0).any(axis=0)
            self._elements[row] = seen.clip(min=0).sum(axis=0)
        drained = Drained(
            np.array(self.steps, dtype=np.int32),
            self._values[:count].cpu().numpy().astype(np.float64),
            self._measured[:count].copy(),
            self._elements[:count].copy(),
        )
        self._values[:count] = 0
        self._measured[:count] = False
        self._elements[:count] = 0
        self._seen.clear()
        self.steps.clear()
        return drained


@dataclass
class Drained:
    """What left a buffer.

    Attributes:
        steps: [r].
        values: [r, layers, quantities]: before they are divided by elements, until `finish`.
        measured: which of them are.
        elements: how many each is of; of `dead`, of each unit.
    """

    steps: np.ndarray
    values: np.ndarray
    measured: np.ndarray
    elements: np.ndarray

    def finish(self, chosen: list[Quantity]) -> None:
        """Divide by the elements what is of each of them; drop what is not defined."""
        elements = np.maximum(self.elements, 1)
        for column, quantity in enumerate(chosen):
            if quantity.reduction == "rms":
                self.values[..., column] /= np.sqrt(elements[..., column])
            elif quantity.reduction in ("share", "mean"):
                self.values[..., column] /= elements[..., column]
            elif quantity.reduction == "dead":
                self.measured[..., column] &= elements[..., column] >= FEW
            if quantity.reduction in ("ratio", "mean"):
                self.measured[..., column] &= np.isfinite(self.values[..., column])


def over_ranks(values: Tensor, reduction: str) -> Tensor:
    """[ranks, …] of what each rank has as one, […]; 0 where it has nothing."""
    if reduction in ("norm", "rms"):
        return functools.reduce(torch.hypot, values.unbind())
    return values.amax(dim=0) if reduction == "max" else values.sum(dim=0)
