"""The words beside figures and tables, and at a run's end: answers, captions, conditions, commands.

Every sentence is made of what was recorded; none is a conclusion written beforehand.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from gradflow import diagnosis, flight, tables
from gradflow.errors import SpecError
from gradflow.spec import RunSpec
from gradflow.store import Run


def answers(lines: pd.DataFrame, gains: pd.DataFrame, lost: pd.DataFrame) -> list[str]:
    """What one group of comparable runs says of depth and skips, in sentences.

    Args:
        lines: `tables.degradation` of the group; gains: its `tables.benefit`; lost: its
            `tables.diverged`.
    """
    told = []
    for arm, part in _training(lines):
        ends = part.iloc[[0, -1]] if len(part) > 1 else part
        errors = [f"{row['text']} at depth {row['depth']}" for _, row in ends.iterrows()]
        told.append(f"Final training error of {arm} networks: {', '.join(errors)}.")
    for arm, part in _training(gains):
        told.append(_compared(arm, part.iloc[-1]))
    for arm in _plain_first(lost["arm"]):
        counts = [f"{r['text']} at depth {r['depth']}" for r in _rows(lost[lost["arm"] == arm])]
        told.append(f"Of {arm} networks {', '.join(counts)}: these have no final error.")
    return told or ["No run of this group has a final training error."]


def _compared(arm: str, gain: pd.Series) -> str:
    """An arm's training error and the plain one: which is lower, where the interval shows it."""
    found, text = tables.Interval(gain["mean"], gain["half"], gain["seeds"]), str(gain["text"])
    where = f"At depth {gain['depth']} the training error of"
    if found.mean == 0 and found.agree:
        return f"{where} {arm} networks is that of plain ones ({text})."
    if found.sign:
        way = "lower" if found.sign > 0 else "higher"
        by = text.lstrip("+-")
        return f"{where} {arm} networks is {way} than that of plain ones by {by}."
    shown = "" if found.seeds == 1 else ": no difference is shown"
    return f"{where} plain networks minus that of {arm} ones is {text}{shown}."


