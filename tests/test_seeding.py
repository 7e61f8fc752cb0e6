"""Derived seeds are frozen: to change them changes every run."""

from gradflow.seeding import derived_seed


def test_frozen_values() -> None:
    assert derived_seed(0, "conv1.weight") == 2_154_377_922_605_724_943
    assert derived_seed(3, 7) == 988_283_059_327_980_205


def test_parts_are_told_apart() -> None:
    parts = [(0, 1), (1, 0), (0, "1"), ("0", "1"), (0,), (0, 1, 0), ("01",), (1,)]
    seeds = {derived_seed(*each) for each in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
