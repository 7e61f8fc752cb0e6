"""At depth 56 a skip's forward half fits more than one block alone could, and does not generalise.

Source: gradflow's own question, which He et al. 2015 (arXiv 1512.03385) and He et al. 2016
(arXiv 1603.05027) leave open: a skip carries the value forward and the gradient backward; which of
the two does the work?

Measured: accuracies at the end in evaluation mode, over the whole training split (4,000 images) and
over the test split, of networks that differ in nothing but the skip: none, forward-only
(a, b) = (1, 0), backward-only (0, 1), identity (1, 1); the differences are of paired seeds. The
control trains the last block and the classifier alone, all else frozen at initialisation: where
forward-only does no better than that, its forward path has kept random features and no more. More
than the control is not yet more than training a few of the last blocks: that of seven is shown.

Deviations: images of 8×8 made from ten templates, on which the control fails; on the handwritten
digits it comes close to forward-only by itself. Forward-only follows the gradient of no function.
The comparisons are of depth 56 with batch normalisation at one learning rate, and depth 20 is shown
beside it; by name, `python -m experiments causal_skip` adds three more rates, depth 110, networks
without normalisation, doses between the halves, a wider control, and the digits.

Cost: 60 runs, 20 minutes on one core; with all that goes beyond the verdict 3½ hours on one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gradflow import styles
from gradflow.findings import (
    FIRST_SEED,
    TRAINED_SEEDS,
    Comparison,
    Exhibit,
    Finding,
    Lookup,
    Region,
    above,
    below,
    between,
)
from gradflow.measures import Array, Record, layers, metric, metric_difference, readings, updates_to
from gradflow.tables import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

ARMS = {"none": "plain", "backward_only": "backward only", "forward_only": "forward only",
        "identity": "residual"}  # fmt: skip
CONTROLS = {"identity": "residual, last block only", "none": "plain, last block only"}
CONTROL = CONTROLS["identity"]
NAMES = (*ARMS.values(), *CONTROLS.values())
DEPTHS, RATE = (20, 56), 0.1
RATES, CONTROL_RATES = (0.01, 0.03, RATE, 0.3), (0.03, RATE)
DEEP, DEEP_SEEDS = 110, 3
DOSES, DOSE_SEEDS = (0.25, 0.5, 0.75), 3
WIDER = 7
"""Blocks of the wider control: those that forward-only at depth 56 moves at all."""
UPDATES = {20: 300, 56: 400, 110: 400}
REACHED = 0.9
"""Training accuracy to which the updates are counted."""
SAME = 0.01
"""Training accuracies that differ by less are told apart by the test images."""

Specs = dict[str, dict[str, Any]]


def spec(skip: str, depth: int, rate: float = RATE, **keys: Any) -> dict[str, Any]:
    """One run: the synthetic images, batch 128, one-cycle; displacements at the end."""
    return {
        "depth": depth,
        "skip": skip,
        "lr": rate,
        "data": "synthetic",
        "batch_size": 128,
        "max_steps": UPDATES[depth],
        "probe": "displacement",
        "record": {"every": {"weights": 10, "outputs": 0, "blocks": 0}},
        **keys,
    }


def label(name: str, depth: int, rate: float = RATE, where: str = "") -> str:
    return f"{name}, depth {depth}, rate {rate:g}{where}"


def arms(
    depth: int, rate: float = RATE, where: str = "", *, controls: bool = True, **keys: Any
) -> Specs:
    """The four skips and the two controls."""
    found = {label(name, depth, rate, where): spec(skip, depth, rate, **keys)
             for skip, name in ARMS.items()}  # fmt: skip
    for skip, name in CONTROLS.items() if controls else ():
        found[label(name, depth, rate, where)] = spec(skip, depth, rate, trainable_blocks=1, **keys)
    return found


def dosed(half: str, dose: float) -> Specs:
    """A residual network of depth 56 of whose skip one half has a dose, the other all."""
    a, b = (dose, 1.0) if half == "a" else (1.0, dose)
    return {f"dose {half}={dose:g}": spec("dosed", 56, skip_forward=a, skip_backward=b)}


def joined(parts: Iterable[Specs]) -> Specs:
    return {name: keys for part in parts for name, keys in part.items()}


BARE, BARE_RATES = ", without normalisation", (0.003, 0.01)
DIGITS = ", digits"
CORE = joined(arms(depth) for depth in DEPTHS)
OTHER_RATES = joined(
    arms(depth, rate, controls=rate in CONTROL_RATES)
    for depth in DEPTHS
    for rate in RATES
    if rate != RATE
)
WITHOUT_NORM = joined(
    arms(20, rate, BARE, norm="none", padding="circular", max_steps=900) for rate in BARE_RATES
)
DEEPER = joined(arms(DEEP, rate) for rate in CONTROL_RATES)
ON_DIGITS = arms(56, RATE, DIGITS, data="digits", max_steps=None, epochs=15)
WIDER_CONTROL = {
    f"residual, last {WIDER} blocks only, depth 56, rate {RATE:g}": spec(
        "identity", 56, trainable_blocks=WIDER
    )
}
DOSED = joined(dosed(half, dose) for half in "ab" for dose in DOSES)


def compare(what: str, region: Region, metric_name: str, one: str, other: str) -> Comparison:
    """A difference of paired accuracies at depth 56."""
    return Comparison(
        f"depth 56, {what}: {one} − {'control' if other == CONTROL else other}",
        (label(one, 56), label(other, 56)),
        metric_difference(metric_name),
        region,
        unit="accuracy",
        slow=other != CONTROL,
    )


COMPARISONS = (
    Comparison(
        "depth 56, training: the control itself",
        (label(CONTROL, 56),),
        metric("train_accuracy"),
        below(0.8),
        unit="accuracy",
    ),
    compare("training", above(0.05), "train_accuracy", "forward only", CONTROL),
    compare("training", above(0.05), "train_accuracy", "residual", "forward only"),
    compare("training", above(0.05), "train_accuracy", "backward only", "plain"),
    compare("test", between(-0.05, 0.05), "test_accuracy", "forward only", CONTROL),
    compare("test", above(0.05), "test_accuracy", "backward only", "forward only"),
)


# --- what is shown of all that was run ------------------------------------------------------------


def displacements(record: Record) -> Array:
    """‖W_T − W_0‖/‖W_0‖ of each block, from the input on."""
    modules = record.table("modules")
    assert modules is not None
    names, _, values = readings(record, "displacement")
    moved = dict(zip(names, values, strict=True))
    rows = modules.sort_by("position").to_pylist()
    blocks = [row["layer"].rpartition(".")[0] for row in rows if row["kind"] == "block"]
    return np.array([moved[block] for block in blocks])


def gradients(record: Record, step: int = 0) -> Array:
    """Norm of each convolution's gradient at a step, from the input on."""
    return layers(record, "weights", "weight_grad_norm", kind="conv", step=step)[1]


