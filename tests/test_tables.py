"""Rates, intervals, pairs and certificates against closed forms and slow references."""

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import report_store

from gradflow import captions, plots, tables
from gradflow.store import Run, RunWriter, load_runs
from gradflow.tables import Rate, fit_rate, interval

SPAN = np.linspace(-1, 1, 40)


def answered(frame, paired):
    """What `captions.answers` is given."""
    return tables.degradation(frame), tables.benefit(paired), tables.diverged(frame)


def read(store):
    runs = load_runs(store)
    return runs, tables.overview(runs)


# --- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e25])
@pytest.mark.parametrize(
    ("factor", "trend"), [(1.2112, "grows"), (0.24, "shrinks"), (1.03, "grows"), (1.0, "flat")]
)
def test_an_exact_exponential_gives_its_factor(factor, trend, scale):
    norms = scale * factor ** np.arange(50)[::-1]
    rate = fit_rate(norms)
    assert rate.factor == pytest.approx(factor, rel=1e-10)
    assert (rate.trend, rate.reason, rate.layers) == (trend, "", 50)


def test_the_factor_is_of_norms_and_toward_the_input():
    assert fit_rate([32, 16, 8, 4, 2, 1]).factor == pytest.approx(2)
    assert fit_rate([1, 2, 4, 8, 16, 32]).factor == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_flat_profile_is_flat(seed):
    norms = np.exp(np.random.default_rng(seed).normal(0, 0.1, 48))
    rate = fit_rate(norms)
    assert rate.trend == "flat"
    assert rate.low < 1 < rate.high
    assert rate.factor == pytest.approx(1, abs=0.01)


def test_a_trend_is_where_the_interval_lies():
    assert Rate(1.01, low=1.001, high=1.02).trend == "grows"
    assert Rate(0.99, low=0.97, high=0.9999).trend == "shrinks"
    assert Rate(1.3, low=0.9, high=1.7).trend == "flat"
    assert Rate(1.3, low=1.0, high=1.7).trend == "flat"
    assert Rate(1.01).trend == ""  # no interval
    assert Rate(reason="no exponential fits").trend == ""


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_exponential_keeps_its_factor(seed):
    noise = np.random.default_rng(seed).normal(0, 0.05, 36)
    rate = fit_rate(np.exp(noise) * 1.21 ** np.arange(36)[::-1])
    assert rate.trend == "grows"
    assert rate.factor == pytest.approx(1.21, rel=0.01)


@pytest.mark.parametrize(
    "norms",
    [
        pytest.param(np.arange(1, 37) ** -0.733, id="power law of a residual network"),
        pytest.param(np.exp(-np.sqrt(np.arange(1.0, 101))), id="sub-exponential"),
        pytest.param(np.exp(np.linspace(-1, 1, 30) ** 2 * 3), id="bent, level at its ends"),
        pytest.param(np.exp(10 * SPAN + 2.8 * SPAN**2), id="steeper at one end by three"),
        pytest.param([3.0, 1.0] * 10, id="zigzag"),
        pytest.param(1.15 ** np.arange(6)[::-1], id="six layers, a factor of two in all"),
        pytest.param([1.0] * 10 + [1e-3] * 10, id="a jump"),
    ],
)
def test_what_is_not_exponential_has_no_rate(norms):
    rate = fit_rate(norms)
    assert rate.factor is None
    assert (rate.trend, rate.reason) == ("", "no exponential fits")


@pytest.mark.parametrize(
    ("norms", "reason"),
    [
        ([0.0, 0.0, 1.0, 2.0, 4.0, 8.0], "exactly zero in 2 of 6 layers"),
        ([1.0, math.nan, 1.0, math.inf, 1.0], "not finite in 2 of 5 layers"),
        ([1.0, 1.0, 1.0, 1.0], "fewer than 5 like layers in a row"),
    ],
)
def test_why_there_is_no_rate(norms, reason):
    assert fit_rate(norms) == Rate(reason=reason, layers=len(norms))


