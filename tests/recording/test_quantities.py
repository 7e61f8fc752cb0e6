"""The list of quantities, and schedules."""

import pytest

from gradflow.errors import SpecError
from gradflow.recording.quantities import ALL, DEFAULT, QUANTITIES, STEPS, meanings, select
from gradflow.recording.schedules import DEFAULTS, every

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


def test_quantities_by_name() -> None:
    assert names(select("skip_rms")) == {"blocks": ["skip_rms"]}
    assert names(select(["weight_norm", "output_rms", "weight_grad_norm"])) == {
        "weights": ["weight_grad_norm", "weight_norm"], "outputs": ["output_rms"]
    }  # fmt: skip
    assert select(()) == {}


@pytest.mark.parametrize("wrong", ["grad", ["weight_norm", "grad"]])
def test_unknown_quantities_are_named(wrong: str | list[str]) -> None:
    with pytest.raises(SpecError, match=r"^quantities=grad: allowed is default, all, or weight_"):
        select(wrong)


def test_names_say_norm_or_rms_and_each_has_its_meaning() -> None:
    for name, quantity in QUANTITIES.items():
        assert name.endswith(("_norm", "_rms"))
        assert quantity.is_rms == ("root mean square" in quantity.meaning)
        assert quantity.is_rms != ("L2 norm" in quantity.meaning)
        assert quantity.unit
    assert set(meanings()) == set(ALL) | set(STEPS)
    assert all(set(note) == {"unit", "meaning"} for note in meanings().values())


def test_every() -> None:
    assert [step for step in range(25) if every(10)(step)] == [0, 10, 20]
    assert [step for step in range(12) if every(5, first=3)(step)] == [0, 1, 2, 5, 10]
    assert not any(every(0, first=5)(step) for step in range(10))
    assert set(DEFAULTS) == set(TABLES)
