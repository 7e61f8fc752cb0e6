"""The last steps in full detail, as long as nothing goes wrong: for when something does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradflow.recording.buffers import Drained
from gradflow.recording.layers import Layer
from gradflow.recording.quantities import Quantity

Rule = Callable[[Mapping[str, float]], bool]
"""Whether a step's row of the table `steps` (`loss`, `grad_norm`, `lr`, …) is worth the record."""

_ARRAYS = {"steps": np.int32, "values": np.float64, "measured": bool, "elements": np.float64}


class Flight:
    """What was measured in the last `length` steps that left the buffers."""

    def __init__(self, length: int):
        self._length = length
        self._tables: dict[str, Drained] = {}
        self._rows: list[dict[str, Any]] = []
        self._written = -1  # the last step that was

    def state_dict(self) -> dict[str, Any]:
        """What is kept, as plain data."""
        tables = {
            name: {label: getattr(found, label).tolist() for label in _ARRAYS}
            for name, found in self._tables.items()
        }
        return {"rows": list(self._rows), "written": self._written, "tables": tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what that one had."""
        self._rows, self._written = list(state["rows"]), state["written"]
        self._tables = {
            name: Drained(*(np.array(found[label], kind) for label, kind in _ARRAYS.items()))
            for name, found in state["tables"].items()
            if found["steps"]
        }

    def keep(self, drained: Mapping[str, Drained], rows: list[dict[str, Any]]) -> None:
        """Take in what leaves the buffers, and forget what is too old."""
        if not rows:
            return
        self._rows = [*self._rows, *rows]
        for table, found in drained.items():
            before = self._tables.get(table)
            self._tables[table] = found if before is None else _joined(before, found)

    def forget(self) -> None:
        """Drop what is older than the last `length` steps."""
        self._rows = self._rows[-self._length :]
        first = self._rows[0]["step"] if self._rows else 0
        self._tables = {name: _since(found, first) for name, found in self._tables.items()}

    def columns(
        self,
        step: int,
        layers: Mapping[str, Sequence[Layer]],
        chosen: Mapping[str, Sequence[Quantity]],
    ) -> dict[str, list[Any]]:
        """What led to `step`, that step included: step, layer, quantity, value; each step once.

        `layer` is None for numbers of the table `steps`.
        """
        first = max(step - self._length, self._written) + 1
        self._written = max(step, self._written)
        found: list[tuple[int, str | None, str, float]] = []
        for row in self._rows:
            if first <= row["step"] <= step:
                values = {name: value for name, value in row.items() if name != "step"}
                found += [(row["step"], None, name, value) for name, value in values.items()]
        for table, kept in self._tables.items():
            within = (first <= kept.steps) & (kept.steps <= step)
            for place, layer, column in zip(
                *np.nonzero(kept.measured & within[:, None, None]), strict=True
            ):
                name, value = chosen[table][column].name, float(kept.values[place, layer, column])
                found.append((int(kept.steps[place]), layers[table][layer].layer, name, value))
        names = ("step", "layer", "quantity", "value")
        found.sort(key=lambda row: row[0])
        return {name: [row[i] for row in found] for i, name in enumerate(names)}


def _joined(one: Drained, other: Drained) -> Drained:
    return Drained(
        *(np.concatenate([getattr(one, name), getattr(other, name)]) for name in _ARRAYS)
    )


def _since(found: Drained, first: int) -> Drained:
    kept = found.steps >= first
    return replace(
        found,
        steps=found.steps[kept],
        values=found.values[kept],
        measured=found.measured[kept],
        elements=found.elements[kept],
    )