def last_gradients(record: Record) -> Array:
    """The same at the last step recorded."""
    table = record.table("weights")
    assert table is not None
    return gradients(record, int(table["step"].to_numpy().max()))


def records(find: Lookup, arm: str) -> list[Record]:
    """All seeds of an arm that were run."""
    if arm not in SPECS:
        return []
    found = (find(arm, FIRST_SEED + place) for place in range(TRAINED_SEEDS))
    return [record for record in found if record is not None]


def accuracy(find: Lookup, arm: str, split: str) -> Array:
    return np.array([record.metrics[f"{split}_accuracy"] for record in records(find, arm)])


def by_rate(find: Lookup, name: str, depth: int, where: str = "") -> dict[float, Array]:
    """Training accuracies of all seeds, at each learning rate that was run whole."""
    arms = {rate: label(name, depth, rate, where) for rate in sorted({*RATES, *BARE_RATES})}
    found = {rate: accuracy(find, arm, "train") for rate, arm in arms.items()}
    seeds = max(1, *map(len, found.values()))
    return {rate: values for rate, values in found.items() if len(values) == seeds}


def best_rate(find: Lookup, name: str, depth: int, where: str = "") -> float | None:
    """The learning rate of an arm's highest mean training accuracy; None if nothing was run.

    Of those within SAME of it, the one of the highest test accuracy.
    """
    means = {rate: v.mean() for rate, v in by_rate(find, name, depth, where).items()}
    same = [rate for rate, mean in means.items() if mean > max(means.values()) - SAME]
    tested = {r: accuracy(find, label(name, depth, r, where), "test").mean() for r in same}
    return max(tested, key=tested.__getitem__) if tested else None


