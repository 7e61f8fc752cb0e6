"""The list of quantities, and schedules."""

import pytest

from gradflow.errors import SpecError
from gradflow.recording.quantities import (
    ALL,
    DEFAULT,
    DETAILS,
    QUANTITIES,
    STEPS,
    Conditions,
    meanings,
    select,
)
from gradflow.recording.schedules import DEFAULTS, every, scheduled

TABLES = {
    "weights": ["weight_grad_norm", "weight_norm", "update_norm"],
    "outputs": ["output_rms", "output_grad_norm"],
    "blocks": ["branch_rms", "skip_rms", "branch_grad_norm", "skip_grad_norm"],
}


def names(chosen: dict) -> dict[str, list[str]]:
    return {table: [quantity.name for quantity in found] for table, found in chosen.items()}


def test_tables_and_their_quantities() -> None:
    assert names(select("all")) == TABLES
    without = TABLES | {"weights": ["weight_grad_norm", "weight_norm"]}
    assert names(select("default")) == without
    assert set(ALL) - set(DEFAULT) == {"update_norm"}
    assert set(QUANTITIES) - set(ALL) == set(DETAILS)


def test_quantities_by_name_and_by_group() -> None:
    assert names(select("skip_rms")) == {"blocks": ["skip_rms"]}
    assert names(select(["weight_norm", "output_rms", "weight_grad_norm"])) == {
        "weights": ["weight_grad_norm", "weight_norm"], "outputs": ["output_rms"]
    }  # fmt: skip
    assert names(select(("default", "grad_max", "skip_rms")))["weights"] == [
        "weight_grad_norm", "weight_norm", "grad_max"
    ]  # fmt: skip
    every_one = [name for table in names(select(("all", "details"))).values() for name in table]
    assert sorted(every_one) == sorted(QUANTITIES)
    assert select(()) == {}


@pytest.mark.parametrize("wrong", ["grad", ["weight_norm", "grad"]])
def test_unknown_quantities_are_named(wrong: str | list[str]) -> None:
    with pytest.raises(SpecError, match=r"^quantities=grad: allowed is default, all, details, wei"):
        select(wrong)


def test_names_say_norm_or_rms_and_each_has_its_meaning() -> None:
    for name, quantity in QUANTITIES.items():
        assert quantity.is_norm == name.endswith(("_norm", "_rms"))
        assert (quantity.reduction == "rms") == ("root mean square" in quantity.meaning)
        assert (quantity.reduction == "norm") == ("L2 norm" in quantity.meaning)
        assert quantity.unit
    assert set(meanings()) == set(QUANTITIES) | set(STEPS)
    assert all(set(note) == {"unit", "meaning"} for note in meanings().values())


@pytest.mark.parametrize(
    ("quantity", "words"),
    [
        ("weight_grad_norm", "after unscaling, accumulated over 2 forward passes, before clipping"),
        ("grad_max", "after unscaling, accumulated over 2 forward passes, before clipping"),
        ("grad_subnormals", "accumulated over 2 forward passes, before clipping"),
        ("dead_units", "accumulated over 2 forward passes, before clipping"),
        ("output_rms", "accumulated over 2 forward passes"),
    ],
)
def test_conditions_that_matter(quantity: str, words: str) -> None:
    """What is divided by the loss's scale, and what is of the numbers as they are."""
    assert Conditions(passes=(2, 2), scaled=True).text(quantity) == f"{words}, eager"
    assert Conditions(passes=(2, 2), scaled=True).text("update_ratio") == ""


def test_every() -> None:
    assert [step for step in range(25) if every(10)(step)] == [0, 10, 20]
    assert [step for step in range(12) if every(5, first=3)(step)] == [0, 1, 2, 5, 10]
    assert not any(every(0, first=5)(step) for step in range(10))


def at(schedule: object, *quantities: str) -> dict[str, list[int]]:
    found = scheduled(schedule, select(quantities))  # type: ignore[arg-type]
    return {name: [step for step in range(201) if found[name](step)] for name in quantities}


def test_each_quantity_has_a_schedule() -> None:
    seldom = [0, 1, 2, 3, 4, *range(10, 201, 10)]
    expected = dict.fromkeys(QUANTITIES, seldom)
    expected |= {"weight_grad_norm": [*range(201)], "update_norm": [*range(201)]}
    assert at(None, *QUANTITIES) == expected | {"grad_rank": [0, 100, 200]}
    assert set(DEFAULTS) - set(QUANTITIES) == {*TABLES, "details"}


def test_schedules_by_table_by_group_and_by_quantity() -> None:
    once, twice, always = every(1000), every(100), every(1)
    given = {"weights": always, "details": once, "grad_max": twice}
    assert at(given, "weight_norm", "grad_zeros", "grad_rank", "grad_max", "output_rms") == {
        "weight_norm": [*range(201)], "grad_zeros": [0], "grad_rank": [0],
        "grad_max": [0, 100, 200], "output_rms": [0, 1, 2, 3, 4, *range(10, 201, 10)],
    }  # fmt: skip
    assert at(once, "weight_norm", "grad_rank") == {"weight_norm": [0], "grad_rank": [0]}
