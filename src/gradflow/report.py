"""The report over a store: one self-contained page, its figures and tables as files, or a text.

    python -m gradflow.report [RUNS …] [--out report] [--text | --serve]

Everything on the page is computed from what was recorded; nothing is trained or measured here.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gradflow import (
    atlas,
    cache,
    captions,
    interrupt,
    reading,
    serve,
    status,
    styles,
    tables,
    verdicts,
)
from gradflow.cache import Cache
from gradflow.errors import GradflowError
from gradflow.findings import Finding
from gradflow.helpers import Helpers
from gradflow.options import Parser
from gradflow.page import Page, publish
from gradflow.reading import QUANTITY
from gradflow.sketches import sketch
from gradflow.store import FINISHED, Run, Runs, load_runs

TOLD_RUNS = 24
"""Runs of which a text tells what the gradient did in each; of more it would be neither short nor
quick."""
_STORIES = 8
"""Runs that went wrong whose story the page tells, of each group."""
MANY = 50
"""Runs with which a report takes help from the start."""
DRAWN_GROUPS = 4
"""Groups of comparable runs that get figures; further ones are in the explorer and the tables."""

# --- what the report is made of -------------------------------------------------------------------


@dataclass
class Material:
    """The frames that figures and tables are made of.

    `problems` name what cannot be read; `probes` are the probe tasks, which are in no frame.
    `views` are what `gradflow.views` packed of each run, by its id.
    The overview has a column `diagnosis` (see `captions.diagnosed`).
    `lines`, `gains`, `lost`, `compared` and `rates` are what `tables.degradation`, `benefit`,
    `diverged`, `comparison` and `rates` say of these.
    """

    members: list[Run]
    overview: pd.DataFrame
    pairs: pd.DataFrame
    profiles: pd.DataFrame = field(default_factory=pd.DataFrame)
    heat: pd.DataFrame = field(default_factory=pd.DataFrame)
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    blocks: pd.DataFrame = field(default_factory=pd.DataFrame)
    diagnoses: pd.DataFrame = field(default_factory=pd.DataFrame)
    stories: pd.DataFrame = field(default_factory=pd.DataFrame)
    lines: pd.DataFrame = field(default_factory=pd.DataFrame)
    gains: pd.DataFrame = field(default_factory=pd.DataFrame)
    lost: pd.DataFrame = field(default_factory=pd.DataFrame)
    compared: pd.DataFrame = field(default_factory=pd.DataFrame)
    rates: pd.DataFrame = field(default_factory=pd.DataFrame)
    problems: list[str] = field(default_factory=list)
    probes: list[Run] = field(default_factory=list)
    views: dict[str, bytes] = field(default_factory=dict)

    def of(self, group: int) -> Material:
        """What belongs to one group of comparable runs."""
        rows = self.overview["group"] == group
        parts = {
            name: frame[frame["group"] == group] if len(frame) else frame
            for name in _BY_GROUP
            for frame in [getattr(self, name)]
        }
        members = [run for run, here in zip(self.members, rows, strict=True) if here]
        views = {n: self.views[n] for n in (run.run_id for run in members) if n in self.views}
        return Material(members, self.overview[rows], views=views, **parts)


_BY_GROUP = ("pairs", "profiles", "heat", "curves", "blocks", "diagnoses", "stories", "lines",
             "gains", "lost", "compared", "rates")  # fmt: skip


def gather(runs: Runs, kept: Cache | None = None, helpers: Helpers | None = None) -> Material:
    """Read what the report shows; a damaged table costs its run that part and is named.

    Args:
        kept: what was read before, and is not read again; helpers: processes that share the work.

    Raises:
        GradflowError: there is no run at all.
    """
    members, problems = distinct(runs)
    probes = list(filter(_is_probe, runs))
    if not members:
        if not probes:
            raise GradflowError("; ".join(["no runs that can be read", *problems]))
        return Material([], pd.DataFrame(), pd.DataFrame(), problems=problems, probes=probes)
    shown = Runs(members)
    overview = tables.overview(shown)
    found = Material(members, overview, tables.pairs(shown, overview), probes=probes)
    extras = tables.extra_layers(shown, found.pairs)
    read = reading.read_all(members, overview, extras, drawn=DRAWN_GROUPS,
                            kept=kept or Cache(), helpers=helpers or Helpers(1))  # fmt: skip
    for name, frame in read.frames.items():
        setattr(found, name, frame)
    found.views = read.views
    told = overview["run_id"].map(captions.diagnosed(found.diagnoses))
    found.overview = overview.assign(diagnosis=told.astype(object).fillna(""))
    found.problems = list(dict.fromkeys([*problems, *read.damaged]))
    found.lines, found.gains = tables.degradation(overview), tables.benefit(found.pairs)
    found.lost, found.compared = tables.diverged(overview), tables.comparison(overview, found.pairs)
    if len(found.profiles):
        found.rates = tables.rates(found.profiles)
    return found


def _is_probe(run: Run) -> bool:
    """Whether a run is a probe of a network at initialisation: a number for a finding, no more."""
    if run.record.get("origin") != "gradflow" or run.spec.get("max_steps") != 0:
        return False
    return (run.spec.get("probe") or {}).get("name") is not None


def distinct(runs: Runs) -> tuple[list[Run], list[str]]:
    """The runs that are compared and shown, each once, and what is passed over."""
    seen: dict[str, Run] = {}
    problems = list(runs.problems)
    for run in runs:
        if why := captions.unreadable(run):
            problems.append(f"{run.path}/spec.json: not a spec of this version's ({why})")
    for run in (run for run in runs if not _is_probe(run)):
        first = seen.setdefault(run.run_id, run)
        if first is not run:
            problems.append(f"{run.path}: the same run as {first.path}")
    return list(seen.values()), problems


def _problems(found: Material) -> list[str]:
    return [*found.problems, *_remarks(found.overview)]


def _probe_words(probes: Sequence[Run], where: str) -> str:
    """`412 probe tasks: see the atlas`, `2 probe tasks (1 not done): see the atlas`; or nothing."""
    undone = sum(run.status != "done" for run in probes)
    counted = f"{len(probes):,} probe task{'s' * (len(probes) != 1)}"
    return f"{counted}{f' ({undone} not done)' * bool(undone)}: {where}" if probes else ""


def _remarks(overview: pd.DataFrame) -> Iterator[str]:
    for row in overview.to_dict("records"):
        if row["status"] != "done":
            yield f"{row['path']}: {row['outcome']}; not among the final errors"
        elif (
            pd.isna(row["train_error"])
            and row["steps"] != 0  # measures the initialisation alone
            and not row["match"].startswith("not ")
        ):
            yield f"{row['path']}: has no final training error"
        if row["match"].startswith("not "):
            yield f"{row['path']}: {row['match']}"


# --- words ----------------------------------------------------------------------------------------


def comparison(runs: Runs) -> str:
    """The comparison as a text: training accuracy with and without skips, by depth."""
    members, _ = distinct(runs)
    compared = Runs(members)
    overview = tables.overview(compared)
    if overview.empty:
        return _comparison_text(overview, overview)
    return _comparison_text(tables.comparison(overview, tables.pairs(compared, overview)), overview)


def _comparison_text(frame: pd.DataFrame, overview: pd.DataFrame) -> str:
    if frame.empty:
        done = int((overview["status"] == "done").sum()) if len(overview) else 0
        if done:
            return f"{tables.counted(done, 'finished run')}, none with a final training error"
        return "no finished runs to compare"
    blocks = []
    for (_, title), part in frame.groupby(["group", "title"], sort=True):
        blocks.append("\n".join(filter(None, [str(title), _text_table(_comparison_columns(part))])))
    note = "training accuracy, evaluation mode; ± 95 % t interval over seeds, if they differ"
    return "\n\n".join([*blocks, note])


def _comparison_columns(frame: pd.DataFrame) -> pd.DataFrame:
    arms = list(dict.fromkeys(frame["arm"]))
    if arms == ["–"]:
        return frame[["depth", "plain", "seeds"]]
    names = {"depth": "depth", "plain": "plain", "arm": "skip", "other": "with skip"}
    if len(arms) == 1:
        names = {"depth": "depth", "plain": "plain", "other": arms[0]}
    names |= {name: name for name in ("difference", "seeds", "matched")}
    return frame[list(names)].rename(columns=names)


def _text_table(frame: pd.DataFrame) -> str:
    cells = [list(map(str, frame.columns)), *[list(map(str, row)) for row in frame.to_numpy()]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(
        line.rstrip() for line in [lines[0], "  ".join("─" * w for w in widths), *lines[1:]]
    )


# --- the page -------------------------------------------------------------------------------------


def write_report(
    runs: Runs,
    out: str | Path = "report",
    *,
    findings: Iterable[Finding] = (),
    processes: int | None = None,
) -> Path:
    """Write `out/index.html`, self-contained, with `out/figures/` and `out/tables/`; its path.

    An older report is replaced file by file once the new one is whole, the page last. What was
    derived of each run is kept in `out/.cache/`, so that the next report reads only what changed.

    Args:
        findings: published findings; where any of their runs is there, `out/atlas.html` tells what
            became of them all.
        processes: how many read and draw, this one included; by default one a core, up to four.

    Raises:
        GradflowError: no run that can be read, or `out` cannot be written.
    """
    return _make(runs, out, _entries(runs, findings), processes)[1]


def _make(
    runs: Runs, out: str | Path, entries: Sequence[atlas.Entry], processes: int | None = None
) -> tuple[Material, Path]:
    kept = Cache(Path(out) / cache.DIRECTORY)
    with Helpers(processes, ["gradflow.reading", "gradflow.plots"]) as helpers:
        if len(runs) >= MANY:
            helpers.start()  # it loads its modules while this process lists the runs
        found = gather(runs, kept, helpers)
        page = _write(found, out, entries, kept, helpers)
    kept.prune()
    return found, page


def _entries(runs: Runs, findings: Iterable[Finding]) -> list[atlas.Entry]:
    stores = dict.fromkeys(run.path.parent for run in runs)
    entries = atlas.read(findings, list(stores))
    return entries if any(entry.ran for entry in entries) else []


def _write(
    found: Material, out: str | Path, entries: Sequence[atlas.Entry], kept: Cache, helpers: Helpers
) -> Path:
    def compose(directory: Path) -> None:
        if entries:
            atlas.write(directory, entries)
        page = Page(directory, kept, helpers)
        if entries:
            page.text(atlas.summary(entries))
        if found.members:
            _compose(page, found)
        else:
            page.text("No run but probe tasks: there is nothing to compare here.")
            page.items(found.problems)
        page.write(_title(found), _subtitle(found, "see the atlas" if entries else "not shown"))

    found.problems += [line for entry in entries for line in entry.problems]
    return publish(out, compose)


def _title(found: Material) -> str:
    if not found.members:
        return "Recorded runs"
    depths = sorted(found.overview["depth"].dropna().unique())
    if not depths:
        return "Recorded runs"
    *others, last = tables.ordered(found.overview["arm"])
    arms = f"{', '.join(others)} and {last}" if others else last
    return f"{arms[0].upper()}{arms[1:]} networks of depth {', '.join(map(str, depths))}"


def _subtitle(found: Material, probes: str) -> str:
    counts = pd.Series([run.status for run in found.members]).value_counts()
    places = dict.fromkeys(str(run.path.parent) for run in found.members)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    counted = tables.counted(len(found.members), "run")
    runs = f"{counted} in {', '.join(places)} ({states})" if places else ""
    made = f"report of {time.strftime('%Y-%m-%d %H:%M')}"
    told = [runs, _probe_words(found.probes, probes), made]
    return "; ".join(filter(None, told))


def _compose(page: Page, found: Material) -> None:
    groups = [found.of(number) for number in sorted(found.overview["group"].unique())]
    shown = groups[:DRAWN_GROUPS]
    _verdict_section(page, shown)
    if found.views:
        page.explorer("Gradient flow", _index(found), found.views)
    _question(page, groups, len(shown))
    _diagnosis_section(page, groups)
    _profile_section(page, shown, "first", "initialisation", "The gradient at initialisation")
    _profile_section(page, shown, "last", "later", "Later in training")
    _heat_section(page, shown)
    _curve_section(page, shown)
    _benefit_section(page, shown)
    _block_section(page, shown)
    _run_section(page, found)
    _condition_section(page, groups)
    page.section("problems", "Problems")
    page.items(_problems(found) or ["None: every run was read, and every pair is done."])
    _write_tables(page, found, groups)  # after the figures, which take helpers longer
    names = sorted(path.name for path in (page.directory / "tables").iterdir())
    links = ", ".join(f'<a href="tables/{name}">{name}</a>' for name in names)
    page.parts.append(f"<p>Tables as files: {links}.</p>")


def _write_tables(page: Page, found: Material, groups: Sequence[Material]) -> None:
    page.csv("runs", _sorted(found.overview))
    page.csv("pairs", found.pairs)
    page.csv("degradation", found.lines)
    page.csv("benefit", found.gains)
    page.csv("comparison", found.compared)
    for name in ("diagnoses", "stories", "rates"):
        if len(frame := getattr(found, name)):
            page.csv(name, frame)
    # Measured is what profiles and curves have a row of.
    for name, missing in (("profiles", "NaN"), ("curves", "NaN"), ("blocks", "")):
        if parts := [part for group in groups if len(part := getattr(group, name))]:
            page.long_csv(name, parts, "group", missing)


def _heading(page: Page, group: Material) -> str:
    title = str(group.overview["title"].iloc[0])
    page.heading(title)
    return title


def _number(group: Material) -> str:
    """What a group's figures are called after: nothing for the first."""
    number = int(group.overview["group"].iloc[0])
    return f"-{number + 1}" if number else ""


