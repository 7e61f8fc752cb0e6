"""Figures hold the numbers of their frames, and show what a log axis cannot."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import report_store
import seaborn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from gradflow import findings, plots, report, styles, tables
from gradflow.errors import GradflowError
from gradflow.findings import (
    Comparison,
    Finding,
    Verdict,
    about,
    above,
    between,
    exactly,
    judge,
)
from gradflow.measures import metric
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


def layered(values, steps=(0, 100), **columns):
    """One run's layers as `views.layered` gives them: the values at each step."""
    rows = [
        {"step": step, "layer": f"l{i}", "family": "weights", "ordinal": i, "x": value} | columns
        for step in steps
        for i, value in enumerate(values, start=1)
    ]
    return pd.DataFrame(rows)


def test_a_comparison_draws_both_runs_and_their_ratio():
    a, b = layered([1.0, 2.0, 4.0], arm="plain"), layered([1.0, 100.0], arm="residual")
    b.loc[b["step"] == 100, "x"] = 1000.0
    figure = plots.comparison(a, b, "x", step=3, names=("A: plain", "B: residual"))
    one, two, _, profiles, ratio = figure.axes
    assert [ax.get_title() for ax in (one, two)] == ["A: plain", "B: residual"]
    meshes = [ax.collections[0] for ax in (one, two)]
    assert {mesh.norm for mesh in meshes} == {meshes[0].norm}  # one scale of colours
    assert (meshes[0].norm.vmin, meshes[0].norm.vmax) == (1, 1000)
    assert [mesh.get_array().shape for mesh in meshes] == [(3, 2), (2, 2)]
    drawn = [line for line in profiles.get_lines() if len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in drawn] == [[1, 2, 4], [1, 100]]
    assert [list(line.get_xdata()) for line in drawn] == [[1, 2, 3], [1, 2]]
    assert [line.get_color() for line in drawn] == [
        styles.style(n)[0] for n in ("plain", "residual")
    ]
    level, line = ratio.get_lines()
    assert list(level.get_ydata()) == [1, 1]
    assert list(line.get_ydata()) == pytest.approx([1, 5, 25])
    assert ratio.get_yscale() == profiles.get_yscale() == "log"
    assert profiles.get_title() == "profiles, initialisation"  # the nearest to step 3
    assert ratio.get_xlabel() == "layer of A, counted from the input"
    assert texts(figure) == ["A: plain", "B: residual"]


def test_a_comparison_by_relative_depth_of_one_step_alone():
    a, b = (layered([1.0, 2.0, value], (0,), arm="plain") for value in (3.0, 6.0))
    profiles, ratio = plots.comparison(a, b, "x", relative=True).axes
    one, two = profiles.get_lines()
    assert list(one.get_xdata()) == list(ratio.get_lines()[1].get_xdata()) == [0, 0.5, 1]
    assert one.get_color() != two.get_color()  # of one arm
    assert ratio.get_xlabel() == "relative depth, input (0) to output (1)"


def test_a_comparison_marks_what_has_no_ratio():
    a = layered([0.0, 1.0, math.nan, 1.0], (0,), arm="plain")
    b = layered([1.0, 0.0, 1.0, None], (0,), arm="residual")
    b["x"] = pd.array([1.0, 0.0, 1.0, None], dtype="double[pyarrow]")
    figure = plots.comparison(a, b, "x")
    profiles, ratio = figure.axes
    marks = {m: [list(line.get_xdata()) for line in lines(ratio, m)] for m in "xv"}
    assert marks == {"x": [[1, 3]], "v": [[2]]}  # of the fourth B was not measured
    marks = {m: [list(line.get_xdata()) for line in lines(profiles, m)] for m in "xv"}
    assert marks == {"x": [[3]], "v": [[1], [2]]}
    assert texts(figure)[2:] == ["exactly zero", "NaN or Inf"]