def _rows(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    return frame.to_dict("records")


def _plain_first(arms: Iterable[str]) -> list[str]:
    return sorted(set(arms), key=lambda name: (name != tables.PLAIN, name))


def _training(means: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    train = means[means["split"] == "train"].sort_values("depth")
    for arm in _plain_first(train["arm"]):
        yield arm, train[train["arm"] == arm]


def ratios(words: pd.DataFrame) -> str:
    """How the gradient at the first layer compares with that at the last, in one sentence.

    Args:
        words: `tables.rate_words` of one moment.
    """
    parts = []
    for key, part in words.groupby("depth", sort=True, dropna=False):
        where = "" if pd.isna(key) else f"depth {key!s} "
        ends = part["first_last"].str.partition(" (")[0]  # without the range over seeds
        means = [f"{end} ({arm})" for end, arm in zip(ends, part["arm"], strict=True)]
        parts.append(f"{where}{', '.join(means)}")
    return f"Norm at the first {kind_of(words)} over that at the last: {'; '.join(parts)}."


def kind_of(words: pd.DataFrame) -> str:
    """What the layers are whose first and last `tables.rates` compares: of one kind in a run."""
    kinds = {"conv": "convolution", "linear": "linear layer"}
    found = [name for kind, name in kinds.items() if (words["kind"] == kind).any()]
    return " or ".join(found) or "layer"


def marks(values: pd.Series) -> str:
    """Names exact zeros and non-finite values in what is drawn, if there are any."""
    known = values.to_numpy(dtype=float, na_value=np.nan)
    zeros, infinite = int((known == 0).sum()), int((~np.isfinite(known)).sum())
    words = [f"{zeros} {_be(zeros)} exactly zero"] * bool(zeros)
    words += [f"{infinite} {_be(infinite)} NaN or Inf"] * bool(infinite)
    return f" Of {known.size} values drawn {' and '.join(words)}." if words else ""


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def crosses(lost: pd.DataFrame) -> str:
    """Says what the crosses of the figure of final errors stand for, if there are any.

    Args:
        lost: `tables.diverged` of what is drawn.
    """
    if lost.empty:
        return ""
    return " Crosses at the upper edge: runs that diverged, and have no final error."


def aside(profiles: pd.DataFrame) -> str:
    """Names the layers that are left out of a profile, if there are any."""
    layers = profiles.loc[profiles["family"] == tables.ASIDE, "layer"].nunique()
    if not layers:
        return ""
    return (
        f" {tables.counted(layers, 'module')} of the skips' path, or of one arm alone, "
        f"{_be(layers)} left out, so that the arms line up; the table of profiles has all."
    )


# --- diagnoses ------------------------------------------------------------------------------------

_REMARKS = 2
"""Remarks told of a group: where branches are dropped at random, each run has its own."""


def diagnosed(diagnoses: pd.DataFrame) -> dict[str, str]:
    """Each run's diagnoses in words: `exploding; later healthy`, or what both moments share.

    Args:
        diagnoses: `gradflow.diagnosis.diagnoses` of some runs, with `run_id`.
    """
    words: dict[tuple[str, str], list[str]] = {}
    if len(diagnoses):
        for run_id, moment, name in diagnoses[["run_id", "moment", "diagnosis"]].to_numpy():
            words.setdefault((str(run_id), moment), []).append(name)
    told: dict[str, list[str]] = {}
    for (run_id, _), names in sorted(words.items()):  # first, last
        told.setdefault(run_id, []).append(", ".join(names))
    return {run_id: "; later ".join(dict.fromkeys(parts)) for run_id, parts in told.items()}


def stories(found: pd.DataFrame) -> list[str]:
    """A line for each story of `gradflow.flight.stories`, with depth, arm and seed."""
    if found.empty:
        return []
    rows: list[dict[Any, Any]] = found.sort_values(["depth", "arm", "seed"]).to_dict("records")
    return [f"{_whose(row)}: {row['story']}" for row in rows]


def _whose(row: Mapping[Any, Any]) -> str:
    depth = "" if pd.isna(row["depth"]) else f"depth {row['depth']}"
    seed = "" if pd.isna(row["seed"]) else f"seed {row['seed']}"
    return ", ".join(filter(None, [depth, str(row["arm"]), seed]))


def evidence(diagnoses: pd.DataFrame) -> pd.DataFrame:
    """The diagnoses of one group of runs in words: a row a depth, arm, moment and diagnosis.

    Args:
        diagnoses: as `diagnosed` takes them, with depth, arm and seed.

    Returns:
        depth, arm, moment (`initialisation`, `after 263 updates`), diagnosis, runs (`2 of 3`: of
        those examined then), sentence (that of the lowest seed), layers (those it names).
    """
    arms = tables.ordered(diagnoses["arm"])
    keyed = diagnoses.assign(place=diagnoses["arm"].map(arms.index))
    rows = []
    for _, part in keyed.groupby(["depth", "place", "moment"], sort=True, dropna=False):
        depth, count = part["depth"].iloc[0], part["run_id"].nunique()
        about = {"depth": "–" if pd.isna(depth) else depth, "arm": part["arm"].iloc[0]}
        about |= {"moment": tables.when(part["step"])}
        for name in _in_order(part["diagnosis"]):
            found = part[part["diagnosis"] == name].sort_values("seed", key=lambda s: s.map(str))
            layers = list(filter(None, found["layers"].iloc[0].split(", ")))
            rows.append(
                about
                | {"diagnosis": name, "runs": f"{len(found)} of {count}"}
                | {"sentence": found["sentence"].iloc[0], "layers": diagnosis.listed(layers)}
            )
    return pd.DataFrame(rows)


def _in_order(names: Iterable[str]) -> list[str]:
    order = (*diagnosis.NAMES, diagnosis.NOT_MEASURED)
    return sorted(set(names), key=order.index)


def advice(names: Iterable[str]) -> list[str]:
    """What usually helps against each of some diagnoses, with its source."""
    found = {name: diagnosis.ADVICE.get(name, "") for name in _in_order(names)}
    return [f"Usually helps against {name}: {words}" for name, words in found.items() if words]


def reservations(diagnoses: pd.DataFrame) -> list[str]:
    """What looks like trouble and is none, and what the records cannot tell: a sentence each."""
    if diagnoses.empty:
        return []
    remarks = list(dict.fromkeys(filter(None, diagnoses["remarks"])))
    lines = [f"No trouble: {remark}." for remark in remarks[:_REMARKS]]
    if len(remarks) > _REMARKS:
        more = tables.counted(len(remarks) - _REMARKS, "more remark")
        lines.append(f"In diagnoses.csv: {more} of this kind.")
    names = dict.fromkeys(", ".join(filter(None, diagnoses["unmeasured"])).split(", "))
    told = ", ".join(filter(None, names))
    if not told:
        return lines
    return [*lines, f"Not looked for in every record here, for want of what tells of it: {told}."]


# --- one run --------------------------------------------------------------------------------------


def summary(run: Run) -> list[str]:
    """A run in a few plain sentences: how it ended, what is wrong with its gradient, where it lies.

    Raises:
        StoreError: a table of the run is damaged.
    """
    run = run.held()
    lines = [_ending(run), *tables.other_circumstances(run)]
    if run.steps_of("weights").size:
        lines += [line for examined in diagnosis.diagnose_run(run) for line in examined.lines()]
    lines += flight.story(run.with_modules("flight"), run.record.get("divergence"))
    return [*lines, *_readings(run), f"recorded in {run.path}"]


def _readings(run: Run) -> Iterator[str]:
    """A line for each probe: its one reading, or how many there are and where they lie."""
    frame = run.frame("probes")
    if frame.empty:
        return
    for name, part in frame.groupby("probe", sort=False, observed=True):
        values = part["value"].to_numpy(dtype=float)
        known = values[np.isfinite(values)]
        lost = f", {values.size - known.size} not finite" if known.size < values.size else ""
        if values.size == 1:
            yield f"{name}: {tables.short(values[0])}"
        elif not known.size:
            yield f"{name}: {values.size} readings, none finite"
        else:
            low, middle, high = map(tables.short, (known.min(), np.median(known), known.max()))
            yield f"{name}: {values.size} readings, {low} to {high}, median {middle}{lost}"


def _ending(run: Run) -> str:
    steps, seconds, values = run.record.get("steps"), run.record.get("seconds"), run.metrics
    line = tables.outcome(run)
    if steps is not None:
        line += f"{':' if run.status == 'done' else ';'} {tables.counted(steps, 'update')}"
    if seconds is not None:
        line += f" in {seconds:.0f} s" if seconds >= 10 else f" in {seconds:.1f} s"
    for split, words in (("train", "training"), ("test", "test")):
        accuracy, top5 = (values.get(f"{split}_{name}") for name in ("accuracy", "top5"))
        if accuracy is not None:
            line += f"; {words} accuracy {accuracy:.3f}"
        if top5 is not None:
            line += f" (top-5 {top5:.3f})"
    return line


# --- under which conditions -----------------------------------------------------------------------

_CONDITIONS = {
    "network": "network {}", "width": "width {}", "order": "{}-activation", "norm": "norm {}",
    "activation": "{}", "init": "{} initialisation", "padding": "padding {}",
    "data": "data {}", "batch_size": "batch {}", "accumulate": "{} batches an update",
    "optimizer": "{}", "momentum": "momentum {}", "weight_decay": "weight decay {}",
    "lr": "learning rate {}", "schedule": "{} schedule", "milestones": "milestones {}",
    "warmup": "{} steps of warm-up", "warmup_lr": "at {}", "weights_digest": "weights {}",
    "clip": "clipped at {}", "precision": "{}",
    "epochs": "{} epoch{s}", "updates": "{} update{s}{lost}", "seed": "seed{s} {}",
}  # fmt: skip
_SHORT = ("network", "data", "batch_size", "lr", "schedule", "updates", "seed")
_UNREMARKABLE = {"accumulate": 1, "warmup": 0, "precision": "fp32"}


def conditions(members: Iterable[Run], *, short: bool = False) -> str:
    """Under which conditions some runs were made, from their specs; `short` as a caption needs."""
    runs = list(members)
    rows = [run.columns() | {"updates": _planned(run)} for run in runs]
    parts = []
    for key, words in _CONDITIONS.items():
        values = {row.get(key) for row in rows} - {None, _UNREMARKABLE.get(key)}
        if values and (not short or key in _SHORT):
            one = len(values) == 1 if key == "seed" else values == {1}
            parts.append(words.format(_listed(values), s="" if one else "s", lost=_lost(runs)))
    if any(run.record.get("origin") == "external" for run in runs):
        parts.append("a user's own loop")
    return ", ".join(parts)


def _planned(run: Run) -> int | None:
    """The updates of the whole run, where they are known: one that diverged made fewer."""
    if run.status == "done":
        return run.record.get("steps")
    spec = _spec(run)
    if isinstance(spec, str):
        return None
    size = spec.data.train_size
    return None if spec.max_steps is None and size is None else spec.updates(size or 0)


def _lost(runs: Sequence[Run]) -> str:
    """` (diverged after 4)`, ` (2 of 3 diverged, after 4 and 6)`; or nothing."""
    lost = [run for run in runs if run.status == "diverged"]
    if not lost:
        return ""
    count = f"{len(lost)} of {len(runs)} diverged," if len(runs) > 1 else "diverged"
    return f" ({count} after {_listed(set(map(_applied, lost)))})"


def _applied(run: Run) -> int:
    """Updates before a run diverged."""
    if run.spec.get("on_divergence") == "continue":
        return int(run.record["divergence"]["step"])
    return int(run.record.get("steps") or 0)


def unreadable(run: Run) -> str:
    """What is wrong with the spec of a run of gradflow's own, if anything is."""
    found = _spec(run)
    return found if isinstance(found, str) else ""


def _spec(run: Run) -> RunSpec | str:
    """Of a run of gradflow's own, or what is wrong with it; nothing of a user's, which has none."""
    if run.record.get("origin") != "gradflow":
        return ""
    try:
        return RunSpec.from_dict(run.spec)
    except (SpecError, TypeError) as error:  # of a version with other keys
        return str(error)


def _listed(values: Iterable[Any]) -> str:
    known = sorted(values, key=lambda v: (isinstance(v, str), v))
    if len(known) > 5:
        return f"{_plain(known[0])} to {_plain(known[-1])}"
    return " and ".join(map(_plain, known)) if len(known) < 3 else _series(known)


def _series(known: list[Any]) -> str:
    return f"{', '.join(map(_plain, known[:-1]))} and {_plain(known[-1])}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", "-")


def environment(run: Run) -> str:
    """Versions, device and commit of one run, as far as it names them."""
    place = run.record.get("environment") or {}
    names = [("python", place.get("python")), *(place.get("versions") or {}).items()]
    parts = [f"{name} {version}" for name, version in names if version]
    parts += [str(place["platform"])] if place.get("platform") else []
    if place.get("device"):
        parts.append(", ".join([str(place["device"]), *_threads(place)]))
    git = place.get("git") or {}
    if git.get("commit"):
        parts.append(f"commit {git['commit'][:10]}{', with changes' if git.get('dirty') else ''}")
    return "; ".join([*parts, *tables.other_circumstances(run)]) or "not recorded"


def _threads(place: Mapping[str, Any]) -> list[str]:
    count = place.get("threads")
    return [] if count is None else [tables.counted(count, "thread")]


# --- commands -------------------------------------------------------------------------------------

_SWEPT = ("depth", "skip", "seed")


def commands(members: Iterable[Run]) -> list[str]:
    """The shortest commands that repeat some runs. A user's own loop has none."""
    known: dict[RunSpec, dict[str, Any]] = {}
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for run in members:
        spec = _spec(run)
        if isinstance(spec, str):
            continue
        named = _named(spec, known)
        fixed = tuple(f"{key}={text}" for key, text in named.items() if key not in _SWEPT)
        groups.setdefault(fixed, []).append({key: named[key] for key in _SWEPT if key in named})
    lines = []
    for fixed, asked in groups.items():
        for row in _as_sweeps(sorted(asked, key=_in_numbers)):
            many = ["-m"] if any("," in text for text in row.values()) else []
            words = [*(f"{key}={text}" for key, text in row.items()), *fixed]
            lines.append(shlex.join(["python", "-m", "gradflow", *many, *words]))
    return list(dict.fromkeys(lines))


def _in_numbers(row: Mapping[str, str]) -> list[int]:
    """By which depths and seeds ascend, and skips stay as they come."""
    return [int(row[key]) if row.get(key, "").isdecimal() else 0 for key in _SWEPT]


def _as_sweeps(asked: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row with lists where the rows are all combinations of their values, else the rows."""
    keys = list(asked[0])
    values = {key: list(dict.fromkeys(row.get(key) for row in asked)) for key in keys}
    rows = {tuple(row.get(key) for key in keys) for row in asked}
    if rows != set(product(*values.values())) or any(set(row) != set(keys) for row in asked):
        return asked
    return [{key: ",".join(map(str, texts)) for key, texts in values.items()}]


def _named(spec: RunSpec, known: dict[RunSpec, dict[str, Any]]) -> dict[str, str]:
    """The keys without which the spec would be another, as the command line spells them."""
    rest = spec.but(seed=0)
    if rest not in known:
        known[rest] = _needed(rest)
    named = known[rest] | {"seed": spec.seed}
    spelled = {"identity": True, "none": False}
    if isinstance(named.get("skip"), str):
        named["skip"] = spelled.get(named["skip"], named["skip"])
    return {key.removesuffix(".name"): _argument(value) for key, value in named.items()}


def _needed(spec: RunSpec) -> dict[str, Any]:
    named = {key: value for key, value in _leaves(spec.to_dict()) if value is not None}
    for key in [key for key in named if key not in _SWEPT]:
        fewer = {name: value for name, value in named.items() if name != key}
        try:
            if RunSpec.from_dict(_nested(fewer)) == spec:
                named = fewer
        except SpecError:
            pass  # the key is needed
    return named


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and prefix + name != "network.args":
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


_PLAIN_WORD = re.compile(r"(?!(?:true|false|null|nan|inf)$)[a-z/][a-z0-9_./:-]*", re.IGNORECASE)


def _argument(value: Any) -> str:
    """A value as Hydra's command line reads it, with its type."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_argument, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(k)}:{_argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and not _PLAIN_WORD.fullmatch(value):
        return _quoted(value)
    return str(value)


def _quoted(text: str) -> str:
    """Backslashes count only before `${`, a quote or the end; there they are doubled."""
    text = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", text)
    text = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", text)
    return "'" + re.sub(r"\\+\Z", lambda found: 2 * found[0], text) + "'"


def _key(name: str) -> str:
    """A mapping's key: Hydra knows no quotes there."""
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", name)