def _under(group: Material) -> str:
    return f"Conditions: {captions.conditions(group.members, short=True)}."


_INTERVALS = (
    "Points with bars are means over seeds with 95 % t intervals, no bar where one seed was run or "
    "all agree; small points beside them are seeds."
)


def _verdict_section(page: Page, groups: list[Material]) -> None:
    told = [(g, verdicts.cards(g.overview, g.pairs, g.diagnoses)) for g in groups]
    if not any(cards for _, cards in told):
        return
    page.section("overview", "Verdicts")
    for group, cards in told:
        if cards:
            _heading(page, group)
            page.cards(cards)
            page.text(f"{captions.conditions(group.members, short=True)}.", note=True)
    page.text(
        "An answer is given where the 95 % t interval over paired seeds lies to one side of zero. "
        "It holds for the learning rate and the number of updates named.",
        note=True,
    )


def _index(found: Material) -> dict[str, Any]:
    """What the explorer knows of the runs before it looks into any."""

    def number(value: Any) -> float | None:
        return None if pd.isna(value) else float(value)

    rows = _sorted(found.overview).to_dict("records")
    runs = [
        {
            "id": row["run_id"], "name": row["run"], "path": shlex.quote(row["path"]),
            "group": int(row["group"]), "arm": row["arm"],
            "depth": None if pd.isna(row["depth"]) else int(row["depth"]),
            "seed": None if pd.isna(row["seed"]) else str(row["seed"]),
            "status": row["status"], "outcome": row["outcome"], "diagnosis": row["diagnosis"],
            "train_error": number(row["train_error"]), "test_error": number(row["test_error"]),
        }
        for row in rows
    ]  # fmt: skip
    groups = [
        {"number": int(part["group"].iloc[0]), "title": str(part["title"].iloc[0]),
         "runs": len(part), "arms": tables.ordered(part["arm"])}
        for _, part in found.overview.groupby("group", sort=True)
    ]  # fmt: skip
    arms = styles.on_screen(["", *found.overview["arm"]])
    return {"runs": runs, "groups": groups, "arms": arms, "labels": styles.LABELS}