def one_run(depth=56, skip="none", **columns):
    """The profile of one step of a run of the store made by hand."""
    modules = report_store.cifar_modules(depth)
    weights = report_store.weight_columns(modules, range(1), depth, skip, 0) | columns
    return tables.profile(pd.DataFrame(weights).merge(pd.DataFrame(modules), on="layer"))


def test_the_rate_of_a_network_is_that_of_the_like_layers_of_its_first_stage():
    frame = one_run()
    stem = frame["layer"] == "conv1"
    frame.loc[stem | (frame["stage"] != 1), "weight_grad_norm"] *= 1000.0
    frame.loc[frame["layer"] == "fc", "weight_grad_norm"] = 0.0  # no convolution
    rate = tables.layer_rate(frame)
    assert rate.factor == pytest.approx(report_store.GROWTH, rel=1e-10)
    assert (rate.trend, rate.kind, rate.stage, rate.layers) == ("grows", "conv", 1, 18)
    assert rate.first_last == pytest.approx(report_store.GROWTH**54)  # 55 convolutions


def test_layers_of_one_shape_in_two_stages_are_two_chains():
    frame = one_run().assign(shape="16x16x3x3")
    frame.loc[frame["stage"] != 1, "weight_grad_norm"] = 1.0
    rate = tables.layer_rate(frame)
    assert (rate.layers, rate.trend) == (19, "grows")  # with the stem
    assert rate.factor == pytest.approx(report_store.GROWTH, rel=1e-10)


def test_a_network_without_convolutions_has_the_rate_of_its_linear_layers(tmp_path):
    run = Run(report_store.write_vanishing(tmp_path, zeros=0))
    rate = tables.layer_rate(tables.profile(run.with_modules("weights")))
    assert rate.factor == pytest.approx(0.24)
    assert (rate.trend, rate.kind, rate.layers) == ("shrinks", "linear", 28)


def test_sentences():
    stage = {"stage": 1, "kind": "conv", "layers": 18}
    assert tables.sentence(Rate(1.2112, low=1.2, high=1.22, **stage)) == (
        "the gradient of the first stage's weights grows 1.21× a layer toward the input"
    )
    assert tables.sentence(Rate(1.0021, low=1.001, high=1.003, **stage)) == (
        "the gradient of the first stage's weights grows 1.0021× a layer toward the input"
    )
    assert tables.sentence(Rate(0.2399, low=0.23, high=0.25, stage=1, kind="linear")) == (
        "the gradient of the hidden layers' weights shrinks to 0.24× a layer toward the input"
    )
    assert tables.sentence(Rate(1.0087, low=0.99, high=1.03, stage=2, kind="conv")) == (
        "the gradient of stage 2's weights keeps its size (1.01× a layer)"
    )
    assert tables.sentence(Rate(1.07, **stage)) == (
        "the gradient of the first stage's weights changes 1.07× a layer toward the input, with "
        "too few layers for an interval"
    )
    refused = Rate(reason="no exponential fits", first_last=18.72, **stage)
    assert tables.sentence(refused) == "no exponential fits: first/last = 18.7"
    zero = Rate(reason="exactly zero in 3 of 30 layers", first_last=0.0, **stage)
    assert tables.sentence(zero) == (
        "the gradient of the weights is exactly zero in 3 of 30 layers: no rate"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(18.72, "18.7"), (4234.0, "4.23e3"), (1.16e7, "1.16e7"), (1.2e-7, "1.2e-7"), (0.0, "0"),
     (1000.0, "1e3"), (math.inf, "inf"), (math.nan, "nan"), (0.0123, "0.0123")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert tables.short(value) == text


# --- intervals ------------------------------------------------------------------------------------


def test_t_intervals_against_tabulated_values():
    three = interval([1.0, 2.0, 3.0])
    assert three.mean == 2.0
    assert three.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # s = 1, t(2) = 4.302653
    two = interval([1.0, 3.0])
    assert two.half == pytest.approx(12.706205, rel=1e-6)  # s/√2 = 1, t(1) = 12.706205
    assert three.words() == "2.000 ± 2.484 (3 seeds)"


def test_one_seed_and_agreement_have_no_interval():
    assert interval([0.5]).words() == "0.500 (one seed)"
    assert interval([0.25, 0.25, 0.25]).words(sign=True) == "+0.250 (3 seeds agree)"
    assert interval([1 - 0.9, 0.1]).agree
    assert not interval([0.1, 0.1001]).agree
    assert interval([]).words() == "–"


def test_a_nan_among_the_seeds_is_not_skipped():
    found = interval([0.1, math.nan, 0.3])
    assert math.isnan(found.mean)
    assert not found.agree


# --- arms, groups, pairs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"skip": "none", "branch_scale": 1.0}, "plain"),
        ({"skip": "identity", "skip_forward": 1.0, "skip_backward": 1.0}, "residual"),
        ({"skip": "identity", "branch_scale": 0.5}, "residual, branch_scale=0.5"),
        ({"skip": "forward_only", "skip_forward": 1.0, "skip_backward": 0.0}, "forward only"),
        ({"skip": "dosed", "skip_forward": 0.5, "skip_backward": 1.0},
         "dosed, skip_forward=0.5, skip_backward=1"),
        ({"skip": True}, "residual"),
        ({"skip": "identity", "shortcut": "B"}, "residual, shortcut=B"),
        ({}, "unnamed"),
    ],
)  # fmt: skip
def test_arms_are_named_by_what_sets_them_apart(columns, name):
    assert tables.arm(columns) == name


