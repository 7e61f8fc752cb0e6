"""The profiles of all comparable runs at one step, a panel a depth or seed: a figure for a paper.

    python -m analysis.facets [RUNS …] [--by depth|seed] [--step N] [--group 0]

The report's page shows the same below its two runs. Groups are numbered as in tables/runs.csv of a
report: 0 has most results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pandas as pd

from analysis.compare import arguments, family_of, not_recorded, told, write
from gradflow import captions, plots, tables, views
from gradflow.errors import GradflowError
from gradflow.report import check_any, distinct
from gradflow.store import Runs, load_runs


def facets(options: argparse.Namespace) -> None:
    quantity, family = options.quantity, options.family
    compared, problems = distinct(load_runs(*options.runs))
    check_any(Runs(compared, problems), options.runs)
    overview = tables.overview(Runs(compared))
    last = int(overview["group"].max())
    if not 0 <= options.group <= last:
        there = f"groups are numbered 0 to {last}" if last else "there is one group, 0"
        raise GradflowError(f"--group {options.group}: {there}")
    overview = overview[overview["group"] == options.group]
    runs = Runs(compared[place] for place in overview.index)
    overview = overview.reset_index(drop=True)
    extras = tables.extra_layers(runs, tables.pairs(runs, overview))
    parts, members, passed = [], [], list(problems)
    for run, row in zip(runs, overview.to_dict("records"), strict=True):
        try:
            frame = views.layered(
                run, quantity, step=options.step, extras=extras.get(row["run"], ())
            )
            frame = tables.measured(frame, quantity)
            family = family_of(frame, run, family)
        except GradflowError as error:
            passed.append(str(error))
            continue
        frame = frame[frame["step"] == tables.nearest(frame["step"], options.step)]
        depth = pd.array([row["depth"]] * len(frame), "Int64")
        members.append(run)
        parts.append(frame.assign(run_id=run.run_id, arm=row["arm"], depth=depth, seed=row["seed"]))
    if not parts:
        raise GradflowError(passed[-1])
    shown = pd.concat(parts, ignore_index=True)
    if (shown[quantity] < 0).any():
        raise GradflowError(f"{quantity}: has negative values, and facets are logarithmic")
    for step, part in shown[shown["step"] != options.step].groupby("step"):
        of = tables.counted(part["run_id"].nunique(), "run")
        print(f"{of}: {not_recorded(quantity, options.step, step)}")
    title = str(overview["title"].iloc[0])
    figure = plots.profile(shown, quantity, family=str(family), by=options.by, title=title)
    for line in passed:
        print(f"passed over: {line}", file=sys.stderr)
    name = f"group {options.group}{f' ({title})' if title else ''}"
    print(f"{name}, {tables.counted(len(parts), 'run')}, {tables.when(shown['step'])}")
    print(f"conditions: {captions.conditions(members)}")
    stem = f"facets-{options.by}-{quantity}-step{shown['step'].max()}"
    write(figure, options.out, f"{stem}-group{options.group}" if options.group else stem)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("facets", "All comparable runs' profiles at one step, by depth or seed.")
    parser.add_argument("runs", nargs="*", default=["runs"], metavar="RUNS", help="stores (runs)")
    parser.add_argument("--by", choices=("depth", "seed"), default="depth", help="(depth)")
    parser.add_argument("--group", type=int, default=0, metavar="N", help="of comparable runs (0)")
    return told(facets, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
