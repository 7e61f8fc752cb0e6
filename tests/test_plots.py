"""Figures hold the numbers of their frames, and show what a log axis cannot."""

import math

import numpy as np
import pandas as pd
import pytest
import report_store
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from gradflow import plots, report, tables
from gradflow.errors import GradflowError
from gradflow.store import load_runs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The frames of a store with every kind of run; its largest group alone."""
    store = report_store.write_store(tmp_path_factory.mktemp("runs"))
    return report.gather(load_runs(store)).of(0)


def record(values, steps=(0, 5)):
    """The frame that a single recorder gives: no run_id, depth or arm."""
    rows = [
        {"step": step, "layer": f"l{i}", "position": i, "kind": "conv", "weight_grad_norm": value}
        for step in steps
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def lines(ax, marker=None):
    """The drawn lines of a panel with that marker (None: those with data on a log axis)."""
    found = [line for line in ax.get_lines() if len(line.get_xdata()) > 0]
    return [line for line in found if marker is None or line.get_marker() == marker]


def texts(figure):
    legends = figure.legends
    return [t.get_text() for legend in legends for t in legend.get_texts()]


def test_a_profile_draws_the_values_of_each_run(found):
    frame = found.profiles[found.profiles["moment"] == "first"]
    figure = plots.profile(frame)
    assert [ax.get_title() for ax in figure.axes] == ["depth 20", "depth 56"]
    assert {ax.get_yscale() for ax in figure.axes} == {"log"}
    drawn = {tuple(line.get_ydata()) for line in lines(figure.axes[1]) if len(line.get_xdata()) > 9}
    expected = {
        tuple(report_store.gradient(56, skip, i, 0, seed) for i in range(1, 57))
        for skip in ("none", "identity")
        for seed in range(4)
    }
    assert {tuple(np.round(y, 9)) for y in drawn} == {tuple(np.round(y, 9)) for y in expected}
    assert texts(figure) == ["plain", "residual"]
    assert figure.get_supxlabel() == "layer, counted from the input"
    assert "L2 norm of the weight gradient\n(loss / parameter)" in figure.get_supylabel()


def test_normalisation_layers_are_drawn_apart(found):
    frame = found.profiles[found.profiles["moment"] == "first"]
    figure = plots.profile(frame, family="norm")
    heights = [y for line in lines(figure.axes[0], "s") for y in line.get_ydata()]
    assert max(heights) == pytest.approx(report_store.gradient(20, "none", 1, 0, 4) / 10)
    assert "parameters' gradient" in figure.get_supylabel()


def test_zeros_and_non_finite_values_are_marked_at_the_edges():
    frame = record([0.0, 0.0, 1.0, math.nan, 2.0, math.inf, 3.0], steps=(0,))
    figure = plots.profile(frame)
    (ax,) = figure.axes
    (zeros,), (infinite,) = lines(ax, "v"), lines(ax, "x")
    assert list(zeros.get_xdata()) == [1, 2]
    assert list(infinite.get_xdata()) == [4, 6]
    assert set(zeros.get_ydata()) == {0.03}  # axes coordinates: the lower edge
    assert set(infinite.get_ydata()) == {0.97}
    assert texts(figure) == ["exactly zero", "NaN or Inf"]
    (curve,) = [line for line in lines(ax) if len(line.get_xdata()) == 7]
    np.testing.assert_array_equal(
        curve.get_ydata(), [math.nan, math.nan, 1.0, math.nan, 2.0, math.nan, 3.0]
    )
    low, high = ax.get_ylim()
    assert 0.1 < low < 1
    assert 3 < high < 30


def test_a_profile_of_zeros_alone_can_be_drawn(tmp_path):
    figure = plots.profile(record([0.0, 0.0], steps=(0,)))
    assert lines(figure.axes[0], "v")
    plots.save(figure, tmp_path / "zeros")


def test_a_single_record_shows_its_first_and_last_step():
    figure = plots.profile(record([1.0, 2.0, 4.0], steps=(0, 3, 5)))
    assert [ax.get_title() for ax in figure.axes] == ["initialisation", "after 5 updates"]
    assert texts(figure) == []


def test_what_was_not_recorded_is_one_clear_error():
    with pytest.raises(GradflowError, match="weight_grad_norm: nothing recorded to draw"):
        plots.profile(pd.DataFrame({"step": [0]}))
    with pytest.raises(GradflowError, match="no layers of the family norm"):
        plots.profile(record([1.0]), family="norm")


def test_heatmaps_show_every_cell_and_tell_zero_non_finite_and_missing_apart():
    frame = tables.profile(record([1.0, 10.0, 100.0], steps=(0, 1, 2)))
    frame = frame.assign(arm="plain", depth=3)
    frame.loc[(frame["step"] == 1) & (frame["layer"] == "l0"), "weight_grad_norm"] = 0.0
    frame.loc[(frame["step"] == 2) & (frame["layer"] == "l2"), "weight_grad_norm"] = math.inf
    frame = frame[~((frame["step"] == 0) & (frame["layer"] == "l1"))]
    figure = plots.heatmap(frame)
    ax = figure.axes[0]
    cells, zeros, infinite = (mesh.get_array() for mesh in ax.collections)
    assert cells.filled(-1).tolist() == [[1, -1, 1], [-1, 10, 10], [100, 100, -1]]
    assert (~zeros.mask).tolist() == [[False, True, False]] + [[False] * 3] * 2
    assert (~infinite.mask).tolist() == [[False] * 3] * 2 + [[False, False, True]]
    assert texts(figure) == ["exactly zero", "NaN or Inf"]
    assert ax.get_title() == "plain, depth 3"


def test_degradation_shows_means_intervals_seeds_and_what_diverged(found):
    means = tables.degradation(found.overview)
    figure = plots.degradation(found.overview, means)
    train, test = figure.axes
    assert (train.get_title(), test.get_title()) == ("training error", "test error")
    plain = next(c for c in train.containers if c.lines[0].get_marker() == "s")
    assert plain.lines[0].get_ydata().tolist() == [0.0, pytest.approx(0.5)]
    low, high = plain.lines[2][0].get_segments()[1][:, 1]
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (low, high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    seeds = np.concatenate(
        [c.get_offsets()[:, 1] for c in train.collections if len(c.get_offsets())]
    )
    for error in (0.4, 0.5, 0.6, 0.01, 0.02):
        assert np.isclose(seeds, error).any()
    (diverged,) = lines(train, "x")
    assert list(diverged.get_xdata()) == [plain.lines[0].get_xdata()[1]]  # at its arm's place
    assert texts(figure) == ["plain", "residual", "diverged"]


def test_the_benefit_is_drawn_from_pairs(found):
    gains = tables.benefit(found.pairs)
    figure = plots.benefit(found.pairs, gains)
    (drawn,) = figure.axes[0].containers
    assert drawn.lines[0].get_ydata().tolist() == [0.0, pytest.approx(0.49)]
    assert figure.axes[0].get_ylabel() == "plain error − error with skip"


def test_training_curves(found):
    figure = plots.curves(found.curves)
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert labels == ["training loss", "training accuracy", "test accuracy"]
    loss = lines(figure.axes[0])[0]
    np.testing.assert_allclose(loss.get_ydata(), 2.3 / (1 + np.arange(12)))
    ends = [
        line.get_ydata()[0]
        for line in lines(figure.axes[3])
        if line.get_markerfacecolor() == "white" and len(line.get_ydata())
    ]
    for error in report_store.ERRORS[56, "none"]:
        assert np.isclose(ends, 1 - error).any()


def test_blocks_show_both_terms(found):
    frame = found.blocks[(found.blocks["arm"] == "residual") & (found.blocks["moment"] == "first")]
    figure = plots.blocks(frame)
    assert texts(figure) == ["skip", "branch"]
    skip = [line for line in lines(figure.axes[0], "o") if len(line.get_xdata()) == 9]
    np.testing.assert_allclose(skip[0].get_ydata(), np.sqrt(np.arange(1, 10)))
    branch = [line for line in lines(figure.axes[2], "s") if len(line.get_xdata()) == 9]
    np.testing.assert_allclose(branch[0].get_ydata(), 0.1 / np.arange(1, 10))


def test_many_depths_wrap_into_rows(tmp_path):
    frame = pd.concat(
        [tables.profile(record([1.0, 2.0])).assign(run_id=str(d), depth=d, arm="plain")
         for d in range(8, 50, 6)]
    )  # fmt: skip
    figure = plots.profile(frame)
    shown = [ax for ax in figure.axes if ax.axison]
    assert len(shown) == 14  # seven depths, first and last step
    assert len({round(ax.get_position().y0, 3) for ax in shown}) == 5


def test_arms_differ_without_colour():
    names = ["plain", "residual", "forward only", "backward only", "rezero", "highway"]
    styles = plots._styles(names)
    assert len({str(dashes) for _, dashes, _ in styles.values()}) == len(names)
    assert len({marker for *_, marker in styles.values()}) == len(names)
    grey = {n: float(np.dot(to_rgb(styles[n][0]), [0.299, 0.587, 0.114])) for n in names}
    assert abs(grey["plain"] - grey["residual"]) > 0.15


def test_figures_are_saved_in_three_formats_and_repeat(tmp_path):
    for name in ("one", "two"):
        figure = plots.profile(record([1.0, 2.0, 4.0]))
        assert isinstance(figure, Figure)
        files = plots.save(figure, tmp_path / name)
        assert [f.name for f in files] == [f"{name}.svg", f"{name}.png", f"{name}.pdf"]
    for kind, start in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        one, two = ((tmp_path / f"{n}.{kind}").read_bytes() for n in ("one", "two"))
        assert one.startswith(start)
        assert one == two
    assert ">initialisation<" in (tmp_path / "one.svg").read_text()  # text stays text