def test_what_may_be_negative_is_compared_by_its_difference():
    a, b = layered([-1.0, 0.0, 1.0], arm="plain"), layered([1.0, 0.0], arm="residual")
    _, _, _, profiles, difference = plots.comparison(a, b, "x").axes
    assert profiles.get_yscale() == difference.get_yscale() == "linear"
    level, line = difference.get_lines()
    assert list(level.get_ydata()) == [0, 0]
    assert list(line.get_ydata()) == [2, 0.5, -1]
    assert difference.get_title() == "B − A at equal relative depth"


def test_profiles_by_seed(found):
    frame = found.profiles[found.profiles["moment"] == "first"]
    figure = plots.profile(frame, by="seed")
    panels = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in panels] == [f"seed {seed}" for seed in range(5)]
    runs = frame[frame["family"] == "weights"].groupby("seed")["run_id"].nunique()
    for ax, seed in zip(panels, range(5), strict=True):
        assert len([line for line in lines(ax) if len(line.get_xdata()) > 9]) == runs[seed]


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


def joins(skip, branch, steps=(0, 5), **columns):
    """The table blocks of a recorder: block i behind layer 2i + 2 of `record`, counted from 1."""
    rows = [
        {"step": step, "layer": f"b{i}", "position": 2 * i + 1.5, "skip_grad_norm": one}
        | {"branch_grad_norm": two, "kind": "block"}
        for step in steps
        for i, (one, two) in enumerate(zip(skip, branch, strict=True))
    ]
    return pd.DataFrame(rows).assign(**columns)


def test_a_record_of_blocks_has_skip_and_branch_below_its_profile():
    blocks = joins([4.0, 2.0, 1.0], [0.5, 0.25, 0.125], steps=(0, 3))
    figure = plots.record(record([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]), blocks)
    first, last, below, _ = figure.axes
    (profile,) = [line for line in lines(first) if len(line.get_xdata()) == 7]
    assert profile.get_ydata().tolist() == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    skip, branch = lines(below)
    assert skip.get_xdata().tolist() == branch.get_xdata().tolist() == [2.5, 4.5, 6.5]
    assert skip.get_ydata().tolist() == [4.0, 2.0, 1.0]
    assert branch.get_ydata().tolist() == [0.5, 0.25, 0.125]
    assert skip.get_linewidth() > 3 * branch.get_linewidth()  # both show where they are equal
    assert first.get_xlim() == below.get_xlim()
    assert [ax.get_title() for ax in figure.axes] == [
        "initialisation", "after 5 updates", "", "after 3 updates",
    ]  # fmt: skip
    assert last.get_ylim() == first.get_ylim()
    assert texts(figure) == ["weights", "input, through the skip", "branch"]


def test_a_skip_without_gradient_is_marked_and_one_that_carries_nothing_is_no_skip():
    values, none = record([1.0, 2.0, 4.0], steps=(0,)), joins([0.0], [1.0], steps=(0,))
    half = plots.record(values, none.assign(skip_rms=1.0))  # forward only
    (mark,) = lines(half.axes[1], "v")
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2.5], [0.03])
    assert texts(half)[-1] == "exactly zero"
    for blocks in (none.assign(skip_rms=0.0), none, none[:0], pd.DataFrame()):
        (ax,) = plots.record(values, blocks).axes
        assert texts(ax.figure) == []
    with pytest.raises(GradflowError, match="nothing recorded to draw"):
        plots.record(pd.DataFrame({"step": [0]}), none)


def test_blocks_that_were_measured_less_often_than_weights_leave_a_place_empty():
    figure = plots.record(record([1.0, 2.0, 4.0]), joins([1.0], [2.0], steps=(0,)))
    assert [ax.axison for ax in figure.axes] == [True, True, True, False]
    figure = plots.record(record([1.0, 2.0, 4.0], steps=(7,)), joins([1.0], [2.0]))
    assert [ax.axison for ax in figure.axes] == [True, False, True, True]
    titles = [ax.get_title() for ax in figure.axes if ax.axison]
    assert titles == ["after 7 updates", "initialisation", "after 5 updates"]


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
    looks = styles.styles_of(names)
    assert len({str(dashes) for _, dashes, _ in looks.values()}) == len(names)
    assert len({marker for *_, marker in looks.values()}) == len(names)
    grey = {n: float(np.dot(to_rgb(looks[n][0]), [0.299, 0.587, 0.114])) for n in names}
    assert abs(grey["plain"] - grey["residual"]) > 0.15