def _question(page: Page, groups: list[Material], drawn: int) -> None:
    page.section("comparison", "Does depth hurt, and how much does a skip help?", "Depth and skips")
    compared = [group for group in groups if len(group.compared)]
    if not compared:
        page.text("No run has a final training error.")
    else:
        page.text(
            "Training accuracy at the end, from an evaluation-mode pass over the whole training "
            "split, and its difference between paired seeds, ± 95 % t intervals over seeds; none "
            "where one seed was run or all agree. Seeds: of plain/skip, where these are not the "
            "same number; matched: pairs with equal initial parameters, batches and data."
        )
    for group in compared:
        title = _heading(page, group)
        page.items(captions.answers(group.lines, group.gains, group.lost))
        page.table(_comparison_columns(group.compared), ["depth"])
        if group.overview["group"].iloc[0] >= drawn or group.lines.empty:
            continue
        page.figure(
            f"degradation{_number(group)}",
            sketch("degradation", group.overview, group.lines, title=title),
            "Final training and test error against depth, by arm.",
            f"Final error against depth; it depends on the learning rate and the number of "
            f"updates. {_INTERVALS}{captions.crosses(group.lost)} {_under(group)}",
        )
    if len(groups) > drawn:
        page.text(
            f"Of {len(groups)} groups of comparable runs the {drawn} largest are drawn; all are "
            "in the tables.",
            note=True,
        )


