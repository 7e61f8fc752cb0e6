"""Verdicts: intervals, regions, identities; and that every finding can come out either way."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import experiments
from gradflow import findings
from gradflow.errors import GradflowError, SpecError
from gradflow.findings import (
    CONTRADICTED,
    FIRST_SEED,
    INCONCLUSIVE,
    NOT_RUN,
    REPRODUCED,
    Comparison,
    Finding,
    Region,
    about,
    above,
    below,
    between,
    decide,
    exactly,
    judge,
)
from gradflow.measures import metric, metric_difference

FINDINGS = experiments.load()


def comparison(region, *, ratio=False):
    return Comparison("a number", ("arm",), metric(), region, ratio=ratio)


def judged(region, values, *, ratio=False, comparisons=1):
    numbers = dict(enumerate(values, FIRST_SEED))
    return judge(comparison(region, ratio=ratio), numbers, comparisons)


# --- one comparison -------------------------------------------------------------------------------

SAMPLE = [1.01, 0.99, 1.00, 1.02, 0.98]


@pytest.mark.parametrize(
    ("region", "word"),
    [
        (between(0.9, 1.1), REPRODUCED),
        (between(1.1, 1.2), CONTRADICTED),
        (below(0.9), CONTRADICTED),
        (above(0.9), REPRODUCED),
        (above(1.01), INCONCLUSIVE),
        (between(0.99, 1.01), INCONCLUSIVE),
    ],
)
def test_the_interval_decides(region, word):
    found = judged(region, SAMPLE)
    half = stats.t.ppf(0.975, 4) * np.std(SAMPLE, ddof=1) / math.sqrt(5)
    assert (found.low, found.mean, found.high) == pytest.approx((1 - half, 1.0, 1 + half))
    assert found.word == word


def test_several_comparisons_share_the_error_rate():
    """1 − .05/m each."""
    half = stats.t.ppf(1 - 0.05 / 4 / 2, 4) * np.std(SAMPLE, ddof=1) / math.sqrt(5)
    assert judged(above(0), SAMPLE, comparisons=4).high == pytest.approx(1 + half)


def test_a_ratio_has_the_interval_of_its_logarithm():
    values = [8.0, 16.0, 32.0]
    found = judged(between(4, 64), values, ratio=True)
    half = stats.t.ppf(0.975, 2) * math.log(2) / math.sqrt(3)
    assert found.mean == pytest.approx(16)
    assert (found.low, found.high) == pytest.approx((16 / math.exp(half), 16 * math.exp(half)))
    assert found.word == INCONCLUSIVE


def test_a_ratio_below_an_open_region():
    assert judged(below(0.5), [0.1, 0.11, 0.12], ratio=True).word == REPRODUCED


def test_a_ratio_of_zero_is_no_verdict():
    assert judged(below(0.5), [0.1, 0.0, 0.12], ratio=True).word == INCONCLUSIVE


def test_how_many_more_seeds():
    """The number that the reason names would do, at the same mean and spread, and one less not."""
    found = judged(above(0.98), [*SAMPLE[:3], 0.97, 1.0])
    assert found.word == INCONCLUSIVE
    more = int(found.reason.split()[1])
    sample = np.array(found.values)

    def half(n):
        return stats.t.ppf(0.975, n - 1) * sample.std(ddof=1) / math.sqrt(n)

    distance = abs(sample.mean() - 0.98)
    assert half(5 + more) < distance <= half(5 + more - 1)


def test_a_hopeless_sample_says_so():
    assert judged(above(1.0), [0.99, 1.01, 1.0]).reason == "over 1,000 more seeds"


def test_exact_identities_go_by_tolerance():
    assert judged(exactly(1.0, 1e-12), [1.0, 1 + 1e-13]).word == REPRODUCED
    assert judged(exactly(1.0, 1e-12), [1.0, 1 + 1e-11]).word == CONTRADICTED


@pytest.mark.parametrize(("value", "word"), [(1.0, REPRODUCED), (0.2, CONTRADICTED)])
def test_seeds_that_agree_have_no_interval(value, word):
    found = judged(above(0.9), [value] * 5)
    assert found.word == word
    assert found.agree
    assert math.isnan(found.low)
    assert findings.measured_words(found) == f"{value:#.4g} (5 seeds agree)"


def test_one_seed_decides_nothing():
    assert judged(above(0), [1.0]).word == INCONCLUSIVE


def test_a_value_that_is_not_finite_decides_nothing():
    found = judged(above(0), [1.0, math.nan, math.inf])
    assert found.word == INCONCLUSIVE
    assert found.reason == "no finite value at seed 101, 102"


def test_nothing_measured_is_not_run():
    assert judged(above(0), []).word == NOT_RUN


def test_regions():
    assert about(-2.0, 0.1) == Region(-2.2, -1.8, theory=-2.0)
    for wrong in ((1, 0), (-math.inf, math.inf)):
        with pytest.raises(SpecError):
            Region(*wrong)
    with pytest.raises(SpecError):
        Region(0, math.inf, exact=True)


# --- a finding ------------------------------------------------------------------------------------


def finding(*regions, **options):
    return Finding(
        source="nobody",
        chapter="skips",
        specs={"plain": {"skip": False}, "residual": {}},
        comparisons=tuple(
            Comparison(f"c{i}", ("residual", "plain"), metric_difference(), region, **options)
            for i, region in enumerate(regions)
        ),
        recorded=NOT_RUN,
        seeds=5,
    )


def world(asked, values):
    """Records by arm and seed in which the comparison has these values."""
    records = {}
    for seed, value in enumerate(values, FIRST_SEED):
        for arm, record in zip(asked.arms, asked.measure.imagine(value), strict=True):
            records[arm, seed] = record
    return lambda arm, seed: records.get((arm, seed))


@pytest.mark.parametrize(
    ("regions", "word"),
    [
        ((above(0.5), above(0.8)), REPRODUCED),
        ((above(0.5), below(0.5)), CONTRADICTED),
        ((above(0.5), above(0.9)), INCONCLUSIVE),
        ((above(0.9), below(0.5)), CONTRADICTED),
    ],
)
def test_a_finding_is_as_good_as_its_worst_comparison(regions, word):
    asked = finding(*regions)
    records = world(asked.comparisons[0], [0.9, 0.91, 0.89, 0.9, 0.9])
    assert decide(asked, records).word == word


def test_all_seeds_are_needed():
    asked = finding(above(0.5))
    decision = decide(asked, world(asked.comparisons[0], [0.9] * 4), missing=2, needed=10)
    assert decision.words == "not run (8 of 10 runs are there)"


def test_a_quick_verdict_has_three_seeds_and_is_marked():
    asked = finding(above(0.5))
    decision = decide(asked, world(asked.comparisons[0], [0.9, 0.91, 0.92]), quick=True)
    assert decision.words == "reproduced, quick"
    assert [spec.seed for spec in asked.runs(quick=True)] == [100, 101, 102, 100, 101, 102]
    assert decision.as_recorded
    assert replace(decision, finding=replace(asked, recorded=INCONCLUSIVE)).as_recorded
    assert not replace(decision, finding=replace(asked, recorded=CONTRADICTED)).as_recorded
    undecided = decide(asked, world(asked.comparisons[0], [0.4, 0.9, 0.92]), quick=True)
    assert undecided.word == INCONCLUSIVE
    assert undecided.as_recorded


def test_what_is_slow_is_left_out_of_a_quick_verdict():
    asked = finding(above(0.5), slow=True)
    assert asked.runs(quick=True) == []
    assert len(asked.runs()) == 10


def test_arms_and_specs_must_fit():
    with pytest.raises(SpecError, match="other"):
        Finding("nobody", "skips", {"other": {}}, (), NOT_RUN)


# --- every finding --------------------------------------------------------------------------------


def each_comparison():
    for name, found in FINDINGS.items():
        for asked in found.comparisons:
            yield pytest.param(found, asked, id=f"{name}-{asked.name}")


def inside_and_outside(asked):
    """A value well inside the region, one outside, and one at its edge."""
    region, ratio = asked.region, asked.ratio
    low, high = region.low, region.high
    if ratio:
        low = math.log(low) if low > 0 else -math.inf
        high = math.log(high)
    width = high - low if math.isfinite(high - low) else 0.2 * max(0.1, abs(_end(low, high)))
    if math.isfinite(low) and math.isfinite(high):
        values = ((low + high) / 2, high + 2 * width, high)
    elif math.isfinite(low):
        values = (low + width, low - 2 * width, low)
    else:
        values = (high - width, high + 2 * width, high)
    back = math.exp if ratio else float
    return tuple(map(back, values)), width


def _end(low, high):
    return low if math.isfinite(low) else high


def jittered(asked, value, spread, count):
    """Values around one, on the comparison's own scale."""
    shifts = np.linspace(-1, 1, count) * spread
    return [value * math.exp(s) if asked.ratio else value + s for s in shifts]


