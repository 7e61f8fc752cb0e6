"""What the page carries of a run equals what the store has, and the answers hold by intervals."""

import math

import numpy as np
import pandas as pd
import pytest
import report_store
import torch

import gradflow
from gradflow import diagnosis, tables, verdicts, views
from gradflow.errors import StoreError
from gradflow.page import Card
from gradflow.store import Run, load_runs
from gradflow.tables import Interval


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("views") / "runs"
    report_store.write_store(place)
    return load_runs(place)


@pytest.mark.parametrize("exponent", [-300, -45, -12, 0, 7, 38, 300])
def test_any_size_is_carried_to_thirteen_bits(exponent):
    values = np.random.default_rng(0).uniform(-10, 10, 1000) * 10.0**exponent
    carried = views.doubles(views.codes(values))
    assert np.abs(carried / values - 1).max() <= 2.0**-13


def test_what_is_no_number_stays_what_it_is():
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, views.missing()])
    found = views.codes(values)
    assert found[6] == views.NULL != found[4]
    carried = views.doubles(found)
    assert carried[:4].tolist() == [0, 0, math.inf, -math.inf]
    assert np.isnan(carried[[4, 6]]).all()
    assert carried[5] == 1


def test_a_view_has_the_values_of_the_store(runs):
    """Each kept value of each quantity of each run, against the recorded row."""
    compared = 0
    for run in runs:
        header, codes = views.unpack(views.pack(run))
        values = views.doubles(codes)
        for name, table in header["tables"].items():
            frame = run.frame(name).set_index(["step", "layer"])
            for quantity, found in table["quantities"].items():
                shape = len(found["steps"]), len(table["layer"])
                part = values[found["at"] : found["at"] + math.prod(shape)].reshape(shape)
                kept = codes[found["at"] : found["at"] + math.prod(shape)].reshape(shape)
                for i, step in enumerate(found["steps"]):
                    for j, layer in enumerate(table["layer"]):
                        there = (step, layer) in frame.index
                        stored = frame.at[(step, layer), quantity] if there else pd.NA
                        assert (kept[i, j] == views.NULL) == (stored is pd.NA)
                        if stored is not pd.NA:
                            assert part[i, j] == pytest.approx(stored, rel=2.0**-13, nan_ok=True)
                            compared += 1
    assert compared > 5000


def test_layers_have_the_places_that_figures_give_them(runs):
    run = next(run for run in runs if run.spec.get("skip") == "identity")
    header, _ = views.unpack(views.pack(run))
    table = header["tables"]["weights"]
    rows = tables.profile(run.with_modules("weights", [0]))
    expected = {row.layer: (row.family, row.ordinal) for row in rows.itertuples()}
    found = zip(table["layer"], table["family"], table["ordinal"], strict=True)
    assert {layer: (family, ordinal) for layer, family, ordinal in found} == expected
    assert header["tables"]["blocks"]["family"] == ["block"] * len(
        header["tables"]["blocks"]["layer"]
    )


def test_a_small_share_keeps_fewer_steps_and_both_ends(runs):
    run = next(run for run in runs if run.spec.get("depth") == 56)
    sizes = {size: views.pack(run, size=size) for size in (160_000, 2_000)}
    steps = {
        size: views.unpack(view)[0]["tables"]["weights"]["quantities"][views.MAIN]["steps"]
        for size, view in sizes.items()
    }
    assert len(sizes[2_000]) < len(sizes[160_000])
    assert len(steps[2_000]) < len(steps[160_000]) == len(run.steps_of("weights"))
    for kept in steps.values():
        assert [kept[0], kept[-1]] == run.steps_of("weights")[[0, -1]].tolist()


def test_kept_steps_are_early_and_even():
    kept = views.spread(np.arange(1000), 40)
    assert len(kept) <= 40
    assert {0, 1, 2, 999} <= set(kept.tolist())
    assert np.diff(kept).max() <= 999 / 19 + 1
    assert views.spread([3, 5, 9], 40).tolist() == [3, 5, 9]


def test_the_share_of_a_run_changes_seldom():
    assert views.share(18) == views.RUN_BYTES
    for count in (100, 200, 500):
        assert views.share(count) * count <= views.PAGE_BYTES < 2 * views.share(count) * count
    assert views.share(200) == views.share(201)


def test_a_run_without_modules_has_no_view(tmp_path):
    report_store.write_store(tmp_path / "runs")
    run = next(iter(load_runs(tmp_path / "runs")))
    (run.path / "modules.parquet").unlink()
    with pytest.raises(StoreError, match="modules"):
        views.pack(Run(run.path))


def test_a_run_without_layers_has_no_view(tmp_path):
    report_store.write_external(tmp_path / "runs", "mine", {})
    path = tmp_path / "runs" / "mine"
    for name in ("weights", "outputs", "blocks"):
        (path / f"{name}.parquet").unlink(missing_ok=True)
    assert views.pack(Run(path)) == b""


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "sign"),
    [
        (Interval(0.3, 0.2, 3), 1),
        (Interval(-0.3, 0.2, 3), -1),
        (Interval(0.1, 0.2, 3), 0),
        (Interval(0.3, math.nan, 3), 1),  # all seeds agree
        (Interval(0.0, math.nan, 3), 0),
        (Interval(0.9, math.nan, 1), 0),  # one seed decides nothing
        (Interval(math.nan, math.nan, 3), 0),
    ],
)
def test_an_answer_needs_an_interval_to_one_side_of_zero(found, sign):
    assert found.sign == sign