def _diagnosis_section(page: Page, groups: list[Material]) -> None:
    parts = [group for group in groups if len(group.diagnoses) or len(group.stories)]
    if not parts:
        return
    page.section("diagnosis", "What is wrong with the gradient?", "Diagnosis")
    page.text(
        "Each run's tables as a whole, at its first and at its last recorded step. Runs: how many "
        "of those examined show it; the evidence is that of the lowest seed, and diagnoses.csv has "
        "it all."
    )
    for group in parts:
        _heading(page, group)
        _stories(page, group)
        if group.diagnoses.empty:
            continue
        words = captions.evidence(group.diagnoses)
        names = {"arm": "skip", "moment": "when", "sentence": "evidence"}
        page.table(words.rename(columns=names), ["depth"])
        page.items(captions.advice(words["diagnosis"]))
        for line in captions.reservations(group.diagnoses):
            page.text(line, note=True)


def _stories(page: Page, group: Material) -> None:
    """What led to each step at which something went wrong, of runs that kept a flight record."""
    lines = captions.stories(group.stories)
    if lines:
        page.text("What led to the step at which a run went wrong, by its last steps:", note=True)
        page.items(lines[:_STORIES])
    if len(lines) > _STORIES:
        page.text(f"In stories.csv: {len(lines) - _STORIES} more.", note=True)