def test_runs_that_differ_in_other_keys_are_never_mixed(tmp_path):
    report_store.write_pairs(tmp_path)
    report_store.write_run(tmp_path, 0.9, depth=56, skip="none", seed=0, lr=0.05)
    report_store.write_run(tmp_path, 0.3, depth=56, skip="identity", seed=1, lr=0.05)
    runs, frame = read(tmp_path)
    titles = dict(zip(frame["group"], frame["title"], strict=True))
    assert titles == {0: "lr=0.02", 1: "lr=0.05"}
    paired = tables.pairs(runs, frame)
    assert len(paired) == 6  # seeds 0 and 1 of the other rate have no partner
    assert set(paired["group"]) == {0}
    means = tables.degradation(frame)
    row = means[(means["group"] == 1) & (means["split"] == "train") & (means["arm"] == "plain")]
    assert row["mean"].tolist() == [pytest.approx(0.9)]


def test_what_is_recorded_sets_no_runs_apart(tmp_path):
    report_store.write_run(tmp_path, 0.3, depth=20, skip="none", record="all")
    report_store.write_run(tmp_path, 0.1, depth=20, skip="identity", on_divergence="continue",
                           record={"every": {"weights": 3, "outputs": 4, "blocks": 5}})  # fmt: skip
    runs, frame = read(tmp_path)
    assert set(frame["group"]) == {0}
    assert tables.pairs(runs, frame)["train_difference"].tolist() == [pytest.approx(0.2)]


def test_of_a_run_recorded_twice_the_one_with_a_result_is_compared(tmp_path):
    report_store.write_run(tmp_path, 0.3, depth=20, skip="none")
    later = report_store.write_run(
        tmp_path, None, depth=20, skip="none", record="all", status="interrupted"
    )
    _, frame = read(tmp_path)
    assert frame.set_index("path").loc[str(later), "match"].startswith("not compared: repeated by")
    assert tables.degradation(frame)["mean"].tolist()[1] == pytest.approx(0.3)


def test_what_users_write_into_their_spec_ends_nothing(tmp_path):
    meta = {"depth": math.inf, "network_args": "wide", "seed": None}
    path = report_store.write_external(tmp_path, "odd", meta)
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"steps": 2.5}))
    _, frame = read(tmp_path)
    assert frame["depth"].isna().all()
    assert frame["steps"].tolist() == [2]


