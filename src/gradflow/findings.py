"""Published findings and what becomes of them: comparisons, regions, intervals, verdicts.

A finding is declared before it is run: which runs, which number of their records, and the region
in which that number must lie for the claim to hold. The verdict follows from the interval of the
number over paired seeds alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from gradflow.errors import GradflowError, SpecError
from gradflow.measures import Measure, Record
from gradflow.spec import RunSpec
from gradflow.store import Run, find
from gradflow.tables import interval

REPRODUCED, CONTRADICTED = "reproduced", "contradicted"
INCONCLUSIVE, NOT_RUN = "inconclusive", "not run"
WORDS = (REPRODUCED, CONTRADICTED, INCONCLUSIVE, NOT_RUN)
FIRST_SEED = 100
"""Confirmation seeds are this and up: no region was chosen with a look at them."""
TRAINED_SEEDS, INITIAL_SEEDS = 5, 10
QUICK_TRAINED_SEEDS, QUICK_INITIAL_SEEDS = 3, 6
ERROR_RATE = 0.05
"""Chance that any of a finding's intervals misses its true value, over all its comparisons."""
MOST_SEEDS = 1000
CHAPTERS = {
    "vanishing": "Vanishing",
    "exploding": "Exploding",
    "initialisation": "Initialisation",
    "normalisation": "Normalisation",
    "skips": "Skips",
    "halves": "Which half of a skip",
    "after": "What comes after",
}
"""The order in which the findings make a course, and the headings of its chapters."""


@dataclass(frozen=True)
class Region:
    """Where a number must lie for the claim to hold, both ends included; declared beforehand.

    Attributes:
        low, high: infinite where it is open.
        theory: the value that a closed form gives, where there is one.
        exact: a target and its rounding: every seed must lie in it, and there is no interval.
    """

    low: float
    high: float
    theory: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        ends = (math.isfinite(self.low), math.isfinite(self.high))
        if not self.low <= self.high or not any(ends) or (self.exact and not all(ends)):
            raise SpecError(f"region: {self.low} to {self.high} is none")


def about(theory: float, share: float) -> Region:
    """Within a share of theory's value: `about(2, 0.03)` is 1.94 to 2.06."""
    low, high = sorted((theory * (1 - share), theory * (1 + share)))
    return Region(low, high, theory)


def between(low: float, high: float, theory: float | None = None) -> Region:
    return Region(low, high, theory)


def above(low: float, theory: float | None = None) -> Region:
    return Region(low, math.inf, theory)


def below(high: float, theory: float | None = None) -> Region:
    return Region(-math.inf, high, theory)


def exactly(value: float, rounding: float) -> Region:
    """An identity, up to the rounding of the numbers in which it is computed."""
    return Region(value - rounding, value + rounding, value, exact=True)


@dataclass(frozen=True)
class Comparison:
    """A number of the paired records of one seed, and the region that the claim gives it.

    Attributes:
        name: what is compared, in a few words.
        arms: names of the finding's runs that the measure reads, in its order.
        measure: the number; see `measures`.
        region: where it must lie.
        ratio: the interval is of the number's logarithm.
        unit: of the number: `ρ` for a squared growth per layer, `norm`, `accuracy`, ….
        slow: left out by quick verdicts.
    """

    name: str
    arms: tuple[str, ...]
    measure: Measure
    region: Region
    ratio: bool = False
    unit: str = ""
    slow: bool = False


@dataclass(frozen=True)
class Curve:
    """A line of a finding's figure: what is measured along the network, and what theory says.

    Attributes:
        name: in the legend.
        arm: whose records it is read from: one arm, or several, such as a network at many depths.
        read: the records of one seed, one for each arm -> x and y.
        theory: x -> y, up to a factor if `scaled`; None where there is no closed form.
        scaled: theory gives the shape alone and is moved onto the measured line's last point.
    """

    name: str
    arm: str | tuple[str, ...]
    read: Callable[..., tuple[NDArray[Any], NDArray[Any]]]
    theory: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    scaled: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        return (self.arm,) if isinstance(self.arm, str) else self.arm


@dataclass(frozen=True)
class Figure:
    """Curves over one pair of axes."""

    curves: tuple[Curve, ...]
    x: str
    y: str
    log: bool = True
    note: str = ""


Lookup = Callable[[str, int], Record | None]
"""Arm and seed -> its record, or None where it has not been run."""