def test_the_theme_is_seaborns_where_it_is_not_our_own():
    theirs = {**seaborn.axes_style("ticks"), **seaborn.plotting_context("paper")}
    ours = plots._SEABORN
    assert theirs.keys() - ours.keys() == {
        "image.cmap", "axes.grid", "grid.color", "grid.linewidth", "axes.titlesize",
        "axes.spines.right", "axes.spines.top", "lines.linewidth",
    }  # fmt: skip
    for name, value in ours.items():
        expected = theirs[name]
        assert value == (pytest.approx(expected) if isinstance(value, float) else expected), name


def test_coordinates_of_an_svg_are_cut_and_its_words_are_not(tmp_path):
    figure = Figure()
    ax = figure.subplots()
    ax.plot([0, 1 / 3], [1 / 7, 2 / 3])
    ax.set_title("a 0.123456 b")
    plots.save(figure, tmp_path / "one")
    text = (tmp_path / "one.svg").read_text()
    assert ">a 0.123456 b<" in text
    assert not re.search(r'<[^>]*[ "]\d+\.\d{3,}[ "][^>]*>', text)
    root = ElementTree.fromstring(text)
    paths = [node.get("d") for node in root.iter("{http://www.w3.org/2000/svg}path")]
    assert any(re.fullmatch(r"M [\d.]+ [\d.]+ +L [\d.]+ [\d.]+ +", path) for path in paths)


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


# --- against theory -------------------------------------------------------------------------------

LAYERS = np.arange(1.0, 11)


def predicted(curves, seeds=(0,), **columns):
    """The frame of an overlay: name -> (values, theory), each seed's values times (1 + seed)."""
    parts = [
        pd.DataFrame({"x": LAYERS, "value": values * (1 + seed), "theory": theory})
        .assign(curve=name, seed=seed, **columns)
        for name, (values, theory) in curves.items()
        for seed in seeds
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def drawn_as(ax, dashed):
    """The dashed lines of theory, or the points of means, as arrays of y."""
    style = "--" if dashed else "None"
    chosen = [line for line in lines(ax) if line.get_linestyle() == style and len(line.get_xdata())]
    return [np.asarray(line.get_ydata(), float) for line in chosen if line.get_zorder() > 2]


def test_an_overlay_tells_both_slopes_and_their_gap():
    frame = predicted(
        {
            "steep": (np.exp(0.33 * LAYERS), np.exp(0.3 * LAYERS)),
            "flat": (np.exp(-0.002 * LAYERS), np.exp(0.03 * LAYERS)),
            "free": (LAYERS, np.nan),
        },
        seeds=(0, 1, 3),
    )
    told = plots.slopes(frame)
    assert told["curve"].tolist() == ["steep", "flat"]
    np.testing.assert_allclose(told["measured"], [0.33, -0.002])
    np.testing.assert_allclose(told["theory"], [0.3, 0.03])
    assert told["gap"][0] == pytest.approx(0.1)
    assert math.isnan(told["gap"][1])
    figure = plots.overlay(frame, x="layer", y="squared norm")
    assert texts(figure) == [
        "steep: slope 0.33, theory 0.3, gap +10.0 %",
        "flat: slope −0.002, theory 0.03, gap −0.032",
        "free",
        "mean over seeds", "each seed", "theory",
    ]  # fmt: skip
    (ax,) = figure.axes
    assert ax.get_yscale() == "log"
    means = drawn_as(ax, dashed=False)
    np.testing.assert_allclose(means[0], np.exp(0.33 * LAYERS) * 2)  # ∛(1·2·4) = 2
    seeds = [line.get_ydata() for line in lines(ax) if line.get_linewidth() == 0.7]
    np.testing.assert_allclose(seeds[2], np.exp(0.33 * LAYERS) * 4)
    colors = [line.get_color() for line in lines(ax) if line.get_linestyle() == "--"]
    points = [line.get_color() for line in lines(ax) if line.get_marker() in ("o", "s")]
    assert colors[:2] == points[:2]


def test_slopes_of_a_linear_axis_are_of_the_values():
    told = plots.slopes(predicted({"a": (3 * LAYERS, 4 * LAYERS)}, seeds=(0, 1)), log=False)
    assert told[["measured", "theory", "gap"]].to_numpy() == pytest.approx(
        np.array([[4.5, 4.0, 0.125]])
    )
    figure = plots.overlay(predicted({"a": (3 * LAYERS, 4 * LAYERS)}), log=False)
    assert figure.axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("log", "mean"), [(True, 2.0), (False, 7 / 3)])