def _profile_section(
    page: Page, groups: list[Material], moment: str, anchor: str, heading: str
) -> None:
    moments = ["first"] if moment == "first" else ["middle", "last"]
    parts = [g for g in groups if len(g.profiles) and g.profiles["moment"].isin(moments).any()]
    if not parts:
        return
    page.section(anchor, heading, "Initialisation" if moment == "first" else "Later")
    for group in parts:
        title = _heading(page, group)
        for name in moments:
            frame = group.profiles[group.profiles["moment"] == name]
            if len(frame):
                _profile_figures(page, group, frame, name, title)


def _profile_figures(
    page: Page, group: Material, frame: pd.DataFrame, moment: str, title: str
) -> None:
    when = tables.when(frame["step"])
    about = f"One line a run. {_under(group)}"
    families = frame["family"].unique()
    if tables.WEIGHT in families:
        words = tables.rate_words(group.rates[group.rates["moment"] == moment])
        weights = frame[frame["family"] == tables.WEIGHT][QUANTITY]
        page.figure(
            f"profile-{moment}{_number(group)}",
            sketch("profile", frame, title=title),
            f"Norm of each layer's weight gradient against its place, {when}, by arm and depth.",
            f"L2 norm of the gradient of each convolution's and linear layer's parameters, {when}, "
            f"from the input on; dotted lines where the stage changes. {captions.ratios(words)}"
            f"{captions.marks(weights)}{captions.aside(frame)} {about}",
        )
        page.table(_rate_columns(words), ["depth"])
    if tables.NORM in families and moment != "middle":
        norms = frame[frame["family"] == tables.NORM][QUANTITY]
        page.figure(
            f"profile-norm-{moment}{_number(group)}",
            sketch("profile", frame, family=tables.NORM, title=title),
            f"Norm of each normalisation layer's parameter gradient, {when}, by arm and depth.",
            f"The same for normalisation layers (and parameters of other modules), {when}."
            f"{captions.marks(norms)}{captions.aside(frame)} {about}",
        )