@dataclass(frozen=True)
class Exhibit:
    """What a finding shows beyond its comparisons: a figure of its own, tables, sentences.

    Attributes:
        figure: a matplotlib figure.
        caption: what is drawn, under which conditions.
        tables: title -> rows, each a column's name -> what stands there.
        sentences: what the evidence bears, no more.
    """

    figure: Any
    caption: str
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One published claim: its runs, comparisons and the verdict that the confirmation seeds gave.

    Attributes:
        source: who, and the arXiv id or venue, with section or figure.
        chapter: one of `CHAPTERS`.
        specs: arm -> keys of a RunSpec, all but the seed.
        comparisons: what decides.
        recorded: the verdict of the confirmation seeds, as a word; what `--check` compares with.
        seeds: how many confirmation seeds.
        figure: what is drawn beside the intervals.
        beside: arm -> how many seeds of it are run and shown with the verdict, without deciding.
        extension: arm -> how many seeds of it are run, beyond the verdict, when the finding is
            asked for by name.
        exhibit: what is shown of all that was run; None where there is too little.
        notes: what else the reader should know, such as a contradiction between sources.
        id, text: the file's name and docstring; set when it is loaded.
    """

    source: str
    chapter: str
    specs: Mapping[str, Mapping[str, Any]]
    comparisons: tuple[Comparison, ...]
    recorded: str
    seeds: int = INITIAL_SEEDS
    figure: Figure | None = None
    beside: Mapping[str, int] = field(default_factory=dict)
    extension: Mapping[str, int] = field(default_factory=dict)
    exhibit: Callable[[Lookup], Exhibit | None] | None = None
    notes: str = ""
    id: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        if self.chapter not in CHAPTERS:
            raise SpecError(f"chapter={self.chapter}: allowed is {', '.join(CHAPTERS)}")
        if self.recorded not in WORDS:
            raise SpecError(f"recorded={self.recorded}: allowed is {', '.join(WORDS)}")
        used = {arm for comparison in self.comparisons for arm in comparison.arms}
        for arm in sorted({*used, *self.beside, *self.extension} ^ {*self.specs}):
            raise SpecError(f"{arm}: an arm without a spec, or a spec that nothing compares")

    @property
    def claim(self) -> str:
        """The docstring's first paragraph, on one line."""
        return " ".join(self.text.strip().split("\n\n")[0].split()).removesuffix(".")

    def part(self, label: str) -> str:
        """The paragraph of the docstring that begins with `label:`, without it; empty if none."""
        found = re.search(rf"^{label}:\s*(.*?)(?=\n\n|\n[A-Z]\w+:|\Z)", self.text, re.S | re.M)
        return " ".join(found[1].split()) if found else ""

    @property
    def trained(self) -> bool:
        """Whether any of its runs trains."""
        return any(self.spec(arm, 0).max_steps != 0 for arm in self.specs)

    def spec(self, arm: str, seed: int) -> RunSpec:
        return RunSpec(**self.specs[arm], seed=seed)

    def compared(self, *, quick: bool = False) -> tuple[Comparison, ...]:
        """The comparisons of a whole verdict or of a quick one."""
        return tuple(c for c in self.comparisons if not (quick and c.slow))

    def confirmation_seeds(self, *, quick: bool = False) -> range:
        fewer = QUICK_TRAINED_SEEDS if self.trained else QUICK_INITIAL_SEEDS
        count = min(self.seeds, fewer) if quick else self.seeds
        return range(FIRST_SEED, FIRST_SEED + count)

    def needed(self, *, quick: bool = False, extended: bool = False) -> list[tuple[str, int]]:
        """Arm and seed of every run that the verdict needs, and of those beyond it."""
        arms = dict.fromkeys(arm for c in self.compared(quick=quick) for arm in c.arms)
        deciding = [(arm, seed) for arm in arms for seed in self.confirmation_seeds(quick=quick)]
        others = {} if quick else {**self.beside, **(self.extension if extended else {})}
        beyond = [
            (arm, FIRST_SEED + place) for arm, count in others.items() for place in range(count)
        ]
        return list(dict.fromkeys([*deciding, *beyond]))

    def runs(self, *, quick: bool = False, extended: bool = False) -> list[RunSpec]:
        """The specs of `needed`, each once."""
        needed = self.needed(quick=quick, extended=extended)
        return list(dict.fromkeys(self.spec(arm, seed) for arm, seed in needed))


@dataclass(frozen=True)
class Result:
    """One comparison's numbers by seed, their interval, and the word that follows.

    `low`, `mean`, `high` are in the unit of the number (for a ratio the exponentials of the
    logarithm's interval); `low` and `high` are NaN where there is no interval: one seed, seeds that
    all `agree`, or an exact identity. `more` is how many further seeds would decide.
    """

    comparison: Comparison
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    word: str
    reason: str = ""
    low: float = math.nan
    mean: float = math.nan
    high: float = math.nan
    agree: bool = False
    more: int = 0