def test_a_shape_is_moved_onto_the_mean_at_the_last_place_known(log, mean):
    values = np.exp(0.2 * LAYERS)
    values[-1] = 0 if log else np.inf  # the last place is not known
    frame = predicted({"a": (values, 100 * np.exp(0.3 * LAYERS))}, seeds=(0, 1, 3), scaled=True)
    (theory,) = drawn_as(plots.overlay(frame, log=log).axes[0], dashed=True)
    np.testing.assert_allclose(theory, mean * np.exp(0.2 * 9 + 0.3 * (LAYERS - 9)))
    if log:
        assert plots.slopes(frame)["theory"][0] == pytest.approx(0.3)


def test_zeros_and_non_finite_values_leave_slopes_and_stay_visible():
    values = np.exp(0.5 * LAYERS)
    values[:3] = [0.0, np.nan, np.inf]
    frame = predicted({"a": (values, np.exp(0.5 * LAYERS))})
    assert plots.slopes(frame)["measured"][0] == pytest.approx(0.5)
    figure = plots.overlay(frame)
    (zeros,), (infinite,) = lines(figure.axes[0], "v"), lines(figure.axes[0], "x")
    assert list(zeros.get_xdata()) == [1]
    assert list(infinite.get_xdata()) == [2, 3]
    assert texts(figure)[-2:] == ["exactly zero", "NaN or Inf"]


def test_a_profile_of_ones_own_beside_its_theory():
    frame = pd.DataFrame({"x": LAYERS, "value": 1.2**-LAYERS, "theory": 1.25**-LAYERS})
    figure = plots.overlay(frame, x="layer", y="squared norm of the gradient")
    gap = 100 * (math.log(1.2) / math.log(1.25) - 1)
    assert texts(figure)[0] == f"slope −0.182, theory −0.223, gap −{-gap:.1f} %"
    assert texts(figure)[1:] == ["measured", "theory"]
    alone = plots.overlay(frame[["x", "value"]])
    assert texts(alone) == ["measured"]
    assert len(plots.slopes(frame[["x", "value"]])) == 0
    with pytest.raises(GradflowError, match="nothing measured"):
        plots.overlay(pd.DataFrame({"x": [], "value": []}))


def test_eight_curves_have_colours_of_their_own_and_arms_keep_theirs():
    names = ["plain", "residual", *(f"σ = {k}" for k in range(6))]
    looks = plots._overlay_styles(names)
    assert looks["plain"] == styles.style("plain")
    assert looks["residual"] == styles.style("residual")
    assert len({color for color, *_ in looks.values()}) == 8
    assert len({marker for *_, marker in looks.values()}) == 8


# --- verdicts -------------------------------------------------------------------------------------


