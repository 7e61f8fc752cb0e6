"""The atlas: published findings with their verdicts, as a page that is read like a course.

Everything on it is computed from what was recorded and from what the findings declared before.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradflow import findings, tables
from gradflow.errors import GradflowError
from gradflow.findings import (
    CHAPTERS,
    ERROR_RATE,
    FIRST_SEED,
    NOT_RUN,
    REPRODUCED,
    Curve,
    Exhibit,
    Finding,
    Lookup,
    Result,
    Verdict,
)
from gradflow.page import INDEX, Html, Page, html, link

PAGE = "atlas.html"
INTRODUCTIONS = {
    "vanishing": (
        "On its way from the loss to the input, the gradient is multiplied by the Jacobian of "
        "every layer that it passes. Where a layer shrinks its square to a share ρ below one, L "
        "layers shrink it to ρ to the power L, and the first layers learn next to nothing. Every "
        "ρ here is a factor of the squared norm, per layer and toward the input; that of the norm "
        "itself is its square root."
    ),
    "exploding": (
        "The same product grows without bound where a layer's factor is above one. Batch "
        "normalisation, meant to keep a network's signals in range, does this to plain networks: "
        "it holds the values forward at one size, and enlarges the gradient at every layer on its "
        "way back. What explodes at initialisation need not stay so: a few updates can undo it, "
        "and the network may fail all the same."
    ),
    "initialisation": (
        "With random weights, what a layer does on average can be computed before anything is "
        "trained. The variance of the weights and the activation decide both how the length of a "
        "signal changes forward and by which factor the squared gradient changes backward. Where "
        "both keep their size, depth does no harm at the start; each well-known initialisation "
        "aims at that for its own activation. The figures lay the recursion over the measurement, "
        "layer by layer."
    ),
    "normalisation": (
        "A normalisation layer divides by a statistic of the signal itself: over the batch, or "
        "over the features of each sample. That makes the forward pass indifferent to the scale "
        "of the weights, but not the backward pass. Which statistic it is, and whether it stands "
        "on the branch or on the path of the skip, decides what happens to the gradient."
    ),
    "skips": (
        "A skip adds a block's input to its output, y = x + F(x), so that the gradient has a way "
        "back on which nothing multiplies it. Its growth per block is then one plus the branch's "
        "share, which can be made as small as depth asks for: by scaling the branch, by starting "
        "it at zero, or by normalising it. Seen in another way, n such blocks are a sum over two "
        "to the power n paths, most of which are about half as long as the network is deep."
    ),
    "halves": (
        "A skip does two things at once: it carries the value forward and the gradient backward. "
        "With sg, which stops the gradient, the two can be had apart: y = F(x) + sg(x) keeps the "
        "forward half, y = F(x) + (x − sg(x)) the backward half, whose values are exactly those of "
        "the plain network. All networks compared here have the same parameters, initial weights "
        "and batches; only the skip differs."
    ),
    "after": (
        "Flat gradients at initialisation are where the story starts, not where it ends. Some "
        "networks have them and cannot be trained, some are made trainable without a skip, and "
        "trained residual networks turn out to bear the loss of whole blocks. The same questions "
        "come back in transformers, with attention in place of convolutions."
    ),
}
"""What a newcomer should know before the findings of a chapter."""
_HOW = (
    "Each finding is a published claim with a number that measures it, and the region in which "
    "that number must lie for the claim to hold. Regions were declared before any of the runs "
    f"shown here was made: these have seeds from {FIRST_SEED} on, which served for nothing else. "
    "A claim is reproduced where the interval of every number over the paired seeds lies within "
    "its region, contradicted where one lies wholly outside, and inconclusive otherwise. The "
    f"intervals of a finding share an error rate of {100 * ERROR_RATE:.0f} %. Verdicts marked "
    "quick rest on fewer seeds, and on fewer comparisons where some are slow."
)


# --- what the page is made of ---------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A finding's verdict, the curves of its figure and what else it shows.

    `curves` has the columns of `plots.overlay`; `problems` say what could not be read.
    """

    verdict: Verdict
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    exhibit: Exhibit | None = None
    problems: tuple[str, ...] = ()

    @property
    def finding(self) -> Finding:
        return self.verdict.finding

    @property
    def ran(self) -> bool:
        """Whether any of its runs is there."""
        return self.verdict.missing < self.verdict.needed or self.exhibit is not None