@pytest.mark.parametrize(("found", "asked"), list(each_comparison()))
def test_every_rule_can_say_everything(found, asked):
    """Made-up tables in the real schema, read by the finding's own functions."""
    (inside, outside, edge), width = inside_and_outside(asked)
    small = 0.0 if asked.region.exact else 1e-3 * width
    words = {}
    for word, value, spread in (
        (REPRODUCED, inside, small),
        (CONTRADICTED, outside, small),
        (INCONCLUSIVE, edge, 0.5 * width),
    ):
        values = jittered(asked, value, spread, found.seeds)
        alone = Finding(
            found.source, found.chapter, {arm: found.specs[arm] for arm in asked.arms},
            (asked,), NOT_RUN, seeds=found.seeds,
        )  # fmt: skip
        words[word] = decide(alone, world(asked, values)).word
    if asked.region.exact:
        del words[INCONCLUSIVE]
    assert words == {word: word for word in words}


@pytest.mark.parametrize(("found", "asked"), list(each_comparison()))
def test_imagined_records_have_the_number_that_was_imagined(found, asked):
    (inside, outside, _), _ = inside_and_outside(asked)
    for value in (inside, outside):
        records = asked.measure.imagine(value)
        assert len(records) == len(asked.arms)
        assert asked.measure.effect(*records) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("found", FINDINGS.values(), ids=FINDINGS)
def test_every_finding_is_described_and_can_be_run(found):
    for label in ("Source", "Measured", "Deviations", "Cost"):
        assert found.part(label), label
    assert 20 < len(found.claim) <= 120
    specs = found.runs()
    assert min(spec.seed for spec in specs) == FIRST_SEED
    assert found.seeds >= (findings.TRAINED_SEEDS if found.trained else findings.INITIAL_SEEDS)
    assert set(found.runs(quick=True)) < set(specs)
    assert len(found.runs(quick=True)) > 0
    for spec in specs:
        assert spec.max_steps != 0 or spec.probe.name is not None


def test_a_record_without_what_is_read_is_named():
    asked = finding(above(0.5))
    with pytest.raises(GradflowError, match="c0"):
        decide(asked, lambda arm, seed: type("R", (), {"metrics": {}})())