def decided(*rows):
    """A verdict on comparisons: (name, region, values) and keys of a Comparison."""
    results = []
    for name, region, values, keys in rows:
        asked = Comparison(name, ("a",), metric(), region, **keys)
        results.append(judge(asked, dict(enumerate(values, 100)), len(rows)))
    asked = tuple(result.comparison for result in results)
    found = Finding("nobody", "skips", {"a": {}}, asked, "not run", id="made up")
    return Verdict(found, tuple(results))


def around(mean, spread=0.01):
    return [mean * factor for factor in (1 - spread, 1, 1 + spread)]


def test_effects_draw_seeds_mean_interval_region_and_theory():
    values = [0.97, 1.0, 1.05]
    verdict = decided(("ρ, he", about(1.0, 0.2), values, {"ratio": True, "unit": "ρ"}))
    (result,) = verdict.results
    figure = plots.effects(verdict)
    (ax,) = figure.axes
    assert ax.get_xscale() == "linear"  # less than a factor of three
    assert ax.get_xlabel() == "ρ"
    (region,) = ax.collections[:1]
    x = region.get_paths()[0].vertices[:, 0]
    assert (x.min(), x.max()) == pytest.approx((0.8, 1.2))
    drawn = lines(ax)
    assert any(np.array_equal(line.get_xdata(), [1.0, 1.0]) for line in drawn)  # theory
    assert any(np.array_equal(line.get_xdata(), values) for line in drawn)
    (bars,) = ax.containers
    assert bars.lines[0].get_xdata() == pytest.approx([result.mean])
    assert bars.lines[2][0].get_segments()[0][:, 0] == pytest.approx([result.low, result.high])
    words = [text.get_text() for text in ax.texts]
    assert words == [result.word, findings.measured_words(result)]
    assert texts(figure) == ["declared region", "theory", "each seed", "mean and interval"]


def test_verdicts_differ_in_colour_marker_and_word():
    verdict = decided(
        ("yes", above(0.5), around(0.9), {}),
        ("no", above(0.5), around(0.3), {}),
        ("perhaps", above(0.5), around(0.5), {}),
        ("never", above(0.5), [], {}),
    )
    figure = plots.effects(verdict)
    bars = [bar.lines[0] for ax in figure.axes for bar in ax.containers]
    assert len({line.get_marker() for line in bars}) == 3
    assert len({line.get_color() for line in bars}) == 3
    words = {text.get_text().split(" (")[0] for ax in figure.axes for text in ax.texts}
    assert {"reproduced", "contradicted", "inconclusive", "not run"} <= words
    for line, result in zip(bars, verdict.results, strict=False):
        said = [t for ax in figure.axes for t in ax.texts if t.get_text().startswith(result.word)]
        assert said[0].get_color() == line.get_color()


def panels(verdict):
    return [
        [result.comparison.name for result in panel] for panel in plots._panels(verdict.results)
    ]


def test_what_cannot_share_an_axis_has_its_own():
    ratio = {"ratio": True, "unit": "norm ratio"}
    verdict = decided(
        ("plain 20", about(9.6, 0.2), around(9.6), ratio),
        ("plain 56", about(4.2e3, 0.2), around(4.2e3), ratio),
        ("residual 20", about(12.0, 0.2), around(12), ratio),
        ("accuracy 20", above(0.9), around(0.95), {"unit": "accuracy"}),
        ("identity", exactly(1.0, 1e-12), [1.0] * 3, {}),
        ("other identity", exactly(0.5, 1e-12), [0.5] * 3, {"unit": "accuracy"}),
    )
    assert panels(verdict) == [
        ["plain 20", "residual 20"], ["plain 56"], ["accuracy 20"], ["identity", "other identity"]
    ]  # fmt: skip
    wide = decided(("decades", between(1, 1e6), [10.0, 1e3, 1e5], ratio))
    assert plots.effects(wide).axes[0].get_xscale() == "log"