def read(known: Iterable[Finding], stores: Sequence[str | Path]) -> list[Entry]:
    """What the stores hold of each finding; what cannot be read costs its finding that part."""
    return [_entry(finding, stores) for finding in known]


def _entry(finding: Finding, stores: Sequence[str | Path]) -> Entry:
    problems: list[str] = []
    find = findings.lookup(finding, stores)
    try:
        verdict = _verdict(finding, find)
    except GradflowError as error:
        return Entry(Verdict(finding, (), needed=1), problems=(f"cannot be judged: {error}",))
    try:
        drawn = curves(finding, find, quick=verdict.quick)
    except (GradflowError, KeyError) as error:
        drawn = pd.DataFrame()
        problems.append(f"{finding.id}: its figure cannot be drawn: {error}")
    try:
        exhibit = None if finding.exhibit is None else finding.exhibit(find)
    except (GradflowError, KeyError) as error:
        exhibit = None
        problems.append(f"{finding.id}: its exhibit cannot be shown: {error}")
    return Entry(verdict, drawn, exhibit, tuple(problems))


def _verdict(finding: Finding, find: Lookup) -> Verdict:
    """The whole verdict; where it has not been run, and the quick one has, the quick one."""
    whole = findings.verdict(finding, find)
    if whole.word != NOT_RUN or whole.missing == whole.needed:
        return whole
    quick = findings.verdict(finding, find, quick=True)
    return whole if quick.word == NOT_RUN else quick


def curves(finding: Finding, find: Lookup, *, quick: bool = False) -> pd.DataFrame:
    """The curves of a finding's figure, over the seeds that are there.

    Returns:
        curve, seed, x, value, theory (NaN where there is none), scaled: as `plots.overlay` takes
        them.

    Raises:
        GradflowError: a record that lacks what a curve reads.
    """
    parts = []
    for curve in finding.figure.curves if finding.figure else ():
        for seed in finding.confirmation_seeds(quick=quick):
            records = [find(arm, seed) for arm in curve.arms]
            if None not in records:
                parts.append(_line(curve, seed, records))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _line(curve: Curve, seed: int, records: Sequence[Any]) -> pd.DataFrame:
    x, value = curve.read(*records)
    theory = np.full(len(x), math.nan) if curve.theory is None else curve.theory(x)
    frame = pd.DataFrame({"x": x, "value": value, "theory": theory})
    return frame.assign(curve=curve.name, seed=seed, scaled=curve.scaled)


def counts(entries: Iterable[Entry]) -> str:
    """How many findings have which verdict."""
    return findings.counted([entry.verdict for entry in entries])


def table(entries: Iterable[Entry]) -> pd.DataFrame:
    """One row a comparison: finding, comparison, unit, low, mean, high, region, theory, seeds,
    verdict, quick."""
    rows = [
        {
            "finding": entry.finding.id,
            "comparison": result.comparison.name,
            "unit": result.comparison.unit,
            "low": result.low,
            "mean": result.mean,
            "high": result.high,
            "region": findings.region_words(result.comparison.region),
            "theory": result.comparison.region.theory,
            "seeds": len(result.values),
            "verdict": result.word,
            "quick": entry.verdict.quick,
        }
        for entry in entries
        for result in entry.verdict.results
    ]
    return pd.DataFrame(rows)


# --- the page -------------------------------------------------------------------------------------