@dataclass(frozen=True)
class Verdict:
    """What became of a finding."""

    finding: Finding
    results: tuple[Result, ...]
    quick: bool = False
    missing: int = 0
    needed: int = 0

    @property
    def word(self) -> str:
        """Contradicted if any comparison is; reproduced only if all are."""
        words = [result.word for result in self.results]
        for word in (NOT_RUN, CONTRADICTED, INCONCLUSIVE):
            if word in words:
                return word
        return REPRODUCED if words else NOT_RUN

    @property
    def words(self) -> str:
        """The verdict with what qualifies it: seeds, how many more, quick."""
        told = [r for r in self.results if r.word == self.word and r.reason]
        reasons = [max(told, key=lambda result: result.more).reason] if told else []
        if self.word == NOT_RUN and self.needed > self.missing > 0:
            reasons = [f"{self.needed - self.missing} of {self.needed} runs are there"]
        tail = f" ({reasons[0]})" if reasons else ""
        return f"{self.word}{tail}{', quick' if self.quick else ''}"

    @property
    def as_recorded(self) -> bool:
        """Whether it is the finding's recorded verdict; a quick one, of fewer seeds and
        comparisons, must not say the opposite."""
        if not self.quick:
            return self.word == self.finding.recorded
        opposite = {self.word, self.finding.recorded} == {REPRODUCED, CONTRADICTED}
        return self.word != NOT_RUN and not opposite


def judge(comparison: Comparison, values: Mapping[int, float], comparisons: int = 1) -> Result:
    """The verdict on one comparison from its number at each seed.

    Args:
        comparisons: how many the finding has: each gets an interval at 1 − 0.05/comparisons.
    """
    seeds, numbers = tuple(values), tuple(float(value) for value in values.values())

    def result(word: str, reason: str = "", **fields: Any) -> Result:
        return Result(comparison, seeds, numbers, word, reason, **fields)

    if not numbers:
        return result(NOT_RUN)
    lost = [seed for seed, value in zip(seeds, numbers, strict=True) if not math.isfinite(value)]
    if lost:
        return result(INCONCLUSIVE, f"no finite value at seed {', '.join(map(str, lost))}")
    inside = [comparison.region.low <= value <= comparison.region.high for value in numbers]
    mean = float(np.mean(numbers))
    if comparison.region.exact:
        return result(REPRODUCED if all(inside) else CONTRADICTED, mean=mean)
    if comparison.ratio and min(numbers) <= 0:
        return result(INCONCLUSIVE, "a ratio that is not positive has no logarithm", mean=mean)
    if len(numbers) == 1:
        return result(INCONCLUSIVE, "one seed", mean=mean)
    return _by_interval(comparison, np.array(numbers), comparisons, result)


def _by_interval(
    comparison: Comparison,
    numbers: NDArray[np.float64],
    comparisons: int,
    result: Callable[..., Result],
) -> Result:
    ratio = comparison.ratio
    ends = np.array([comparison.region.low, comparison.region.high])
    with np.errstate(divide="ignore"):
        region = np.log(np.maximum(ends, 0)) if ratio else ends
    sample = np.log(numbers) if ratio else numbers
    level = 1 - ERROR_RATE / comparisons
    found = interval(sample, level)
    back = math.exp if ratio else float
    if found.agree:
        inside = region[0] <= found.mean <= region[1]
        word = REPRODUCED if inside else CONTRADICTED
        return result(word, mean=back(found.mean), agree=True)
    low, high = found.mean - found.half, found.mean + found.half
    named = {"low": back(low), "mean": back(found.mean), "high": back(high)}
    if region[0] <= low and high <= region[1]:
        return result(REPRODUCED, **named)
    if high < region[0] or region[1] < low:
        return result(CONTRADICTED, **named)
    more = seeds_needed(sample, region, level) - len(sample)
    about = f"about {more} more seed{'s' * (more != 1)}"
    about = about if more <= MOST_SEEDS else "over 1,000 more seeds"
    return result(INCONCLUSIVE, about, more=more, **named)