def _rate_table(rates: pd.DataFrame, moment: str) -> tuple[pd.DataFrame, str]:
    here = rates[rates["moment"] == moment] if len(rates) else rates
    words = tables.rate_words(here) if len(here) else here
    return (_rate_columns(words), tables.when(here["step"])) if len(words) else (words, "")


def _rate_columns(words: pd.DataFrame) -> pd.DataFrame:
    names = {"depth": "depth", "arm": "skip"}
    if words["step"].nunique() > 1:  # where some runs ended earlier
        names["step"] = "after updates"
    names["rate"] = "a layer toward the input"
    names |= {
        "trend": "trend",
        "fits": "seeds with a rate",
        "first_last": f"first/last {captions.kind_of(words)}",
    }
    names |= {name: name.replace("_", "-") for name in ("zeros", "non_finite") if words[name].any()}
    depth = words["depth"].astype(object).where(words["depth"].notna(), "–")
    return words.assign(depth=depth)[list(names)].rename(columns=names)


def _heat_section(page: Page, groups: list[Material]) -> None:
    parts = [group for group in groups if len(group.heat)]
    if not parts:
        return
    page.section("heatmaps", "Layer by layer, step by step", "Heatmaps")
    for group in parts:
        title = _heading(page, group)
        seeds, runs = (list(group.heat[c].unique()) for c in ("seed", "run"))
        is_one = len(seeds) == 1 and not pd.isna(seeds[0])
        which = f"seed {seeds[0]}" if is_one else ", ".join(runs)
        weights = group.heat[group.heat["family"] == tables.WEIGHT][QUANTITY]
        page.figure(
            f"heatmap{_number(group)}",
            sketch("heatmap", group.heat, title=title),
            "Heatmaps of the weight-gradient norm over layer and step, by depth and arm.",
            "L2 norm of the weight gradient of convolutions and linear layers over training; one "
            f"run a panel ({which}). Grey: not recorded.{captions.marks(weights)}"
            f"{captions.aside(group.heat)} {_under(group)}",
        )


def _curve_section(page: Page, groups: list[Material]) -> None:
    parts = [g for g in groups if len(g.curves) and g.curves["step"].nunique() > 1]
    if not parts:
        return
    page.section("curves", "Training curves", "Curves")
    for group in parts:
        title = _heading(page, group)
        page.figure(
            f"curves{_number(group)}",
            sketch("curves", group.curves, title=title),
            "Training loss, training accuracy and test accuracy by step, by depth and arm.",
            "Loss of the training batches (means over up to a hundredth of the run), accuracy on "
            "the training batches in training mode, and test accuracy where it was evaluated. "
            "Open marks: accuracy on the whole training split in evaluation mode at the end. One "
            f"line a run. {_under(group)}",
        )


def _benefit_section(page: Page, groups: list[Material]) -> None:
    parts = [group for group in groups if len(group.gains)]
    if not parts:
        return
    page.section("benefit", "The skip's benefit by depth", "Benefit")
    for group in parts:
        title = _heading(page, group)
        page.figure(
            f"benefit{_number(group)}",
            sketch("benefit", group.pairs, group.gains, title=title),
            "Plain error minus the error with a skip, by depth.",
            "Final error of the plain network minus that of its partner of equal depth and seed: "
            f"above zero the skip helps. {_INTERVALS} {_under(group)}",
        )


def _block_section(page: Page, groups: list[Material]) -> None:
    parts = [
        (group, arm, group.blocks[group.blocks["arm"] == arm])
        for group in groups
        if len(group.blocks)
        for arm in tables.ordered(group.blocks["arm"].unique())
        if arm != tables.PLAIN
    ]
    if not parts:
        return
    page.section("blocks", "Branch and skip, block by block", "Blocks")
    for group, arm, frame in parts:
        title = str(group.overview["title"].iloc[0])
        for moment in frame["moment"].unique():
            here = frame[frame["moment"] == moment]
            when = tables.when(here["step"])
            page.figure(
                f"blocks-{re.sub('[^a-z0-9]+', '-', arm.lower())}-{moment}{_number(group)}",
                sketch("blocks", here, title=", ".join(filter(None, [arm, title]))),
                f"Size of branch and skip in each block, {arm} networks, {when}.",
                f"What the two terms of each block's sum carry, {arm} networks, {when}: root mean "
                "square of the values forward, L2 norm of the gradients backward (loss / output). "
                f"One line a run. {_under(group)}",
            )