def test_identities_are_told_in_words():
    verdict = decided(
        ("identity", exactly(1.0, 1e-12), [1.0] * 3, {}),
        ("nearly", exactly(0.0, 1e-3), [1e-4, -2.5e-4], {}),
    )
    (ax,) = plots.effects(verdict).axes
    assert [text.get_text() for text in ax.texts] == [
        "reproduced", "no difference (3 seeds)", "exact: 1 ± 1e-12",
        "reproduced", "off by 0.00025 at most (2 seeds)", "exact: 0 ± 0.001",
    ]  # fmt: skip
    assert not lines(ax)


def test_a_seed_that_is_not_finite_is_marked():
    verdict = decided(("a", above(0.5), [0.6, math.nan, 0.7], {}))
    figure = plots.effects(verdict)
    (ax,) = figure.axes
    assert len(lines(ax, "x")) == 1
    assert texts(figure)[-1] == "NaN or Inf"
    assert [text.get_text() for text in ax.texts] == ["inconclusive (no finite value at seed 101)"]


def test_nothing_measured_is_one_clear_error():
    with pytest.raises(GradflowError, match="made up: nothing measured to draw"):
        plots.effects(decided(("never", above(0.5), [], {})))


def test_twelve_rows_are_legible():
    """No text overlaps another one or leaves the figure."""
    long = "the norm of the first layer's gradient over the last one's"
    rows = [(f"{long}, depth {d}", about(10.0**d, 0.2), around(10.0**d), {"ratio": True})
            for d in range(6)]  # fmt: skip
    rows += [(f"{long}, {d}", above(0.5), around(0.5), {"unit": "accuracy"}) for d in range(4)]
    rows += [(f"{long}, at {d}", exactly(d, 1e-9), [d] * 3, {}) for d in range(2)]
    figure = plots.effects(decided(*rows))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = []
    for ax in figure.axes:
        shown = [*ax.texts, *ax.get_yticklabels(), *ax.get_xticklabels(), ax.xaxis.label]
        low, high = ax.get_xlim()
        ticks = [t for t in ax.get_xticklabels() if not low <= t.get_position()[0] <= high]
        shown = [text for text in shown if text.get_text() and text not in ticks]
        shown = shown if ax.xaxis.get_visible() else [*ax.texts, *ax.get_yticklabels()]
        boxes += [text.get_window_extent(canvas.get_renderer()) for text in shown]
    boxes += [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) > 40
    whole = figure.bbox
    for place, box in enumerate(boxes):
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1
        for other in boxes[:place]:
            assert min(box.x1, other.x1) - max(box.x0, other.x0) < 2 or (
                min(box.y1, other.y1) - max(box.y0, other.y0) < 2
            )


def test_networks_are_drawn_over_their_last_layer():
    frame = pd.DataFrame(
        {
            "network": ["LeNet-5"] * 2 + ["plain-152"] * 3,
            "arm": [""] * 2 + ["plain"] * 3,
            "place": [0.0, 1.0, 0.0, 0.5, 1.0],
            "weight_grad_norm": [0.006, 2.0, 8e9, 0.0, 1.0],
            "output_grad_norm": [0.5, 0.5, np.nan, 3.0, 2.0],
        }
    )
    figure = plots.across(frame)
    left, right = figure.axes
    plain = styles.style("plain")[0]
    np.testing.assert_allclose(lines(left)[0].get_ydata(), [0.003, 1])
    for ax, mark in ((left, "v"), (right, "x")):
        assert mark in {line.get_marker() for line in ax.lines if line.get_color() == plain}
    assert [text.get_text() for text in left.texts] == ["×3·10⁻³", "×8·10⁹"]
    assert [text.get_text() for text in right.texts] == ["×1"]
    assert texts(figure) == ["LeNet-5", "plain-152", "exactly zero", "NaN or Inf"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(186.6, "×190"), (741.0, "×740"), (0.0917, "×0.092"), (6.08e-4, "×6·10⁻⁴"),
     (9.96e9, "×1·10¹⁰"), (1.0, "×1"), (9999.0, "×1·10⁴"), (3000.0, "×3000")],
)  # fmt: skip
def test_a_first_value_has_one_or_two_digits(value, said):
    assert plots._times(value) == said