def seeds_needed(sample: NDArray[np.float64], region: NDArray[np.float64], level: float) -> int:
    """Seeds at which an interval of this mean and spread would lie on one side of the region's
    nearest end; MOST_SEEDS and more where so many would not do."""
    distance = float(np.abs(region - sample.mean()).min())
    spread = float(sample.std(ddof=1))
    for n in range(len(sample) + 1, MOST_SEEDS + len(sample)):
        if stdtrit(n - 1, (1 + level) / 2) * spread / math.sqrt(n) < distance:
            return n
    return 2 * MOST_SEEDS + len(sample)


def lookup(finding: Finding, stores: Sequence[str | Path]) -> Lookup:
    """Finds the finding's runs in the stores, each once."""
    return functools.cache(lambda arm, seed: _find(stores, finding.spec(arm, seed)))


def verdict(finding: Finding, find: Lookup, *, quick: bool = False) -> Verdict:
    """What the runs that `find` finds say of a finding; pure reading.

    Raises:
        GradflowError: a record that lacks what the finding reads.
    """
    needed = finding.needed(quick=quick)
    missing = sum(find(arm, seed) is None for arm, seed in needed)
    return decide(finding, find, quick=quick, missing=missing, needed=len(needed))


def decide(finding: Finding, record: Lookup, **about: Any) -> Verdict:
    """The verdict on records that `record` finds by arm and seed; those of `verdict`, or made up.

    A comparison counts when all seeds have all its arms.
    """
    quick = bool(about.get("quick"))
    chosen = finding.compared(quick=quick)
    results = []
    for comparison in chosen:
        values: dict[int, float] = {}
        for seed in finding.confirmation_seeds(quick=quick):
            records = [record(arm, seed) for arm in comparison.arms]
            if None in records:
                values = {}
                break
            values[seed] = _effect(finding, comparison, records)
        results.append(judge(comparison, values, len(chosen)))
    return Verdict(finding, tuple(results), **about)


def _effect(finding: Finding, comparison: Comparison, records: list[Any]) -> float:
    try:
        return float(comparison.measure.effect(*records))
    except (GradflowError, KeyError) as error:
        raise GradflowError(f"{finding.id}, {comparison.name}: {error}") from None


def _find(stores: Sequence[str | Path], spec: RunSpec) -> Run | None:
    found = (find(store, spec) for store in stores)
    return next((run for run in found if run is not None), None)


def counted(verdicts: Sequence[Verdict]) -> str:
    """`33 findings: 28 reproduced (4 quick), 2 contradicted, 3 not run`."""
    told = []
    for word in WORDS:
        here = [verdict.quick for verdict in verdicts if verdict.word == word]
        quick = f" ({sum(here)} quick)" if any(here) else ""
        told += [f"{len(here)} {word}{quick}"] if here else []
    return f"{len(verdicts)} finding{'s' * (len(verdicts) != 1)}: {', '.join(told)}"


def by_chapter(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Findings under the headings of their chapters, in the course's order."""
    members = list(findings)
    chapters = {head: [f for f in members if f.chapter == name] for name, head in CHAPTERS.items()}
    return {head: found for head, found in chapters.items() if found}


def measured_words(result: Result) -> str:
    """`1.468 [1.461, 1.475] (10 seeds)`, `1.000 (10 seeds agree)`, `not run`."""
    count = len(result.values)
    if not count:
        return NOT_RUN
    digits = _digits(result)
    seeds = "one seed" if count == 1 else f"{count} seeds"
    if math.isnan(result.mean):
        return f"not finite ({seeds})"
    if result.comparison.region.exact:
        low, high = min(result.values), max(result.values)
        return f"{low:.17g} to {high:.17g} ({seeds})" if low < high else f"{low:.17g} ({seeds})"
    if result.agree:
        return f"{result.mean:{digits}} ({seeds} agree)"
    if math.isnan(result.low):
        return f"{result.mean:{digits}} ({seeds})"
    ends = f"[{result.low:{digits}}, {result.high:{digits}}]"
    return f"{result.mean:{digits}} {ends} ({seeds})"


def _digits(result: Result) -> str:
    return ".3g" if abs(result.mean) >= 1000 or abs(result.mean) < 0.01 else "#.4g"


def region_words(region: Region) -> str:
    """`0.97 to 1.03`, `above 0.7`, `below 0.1`."""
    low, high = f"{region.low:.4g}", f"{region.high:.4g}"
    if region.exact:
        return f"{region.theory:.6g} ± {(region.high - region.low) / 2:.1g}"
    if math.isinf(region.low):
        return f"below {high}"
    return f"above {low}" if math.isinf(region.high) else f"{low} to {high}"


def exponential(growth: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Theory of a curve: a growth per layer toward the input, 1 at the last layer."""
    return lambda layer: growth ** (layer.max() - layer)
