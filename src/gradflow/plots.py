"""Figures from frames: every function takes tables and returns a matplotlib Figure.

Arms differ in colour (safe for the colour-blind), line style and marker, so that a print in grey
reads as well. What a logarithmic axis cannot show is marked at its edge: exact zeros at the bottom,
NaN and Inf at the top.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from fontTools import subset  # comes with matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from gradflow import tables
from gradflow.errors import GradflowError
from gradflow.findings import (
    CONTRADICTED,
    INCONCLUSIVE,
    NOT_RUN,
    REPRODUCED,
    Result,
    Verdict,
    measured_words,
    region_words,
)
from gradflow.styles import KNOWN, OTHERS, Style, label, style, styles_of

WIDTH = 7.2
"""Inches: the width of every figure."""
FORMATS = ("svg", "png", "pdf")

_SEABORN: dict[str, Any] = {
    "figure.facecolor": "white", "axes.labelcolor": ".15", "xtick.direction": "out",
    "ytick.direction": "out", "xtick.color": ".15", "ytick.color": ".15", "axes.axisbelow": True,
    "grid.linestyle": "-", "text.color": ".15", "font.family": ["sans-serif"],
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "Bitstream Vera Sans",
                        "sans-serif"],
    "lines.solid_capstyle": "round", "patch.edgecolor": "w", "patch.force_edgecolor": True,
    "xtick.top": False, "ytick.right": False, "axes.facecolor": "white", "axes.edgecolor": ".15",
    "axes.spines.left": True, "axes.spines.bottom": True, "xtick.bottom": True, "ytick.left": True,
    "axes.linewidth": 1.0, "lines.markersize": 4.8, "patch.linewidth": 0.8,
    "xtick.major.width": 1.0, "ytick.major.width": 1.0, "xtick.minor.width": 0.8,
    "ytick.minor.width": 0.8, "xtick.major.size": 4.8, "ytick.major.size": 4.8,
    "xtick.minor.size": 3.2, "ytick.minor.size": 3.2, "font.size": 9.6, "axes.labelsize": 9.6,
    "xtick.labelsize": 8.8, "ytick.labelsize": 8.8, "legend.fontsize": 8.8,
    "legend.title_fontsize": 9.6,
}  # fmt: skip
"""seaborn's style `ticks` in the context `paper`, written out: to load seaborn takes as long as to
draw several figures."""
_THEME: dict[str, Any] = {
    **_SEABORN,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradflow",
    "pdf.fonttype": 42,
}
themed = mpl.rc_context(_THEME)  # type: ignore[arg-type]

_DASHES = (0, (4, 2))
_ZERO, _NON_FINITE, _MISSING = "white", "#CC3311", "0.8"


def _grid(panels: int, columns: int = 3, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    columns = max(1, min(columns, panels))
    rows = math.ceil(panels / columns)
    # A lone panel keeps a usual shape: wide figures of one line mislead about its slope.
    height = max(height, 3.2) if panels == 1 else height
    figure = Figure(figsize=(WIDTH if columns > 1 else 5.0, 0.6 + height * rows))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in grid.flat[panels:]:
        ax.set_axis_off()
    return figure, list(grid.flat[:panels])


def _matrix(
    labels: Sequence[str], depths: list[tuple[str, pd.DataFrame]], height: float = 1.75
) -> tuple[Figure, list[list[tuple[Axes, pd.DataFrame]]]]:
    """A row of panels for each label, a column for each depth; beyond four, more such blocks."""
    columns, rows = min(len(depths), 4), len(labels)
    total = rows * math.ceil(len(depths) / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 5.0, 0.9 + height * total))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(total, columns, squeeze=False, sharex="col", sharey="row")
    lines: list[list[tuple[Axes, pd.DataFrame]]] = [[] for _ in labels]
    for index in range(total // rows * columns):
        block, column = divmod(index, columns)
        for row, words in enumerate(labels):
            ax = axes[block * rows + row, column]
            if index >= len(depths):
                ax.set_axis_off()
                axes[block * rows - 1, column].tick_params(labelbottom=True)
                continue
            facet, part = depths[index]
            lines[row].append((ax, part))
            ax.set_title(facet if row == 0 else "")
            ax.set_ylabel(words if column == 0 else "")
    return figure, lines


def _legend(figure: Figure, handles: Sequence[Any], title: str = "", *, columns: int = 5) -> None:
    title = "\n".join(textwrap.wrap(title, int(11 * figure.get_figwidth())))
    if not handles:
        figure.suptitle(title)
        return
    columns = min(len(handles), columns)
    legend = figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, title=title or None
    )
    legend.get_title().set_multialignment("center")


def _line_handle(name: str, style: Style) -> Line2D:
    color, dashes, marker = style
    return Line2D([], [], color=color, linestyle=dashes, marker=marker, markersize=4, label=name)


def _edge_marks(
    ax: Axes, x: ArrayLike, y: ArrayLike, color: str, *, zeros: bool = True
) -> set[str]:
    """Marks zeros at the lower edge and non-finite values at the upper one; says which it drew."""
    places, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    drawn = set()
    edges = {"non-finite": (~np.isfinite(values), 0.97, "x")}
    if zeros:
        edges["zero"] = (values == 0, 0.03, "v")
    for name, (which, height, marker) in edges.items():
        if which.any():
            drawn.add(name)
            ax.plot(
                places[which], np.full(which.sum(), height), marker, color=color, markersize=4,
                transform=ax.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
    return drawn


def _edge_handles(drawn: set[str]) -> list[Line2D]:
    marks = {"zero": ("v", "exactly zero"), "non-finite": ("x", "NaN or Inf")}
    return [
        Line2D([], [], color="0.3", linestyle="", marker=marker, markersize=4, label=label)
        for name, (marker, label) in marks.items()
        if name in drawn
    ]


def _drawable(values: ArrayLike) -> NDArray[np.float64]:
    """For a log axis: what cannot be drawn there becomes NaN, a gap in the line."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array) & (array > 0), array, np.nan)


def _shown(values: NDArray[np.float64], log: bool) -> NDArray[np.float64]:
    """What an axis cannot show becomes NaN, a gap in the line."""
    return _drawable(values) if log else np.where(np.isfinite(values), values, np.nan)


