"""Where measured values wait on the device until they leave it in chunks."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from gradflow.recording.norms import gather
from gradflow.recording.quantities import Quantity

FLUSH_STEPS = 256
"""Steps after which a buffer is full, however small they are."""
FLUSH_SECONDS = 20.0
"""After which what waits is written, where it is written at all: a crash loses no more."""
BUFFER_BYTES = 4 * 2**20
"""Size of a table's buffer on the device at most, at least one step."""


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
        dtype = torch.float32 if device.type == "mps" else torch.float64
        shape = (self.rows, layers, len(chosen))
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._measured = np.zeros(shape, dtype=bool)
        self._elements = np.zeros(shape, dtype=np.float64)
        self._seen: dict[int, Tensor] = {}  # row -> elements by rank and place, −1 for none
        self._is_rms = torch.tensor([quantity.is_rms for quantity in chosen], device=device)
        self._is_gradient = torch.tensor([q.is_gradient for q in chosen], device=device)
        self._zero = torch.zeros((), dtype=dtype, device=device)
        self._loose: dict[int, Tensor] = {}  # place in a row -> norm
        self._counts: dict[int, int] = {}  # place in a row -> elements
        self._places: tuple[list[int], Tensor] = ([], torch.zeros(0, dtype=torch.int64))
        self.steps: list[int] = []

    @property
    def full(self) -> bool:
        return len(self.steps) >= self.rows

    def add(self, layer: int, name: str, value: Tensor, elements: int) -> None:
        """Combine one tensor's norm into the step under way."""
        place = layer * len(self.chosen) + self.index[name]
        before = self._loose.get(place, self._zero)
        self._loose[place] = value if before is self._zero else torch.hypot(before, value)
        self._counts[place] = self._counts.get(place, 0) + elements

    def expect(self, layer: int, name: str) -> None:
        """Zero, measured, unless something is added in the course of the step."""
        self._loose.setdefault(layer * len(self.chosen) + self.index[name], self._zero)

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
            values[self._places[1]] = torch.stack(list(self._loose.values())).to(values.dtype)
        if scale is not None:
            self._values[row] /= torch.where(self._is_gradient, scale.to(values.dtype), 1.0)
        if world > 1:
            self._combine(row, places, counts, world)
        else:
            self._measured[row].reshape(-1)[places] = True
            self._elements[row].reshape(-1)[places] = counts
        self.forget()

    def _combine(self, row: int, places: list[int], counts: list[int], world: int) -> None:
        """Make a row of this rank's norms one of all ranks', which may have measured other places.

        DDP takes the mean of the ranks' losses: to its gradient a rank's own contributes the
        `world`th part. How many elements there were stays on the device as well.
        """
        seen = torch.full((self._values[row].numel(),), -1, dtype=torch.int64)
        seen[places] = torch.tensor(counts, dtype=torch.int64)
        self._seen[row] = gather(seen.to(self._values.device), world)
        self._values[row] *= torch.where(self._is_rms, 1.0, 1 / world)
        self._values[row] = functools.reduce(torch.hypot, gather(self._values[row], world).unbind())

    def forget(self) -> None:
        """Drop what was added since the last row."""
        self._loose.clear()
        self._counts.clear()

    def open(self, step: int) -> None:
        """Begin the row of `step`."""
        self.steps.append(step)

    def fill(self, name: str, values: Tensor, measured: np.ndarray) -> None:
        """Set the last row of a norm for all layers at once."""
        row, column = len(self.steps) - 1, self.index[name]
        self._values[row, :, column] = values
        self._measured[row, :, column] = measured

    def current(self, name: str) -> Tensor:
        """The last row of a quantity, on the device."""
        return self._values[len(self.steps) - 1, :, self.index[name]]

    def drain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(steps [r], values [r, layers, quantities], measured) so far, and an empty buffer."""
        count = len(self.steps)
        steps = np.array(self.steps, dtype=np.int32)
        values = self._values[:count].cpu().numpy().astype(np.float64)
        for row, by_rank in self._seen.items():
            seen = by_rank.cpu().numpy().reshape(len(by_rank), *self._measured.shape[1:])
            self._measured[row] = (seen >= 0).any(axis=0)
            self._elements[row] = seen.clip(min=0).sum(axis=0)
        measured = self._measured[:count].copy()
        for column, quantity in enumerate(self.chosen):
            if quantity.is_rms:
                values[:, :, column] /= np.sqrt(np.maximum(self._elements[:count, :, column], 1))
        self._values[:count] = 0
        self._measured[:count] = False
        self._elements[:count] = 0
        self._seen.clear()
        self.steps.clear()
        return steps, values, measured