def in_words(values: Iterable[float]) -> str:
    found = list(values)
    never = sum(not math.isfinite(value) for value in found)
    return f"never in {never} of {len(found)}" if never else interval(found).cell()


def row(find: Lookup, arm: str) -> dict[str, Any]:
    """What an arm came to: means over seeds with 95 % t intervals."""
    seeds = records(find, arm)
    return {
        "networks": arm,
        "training error": in_words(1 - accuracy(find, arm, "train")),
        "test error": in_words(1 - accuracy(find, arm, "test")),
        f"updates to {REACHED:.0%}": in_words(updates_to(record, REACHED) for record in seeds),
        "displacement, median block": in_words(
            float(np.median(displacements(record))) for record in seeds
        ),
        "seeds": len(seeds),
    }


def over_rates(find: Lookup, name: str, depth: int) -> dict[str, Any]:
    """An arm at its best rate, and the median over all rates, seed by seed."""
    found = by_rate(find, name, depth)
    best = best_rate(find, name, depth)
    assert best is not None
    arm = label(name, depth, best)
    median = np.median(list(found.values()), axis=0)
    return {
        "networks": f"{name}, depth {depth}",
        "rates": ", ".join(f"{rate:g}" for rate in found),
        "best": f"{best:g}",
        "training error, best": in_words(1 - accuracy(find, arm, "train")),
        "test error, best": in_words(1 - accuracy(find, arm, "test")),
        "training error, median": in_words(1 - median),
        "seeds": len(median),
    }


def tables(find: Lookup) -> dict[str, list[dict[str, Any]]]:
    parts = {
        "At one learning rate, with batch normalisation": CORE,
        "A wider control": WIDER_CONTROL,
        "At other learning rates": OTHER_RATES,
        "Depth 110": DEEPER,
        "Doses of one half, the other whole (depth 56, rate 0.1)": DOSED,
        "Without normalisation, circular padding": WITHOUT_NORM,
        "Digits, on which the control is no control": ON_DIGITS,
    }
    found = {
        title: [row(find, arm) for arm in specs if records(find, arm)]
        for title, specs in parts.items()
    }
    found["Best and median learning rate"] = [
        over_rates(find, name, depth)
        for depth in (*DEPTHS, DEEP)
        for name in NAMES
        if len(by_rate(find, name, depth)) > 1
    ]
    return {title: rows for title, rows in found.items() if rows}


def exhibit(find: Lookup) -> Exhibit | None:
    """One figure of everything, and the numbers."""
    if not all(records(find, arm) for arm in CORE):
        return None
    return Exhibit(
        figure=draw(find),
        caption=(
            "What each half of a skip does. A: accuracy at the end, training (filled) and test "
            "(open), each arm at the learning rate of its best training accuracy among those run "
            "(up to four, of the control two; of those within .01 of it, that of the best test "
            "accuracy); means with 95 % t intervals, small points are seeds; grey, the control: "
            "the residual network of which only the last block and the classifier are trained. B: "
            "how far each block of the networks of depth 56, counted "
            "from the input, moved, ‖W_T − W_0‖/‖W_0‖, one line a seed; weight decay alone moves a "
            "block by .020, where forward-only's first ones lie. C, D: the gradient of each "
            "convolution at initialisation and at the last step recorded, one line a seed. E, "
            "where it was run: accuracy, training (filled) and test (open), against the dose of "
            "one half, the other whole."
        ),
        tables=tables(find),
        sentences=sentences(find),
    )