def _run_section(page: Page, found: Material) -> None:
    page.section("runs", "Runs")
    frame = _sorted(found.overview)

    def numbers(name: str, style: str) -> list[str]:
        return ["" if value is pd.NA else format(value, style) for value in frame[name]]

    shown = {
        "run": frame["run"],
        "outcome": frame["outcome"],
        "diagnosis": frame["diagnosis"],
        "certificate": frame["match"],
        "parameters": numbers("parameters", ",.0f"),
        "updates": numbers("steps", ",.0f"),
        "seconds": numbers("seconds", ",.1f"),
        "recorder": numbers("recorder_share", ".1%"),
        "train acc.": numbers("train_accuracy", ".3f"),
        "test acc.": numbers("test_accuracy", ".3f"),
    }
    page.table(pd.DataFrame(shown), list(shown)[4:])
    page.text(
        "Diagnosis of the first recorded step, and of the last where it differs. Certificate of "
        "the run's pair: matched is equal initial parameters, batches and data, by digest. "
        "Recorder: its share of the training loop's time. Accuracies at the end, evaluation mode.",
        note=True,
    )


def _sorted(overview: pd.DataFrame) -> pd.DataFrame:
    place = {name: index for index, name in enumerate(tables.ordered(overview["arm"]))}
    order = overview.assign(place=overview["arm"].map(place), text=overview["seed"].map(str))
    return overview.loc[order.sort_values(["group", "depth", "place", "text"]).index]


def _condition_section(page: Page, groups: list[Material]) -> None:
    page.section("conditions", "Conditions, environment, commands", "Conditions")
    for group in groups:
        _heading(page, group)
        page.text(captions.conditions(group.members) + ".")
        lines = captions.commands(group.members)
        if lines:
            page.code(lines)
    environments: dict[str, int] = {}
    for run in (run for group in groups for run in group.members):
        words = captions.environment(run)
        environments[words] = environments.get(words, 0) + 1
    page.heading("Environment")
    page.items([f"{tables.counted(n, 'run')}: {words}" for words, n in environments.items()])


# --- command line ---------------------------------------------------------------------------------


def text_report(runs: Runs) -> str:
    """The report as a text: the comparison, and of few runs what each gradient did.

    Raises:
        GradflowError: no run that can be read.
    """
    members, problems = distinct(runs)
    probes = _probe_words(list(filter(_is_probe, runs)), "python -m analysis makes their atlas")
    if len(members) > TOLD_RUNS:
        told = "python -m gradflow.report RUNS tells what the gradient did in each"
        rest = f"{len(members):,} runs: {told}"
        open_ends = [run for run in members if run.status not in FINISHED]
        lines = [f"{run.path.name}: {tables.outcome(run)}" for run in open_ends]
        last = "\n".join([*lines, *problems])
        return "\n\n".join(filter(None, [probes, comparison(runs), rest, last]))
    if not members and probes:
        return "\n\n".join(filter(None, [probes, "\n".join(problems)]))
    found = gather(runs)
    parts = [*filter(None, [probes]), _comparison_text(found.compared, found.overview)]
    for group in (found.of(number) for number in sorted(found.overview["group"].unique())):
        parts += _diagnosis_text(group)
        for moment in ("first", "last"):
            words, when = _rate_table(group.rates, moment)
            if len(words):
                heading = f"gradient of the weights, {when}"
                title = str(group.overview["title"].iloc[0])
                parts.append("\n".join(filter(None, [title, heading, _text_table(words)])))
    columns = {"run": "run", "outcome": "outcome", "diagnosis": "diagnosis", "match": "certificate"}
    parts.append(_text_table(_sorted(found.overview)[list(columns)].rename(columns=columns)))
    if problems := _problems(found):
        parts.append("\n".join(["passed over or unfinished:", *problems]))
    return "\n\n".join(parts)