def test_groups_are_told_by_what_differs():
    one = {"origin": "gradflow", "network": "cifar", "lr": 0.02, "clip": None, "norm": "batch"}
    assert tables.group_titles([one]) == [""]
    assert tables.group_titles([one, one | {"clip": 1.0}]) == ["without clip", "clip=1"]
    assert tables.group_titles([one | {"epochs": 12}, one | {"max_steps": 0}]) == [
        "epochs=12", "max_steps=0",
    ]  # fmt: skip
    mlp = {"origin": "gradflow", "network": "mlp", "norm": "none", "activation": "relu"}
    own = {"origin": "external"}
    assert tables.group_titles([one, mlp, own]) == ["cifar", "mlp, norm=none", "a user's loop"]
    assert tables.group_titles([own, own | {"lr": 0.1, "mine": "none"}, own | {"lr": 0.1}]) == [
        "without lr, mine", "lr=0.1, mine=none", "lr=0.1",
    ]  # fmt: skip
    assert tables.group_titles([own, {"origin": "gradflow"}])[1] == "unknown network"


def test_groups_of_one_size_come_in_the_order_of_their_titles_numbers(tmp_path):
    for rate in (0.1, 1e-5, 0.02, 10.0):
        report_store.write_run(tmp_path, 0.1, depth=8, skip="none", lr=rate)
    _, frame = read(tmp_path)
    titles = dict(zip(frame["group"], frame["title"], strict=True))
    assert titles == {0: "lr=1e-05", 1: "lr=0.02", 2: "lr=0.1", 3: "lr=10"}


def test_paired_differences_against_a_loop(tmp_path):
    report_store.write_pairs(tmp_path)
    runs, frame = read(tmp_path)
    gains = tables.benefit(tables.pairs(runs, frame))
    train = gains[gains["split"] == "train"].set_index("depth")
    errors = report_store.ERRORS
    differences = [a - b for a, b in zip(errors[56, "none"], errors[56, "identity"], strict=True)]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    assert train.loc[56, "mean"] == pytest.approx(mean)
    assert train.loc[56, "half"] == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)
    assert train.loc[20, "text"] == "+0.000 (3 seeds agree)"


def test_the_comparison_in_words(tmp_path):
    report_store.write_pairs(tmp_path)
    runs, frame = read(tmp_path)
    table = tables.comparison(frame, tables.pairs(runs, frame))
    assert table.drop(columns=["group", "title"]).to_dict("records") == [
        {"depth": 20, "arm": "residual", "plain": "1.000", "other": "1.000",
         "difference": "+0.000", "seeds": "3", "matched": "3 of 3"},
        {"depth": 56, "arm": "residual", "plain": "0.500±0.248", "other": "0.990±0.025",
         "difference": "+0.490±0.237", "seeds": "3", "matched": "3 of 3"},
    ]  # fmt: skip


def test_diverged_seeds_stand_in_the_comparison(tmp_path):
    for depth, lost in ((20, (1, 2)), (56, (0, 1, 2))):
        for seed in range(3):
            report_store.write_run(tmp_path, 0.0, depth=depth, skip="identity", seed=seed)
            ended = {"status": "diverged", "steps": 6, "batches": "other"} if seed in lost else {}
            error = None if ended else 0.1
            report_store.write_run(tmp_path, error, depth=depth, skip="none", seed=seed, **ended)
    runs, frame = read(tmp_path)
    paired = tables.pairs(runs, frame)
    table = tables.comparison(frame, paired)
    names = ["depth", "plain", "other", "difference", "seeds", "matched"]
    assert table[names].to_numpy().tolist() == [
        [20, "0.900, 2 of 3 diverged", "1.000", "+0.100", "1/3", "1 of 1"],
        [56, "3 of 3 diverged", "1.000", "–", "0/3", "no pair"],
    ]
    assert captions.answers(*answered(frame, paired))[-1] == (
        "Of plain networks 2 of 3 diverged at depth 20, 3 of 3 diverged at depth 56: these have "
        "no final error."
    )
    figure = plots.degradation(frame, tables.degradation(frame))
    (crosses,) = [x for x in figure.axes[0].get_lines() if x.get_marker() == "x"]
    np.testing.assert_allclose(crosses.get_xdata(), np.array([20, 20, 56, 56, 56]) / 1.04**0.5)