def write(directory: Path, entries: Sequence[Entry]) -> None:
    """Write `atlas.html`, `figures/atlas-*` and `tables/atlas.csv` into a directory."""
    page = Page(directory)
    known = {entry.finding.id: entry for entry in entries}
    chapters = findings.by_chapter(entry.finding for entry in entries)
    course = [known[finding.id] for members in chapters.values() for finding in members]
    page.csv("atlas", table(course))
    page.text(_HOW)
    page.section("findings", "All findings")
    page.table(_listing(course))
    csv = link("tables/atlas.csv", "atlas.csv")
    page.text(Html(f"Every comparison, as a table: {csv}."), note=True)
    names = {heading: name for name, heading in CHAPTERS.items()}
    for heading, members in chapters.items():
        page.section(f"chapter-{names[heading]}", heading)
        page.text(INTRODUCTIONS[names[heading]])
        for finding in members:
            _section(page, known[finding.id])
    made = f"of {time.strftime('%Y-%m-%d %H:%M')}; back to {link(INDEX, 'the report')}"
    page.write("Atlas of findings", Html(f"{html(counts(entries))}; {made}"), PAGE)


def summary(entries: Sequence[Entry]) -> Html:
    """One line for the page that links here."""
    return Html(f"{link(PAGE, 'Atlas of published findings')}, {html(counts(entries))}.")


def _badge(word: str, words: str = "") -> Html:
    return Html(f'<span class="verdict {word.replace(" ", "-")}">{html(words or word)}</span>')


def _listing(entries: Iterable[Entry]) -> pd.DataFrame:
    """One row a finding, with the comparison that decided."""
    rows = []
    for entry in entries:
        finding, verdict = entry.finding, entry.verdict
        held = sum(result.word == REPRODUCED for result in verdict.results)
        row = {
            "finding": link(f"#{finding.id}", finding.id),
            "verdict": _badge(verdict.word, f"{verdict.word}{', quick' * verdict.quick}"),
            "holds": f"{held} of {len(verdict.results)}" if verdict.word != NOT_RUN else "–",
            "effect": "–",
            "interval": "–",
            "seeds": "–",
        }
        decided = [r for r in verdict.results if r.word == verdict.word and r.values]
        if decided:
            row["effect"] = f"{decided[0].comparison.name}: {_number(decided[0].mean)}"
            row["interval"] = _interval(decided[0])
            row["seeds"] = str(len(decided[0].values))
        cost = finding.part("Cost").removesuffix(".").split(";")[0]
        rows.append(row | {"cost": cost, "source": finding.source})
    return pd.DataFrame(rows, dtype=object)


def _number(value: float) -> str:
    plain = 0.01 <= abs(value) < 1000 or not value or math.isnan(value)
    return f"{value:.4g}" if plain else tables.short(value)


def _interval(result: Result) -> str:
    if result.comparison.region.exact:
        return "exact"
    if math.isfinite(result.low):
        return f"[{_number(result.low)}, {_number(result.high)}]"
    return "seeds agree" if result.agree else "–"


def _section(page: Page, entry: Entry) -> None:
    finding, verdict = entry.finding, entry.verdict
    page.heading(finding.claim, finding.id)
    page.text(Html(f"{_badge(verdict.word, verdict.words)} {html(finding.source)}."))
    for problem in entry.problems:
        page.text(f"{problem}.")
    if not verdict.as_recorded and NOT_RUN not in (finding.recorded, verdict.word):
        page.text(f"When it was first confirmed, the verdict was: {finding.recorded}.")
    for paragraph in [*_paragraphs(finding), f"Measured: {finding.part('Measured')}"]:
        page.text(_prose(paragraph))
    _figures(page, entry)
    page.table(_numbers(entry))
    if entry.exhibit is not None:
        _show(page, finding, entry.exhibit)
    if finding.notes:
        page.text(_prose(finding.notes))
    page.text(_prose(f"Deviations: {finding.part('Deviations')}"))
    page.text(f"Cost: {finding.part('Cost')} Declared in experiments/{finding.id}.py.", note=True)
    page.code([f"python -m experiments {finding.id}"])


def _prose(text: str) -> Html:
    """A docstring's sentences: what stands between backticks is code."""
    return Html(re.sub(r"`([^`]+)`", r"<code>\1</code>", html(text)))


def _paragraphs(finding: Finding) -> list[str]:
    """What the docstring says beyond the claim and its labelled paragraphs."""
    parts = [" ".join(part.split()) for part in finding.text.strip().split("\n\n")[1:]]
    return [part for part in parts if part and not part.split()[0].endswith(":")]