def test_the_effect_of_depth_is_paired_by_seed(runs):
    overview = tables.overview(runs)
    overview = overview[overview["group"] == 0]
    shallow, deep, found = verdicts.depth_effect(overview, "plain")
    assert (shallow, deep) == (20, 56)
    errors = report_store.ERRORS
    gaps = np.subtract(errors[56, "none"], errors[20, "none"])
    assert found.mean == pytest.approx(gaps.mean(), abs=1e-12)
    assert found.half == pytest.approx(4.30265273 * gaps.std(ddof=1) / math.sqrt(3), rel=1e-6)
    assert found.seeds == 3


def test_the_first_cards_answer_the_first_questions(runs):
    overview = tables.overview(runs)
    overview = overview[overview["group"] == 0]
    pairs = tables.pairs(runs, tables.overview(runs))
    cards = verdicts.cards(overview, pairs[pairs["group"] == 0], pd.DataFrame())
    told = {card.asked: (card.word, card.kind) for card in cards}
    assert told["Does depth hurt plain networks?"] == ("Yes: more training error", "hurts")
    assert told["Does depth hurt residual networks?"] == ("Not shown", "neither")
    assert told["Does the skip help (residual)?"] == ("Yes: less training error", "helps")
    (skip,) = (card for card in cards if card.pair)
    ids = set(overview["run_id"])
    assert set(skip.pair) <= ids
    assert "depth 56" in skip.because


def table_of(*rows):
    """An overview of runs: arm, depth, seed, training error; None is a run that diverged."""
    names = ["arm", "depth", "seed", "train_error"]
    frame = pd.DataFrame(rows, columns=names).convert_dtypes()
    lost = frame["train_error"].isna()
    labels = [f"{arm}-{depth}-{seed}" for arm, depth, seed, _ in rows]
    return frame.assign(
        group=0,
        match="",
        status=lost.map({True: "diverged", False: "done"}),
        outcome=lost.map({True: "diverged at step 3: loss not finite", False: "done"}),
        run=labels,
        run_id=labels,
    )


def test_where_the_deepest_diverged_no_lesser_depth_answers_for_them():
    shallow = [("plain", 20, 0, 0.4), ("plain", 20, 1, 0.4)]
    better = [("plain", 56, 0, 0.2), ("plain", 56, 1, 0.2)]
    lost = [("plain", 152, 0, None), ("plain", 152, 1, None)]
    answers = [
        (shallow + better, "No: less training error", "from depth 20 to 56."),
        (shallow + better + lost, "The deepest diverged", "plain, depth 152: 2 of 2 diverged."),
        (shallow + lost, "The deepest diverged", "plain, depth 152: 2 of 2 diverged."),
    ]
    for rows, word, end in answers:
        (card,) = verdicts.cards(table_of(*rows), pd.DataFrame(), pd.DataFrame())
        assert card.word == word
        assert card.because.endswith(end)


@pytest.mark.parametrize(
    ("rows", "word", "because"),
    [
        ([("plain", 8, 0, None)], "1 of 1 diverged", "diverged at step 3: loss not finite."),
        ([("unnamed", None, 0, None), ("unnamed", None, 1, 0.1)], "1 of 2 diverged",
         "diverged at step 3: loss not finite."),
        ([("plain", 8, 0, None), ("plain", 8, 1, None)], "2 of 2 diverged",
         "plain, depth 8: 2 of 2 diverged."),
    ],
)  # fmt: skip
def test_what_diverged_is_counted_where_no_other_card_does(rows, word, because):
    cards = verdicts.cards(table_of(*rows), pd.DataFrame(), pd.DataFrame())
    assert cards == [Card("Did training stay finite?", word, because, "hurts")]


def test_a_pair_of_which_one_run_diverged_is_told():
    overview = table_of(("plain", 8, 0, None), ("residual", 8, 0, 0.1))
    (card,) = verdicts.cards(overview, pd.DataFrame(), pd.DataFrame())
    assert card == Card(
        "Does the skip help (residual)?", "No pair has both final errors",
        "plain, depth 8: 1 of 1 diverged.", "neither",
    )  # fmt: skip


def test_a_run_whose_skip_is_not_known_has_its_gradient_judged(tmp_path):
    network = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
    with gradflow.Recorder(network, save=tmp_path / "runs" / "own") as recorder:
        network(torch.ones(2, 4)).sum().backward()
        recorder.step()
    runs = load_runs(tmp_path / "runs")
    found = diagnosis.diagnoses(next(iter(runs))).assign(
        run_id="own", depth=None, arm="unnamed", seed=None
    )
    (card,) = verdicts.cards(tables.overview(runs), pd.DataFrame(), found)
    assert card.asked == "The gradient at the first step"
    assert card.word == found["diagnosis"].iloc[0]