def sentences(find: Lookup) -> tuple[str, ...]:
    """Numbers in a sentence; what they bear is the verdict's."""
    train, test = (
        {n: accuracy(find, label(n, 56), split).mean() for n in NAMES}
        for split in ("train", "test")
    )
    return (
        f"At depth 56 and rate {RATE:g} the residual network reaches {train['residual']:.2f} on "
        f"the training and {test['residual']:.2f} on the test images, with the forward half of its "
        f"skips alone {train['forward only']:.2f} and {test['forward only']:.2f}, with the "
        f"backward half alone {train['backward only']:.2f} and {test['backward only']:.2f}, "
        f"without skips {train['plain']:.2f} and {test['plain']:.2f}; training nothing but its "
        f"last block {train[CONTROL]:.2f} and {test[CONTROL]:.2f}.",
    )


def draw(find: Lookup) -> Drawing:
    """The figure: accuracies, displacements, gradients, doses."""
    from gradflow import plots

    return plots.themed(_draw)(find)


def _draw(find: Lookup) -> Drawing:
    from matplotlib.figure import Figure as Drawing

    from gradflow import plots

    doses = [arm for arm in DOSED if records(find, arm)]
    figure = Drawing(figsize=(plots.WIDTH, 5.6))
    figure.set_layout_engine("constrained")
    panels = 4 if doses else 3
    grid = figure.add_gridspec(2, panels)
    _draw_accuracies(figure.add_subplot(grid[0, :]), find)
    moved, start = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    end = figure.add_subplot(grid[1, 2], sharey=start)
    _draw_lines(moved, find, "B  displacement", "block", displacements)
    _draw_lines(start, find, "C  gradient, start", "convolution", gradients)
    _draw_lines(end, find, "D  gradient, end", "convolution", last_gradients)
    end.tick_params(labelleft=False)
    if doses:
        _draw_doses(figure.add_subplot(grid[1, 3]), find)
    return figure


def _draw_accuracies(ax: Axes, find: Lookup) -> None:
    groups = [(depth, where) for depth, where in ((20, ""), (56, ""), (DEEP, ""), (20, BARE),
              (56, DIGITS)) if best_rate(find, "plain", depth, where) is not None]  # fmt: skip
    for place, (depth, where) in enumerate(groups):
        control = best_rate(find, CONTROL, depth, where)
        if control is not None:
            arm = label(CONTROL, depth, control, where)
            for split, fill in (("train", "0.8"), ("test", "0.92")):
                mean = accuracy(find, arm, split).mean()
                ax.fill_between([place - 0.42, place + 0.42], 0, mean, color=fill, zorder=0, lw=0)
        for shift, name in enumerate(ARMS.values()):
            rate = best_rate(find, name, depth, where)
            if rate is not None:
                arm = label(name, depth, rate, where)
                _draw_arm(ax, find, arm, place + (shift - 1.5) * 0.2, styles.style(name))
    ax.set_xticks(
        range(len(groups)),
        [f"depth {depth}{where.replace(', ', chr(10))}" for depth, where in groups],
    )
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_ylim(0, 1.03)
    ax.set_title("A  accuracy at the end", loc="left", fontweight="bold")
    ax.grid(axis="x", visible=False)
    _legend(ax)


def _draw_arm(ax: Axes, find: Lookup, arm: str, x: float, style: tuple[str, Any, str]) -> None:
    color, _, marker = style
    for split, fill, shift in (("train", color, -0.03), ("test", "white", 0.03)):
        values = accuracy(find, arm, split)
        found = interval(values)
        half = 0.0 if math.isnan(found.half) else found.half
        ax.errorbar(x + shift, found.mean, half, color=color, marker=marker, markersize=5,
                    markerfacecolor=fill, linestyle="", elinewidth=1, zorder=3)  # fmt: skip
        ax.plot(np.full(len(values), x + shift * 2.4), values, ".", color=color, markersize=2)