def test_a_group_where_all_diverged_is_compared_too(tmp_path):
    report_store.write_run(tmp_path, None, depth=20, skip="none", status="diverged")
    runs, frame = read(tmp_path)
    paired = tables.pairs(runs, frame)
    (row,) = tables.comparison(frame, paired).to_dict("records")
    assert (row["arm"], row["plain"], row["seeds"]) == ("–", "1 of 1 diverged", "0")
    assert captions.answers(*answered(frame, paired)) == [
        "Of plain networks 1 of 1 diverged at depth 20: these have no final error."
    ]


@pytest.mark.parametrize(
    ("plain", "residual", "told"),
    [
        ((0.5, 0.7, 0.6), (0.1, 0.2, 0.1),
         "the training error of residual networks is lower than that of plain ones by "
         "0.467 ± 0.143 (3 seeds)."),
        ((0.5, 0.1), (0.3, 0.1), "the training error of plain networks minus that of residual ones "
         "is +0.100 ± 1.271 (2 seeds): no difference is shown."),
        ((0.5,), (0.3,), "the training error of plain networks minus that of residual ones is "
         "+0.200 (one seed)."),
        ((0.5, 0.5), (0.5, 0.5),
         "the training error of residual networks is that of plain ones (+0.000 (2 seeds agree))."),
    ],
)  # fmt: skip
def test_a_difference_is_claimed_where_its_interval_shows_it(tmp_path, plain, residual, told):
    for skip, errors in (("none", plain), ("identity", residual)):
        for seed, error in enumerate(errors):
            report_store.write_run(tmp_path, error, depth=14, skip=skip, seed=seed)
    runs, frame = read(tmp_path)
    assert captions.answers(*answered(frame, tables.pairs(runs, frame)))[-1] == (
        f"At depth 14 {told}"
    )


def test_a_pair_that_is_not_matched_gives_no_difference(tmp_path):
    report_store.write_run(tmp_path, 0.5, depth=20, skip="none", seed=0)
    report_store.write_run(tmp_path, 0.1, depth=20, skip="identity", seed=0, batches="other")
    runs, frame = read(tmp_path)
    paired = tables.pairs(runs, frame)
    assert paired["match"].tolist() == ["not matched: batches differ"]
    assert paired["train_difference"].isna().all()
    assert len(tables.benefit(paired)) == 0
    assert tables.comparison(frame, paired)["matched"].tolist() == [
        "0 of 1; not matched: batches differ"
    ]


def certified(tmp_path, name, **fields):
    spec = {"skip": name, "depth": 20, "seed": 0}
    with RunWriter(tmp_path / name, spec) as writer:
        writer.update(certificate=fields)
    return Run(writer.path)


def test_certificates(tmp_path):
    base = {"parameters": {"a": "1", "b": "2"}, "batches": "x", "data": "y"}
    plain = certified(tmp_path, "none", **base)

    def against(**changes):
        return tables.match(plain, certified(tmp_path, "rezero", **(base | changes)))

    assert against() == "matched"
    assert against(parameters={"a": "1", "b": "2", "gain": "3", "z": "4"}) == (
        "matched on shared parameters (+2 in rezero)"
    )
    assert against(parameters={"a": "1", "b": "9"}) == "not matched: initial b differ"
    assert against(parameters={"a": "0", "b": "9"}) == "not matched: initial a and 1 more differ"
    assert against(parameters={"c": "1"}) == "not matched: initial parameter names differ"
    assert against(batches="z") == "not matched: batches differ"
    assert against(data="z") == "not matched: data differ"
    assert against(batches=None) == "no certificate: rezero unfinished"
    assert against(parameters=None) == "no certificate"


