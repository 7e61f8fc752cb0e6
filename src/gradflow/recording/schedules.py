"""When to measure: a schedule says of a step's number whether it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradflow.errors import SpecError
from gradflow.recording.quantities import QUANTITIES, Quantity

Schedule = Callable[[int], bool]


def every(n: int, *, first: int = 0) -> Schedule:
    """Steps 0, n, 2n, … and the first `first` steps; never at all where n is 0."""
    if n == 0:
        return lambda step: False
    return lambda step: step % n == 0 or step < first


FIRST_STEPS = 5
"""Steps at the start that are measured however rarely a table is."""

_SELDOM = every(10, first=FIRST_STEPS)
DEFAULTS: dict[str, Schedule] = {
    "weights": every(1),
    "outputs": _SELDOM,
    "blocks": _SELDOM,
    "details": _SELDOM,
    "weight_norm": _SELDOM,  # it moves slowly
    "grad_rank": every(100),
}
"""Where none is given: of each table's norms, and of what is recorded where it is asked for."""


def scheduled(
    schedule: Schedule | Mapping[str, Schedule] | None, chosen: Mapping[str, list[Quantity]]
) -> dict[str, Schedule]:
    """The schedule of each chosen quantity: its own, else its table's, or that of details.

    Raises:
        SpecError: a key that is neither.
    """
    given = dict(schedule) if isinstance(schedule, Mapping) else {}
    for one in given.values() if isinstance(schedule, Mapping) else (schedule,):
        if one is not None and not callable(one):
            raise SpecError(f"schedule: {one!r}: wants functions of the step, such as every(10)")
    for name in given:
        if name not in DEFAULTS and name not in QUANTITIES:
            allowed = ", ".join(("weights", "outputs", "blocks", "details"))
            raise SpecError(f"schedule: {name}: allowed is {allowed}, or a quantity's name")
    known = DEFAULTS | given
    found = {}
    for quantity in (q for table in chosen.values() for q in table):
        group = "details" if quantity.is_detail else quantity.table
        own = given.get(quantity.name) or (group not in given and known.get(quantity.name))
        found[quantity.name] = own or known[group]
    return dict.fromkeys(found, schedule) if callable(schedule) else found