def _diagnosis_text(group: Material) -> Iterator[str]:
    """A paragraph: the group's title, a line a diagnosis."""
    if group.diagnoses.empty and group.stories.empty:
        return
    lines = [str(group.overview["title"].iloc[0]), "diagnosis"]
    words = captions.evidence(group.diagnoses) if len(group.diagnoses) else pd.DataFrame()
    for row in words.to_dict("records"):
        depth = "" if row["depth"] == "–" else f"depth {row['depth']}"
        who = ", ".join(filter(None, [depth, row["arm"], row["moment"]]))
        lines.append(f"{who}: {row['diagnosis']} ({row['runs']}): {row['sentence']}")
    lines += captions.stories(group.stories)
    yield "\n".join(filter(None, [*lines, *captions.reservations(group.diagnoses)]))


def _print_text(places: Sequence[str]) -> None:
    """How the sweeps stand, and what there is to compare so far."""
    runs = load_runs(*places)
    standing = status.text(runs, places)
    if len(runs) or not standing:
        check_any(runs, places)
        standing = "\n\n".join(filter(None, [standing, text_report(runs)]))
    with interrupt.reader_may_leave():
        print(standing)


def check_any(runs: Runs, places: Sequence[str]) -> None:
    """Raises GradflowError where there is no run."""
    if not len(runs):
        where = ", ".join(places)
        raise GradflowError("; ".join([f"{where}: no runs that can be read", *runs.problems]))


def _check_apart(out: str, places: Sequence[str]) -> None:
    """A report that lies in a store would be looked through for runs, and named as having none."""
    path = Path(out).resolve()
    for place in places:
        if Path(place).resolve() in (path, *path.parents):
            raise GradflowError(f"--out {out}: lies in {place}, among the runs; name another place")


def main(
    argv: Sequence[str] | None = None,
    prog: str = "python -m gradflow.report",
    findings: Callable[[], Mapping[str, Finding]] = dict,
) -> int:
    """The command line: 0, or 1 after one line that says why there is no report.

    Args:
        findings: loads the published findings, by id, whose atlas is part of the report.
    """
    try:
        return _report(_options(argv, prog), findings)
    except GradflowError as error:
        print(f"gradflow: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gradflow: interrupted", file=sys.stderr)
        return 130


def _options(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description="A report over recorded runs.")
    parser.add_argument(
        "runs", nargs="*", default=["runs"], metavar="RUNS", help="stores or single runs (runs)"
    )
    parser.add_argument("--out", default="report", metavar="DIR", help="where to write (report)")
    parser.add_argument("--text", action="store_true", help="print a text, write nothing")
    parser.add_argument(
        "--serve", action="store_true", help="show the page under a URL, and renew it as runs go on"
    )
    parser.add_argument("--host", default=serve.HOST, help="with --serve: where (127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=serve.PORT, help="with --serve: 0 is any (8000)"
    )
    options = parser.parse_args(argv)
    if options.text and options.serve:
        raise GradflowError("--text and --serve: one of them")
    return options


def _report(options: argparse.Namespace, findings: Callable[[], Mapping[str, Finding]]) -> int:
    if options.text:
        _print_text(options.runs)
        return 0
    _check_apart(options.out, options.runs)

    def make() -> tuple[Material, list[atlas.Entry], Path]:
        runs = load_runs(*options.runs)
        check_any(runs, options.runs)
        entries = _entries(runs, findings().values())
        found, page = _make(runs, options.out, entries)
        return found, entries, page

    if options.serve:
        where = {"host": options.host, "port": options.port}
        return serve.serve(options.runs, options.out, lambda: make()[-1], **where)
    found, entries, page = make()
    for line in found.problems:
        print(f"passed over: {line}", file=sys.stderr)
    print(_comparison_text(found.compared, found.overview), end="\n\n")
    if entries:
        print(f"{atlas.counts(entries)}\n{page.with_name(atlas.PAGE)}")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