def test_every_kind_of_run_is_told_as_what_it_is(tmp_path):
    runs, frame = read(report_store.write_store(tmp_path))
    assert len(frame) == len(runs) == 18
    rows = {(r["arm"], r["depth"], r["seed"]): r for r in frame.to_dict("records")}
    diverged = rows["plain", 56, 3]
    assert diverged["outcome"] == "diverged at step 5: output_rms not finite in conv1"
    assert diverged["match"] == (
        "no certificate: initial parameters are equal; batches cannot be compared, as plain "
        "diverged"
    )
    assert math.isnan(diverged["train_error"])
    assert rows["plain", 20, 4]["outcome"] == "unfinished: its process is gone"
    assert rows["plain", 20, 4]["steps"] is None
    assert rows["plain", 56, 2]["train_error"] == pytest.approx(0.6)
    assert rows["plain", 56, 2]["match"] == "matched"
    external = frame[frame["origin"] == "external"].set_index("run")
    assert external.loc["mine <b>&", "match"] == "no partner"
    assert external.loc["mine <b>&", "train_error"] == 0.25
    assert external.loc["nameless", "depth"] is pd.NA


def test_a_pair_of_users_loops_has_no_certificate_and_is_compared(tmp_path):
    report_store.write_external(tmp_path, "a", {"depth": 20, "skip": "none", "seed": 0})
    report_store.write_external(tmp_path, "b", {"depth": "20", "skip": True, "seed": 0})
    runs, frame = read(tmp_path)
    paired = tables.pairs(runs, frame)
    assert paired["match"].tolist() == ["no certificate"]
    assert paired["train_difference"].tolist() == [0.0]


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_only_finished_runs_have_a_final_error(tmp_path, status):
    report_store.write_run(tmp_path, 0.5, depth=20, skip="none", status=status)
    _, frame = read(tmp_path)
    assert frame["train_error"].isna().all()
    assert frame["train_accuracy"].tolist() == [0.5]


def test_of_runs_with_equal_keys_the_latest_is_compared(tmp_path):
    meta = {"depth": 20, "skip": "none", "seed": 0}
    report_store.write_external(tmp_path, "older", meta)
    report_store.write_external(tmp_path, "newer", meta)
    _, frame = read(tmp_path)
    matches = frame.set_index("run")["match"]
    assert matches["older"] == "not compared: repeated by newer"
    assert matches["newer"] == "no partner"
    assert tables.degradation(frame)["seeds"].tolist() == [1]


def test_an_empty_store_has_empty_tables(tmp_path):
    runs, frame = read(tmp_path)
    assert frame.empty
    assert tables.pairs(runs, frame).empty


# --- profiles -------------------------------------------------------------------------------------


def test_nulls_go_and_zeros_and_non_finite_values_stay():
    values = pa.array([1.0, None, math.nan, 0.0, math.inf])
    frame = pd.DataFrame({"q": pd.Series(values, dtype=pd.ArrowDtype(pa.float64()))})
    np.testing.assert_array_equal(
        tables.measured(frame, "q")["q"].to_numpy(), [1.0, math.nan, 0.0, math.inf]
    )
    plain = pd.DataFrame({"q": [1.0, math.nan]})
    assert len(tables.measured(plain, "q")) == 2


def test_ordinals_count_layers_of_a_family_from_the_input():
    frame = one_run(depth=20)
    weights = frame[frame["family"] == "weights"]
    assert weights["ordinal"].tolist() == list(range(1, 21))
    assert weights["layer"].iloc[[0, -1]].tolist() == ["conv1", "fc"]
    assert frame[frame["family"] == "norm"]["ordinal"].tolist() == list(range(1, 20))
    assert "block" not in set(frame["kind"])


def test_parameters_of_other_modules_are_weights_only_where_there_are_no_others():
    rows = {"step": [0, 0], "layer": ["a", "b"], "position": [0, 1], "weight_grad_norm": [1.0, 2.0]}
    alone = tables.profile(pd.DataFrame(rows | {"kind": ["other", "norm"]}))
    beside = tables.profile(pd.DataFrame(rows | {"kind": ["other", "conv"]}))
    assert dict(zip(alone["layer"], alone["family"], strict=True)) == {"a": "weights", "b": "norm"}
    assert dict(zip(beside["layer"], beside["family"], strict=True)) == {
        "a": "norm", "b": "weights",
    }  # fmt: skip


