"""Two runs side by side, as the report's page shows them, as a figure for a paper and in numbers.

    python -m analysis.compare RUN_A RUN_B [--step N] [--quantity weight_grad_norm]

Writes SVG, PNG and PDF: both heatmaps, the profiles at one step, and B over A at equal relative
depth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradflow import captions, plots, styles, tables, views
from gradflow.errors import GradflowError
from gradflow.options import Parser
from gradflow.store import Run, Runs


def find(name: str, store: str) -> Run:
    """The run of this directory, or of this name or id within a store.

    Raises:
        GradflowError: there is none, or more than one; StoreError: it cannot be read.
    """
    if (Path(name) / "run.json").exists():
        return Run(name)
    directory = Path(store)
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    found = [p for p in paths if p.name == name] or [
        p for p in paths if p.name.endswith(f"-{name}")
    ]
    if len(found) > 1:
        raise GradflowError(f"{name}: {', '.join(p.name for p in found)} end so; give one's name")
    if not found:
        raise GradflowError(f"{name}: no directory of a run, and no name or id of one in {store}")
    return Run(found[0])


def called(row: dict[Any, Any], *, title: bool) -> str:
    """What a run is called: `plain, depth 56, seed 0`, `title` with what sets its group apart."""
    if pd.isna(row["depth"]) and pd.isna(row["seed"]):
        return str(row["run"])
    parts = [f"{key} {row[key]}" for key in ("depth", "seed") if not pd.isna(row[key])]
    return ", ".join([row["arm"], *parts, *[row["title"]] * title])


def family_of(frame: pd.DataFrame, run: Run, wanted: str | None) -> str:
    """The family of layers to show: the one wanted, else the weights or what there is."""
    there = list(dict.fromkeys(frame["family"]))
    if wanted is None:
        return tables.WEIGHT if tables.WEIGHT in there else there[0]
    if wanted not in there:
        raise GradflowError(
            f"{run.path.name}: no layers of the family {wanted} (has {', '.join(there)})"
        )
    return wanted


def said(frame: pd.DataFrame, quantity: str, run: Run, wanted: int) -> int:
    """The recorded step that stands for the one wanted; says so where it is another."""
    step = tables.nearest(tables.measured(frame, quantity)["step"], wanted)
    if step != wanted:
        print(f"{run.path.name}: {not_recorded(quantity, wanted, step)}")
    return step


def not_recorded(quantity: str, wanted: int, step: object) -> str:
    return f"{quantity} was not recorded at step {wanted}; step {step} is used"


def compare(options: argparse.Namespace) -> None:
    a, b = (find(name, options.runs).held() for name in (options.a, options.b))
    if a.path.resolve() == b.path.resolve():
        raise GradflowError(f"{a.path}: A and B are the same run")
    overview = tables.overview(Runs([a, b]))
    rows = overview.to_dict("records")
    names = [
        f"{side}: {called(row, title=overview['group'].nunique() > 1)}"
        for side, row in zip("AB", rows, strict=True)
    ]
    alike = len({str(row["depth"]) for row in rows}) == 1
    extras = tables.lone_layers(a, b) if alike else set()
    quantity, family, frames, steps = options.quantity, options.family, [], []
    for run, row in zip((a, b), rows, strict=True):
        frame = views.layered(run, quantity, step=options.step, extras=extras)
        family = family_of(tables.measured(frame, quantity), run, family)
        frames.append(frame[frame["family"] == family].assign(arm=row["arm"]))
        steps.append(said(frames[-1], quantity, run, options.step))
    figure = plots.comparison(
        frames[0], frames[1], quantity, step=options.step, relative=options.axis == "relative",
        names=(names[0], names[1]),
    )  # fmt: skip
    for name, run, row in zip(names, (a, b), rows, strict=True):
        print(f"{name}; {errors(row)} ({run.path})")
    if alike and str(rows[0]["seed"]) == str(rows[1]["seed"]):
        print(f"certificate: {tables.match(a, b)}")
    print(f"conditions: {captions.conditions([a, b])}")
    print(f"\n{styles.label(quantity)}, {tables.when(steps)}\n")
    print(ends(frames, quantity, steps).to_string(index=False), end="\n\n")
    stem = f"comparison-{a.run_id}-{b.run_id}-{quantity}-step{steps[0]}"
    write(figure, options.out, stem)


def errors(row: dict[Any, Any]) -> str:
    known = [split for split in tables.SPLITS if not pd.isna(row[f"{split}_error"])]
    words = {"train": "training error", "test": "test error"}
    told = [f"{words[split]} {row[f'{split}_error']:.3f}" for split in known]
    return ", ".join(told) or f"no final error ({row['outcome']})"


def ends(frames: Sequence[pd.DataFrame], quantity: str, steps: Sequence[int]) -> pd.DataFrame:
    """The first and the last layer of both runs, first over last, and B against A, in words."""
    both = [tables.at_step(f, quantity, step) for f, step in zip(frames, steps, strict=True)]
    log = not any((tables.measured(f, quantity)[quantity] < 0).any() for f in frames)
    values = [*both, tables.compare_layers(*both, log=log)]
    rows = []
    for place, end in ((0, "first"), (-1, "last")):
        layers = dict.fromkeys(
            named(f, len(v) if place else 1) for f, v in zip(frames, both, strict=True)
        )
        rows.append([f"{end} ({' / '.join(layers)})", *(cell(v[place]) for v in values)])
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = [np.divide(*values.filled(np.nan)[[0, -1]]) for values in both]
            rows.append(["first over last", *map(cell, [*shares, shares[1] / shares[0]])])
    return pd.DataFrame(rows, columns=["layer", "A", "B", "B / A" if log else "B − A"])


def named(frame: pd.DataFrame, ordinal: int) -> str:
    return str(frame.loc[frame["ordinal"] == ordinal, "layer"].iloc[0])


def cell(value: Any) -> str:
    return "not measured" if value is np.ma.masked else tables.short(float(value))


def write(figure: Any, out: str, stem: str) -> None:
    """Write the figure's files and print where they lie."""
    directory = Path(out)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths = plots.save(figure, directory / stem)
    except OSError as error:
        raise GradflowError(f"{directory}: cannot be written ({error.strerror})") from None
    print(*paths, sep="\n")


def arguments(prog: str, text: str) -> Parser:
    """What the commands for figures have in common."""
    parser = Parser(prog=f"python -m analysis.{prog}", description=text)
    parser.add_argument("--step", type=int, default=0, metavar="N", help="updates done (0)")
    parser.add_argument("--quantity", default="weight_grad_norm", help="(weight_grad_norm)")
    parser.add_argument("--family", choices=("weights", "norm", "aside", "block"),
                        help="layers shown (weights, or what there is)")  # fmt: skip
    parser.add_argument("--out", default="figures", metavar="DIR", help="where to write (figures)")
    return parser


def told(
    work: Callable[[argparse.Namespace], None],
    parser: Parser,
    argv: Sequence[str] | None,
    name: str = "gradflow",
) -> int:
    """0, or 1 after one line that says why there is no figure."""
    try:
        work(parser.parse_args(argv))
    except GradflowError as error:
        print(f"{name}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("compare", "Two runs side by side, as a figure and in numbers.")
    parser.add_argument("a", metavar="RUN_A", help="a run's directory, or its name or id in --runs")
    parser.add_argument("b", metavar="RUN_B")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="a store (runs)")
    parser.add_argument("--axis", choices=("layers", "relative"), default="layers",
                        help="layers counted (default), or relative depth")  # fmt: skip
    return told(compare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