def _numbers(entry: Entry) -> pd.DataFrame:
    rows = []
    declared = [Result(asked, (), (), NOT_RUN) for asked in entry.finding.comparisons]
    for result in entry.verdict.results or declared:
        asked = result.comparison
        theory, told = asked.region.theory, asked.unit and asked.unit not in asked.name
        rows.append(
            {
                "comparison": asked.name + (f" ({asked.unit})" if told else ""),
                "measured": findings.measured_words(result),
                "declared region": findings.region_words(asked.region),
                "theory": "–" if theory is None else _number(theory),
                "verdict": _badge(result.word, _with_reason(result)),
            }
        )
    return pd.DataFrame(rows, dtype=object)


def _with_reason(result: Result) -> str:
    return f"{result.word} ({result.reason})" if result.reason else result.word


def _figures(page: Page, entry: Entry) -> None:
    from gradflow import plots  # takes as long to load as all else: not for a text

    finding, results = entry.finding, entry.verdict.results
    if len(entry.curves):
        assert finding.figure is not None
        figure = finding.figure
        page.figure(
            f"atlas-{finding.id}-curves",
            plots.overlay(entry.curves, x=figure.x, y=figure.y, log=figure.log),
            f"{figure.y} against {figure.x}: {finding.claim}.",
            _overlay_caption(entry),
        )
    if any(result.values and not result.comparison.region.exact for result in results):
        page.figure(
            f"atlas-{finding.id}",
            plots.effects(entry.verdict),
            f"Numbers of each seed, their intervals and the declared regions: {finding.claim}.",
            _effects_caption(entry),
        )


def _overlay_caption(entry: Entry) -> str:
    assert entry.finding.figure is not None
    figure, drawn = entry.finding.figure, entry.curves
    words = [f"{figure.y[:1].upper()}{figure.y[1:]} against {figure.x}; {_seeds(drawn['seed'])}."]
    known = drawn[drawn["theory"].notna()]
    if len(known):
        y = "ln y" if figure.log else "y"
        words.append(f"Slopes are of {y} a unit of x, by least squares; gap: measured/theory − 1.")
    if known["scaled"].any():
        moved = list(dict.fromkeys(known.loc[known["scaled"], "curve"]))
        which = "" if len(moved) == known["curve"].nunique() else f" of {', '.join(moved)}"
        words.append(
            f"Theory{which} gives the shape alone, and is moved onto the measured mean at the last "
            "place."
        )
    return " ".join([*words, *([figure.note] if figure.note else [])])


def _effects_caption(entry: Entry) -> str:
    results = [result for result in entry.verdict.results if result.values]
    level = 1 - ERROR_RATE / len(entry.verdict.results)
    words = [
        f"Each comparison with its number at {_seeds(results[0].seeds)}, its mean with a "
        f"{100 * level:.4g} % t interval, and the region in which the claim holds."
    ]
    if any(result.comparison.ratio for result in results):
        words.append("Mean and interval of a growth factor or a ratio are of its logarithm.")
    if any(math.isnan(result.low) for result in results if not result.comparison.region.exact):
        words.append("No interval where one seed was run, all agree, or one is not finite.")
    return " ".join(words)


def _seeds(values: Iterable[int]) -> str:
    """`seed 100`, `seeds 100 to 109`."""
    known = sorted(set(values))
    return f"seeds {known[0]} to {known[-1]}" if len(known) > 1 else f"seed {known[0]}"


def _show(page: Page, finding: Finding, exhibit: Exhibit) -> None:
    """What a finding shows beyond its comparisons."""
    if exhibit.figure is not None:
        alt = f"What was found beyond the verdict: {finding.claim}."
        page.figure(f"atlas-{finding.id}-more", exhibit.figure, alt, exhibit.caption)
    for title, rows in exhibit.tables.items():
        frame = pd.DataFrame(list(rows))
        page.text(f"{title}:")
        page.table(frame, list(map(str, frame.select_dtypes("number"))))
    if exhibit.sentences:
        page.items(exhibit.sentences)
