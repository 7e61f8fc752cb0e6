"""When to measure: a schedule says of a step's number whether it is measured."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[int], bool]


def every(n: int, *, first: int = 0) -> Schedule:
    """Steps 0, n, 2n, … and the first `first` steps; never at all where n is 0."""
    if n == 0:
        return lambda step: False
    return lambda step: step % n == 0 or step < first


FIRST_STEPS = 5
"""Steps at the start that are measured however rarely a table is."""

DEFAULTS: dict[str, Schedule] = {
    "weights": every(1),
    "outputs": every(10, first=FIRST_STEPS),
    "blocks": every(10, first=FIRST_STEPS),
}
"""Schedule of each table where none is given."""