def _log_line(
    ax: Axes, x: ArrayLike, y: ArrayLike, style: Style, offset: float = 0,
    *, log: bool = True,
) -> None:  # fmt: skip
    """A line with few markers, those of different arms at different places."""
    color, dashes, marker = style
    places, values = np.asarray(x), _shown(np.asarray(y, dtype=float), log)
    every = max(1, len(places) // 7)
    ax.plot(
        places, values, color=color, linestyle=dashes, marker=marker, linewidth=0.9,
        markersize=3, markevery=(int(offset * every), every), alpha=0.85,
    )  # fmt: skip


def _range(values: ArrayLike) -> tuple[float, float]:
    known = _drawable(values)
    known = known[~np.isnan(known)]
    return (known.min(), known.max()) if known.size else (0.1, 1.0)


def _log_limits(axes: Iterable[Axes], values: ArrayLike) -> None:
    """One logarithmic y axis for all panels, with room for the marks at its edges."""
    low, high = _range(values)
    room = 0.08 * max(math.log10(high) - math.log10(low), 0.5)
    for ax in axes:
        ax.set_yscale("log")
        ax.set_ylim(max(low * 10**-room, 1e-320), high * 10**room)
        _log_ticks(ax.yaxis, low, high)


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Powers of ten, or over a narrow range the numbers between them."""
    if high / low > 100:
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_major_formatter(FuncFormatter(_power))
    else:
        numbers = MaxNLocator(5, steps=[1, 2, 5, 10])
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 3 else numbers)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _power(value: float, _: int = 0) -> str:
    """A power of ten in plain characters: mathtext is slow, and no text in an SVG."""
    exponent = str(round(math.log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _completed(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that facet a figure, also for the frame of a single record, which lacks them."""
    missing: dict[str, Any] = {"run_id": "", "depth": pd.NA, "arm": "", "seed": pd.NA}
    return frame.assign(**{n: v for n, v in missing.items() if n not in frame})


def _by(frame: pd.DataFrame, column: str = "depth") -> list[tuple[str, pd.DataFrame]]:
    """(panel's title, rows) for each depth, or seed; runs without one come last."""
    known = sorted(frame[column].dropna().unique(), key=lambda v: (isinstance(v, str), v))
    parts = [(f"{column} {value}", frame[frame[column] == value]) for value in known]
    rest = frame[frame[column].isna()]
    return [*parts, (f"no {column} given" if parts else "", rest)] if len(rest) else parts


# --- profiles -------------------------------------------------------------------------------------


@themed
def profile(
    frame: pd.DataFrame,
    quantity: str = "weight_grad_norm",
    *,
    family: str = tables.WEIGHT,
    by: str = "depth",
    title: str = "",
) -> Figure:
    """A quantity of each layer against its place, log scale: each run's first and last step.

    One panel a moment and depth (`by="seed"`: seed), one line a run, arms side by side.

    Args:
        frame: step, layer, position, kind, the quantity; of more than one run also run_id, depth,
            arm, as `tables.profile` gives them.
        family: `weights` (convolutions, linear layers, embeddings) or `norm` (all others).

    Raises:
        GradflowError: the quantity was not recorded.
    """
    if quantity not in frame or not len(tables.measured(frame, quantity)):
        raise GradflowError(f"{quantity}: nothing recorded to draw")
    data = _completed(frame if "ordinal" in frame else tables.profile(frame, quantity))
    data = data[data["family"] == family]
    if not len(data):
        raise GradflowError(f"{quantity}: no layers of the family {family}")
    ends = data.groupby("run_id")["step"].agg(["min", "max"]).loc[data["run_id"]].to_numpy()
    steps = data["step"].to_numpy()
    panels = []
    for moment in dict.fromkeys(range(2) if (ends[:, 0] != ends[:, 1]).any() else [0]):
        here = data[steps == ends[:, moment]]
        words = tables.when(here["step"])
        panels += [(words, facet, part) for facet, part in _by(here, by)]
    constant = len({words for words, *_ in panels}) == 1
    figure, axes = _grid(len(panels))
    styles = styles_of(data["arm"].unique())
    drawn: set[str] = set()
    _log_limits(axes, np.concatenate([part[quantity] for *_, part in panels]))
    for ax, (words, facet, part) in zip(axes, panels, strict=True):
        drawn |= _profile_panel(ax, part, quantity, styles)
        ax.set_title(", ".join(filter(None, [facet, "" if constant else words])))
    figure.supxlabel(f"{_one(family)}, counted from the input", fontsize=9)
    words = label(quantity).replace(" (", "\n(")
    if family == tables.NORM:
        words = words.replace("weight gradient", "parameters' gradient")
    figure.supylabel(words, fontsize=9)
    arms = [_line_handle(arm, styles[arm]) for arm in tables.ordered(styles) if arm]
    heading = ": ".join(filter(None, [panels[0][0] if constant else "", title]))
    _legend(figure, [*arms, *_edge_handles(drawn)], heading)
    return figure


def _one(family: str) -> str:
    """What is counted on the axis of a family's layers."""
    return {tables.NORM: "normalisation layer", tables.BLOCK: "block"}.get(family, "layer")


def _profile_panel(
    ax: Axes, part: pd.DataFrame, quantity: str, styles: dict[str, Style]
) -> set[str]:
    drawn: set[str] = set()
    names = list(styles)
    for (arm, _, _), run in part.groupby(["arm", "run_id", "step"], sort=False):
        x, y = run["ordinal"].to_numpy(), run[quantity].to_numpy()
        style = styles[str(arm)]
        _log_line(ax, x, y, style, names.index(str(arm)) / len(names))
        drawn |= _edge_marks(ax, x, y, style[0])
    if "stage" in part and part["depth"].nunique() < 2:
        layers = part.drop_duplicates("ordinal").sort_values("ordinal")
        stages = layers["stage"].to_numpy(dtype=float, na_value=np.nan)
        for place in layers["ordinal"].to_numpy()[1:][np.diff(stages) > 0]:
            ax.axvline(place - 0.5, color="0.6", linewidth=0.6, linestyle=":", zorder=0)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.grid(axis="x", visible=False)
    return drawn


@themed
def across(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Norms of different networks' layers over those of their last one, against relative depth.

    A panel for the weights' gradients and one for the outputs', log scale, a line each network, at
    whose beginning its value stands.

    Args:
        frame: network, arm (for its colour; empty for none), place (0 the first layer, 1 the
            last), weight_grad_norm, output_grad_norm, in the order of the layers.
    """
    names = dict(frame[["network", "arm"]].drop_duplicates().to_numpy())
    others = iter(OTHERS)
    styles = {name: KNOWN[arm] if arm else next(others) for name, arm in names.items()}
    figure, axes = _grid(2, columns=2, height=3.9)
    panels = {
        "weight_grad_norm": "gradient of each layer's weights",
        "output_grad_norm": "gradient of each layer's output",
    }
    shares = {c: frame[c] / frame.groupby("network")[c].transform("last") for c in panels}
    _log_limits(axes, np.concatenate([share.to_numpy() for share in shares.values()]))
    drawn: set[str] = set()
    for ax, (quantity, words) in zip(axes, panels.items(), strict=True):
        for name, look in styles.items():
            here = (frame["network"] == name).to_numpy()
            x, y = frame["place"].to_numpy()[here], shares[quantity].to_numpy()[here]
            drawn |= _across_line(ax, x, y, look)
        ax.axhline(1, color="0.6", linewidth=0.6, zorder=0)
        ax.set_xlim(-0.27, 1.03)  # room for each line's first value
        ax.set_title(words)
        ax.grid(axis="x", visible=False)
        ax.xaxis.set_major_locator(FixedLocator([0, 1]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "last" if x else "first"))
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("L2 norm, over that of the last layer", fontsize=9)
    handles = [_line_handle(name, styles[name]) for name in names]
    _legend(figure, [*handles, *_edge_handles(drawn)], title, columns=7)
    return figure


def _across_line(ax: Axes, x: NDArray[np.float64], y: NDArray[np.float64], look: Style) -> set[str]:
    color, dashes, marker = look
    ax.plot(
        x, _drawable(y), color=color, linestyle=dashes, linewidth=1.4, marker=marker, markersize=4,
        markevery=max(1, len(x) // 8),
    )  # fmt: skip
    if np.isfinite(y[0]) and y[0] > 0:
        ax.text(-0.03, y[0], _times(y[0]), size=8, color=color, ha="right", va="center")
    return _edge_marks(ax, x, y, color)


def _times(value: float) -> str:
    """`×190`, `×8·10⁹`: one or two digits."""
    digit, exponent = f"{value:.0e}".split("e")
    if -3 < int(exponent) < 4:
        return f"×{float(f'{value:.1e}'):g}"
    return f"×{digit}·{_power(10.0 ** int(exponent))}"


@themed
def heatmap(frame: pd.DataFrame, quantity: str = "weight_grad_norm", *, title: str = "") -> Figure:
    """A quantity over layer and step, one panel a depth and arm; zeros and NaN/Inf have colours.

    Args:
        frame: `tables.profile` of one run for each depth and arm, over many steps.
    """
    data = _completed(frame)
    data = data[data["family"] == tables.WEIGHT]
    arms = tables.ordered(data["arm"].unique())
    depths = _by(data)
    figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * len(depths)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(depths), len(arms), squeeze=False, sharex=True)
    found: set[str] = set()
    for line, (facet, here) in zip(axes, depths, strict=True):
        low, high = _range(here[quantity])
        norm = LogNorm(low, high if high > low else low * 10)
        for ax, arm in zip(line, arms, strict=True):
            part = here[here["arm"] == arm]
            heading = ", ".join(filter(None, [arm, facet]))
            ax.set_title(textwrap.fill(heading, _LINE // len(arms)))
            ax.grid(visible=False)
            ax.set_facecolor(_MISSING)
            if len(part):
                found |= _heat_panel(ax, part, quantity, norm)
        _color_bar(figure, norm, line)
    figure.supxlabel(_HEAT_STEPS, fontsize=9)
    figure.supylabel("layer, counted from the input", fontsize=9)
    words = ": ".join(filter(None, [label(quantity), title]))
    _legend(figure, _heat_handles(found), words)
    return figure


_LINE = 88
"""Letters of panels' titles that fit beside each other."""
_HEAT_STEPS = "step (linear to 10, then logarithmic)"


def _color_bar(figure: FigureBase, norm: Normalize, axes: Iterable[Axes]) -> None:
    mapped = ScalarMappable(norm, "viridis")
    bar = figure.colorbar(mapped, ax=list(axes), aspect=15, fraction=0.05, pad=0.02)
    if isinstance(norm, LogNorm):
        _log_ticks(bar.ax.yaxis, *bar.ax.get_ylim())


def _heat_handles(found: set[str]) -> list[Patch]:
    colors = {"zero": (_ZERO, "exactly zero"), "non-finite": (_NON_FINITE, "NaN or Inf")}
    return [
        Patch(facecolor=color, edgecolor="0.3", label=label)
        for name, (color, label) in colors.items()
        if name in found
    ]


def _heat_panel(ax: Axes, part: pd.DataFrame, quantity: str, norm: Normalize) -> set[str]:
    layers, row = np.unique(part["ordinal"].to_numpy(dtype=float), return_inverse=True)
    steps, column = np.unique(part["step"].to_numpy(dtype=float), return_inverse=True)
    values = np.full((len(layers), len(steps)), np.nan)
    values[row, column] = part[quantity].to_numpy(dtype=float, na_value=np.nan)
    there = np.zeros_like(values, dtype=bool)
    there[row, column] = True
    x = np.concatenate([[steps[0] - 0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
    y = np.concatenate([layers - 0.5, [layers[-1] + 0.5]])
    ax.set_xscale("symlog", linthresh=10, linscale=0.7)
    log = isinstance(norm, LogNorm)
    ax.pcolormesh(
        x, y, np.ma.masked_invalid(_shown(values, log)), norm=norm, cmap="viridis", rasterized=True
    )
    bad = ~np.isfinite(values) & there  # a cell that the run lacks is NaN as well
    drawn = set()
    zero = (values == 0) & log
    for name, which, color in (("zero", zero, _ZERO), ("non-finite", bad, _NON_FINITE)):
        if which.any():
            drawn.add(name)
            cells = np.ma.masked_array(np.ones_like(values), ~which)
            ax.pcolormesh(x, y, cells, cmap=ListedColormap([color]), rasterized=True)
    ticks = [0, 5, *(10**k for k in range(1, 9) if 10**k <= steps[-1])]
    ax.xaxis.set_major_locator(FixedLocator([t for t in ticks if t <= steps[-1]]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return drawn


# --- two runs -------------------------------------------------------------------------------------

_TWIN = ("#000000", (0, (1, 1.2)), "D")
"""How B is drawn where A has the colour of its arm."""


@themed
def comparison(
    a: pd.DataFrame,
    b: pd.DataFrame,
    quantity: str = "weight_grad_norm",
    *,
    step: int = 0,
    relative: bool = False,
    names: tuple[str, str] = ("A", "B"),
    title: str = "",
) -> Figure:
    """Two runs side by side: their heatmaps on one colour scale, and at one step their profiles
    and B over A at equal relative depth (`tables.compare_layers`).

    Axes and colours are logarithmic; linear, and B − A, where the quantity has negative values.

    Args:
        a, b: one run's layers of one family, as `views.layered` gives them, with its `arm`.
        step: of each run the nearest recorded one is shown; a triangle marks it in the heatmaps.
        relative: profiles against relative depth, 0 the first and 1 the last layer, instead of
            layers counted.

    Raises:
        GradflowError: either has no value of the quantity.
    """
    titles = [textwrap.fill(name, 48) for name in names]
    both = [tables.measured(frame, quantity) for frame in (a, b)]
    if not all(map(len, both)):
        raise GradflowError(f"{quantity}: nothing recorded to draw")
    values = np.concatenate([frame[quantity].to_numpy() for frame in both])
    log = not (values < 0).any()
    at = [tables.nearest(frame["step"], step) for frame in both]
    styles = [style(str(frame["arm"].iloc[0])) for frame in both]
    if styles[0] == styles[1]:
        styles[1] = _TWIN
    mapped = any(frame["step"].nunique() > 1 for frame in both)
    figure = Figure(figsize=(WIDTH, 5.3 if mapped else 3.1))
    figure.set_layout_engine("constrained")
    marks: list[Any] = []
    lower: FigureBase = figure
    if mapped:
        upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
        marks = _heat_handles(_heat_pair(upper, both, quantity, values, log, at, titles))
    left, right = lower.subplots(1, 2)
    profiles = [tables.at_step(f, quantity, s) for f, s in zip((a, b), at, strict=True)]
    against = tables.compare_layers(*profiles, log=log)
    right.axhline(1 if log else 0, color="0.4", linewidth=0.8, zorder=1.6)
    if log:
        _log_limits([left], np.concatenate([found.compressed() for found in profiles]))
        _log_limits([right], [1, *against.compressed()])
    drawn = _layer_line(right, against, ("0.1", "-", "."), log=log, relative=relative)
    for index, (found, look) in enumerate(zip(profiles, styles, strict=True)):
        drawn |= _layer_line(left, found, look, index / 2, log=log, relative=relative)
    what = _one(str(a["family"].iloc[0]))
    whose = " of A" if len(profiles[0]) != len(profiles[1]) else ""
    for ax, owner in ((left, ""), (right, whose)):
        counted = f"{what}{owner}, counted from the input"
        words = "relative depth, input (0) to output (1)" if relative else counted
        ax.set_xlabel(words, fontsize=9)
    left.set_title(f"profiles, {' and '.join(dict.fromkeys(tables.when([s]) for s in at))}")
    right.set_title(f"{'B / A' if log else 'B − A'} at equal relative depth")
    lines = [_line_handle(*pair) for pair in zip(titles, styles, strict=True)]
    heading = ": ".join(filter(None, [label(quantity), title]))
    _legend(figure, [*lines, *marks, *_edge_handles(drawn)], heading, columns=3)
    return figure


def _heat_pair(
    figure: FigureBase, both: Sequence[pd.DataFrame], quantity: str, values: NDArray[np.float64],
    log: bool, at: Sequence[int], titles: Sequence[str],
) -> set[str]:  # fmt: skip
    low, high = _range(values) if log else _reach(values)
    norm = (LogNorm if log else Normalize)(low, high if high > low else low + abs(low or 1))
    axes = figure.subplots(1, 2, sharex=True)
    found: set[str] = set()
    for ax, frame, step, title in zip(axes, both, at, titles, strict=True):
        ax.set_title(title, pad=9)
        ax.grid(visible=False)
        ax.set_facecolor(_MISSING)
        found |= _heat_panel(ax, frame, quantity, norm)
        ax.plot(step, 1.03, "v", color="0.2", markersize=4, clip_on=False,
                transform=ax.get_xaxis_transform())  # fmt: skip
    _color_bar(figure, norm, axes)
    figure.supxlabel(_HEAT_STEPS, fontsize=9)
    axes[0].set_ylabel(f"{_one(str(both[0]['family'].iloc[0]))}, from the input", fontsize=9)
    return found


def _reach(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _layer_line(
    ax: Axes, found: np.ma.MaskedArray, style: Style, offset: float = 0,
    *, log: bool, relative: bool,
) -> set[str]:  # fmt: skip
    count = len(found)
    x = tables.relative_depth(count) if relative else np.arange(1.0, count + 1)
    _log_line(ax, x, found.filled(np.nan), style, offset, log=log)
    there = ~np.ma.getmaskarray(found)
    if not relative:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.grid(axis="x", visible=False)
    return _edge_marks(ax, x[there], found.compressed(), style[0], zeros=log)


# --- against depth --------------------------------------------------------------------------------


def _depth_axis(ax: Axes, depths: ArrayLike) -> None:
    known = np.unique(np.asarray(depths, dtype=float))
    ax.set_xscale("log")
    ax.set_xlim(known[0] / 1.25, known[-1] * 1.25)
    shown = known if len(known) <= 8 else known[:: math.ceil(len(known) / 8)]
    ax.xaxis.set_major_locator(FixedLocator(list(shown)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("depth (weight layers)")


def _dodge(arm: str, arms: list[str]) -> float:
    """By what an arm's depths are multiplied, so that arms stand beside each other."""
    return 1.04 ** (arms.index(arm) - (len(arms) - 1) / 2)


def _against_depth(
    ax: Axes, points: pd.DataFrame, lines: pd.DataFrame, column: str, arms: list[str]
) -> None:
    """Means with their intervals, and each seed's value as a small point beside them."""
    styles = styles_of(arms)
    for arm in arms:
        color, dashes, marker = styles[arm]
        dodge = _dodge(arm, arms)
        line = lines[lines["arm"] == arm].sort_values("depth")
        x = line["depth"].to_numpy(dtype=float) * dodge
        ax.errorbar(
            x, line["mean"], yerr=np.nan_to_num(line["half"]), color=color, linestyle=dashes,
            marker=marker, markersize=5, capsize=3, elinewidth=1,
        )  # fmt: skip
        seeds = points[(points["arm"] == arm) & points[column].notna()]
        import seaborn as sns  # in this figure alone

        sns.scatterplot(
            x=seeds["depth"].to_numpy(dtype=float) * dodge * 1.06, y=seeds[column].to_numpy(float),
            color=color, marker=marker, s=14, alpha=0.6, linewidth=0, ax=ax, legend=False,
        )  # fmt: skip


@themed
def degradation(points: pd.DataFrame, lines: pd.DataFrame, *, title: str = "") -> Figure:
    """Final training and test error against depth, by arm: mean, 95 % interval and each seed.

    Args:
        points: `tables.overview` of one group; lines: its `tables.degradation`. Runs that diverged
            have no final error and are marked at the upper edge.
    """
    points, lines = points[points["depth"].notna()], lines[lines["depth"].notna()]
    splits = [s for s in tables.SPLITS if (lines["split"] == s).any()] or ["train"]
    figure, axes = _grid(len(splits), columns=2, height=2.9)
    arms = tables.ordered(points["arm"])
    styles = styles_of(arms)
    drawn: set[str] = set()
    for ax, split in zip(axes, splits, strict=True):
        column = f"{split}_error"
        _against_depth(ax, points, lines[lines["split"] == split], column, arms)
        for arm in arms:
            lost = points[(points["arm"] == arm) & (points["status"] == "diverged")]
            x = lost["depth"].to_numpy(dtype=float) * _dodge(arm, arms)
            drawn |= _edge_marks(ax, x, np.full(len(x), np.nan), styles[arm][0], zeros=False)
        _depth_axis(ax, points["depth"])
        ax.set_title("training error" if split == "train" else "test error")
        ax.set_ylabel("")
    low = float(np.nanmin([0.0, *lines["low"], *lines["mean"]]))
    high = float(np.nanmax([0.0, *lines["high"], *lines["mean"]])) or 1.0
    axes[0].set_ylim(low - 0.04 * (high - low), high + 0.08 * (high - low))
    axes[0].set_ylabel("error (share of images)")
    handles = [_line_handle(arm, styles[arm]) for arm in arms]
    if drawn:
        handles.append(Line2D([], [], color="0.3", linestyle="", marker="x", label="diverged"))
    _legend(figure, handles, title)
    return figure


@themed
def benefit(points: pd.DataFrame, lines: pd.DataFrame, *, title: str = "") -> Figure:
    """The skip's benefit by depth: plain error − the arm's, by pair, mean and 95 % interval.

    Args:
        points: `tables.pairs` of one group; lines: its `tables.benefit`.
    """
    splits = [s for s in tables.SPLITS if (lines["split"] == s).any()] or ["train"]
    figure, axes = _grid(len(splits), columns=2, height=2.9)
    arms = tables.ordered(points["arm"])
    for ax, split in zip(axes, splits, strict=True):
        ax.axhline(0, color="0.4", linewidth=0.8, zorder=0)
        _against_depth(ax, points, lines[lines["split"] == split], f"{split}_difference", arms)
        _depth_axis(ax, points["depth"])
        ax.set_title("training error" if split == "train" else "test error")
        ax.set_ylabel("")
    axes[0].set_ylabel("plain error − error with skip")
    _legend(figure, [_line_handle(arm, styles_of(arms)[arm]) for arm in arms], title)
    return figure


# --- training -------------------------------------------------------------------------------------

_CURVES = {
    ("loss", "train"): "training loss",
    ("accuracy", "train"): "training accuracy",
    ("accuracy", "test"): "test accuracy",
}


@themed
def curves(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """Training curves: loss, training and test accuracy by step; a row each, a column a depth.

    Args:
        frame: run_id, depth, arm, step, measure (`loss`, `accuracy`), split (`train`, `test`),
            value; of final evaluation-mode values `final` is True.
    """
    data = _completed(frame)
    seen = set(data[["measure", "split"]].drop_duplicates().itertuples(index=False, name=None))
    rows = {key: label for key, label in _CURVES.items() if key in seen}
    figure, lines = _matrix(list(rows.values()), _by(data))
    styles, drawn = styles_of(data["arm"].unique()), set()
    for line, (measure, split) in zip(lines, rows, strict=True):
        for ax, here in line:
            part = here[(here["measure"] == measure) & (here["split"] == split)]
            drawn |= _curve_panel(ax, part, styles, log=measure == "loss")
            if measure == "accuracy":
                ax.set_ylim(-0.03, 1.03)
        if measure == "loss":
            shown = data[(data["measure"] == "loss") & (data["split"] == "train")]["value"]
            _log_limits([ax for ax, _ in line], shown)
    figure.supxlabel("step (updates)", fontsize=9)
    handles: list[Any] = [_line_handle(arm, styles[arm]) for arm in tables.ordered(styles) if arm]
    if data["final"].any():
        label = "end, evaluation mode"
        handles.append(
            Line2D([], [], color="0.3", linestyle="", marker="o", mfc="white", label=label)
        )
    _legend(figure, [*handles, *_edge_handles(drawn)], title)
    return figure


def _curve_panel(ax: Axes, part: pd.DataFrame, styles: dict[str, Style], *, log: bool) -> set[str]:
    drawn: set[str] = set()
    for (arm, _), run in part.groupby(["arm", "run_id"], sort=False):
        color, dashes, marker = styles[str(arm)]
        last, path = run[run["final"]], run[~run["final"]].sort_values("step")
        y = path["value"].to_numpy(dtype=float)
        few = marker if len(y) <= 15 else ""
        ax.plot(
            path["step"], _shown(y, log), color=color, linestyle=dashes,
            marker=few, markersize=2.5, linewidth=1, alpha=0.85,
        )  # fmt: skip
        ax.plot(last["step"], last["value"], marker, color=color, mfc="white", markersize=4.5)
        drawn |= _edge_marks(ax, path["step"], y, color, zeros=log)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return drawn


# --- blocks ---------------------------------------------------------------------------------------

_BLOCK_ROWS = {
    "forward: RMS": ("skip_rms", "branch_rms"),
    "backward: L2 norm": ("skip_grad_norm", "branch_grad_norm"),
}
_TERMS = {"skip": ("#00517F", "-", "o"), "branch": ("#D55E00", (0, (4, 1.5)), "s")}


@themed
def blocks(frame: pd.DataFrame, *, title: str = "") -> Figure:
    """What a block's branch and its skip carry: values forward, gradients backward, by block.

    Args:
        frame: one arm's rows of the table blocks at one moment: run_id, depth, step, layer,
            position, and any of branch_rms, skip_rms, branch_grad_norm, skip_grad_norm.
    """
    data = _completed(frame).sort_values(["run_id", "position"])
    data = data.assign(ordinal=data.groupby(["run_id", "step"]).cumcount() + 1)
    rows = {n: [c for c in pair if c in data] for n, pair in _BLOCK_ROWS.items()}
    rows = {name: columns for name, columns in rows.items() if columns}
    figure, lines = _matrix(list(rows), _by(data))
    drawn: set[str] = set()
    for line, columns in zip(lines, rows.values(), strict=True):
        values = [data[c].to_numpy(dtype=float, na_value=np.nan) for c in columns]
        _log_limits([ax for ax, _ in line], np.concatenate(values))
        for ax, part in line:
            for column in columns:
                term = column.split("_")[0]
                for _, run in tables.measured(part, column).groupby(["run_id", "step"]):
                    x, y = run["ordinal"].to_numpy(), run[column].to_numpy()
                    _log_line(ax, x, y, _TERMS[term], list(_TERMS).index(term) / 2)
                    drawn |= _edge_marks(ax, x, y, _TERMS[term][0])
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    figure.supxlabel("block, counted from the input", fontsize=9)
    heading = ": ".join(filter(None, [tables.when(data["step"]), title]))
    terms = [_line_handle(name, style) for name, style in _TERMS.items()]
    _legend(figure, [*terms, *_edge_handles(drawn)], heading)
    return figure


# --- one record -----------------------------------------------------------------------------------

_OWN = ("0.2", "-", "o")
_SKIP_COLOR, _BRANCH_COLOR = _TERMS["skip"][0], _TERMS["branch"][0]
_BRANCH = {"color": _BRANCH_COLOR, "linewidth": 0.9, "linestyle": (0, (4, 1.5)), "marker": "s",
           "markersize": 3}  # fmt: skip
# An undosed skip and its branch receive the same gradient: each must show where both lines are one.
_WAYS: dict[str, dict[str, Any]] = {
    "skip_grad_norm": {"label": "input, through the skip", "color": _SKIP_COLOR,
                       "linewidth": 4, "alpha": 0.35},
    "branch_grad_norm": {"label": "branch"} | _BRANCH,
    "branch_x_grad_norm": {"label": "input, through the branch"} | _BRANCH,
}  # fmt: skip


@themed
def record(weights: pd.DataFrame, blocks: pd.DataFrame, *, title: str = "") -> Figure:
    """One record's profile, and below it what each block's skip and branch receive of the gradient.

    A column each for the first and the last step of either table. Both rows count the same layers:
    a block stands behind the last one before its sum. Where no block has a skip that carries
    anything, the figure is the `profile`.

    Args:
        weights: step, layer, position, kind, weight_grad_norm.
        blocks: step, layer, position, and any of skip_grad_norm, branch_x_grad_norm (in its place
            branch_grad_norm, where it was not recorded), skip_rms.

    Raises:
        GradflowError: the weights' gradient was not recorded.
    """
    layers, joins = _weight_layers(weights), _joins(blocks)
    if not (len(layers) and len(joins)):
        return profile(weights, title=title)
    upper, lower = _ends(layers), _ends(_behind_layers(joins, layers))
    columns = max(len(upper), len(lower))
    figure = Figure(figsize=(WIDTH if columns > 1 else 5.0, 5.4))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
    drawn = _profile_row(axes[0], upper) | _joins_row(axes[1], lower)
    for place, (above, below) in enumerate(axes.T):
        if place >= len(lower):
            below.set_axis_off()
            above.tick_params(labelbottom=True)
        elif place < len(upper) and above.get_title() == below.get_title():
            below.set_title("")
    figure.supxlabel("layer, counted from the input; blocks behind their last layer", fontsize=9)
    own = _line_handle("weights", _OWN)
    ways = [Line2D([], [], **style) for way, style in _WAYS.items() if way in joins]
    handles = [own, *ways, *_edge_handles(drawn)]
    narrow = columns == 1 and len(handles) > 3
    _legend(figure, handles, title, columns=2 if narrow else len(handles))
    return figure


def _weight_layers(weights: pd.DataFrame) -> pd.DataFrame:
    """The layers of a record's profile; no row where the gradient was not recorded."""
    if "weight_grad_norm" not in weights:
        return weights[:0]
    data = _completed(tables.profile(weights))
    return data[data["family"] == tables.WEIGHT]


def _joins(blocks: pd.DataFrame) -> pd.DataFrame:
    """The rows of blocks that have a gradient to show; none where no skip carries anything."""
    if "branch_x_grad_norm" in blocks:  # the other part of what comes to the input
        blocks = blocks.drop(columns="branch_grad_norm", errors="ignore")
    ways = [way for way in _WAYS if way in blocks]
    carried = [tables.measured(blocks, c)[c] for c in ("skip_rms", "skip_grad_norm") if c in blocks]
    if not ways or all(bool((values == 0).all()) for values in carried):
        return blocks[:0]
    return blocks[np.logical_or.reduce([blocks[way].notna() for way in ways])]


def _behind_layers(joins: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Blocks with their `place` on the axis that counts layers: half a layer behind the last."""
    positions = np.unique(layers["position"].to_numpy(dtype=float))
    own = joins["position"].to_numpy(dtype=float, na_value=np.nan)
    return joins.assign(place=np.searchsorted(positions, own) + 0.5).sort_values("place")


def _ends(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of a record's first and of its last step; one part where they are the same."""
    steps = frame["step"].to_numpy(dtype=int)
    return [frame[steps == step] for step in sorted({steps.min(), steps.max()})]


def _profile_row(axes: NDArray[Any], parts: Sequence[pd.DataFrame]) -> set[str]:
    drawn: set[str] = set()
    _log_limits(axes, np.concatenate([part["weight_grad_norm"] for part in parts]))
    for ax, part in zip(axes, parts, strict=False):
        drawn |= _profile_panel(ax, part, "weight_grad_norm", {"": _OWN})
        ax.set_title(tables.when(part["step"]))
    for ax in axes[len(parts) :]:
        ax.set_axis_off()
    axes[0].set_ylabel("weight gradient\nL2 norm (loss / parameter)", fontsize=9)
    return drawn


def _joins_row(axes: NDArray[Any], parts: Sequence[pd.DataFrame]) -> set[str]:
    ways, drawn = [way for way in _WAYS if way in parts[0]], set()
    values = [tables.measured(part, way)[way] for part in parts for way in ways]
    _log_limits(axes, np.concatenate(values))
    for ax, part in zip(axes, parts, strict=False):
        for way in ways:
            here = tables.measured(part, way)
            x, y = here["place"].to_numpy(), here[way].to_numpy()
            ax.plot(x, _drawable(y), **_WAYS[way])
            drawn |= _edge_marks(ax, x, y, _WAYS[way]["color"])
        ax.set_title(tables.when(part["step"]))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        ax.grid(axis="x", visible=False)
    axes[0].set_ylabel("gradient at each block's sum\nL2 norm (loss / output)", fontsize=9)
    return drawn


# --- against theory -------------------------------------------------------------------------------

_FLAT = 0.3
"""Theory that changes by less than this share over all places has no relative gap of slopes."""


@themed
def overlay(
    frame: pd.DataFrame, *, x: str = "", y: str = "", log: bool = True, title: str = ""
) -> Figure:
    """Predicted profiles over measured ones, and the gap of their slopes in the legend.

    Of each curve: thin lines are seeds, points their mean (of the logarithm on a log axis), the
    dashed line theory. A profile of one's own, a squared gradient norm `g` of each layer, beside
    its recursion:

        frame = pd.DataFrame({"x": range(1, 41), "value": g, "theory": predicted})
        plots.overlay(frame, x="layer", y="squared norm of the gradient")

    Args:
        frame: x and value; where there are more than one, curve (a name) and seed; theory, NaN or
            null where there is none; scaled, true where theory gives a shape alone: it is then
            multiplied to meet the mean at the last place where both are known.
        x, y: labels of the axes, with units.
        log: logarithmic y, and slopes of ln y instead of y.

    Raises:
        GradflowError: the frame has no rows.
    """
    data = _curves_of(frame, log)
    if not len(data):
        raise GradflowError("overlay: nothing measured to draw")
    names = list(dict.fromkeys(data["curve"]))
    figure = Figure(figsize=(WIDTH, 3.6 + 0.13 * len(names)))
    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    styles = _overlay_styles(names)
    if log:
        _log_limits([ax], data[["value", "theory"]].to_numpy())
    drawn: set[str] = set()
    for place, name in enumerate(names):
        part = data[data["curve"] == name]
        drawn |= _overlay_curve(ax, part, styles[name], place / len(names), log=log)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel("\n".join(textwrap.wrap(y, 46)), fontsize=9)
    whole = bool((data["x"] == data["x"].round()).all())
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=whole))
    told = slopes(data, log=log).set_index("curve")["text"]
    labels = {name: ": ".join(filter(None, [name, told.get(name, "")])) for name in names}
    handles = [
        Line2D([], [], color=styles[name][0], linestyle="", marker=styles[name][2], markersize=4,
               label=label)
        for name, label in labels.items()
        if label
    ]  # fmt: skip
    key = _overlay_key(data) + _edge_handles(drawn)
    _legend(figure, handles, title, columns=2 if max(map(len, labels.values())) <= 50 else 1)
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), fontsize=8)
    return figure


def slopes(frame: pd.DataFrame, *, log: bool = True) -> pd.DataFrame:
    """Slopes of measured and predicted profiles by least squares, means over seeds, and their gap.

    Args:
        frame, log: as `overlay` takes them.

    Returns:
        A row a curve that has a theory: curve, measured and theory (of ln y per unit of x, or of
        y), gap (measured/theory − 1, above zero where the measured profile is the steeper one; NaN
        where theory is flat: it changes by less than 30 % over all places) and `text`. Places are
        left out at which either is zero, not finite or unknown.
    """
    rows = []
    for name, part in _curves_of(frame, log).groupby("curve", sort=False):
        fits = [_fits(run, log) for _, run in part.groupby("seed")]
        known = [fit for fit in fits if fit is not None]
        if not known:
            continue
        measured, theory, change = np.mean(known, axis=0)
        flat = change < _FLAT
        gap = math.nan if flat else measured / theory - 1
        words = _number(measured - theory, "+.2g") if flat else _number(100 * gap, "+.1f") + " %"
        text = f"slope {_number(measured)}, theory {_number(theory)}, gap {words}"
        rows.append({"curve": name, "measured": measured, "theory": theory, "gap": gap,
                     "text": text})  # fmt: skip
    return pd.DataFrame(rows, columns=["curve", "measured", "theory", "gap", "text"])


def _number(value: float, style: str = ".3g") -> str:
    """In plain characters; noise of the arithmetic is no slope, and zero has no sign."""
    text = f"{0.0 if abs(value) < 1e-12 else value:{style}}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _fits(run: pd.DataFrame, log: bool) -> tuple[float, float, float] | None:
    """Slopes of one seed, and by which share its theory changes over all places."""
    both = _shown(run[["value", "theory"]].to_numpy(), log)
    known = ~np.isnan(both).any(axis=1)
    places = run["x"].to_numpy()[known]
    if len(np.unique(places)) < 2:
        return None
    values = np.log(both[known]) if log else both[known]
    measured, theory = np.polyfit(places, values, 1)[0]
    size = 1.0 if log else float(np.abs(values[:, 1]).mean()) or 1.0
    return measured, theory, abs(theory) * np.ptp(places) / size


def _curves_of(frame: pd.DataFrame, log: bool) -> pd.DataFrame:
    """The frame of `overlay` with all its columns, numbers as float64, theory moved into place."""
    missing: dict[str, Any] = {"curve": "", "seed": 0, "theory": math.nan, "scaled": False}
    data = frame.assign(**{n: v for n, v in missing.items() if n not in frame})
    numbers = {c: data[c].to_numpy(dtype=float, na_value=np.nan) for c in ("x", "value", "theory")}
    data = data[["curve", "seed", "scaled"]].assign(**numbers).reset_index(drop=True)
    for _, part in data[data["scaled"].astype(bool)].groupby("curve"):
        data.loc[part.index, "theory"] *= _factor(part, log)
    return data.assign(scaled=False)


def _factor(part: pd.DataFrame, log: bool) -> float:
    """By what a curve's theory is multiplied to meet the mean over seeds at the last place."""
    both = _shown(part[["value", "theory"]].to_numpy(), log)
    known = part[~np.isnan(both).any(axis=1)]
    last = known[known["x"] == known["x"].max()]
    if last.empty:
        return math.nan
    if log:
        return float(np.exp(np.log(last["value"] / last["theory"]).mean()))
    return float(last["value"].mean() / last["theory"].mean())


def _overlay_styles(names: Sequence[str]) -> dict[str, Style]:
    """Arms keep their colour; other curves take those that are left, in their order."""
    palette = [KNOWN[arm] for arm in ("residual", "plain", "forward only", "backward only")]
    known = {name: KNOWN[name] for name in names if name in KNOWN and name}
    rest = [style for style in (*palette, *OTHERS) if style not in known.values()]
    others = [name for name in names if name not in known]
    return known | {name: rest[i % len(rest)] for i, name in enumerate(others)}


def _overlay_curve(
    ax: Axes, part: pd.DataFrame, style: Style, offset: float, *, log: bool
) -> set[str]:
    """One curve; `offset` of points and dashes, in [0, 1), so that equal curves are all seen."""
    color, _, marker = style
    pale = tuple(0.4 * np.array(to_rgb(color)) + 0.6)
    drawn: set[str] = set()
    for _, run in part.groupby("seed", sort=False):
        values = run["value"].to_numpy()
        ax.plot(run["x"], _shown(values, log), color=pale, linewidth=0.7, zorder=2)
        drawn |= _edge_marks(ax, run["x"], values, color, zeros=log)
    means, theory = _over_seeds(part, "value", log), _over_seeds(part, "theory", log)
    joined = theory.isna().all() and len(part) == len(means) * part["seed"].nunique()
    every = max(1, math.ceil(len(means) / 25))
    ax.plot(
        means.index, means, color=color, marker=marker, markersize=3.5, mew=0, zorder=3,
        markevery=(int(offset * every), every), linestyle="-" if joined else "",
    )  # fmt: skip
    start, dashes = _DASHES
    dashed = (start + offset * sum(dashes), dashes)
    ax.plot(theory.index, theory, color=color, linestyle=dashed, linewidth=1.3, zorder=4)
    return drawn


def _over_seeds(part: pd.DataFrame, column: str, log: bool) -> pd.Series:
    """Mean over seeds at each x, of the logarithm where `log`; NaN where one cannot be drawn."""
    values = _shown(part[column].to_numpy(), log)
    values = np.log(values) if log else values
    means = part.assign(shown=values).groupby("x")["shown"].agg(lambda s: s.mean(skipna=False))
    return means.map(np.exp) if log else means


def _overlay_key(data: pd.DataFrame) -> list[Line2D]:
    several = data.groupby(["curve", "x"])["seed"].nunique().max() > 1
    label = "mean over seeds" if several else "measured"
    found = [Line2D([], [], color="0.3", linestyle="", marker="o", markersize=3.5, label=label)]
    if data["seed"].nunique() > 1:
        found.append(Line2D([], [], color="0.7", linewidth=0.7, label="each seed"))
    if data["theory"].notna().any():
        found.append(Line2D([], [], color="0.3", linestyle=_DASHES, linewidth=1.3, label="theory"))
    return found


# --- verdicts -------------------------------------------------------------------------------------

_WORDS = {
    REPRODUCED: ("#00517F", "o"),
    CONTRADICTED: ("#B3400A", "X"),
    INCONCLUSIVE: ("#8A1F6A", "D"),
    NOT_RUN: ("#555555", ""),
}
_REGION = "#CFE0EA"
_SHARED = 8
"""Comparisons share an axis if that is no more than so many times as wide as each of them needs."""


@themed
def effects(verdict: Verdict) -> Figure:
    """The comparisons of a finding: seeds, mean and interval, declared region, theory and verdict.

    A row a comparison; those of one unit share an axis where each is still readable on it. An axis
    is logarithmic where the interval is of the number's logarithm and the axis spans more than a
    factor of three. Identities that hold exactly are told in words.

    Raises:
        GradflowError: no comparison has been measured.
    """
    if not any(result.values for result in verdict.results):
        raise GradflowError(f"{verdict.finding.id}: nothing measured to draw")
    panels = _panels(verdict.results)
    rows = [0.37 * len(panel) for panel in panels]
    axes = sum(0.1 if panel[0].comparison.region.exact else 0.38 for panel in panels)
    figure = Figure(figsize=(WIDTH, 0.45 + sum(rows) + axes))
    figure.set_layout_engine("constrained", h_pad=0.02, hspace=0.02)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
    drawn: set[str] = set()
    for index, (ax, panel) in enumerate(zip(grid, panels, strict=True)):
        drawn |= _effects_panel(ax, panel)
        unit = panel[0].comparison.unit
        if index + 1 == len(panels) or panels[index + 1][0].comparison.unit != unit:
            ax.set_xlabel(unit, labelpad=1)
    _legend(figure, _effects_handles(drawn))
    return figure


def _panels(results: Sequence[Result]) -> list[list[Result]]:
    """Comparisons by unit and scale, and so that none becomes too narrow on the axis they share."""
    panels: list[tuple[tuple[Any, ...], list[Result]]] = []
    for result in results:
        asked = result.comparison
        key = (asked.region.exact, *(() if asked.region.exact else (asked.unit, asked.ratio)))
        for other, members in panels:
            if key == other and (asked.region.exact or _fit([*members, result])):
                members.append(result)
                break
        else:
            panels.append((key, [result]))
    return [members for _, members in panels]


def _fit(results: Sequence[Result]) -> bool:
    ends = np.array([_extent(result) for result in results])
    if results[0].comparison.ratio:
        ends = np.log(ends)
    widths = ends[:, 1] - ends[:, 0]
    return bool(np.ptp(ends) <= _SHARED * widths.min())


def _extent(result: Result) -> tuple[float, float]:
    """What a row must show: its numbers, interval, region and theory."""
    region = result.comparison.region
    theory = math.nan if region.theory is None else region.theory
    ends = [region.low, region.high, theory, result.low, result.mean, result.high]
    known = np.array([value for value in (*ends, *result.values) if math.isfinite(value)])
    known = known[known > 0] if result.comparison.ratio else known
    if not known.size:
        return (0.5, 2.0)
    low, high = float(known.min()), float(known.max())
    room = 0.05 * abs(high) or 0.5
    return (low, high) if high - low > 1e-9 * abs(high) else (low - room, high + room)


def _effects_panel(ax: Axes, panel: Sequence[Result]) -> set[str]:
    ax.set_ylim(len(panel) - 0.5, -0.5)
    names = ["\n".join(textwrap.wrap(result.comparison.name, 34)) for result in panel]
    ax.set_yticks(range(len(panel)), names, fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    for row, result in enumerate(panel):
        _row_words(ax, row, result)
    if panel[0].comparison.region.exact:
        ax.xaxis.set_visible(False)
        ax.spines["bottom"].set_visible(False)
        return set()
    _effects_axis(ax, panel)
    return set().union(*(_effects_row(ax, row, result) for row, result in enumerate(panel)))


def _effects_axis(ax: Axes, panel: Sequence[Result]) -> None:
    ends = np.array([_extent(result) for result in panel])
    low, high = float(ends.min()), float(ends.max())
    ratio = panel[0].comparison.ratio
    if not ratio or high / low <= 3:
        room = 0.06 * (high - low)
        ax.set_xlim(low - room, high + room)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        return
    room = (high / low) ** 0.06
    ax.set_xscale("log")
    ax.set_xlim(low / room, high * room)
    wide = high / low > 100
    ax.xaxis.set_major_locator(LogLocator(numticks=7) if wide else LogLocator(subs=(1, 2, 5)))
    form = _power if wide else lambda value, _: _tick(value)
    ax.xaxis.set_major_formatter(FuncFormatter(form))
    ax.xaxis.set_minor_locator(NullLocator())


def _tick(value: float) -> str:
    return f"{value:.6g}" if 1e-4 <= abs(value) < 1e5 or not value else tables.short(value)


def _effects_row(ax: Axes, row: int, result: Result) -> set[str]:
    """One comparison; the parts of it that the legend explains."""
    region, (color, marker) = result.comparison.region, _WORDS[result.word]
    low, high = ax.get_xlim()
    ends = np.clip([region.low, region.high], low, high)
    ax.fill_betweenx([row - 0.42, row + 0.42], *ends, color=_REGION, linewidth=0, zorder=0)
    drawn = {"region"}
    if region.theory is not None:
        drawn.add("theory")
        ax.plot([region.theory] * 2, [row - 0.42, row + 0.42], color="0.1", linestyle=_DASHES,
                linewidth=1.0, zorder=1)  # fmt: skip
    values = np.array(result.values)
    shown = values[np.isfinite(values)]
    if len(shown) > 1:
        drawn.add("seed")
        ax.plot(shown, np.full(len(shown), row + 0.26), "o", color="0.35", markersize=2.6,
                alpha=0.6, mew=0, zorder=2)  # fmt: skip
    if len(shown) < len(values):
        drawn.add("non-finite")
        ax.plot(0.98, row + 0.26, "x", color="0.3", markersize=4,
                transform=ax.get_yaxis_transform(), clip_on=False)  # fmt: skip
    if math.isfinite(result.mean):
        spread = [[result.mean - result.low], [result.high - result.mean]]
        drawn.add("mean")
        ax.errorbar(result.mean, row - 0.08, xerr=np.nan_to_num(spread), color=color, capsize=3,
                    marker=marker, markersize=5, elinewidth=1.4, zorder=3)  # fmt: skip
    return drawn


def _row_words(ax: Axes, row: int, result: Result) -> None:
    """The verdict and the numbers at the right of a row; of an identity also what is asked."""
    color = _WORDS[result.word][0]
    place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
    reason = f" ({result.reason})" if result.reason else ""
    ax.text(1.02, row - 0.2, f"{result.word}{reason}", size=8, color=color, weight="bold", **place)
    region = result.comparison.region
    if math.isfinite(result.mean):
        words = _exact_words(result) if region.exact else measured_words(result)
        ax.text(1.02, row + 0.2, words, size=7.5, color="0.2", **place)
    if region.exact:
        words = f"exact: {region_words(region)}"
        ax.text(0.5, row, words, size=8, ha="center", color="0.2", **place)


def _exact_words(result: Result) -> str:
    off = max(abs(value - (result.comparison.region.theory or 0.0)) for value in result.values)
    return f"{f'off by {off:.2g} at most' if off else 'no difference'} ({len(result.values)} seeds)"


def _effects_handles(drawn: set[str]) -> list[Any]:
    known = {
        "region": Patch(facecolor=_REGION, label="declared region"),
        "theory": Line2D([], [], color="0.1", linestyle=_DASHES, linewidth=1.0, label="theory"),
        "seed": Line2D([], [], color="0.35", linestyle="", marker="o", markersize=2.6,
                       alpha=0.6, mew=0, label="each seed"),
        "mean": Line2D([], [], color="0.1", marker="o", markersize=5, linewidth=1.4,
                       label="mean and interval"),
    }  # fmt: skip
    handles = [handle for part, handle in known.items() if part in drawn]
    return [*handles, *_edge_handles(drawn)]


# --- files ----------------------------------------------------------------------------------------


_TAG = re.compile(r"<[^>]+>")
_DIGITS = re.compile(r"(?<=[ \"\n])(-?\d+\.\d\d)\d+(?=[ \"\n])")


def _shortened(tag: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point: a third of a figure of many lines is digits beyond."""
    return _DIGITS.sub(r"\1", tag[0])


@contextlib.contextmanager
def _lean_fonts() -> Iterator[None]:
    """A PDF has the glyphs of a font alone: to look through what typesetters need beside them takes
    half of the time of a figure."""
    load = subset.load_font

    def lean(*args: Any, **options: Any) -> Any:
        font = load(*args, **options)
        for table in {"GDEF", "GPOS", "GSUB", "kern"} & {*font.keys()}:
            del font[table]
        return font

    subset.load_font = lean  # matplotlib has no option for it
    try:
        yield
    finally:
        subset.load_font = load


@themed
def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.svg`, `.png` and `.pdf`."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS]
    svg, png, pdf = paths
    # `savefig` would draw twice for each format to lay the figure out anew: most of its time.
    figure.dpi = 150
    lightly = {"compress_level": 3}  # half the time of the usual 6, and as small
    # First: the others set the resolution anew.
    FigureCanvasAgg(figure).print_png(png, pil_kwargs=lightly)
    figure.set_layout_engine("none")
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg.write_text(_TAG.sub(_shortened, text.getvalue()), encoding="utf-8")
    with _lean_fonts():
        FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
    return paths