def _legend(ax: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for name in ARMS.values():
        color, _, marker = styles.style(name)
        handles.append(
            Line2D([], [], color=color, marker=marker, linestyle="", markersize=5, label=name)
        )
    handles.append(Patch(color="0.8", label="control: last block alone (test lighter)"))
    handles.append(
        Line2D([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="", label="test")
    )
    assert ax.figure is not None
    ax.figure.legend(handles=handles, ncols=3, loc="outside upper center")


def _draw_lines(
    ax: Axes, find: Lookup, title: str, what: str, read: Callable[[Record], Array]
) -> None:
    for name in ARMS.values():
        color, dashes, _ = styles.style(name)
        for record in records(find, label(name, 56)):
            values = read(record)
            shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
            ax.plot(np.arange(1, len(values) + 1), shown, color=color, linestyle=dashes, lw=0.8,
                    alpha=0.8)  # fmt: skip
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.set_xlabel(what)
    ax.set_title(title, loc="left", fontweight="bold")


def _draw_doses(ax: Axes, find: Lookup) -> None:
    ends = {"a": ("backward only", "residual"), "b": ("forward only", "residual")}
    names = {"a": "forward, a", "b": "backward, b"}
    for half, (none, whole) in ends.items():
        places = [0.0, *DOSES, 1.0]
        labels = [label(none, 56), *(f"dose {half}={d:g}" for d in DOSES), label(whole, 56)]
        color, dashes, marker = styles.style("forward only" if half == "a" else "backward only")
        for split, fill, name in (("train", color, names[half]), ("test", "white", None)):
            found = [interval(accuracy(find, arm, split)[:DOSE_SEEDS]) for arm in labels]
            halves = [0.0 if math.isnan(one.half) else one.half for one in found]
            ax.errorbar(places, [one.mean for one in found], halves, color=color, linestyle=dashes,
                        marker=marker, markersize=4, markerfacecolor=fill, elinewidth=0.8,
                        label=name)  # fmt: skip
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("dose of one half")
    ax.set_title("E  doses", loc="left", fontweight="bold")
    ax.legend(loc="center", bbox_to_anchor=(0.42, 0.29), fontsize=7)


BEYOND = {
    **dict.fromkeys([*WIDER_CONTROL, *OTHER_RATES, *ON_DIGITS], TRAINED_SEEDS),
    **dict.fromkeys([*DEEPER, *WITHOUT_NORM], DEEP_SEEDS),
    **dict.fromkeys(DOSED, DOSE_SEEDS),
}
SPECS = joined((CORE, WIDER_CONTROL, OTHER_RATES, DEEPER, DOSED, WITHOUT_NORM, ON_DIGITS))

FINDING = Finding(
    source="gradflow; asks what He et al. 2015, arXiv 1512.03385, and 2016, 1603.05027, leave open",
    chapter="halves",
    specs=SPECS,
    comparisons=COMPARISONS,
    recorded="inconclusive",
    seeds=TRAINED_SEEDS,
    beside=dict.fromkeys(CORE, TRAINED_SEEDS),
    extension=BEYOND,
    exhibit=exhibit,
    notes="At depth 56 backward-only networks either begin to train, to about half of the images, "
    "or stay at chance: three and two of five seeds. Of such an arm a mean says little, and what "
    "the backward half buys is left open here. What forward-only fits it does not understand: its "
    "test accuracy is the control's, close to chance, where the residual network's is near 1. A "
    "control that trains the last seven blocks fits more than forward-only does (training error "
    ".001 against .33) and generalises as little: what forward-only gains over one block is no "
    "more than a few last blocks gain on frozen features.",
)