def with_projections(depth=20):
    """Rows of step 0 of a network with projections before its second and third stage's blocks."""
    modules = report_store.cifar_modules(depth)
    weights = report_store.weight_columns(modules, range(1), depth, "identity", 0)
    values = dict(zip(weights["layer"], weights["weight_grad_norm"], strict=True))
    rows = []
    for row in modules:
        rows.append(row)
        if row["layer"] in ("layer2.0.bn2", "layer3.0.bn2"):
            name = row["layer"].removesuffix("bn2") + "downsample."
            rows.append(row | {"layer": name + "0", "kind": "conv", "shape": "16x16x3x3"})
            rows.append(row | {"layer": name + "1"})
    return pd.DataFrame(
        {"step": 0, "weight_grad_norm": values.get(row["layer"], 7.0)} | row | {"position": place}
        for place, row in enumerate(rows)
    )


def test_layers_of_one_arm_alone_are_left_out_and_the_others_line_up():
    plain, projected = one_run(), tables.profile(with_projections(56))
    for family in ("weights", "norm"):
        one, two = (f[f["family"] == family] for f in (plain, projected))
        assert two[["layer", "ordinal"]].to_numpy().tolist() == (
            one[["layer", "ordinal"]].to_numpy().tolist()
        )
    assert projected[projected["family"] == "aside"]["layer"].tolist() == [
        f"layer{stage}.0.downsample.{index}" for stage in (2, 3) for index in (0, 1)
    ]
    named = tables.profile(with_projections(), extras={"fc", "bn1"})
    assert set(named[named["family"] == "aside"]["layer"]) >= {"fc", "bn1"}
    assert named[named["family"] == "norm"]["layer"].iloc[0] == "layer1.0.bn1"


def test_projections_are_no_part_of_the_rate():
    projected = tables.profile(with_projections(56).assign(stage=2))
    rates = tables.rates(projected.assign(run_id=""))
    shared = tables.rates(one_run(skip="identity").assign(stage=2, run_id=""))
    pd.testing.assert_frame_equal(rates, shared)


def test_moments_and_spread():
    assert tables.moments(range(264)) == [0, 16, 263]
    assert tables.moments([0]) == [0]
    assert tables.moments([]) == []
    few = tables.spread(range(100_000), 60)
    assert few.tolist()[:11] == list(range(11))
    assert few[-1] == 99_999
    assert len(few) <= 61
    assert tables.spread([0, 5, 7]).tolist() == [0, 5, 7]


def test_bins_are_means_and_keep_what_is_not_finite():
    frame = pd.DataFrame({"step": range(6), "loss": [1.0, 3.0, math.nan, 1.0, 5.0, 7.0]})
    found = tables.binned(frame, "loss", 3)
    assert found["step"].tolist() == [1, 3, 5]
    np.testing.assert_array_equal(found["loss"], [2.0, math.nan, 6.0])


def test_rates_over_seeds_in_words(tmp_path):
    for seed in range(3):
        report_store.write_run(tmp_path, depth=56, skip="none", seed=seed)
        report_store.write_run(tmp_path, depth=56, skip="identity", seed=seed)
    frame = tables.profile(load_runs(tmp_path).weights("weight_grad_norm"))
    frame = frame[frame["step"] == 0].assign(arm=lambda f: f["skip"].astype(object))
    words = tables.rate_words(tables.rates(frame)).set_index("arm")
    assert words.loc["none", "rate"] == "1.210×"
    assert words.loc["none", "trend"] == "grows"
    assert words.loc["none", "fits"] == "3 of 3"
    assert words.loc["none", "first_last"] == tables.short(1.21**54)
    assert words.loc["identity", "rate"] == "–"
    assert words.loc["identity", "trend"] == "no exponential fits"
    assert words.loc["identity", "first_last"] == tables.short(55**0.7)


def test_what_has_no_ratio_is_no_number(tmp_path):
    for seed, skip in ((0, "none"), (0, "identity"), (1, "none")):
        report_store.write_run(tmp_path, depth=8, skip=skip, seed=seed)
    rates = tables.rates(
        tables.profile(load_runs(tmp_path).weights("weight_grad_norm"))
        .query("step == 0")
        .assign(arm=lambda f: f["skip"].astype(object))
    )
    lost = rates["arm"].eq("identity")
    words = tables.rate_words(rates.assign(first_last=rates["first_last"].mask(lost, math.nan)))
    assert captions.ratios(words) == (
        f"Norm at the first convolution over that at the last: depth 8 – (identity), "
        f"{tables.short(1.21**6)} (none)."
    )


# --- two runs -------------------------------------------------------------------------------------


def test_networks_of_equal_depth_are_compared_layer_by_layer():
    a = np.random.default_rng(0).uniform(1, 2, 152)
    b = np.random.default_rng(1).uniform(1, 2, 152)
    np.testing.assert_array_equal(tables.compare_layers(a, b), b / a)
    np.testing.assert_array_equal(tables.compare_layers(a, b, log=False), b - a)
    assert tables.compare_layers([2.0], [6.0]).tolist() == [3.0]


def test_between_two_layers_the_logarithm_is_interpolated():
    """Three layers of A lie at 0, 1/2 and 1: the second between the two of B, of √(1·100)."""
    assert tables.compare_layers([1, 1, 1], [1, 100]).tolist() == pytest.approx([1, 10, 100])
    assert tables.compare_layers([1, 1, 1], [1, 100], log=False).tolist() == [0, 49.5, 99]
    # Of four, at 1/3 and 2/3, against three at 0, 1/2 and 1: two thirds, and one third, of the way.
    four = tables.compare_layers([1, 2, 4, 8], [1, 8, 64])
    assert four.tolist() == pytest.approx([1, 2, 4, 8])
    assert tables.compare_layers([1, 2], [3, 5, 8]).tolist() == [3, 4]
    exponential = tables.compare_layers(1.2 ** np.arange(20), 1.2 ** np.linspace(0, 19, 152))
    np.testing.assert_allclose(exponential, 1, rtol=1e-12)
    tiny = tables.compare_layers(np.full(5, 1e-300), np.full(9, 1e300))
    assert np.isposinf(tiny).all()


def test_what_has_no_ratio_is_told_apart():
    none = np.ma.masked_invalid([math.nan, 1.0, 1.0, 1.0, 1.0])
    found = tables.compare_layers([1, 0, 0, math.nan, math.inf], [0, 1, 0, 1, 1])
    np.testing.assert_array_equal(found, [0, math.inf, math.nan, math.nan, math.nan])
    assert not np.ma.getmaskarray(found).any()
    for pair in ((none, [2.0] * 5), ([2.0] * 5, none)):
        assert np.ma.getmaskarray(tables.compare_layers(*pair)).tolist() == [True, *[False] * 4]
    # What lies between a layer and one that was not measured was not measured either.
    between = tables.compare_layers([1, 1, 1], np.ma.masked_invalid([1.0, math.nan]))
    assert np.ma.getmaskarray(between).tolist() == [False, True, True]
    assert tables.compare_layers([1, 1, 1], [0, 4]).tolist() == [0, 0, 4]


def test_a_step_s_profile_knows_null_from_nan():
    values = pd.arrays.ArrowExtensionArray(pa.array([1.0, None, math.nan, 4.0]))
    frame = pd.DataFrame({"step": [0, 0, 0, 5], "ordinal": [1, 2, 3, 4], "x": values})
    found = tables.at_step(frame, "x", 0)
    assert np.ma.getmaskarray(found).tolist() == [False, True, False, True]
    assert found[0] == 1
    assert math.isnan(found[2])


def test_the_nearest_step_is_the_earlier_of_two():
    assert [tables.nearest([0, 10, 30], wanted) for wanted in (-5, 5, 6, 20, 999)] == [
        0, 0, 10, 10, 30
    ]  # fmt: skip
