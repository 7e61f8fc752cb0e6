"""What the recorded runs say, as frames and sentences: pure functions of what was recorded.

Comparisons are paired: two runs form a pair where all keys agree except those of the skip. Runs
that differ in anything else (learning rate, epochs, …) are different groups and never mixed; what
was recorded changes no result, and sets no runs apart.
Intervals are 95 % Student-t intervals over seeds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from gradflow.spec import NETWORKS, SKIP_KEYS, RunSpec
from gradflow.store import FINISHED, METRICS, Run, Runs

LEVEL = 0.95
PLAIN = "plain"
ARM_NAMES = {"none": PLAIN, "identity": "residual"}
ARMS = (PLAIN, "residual", "forward only", "backward only")
"""Arms that have a place of their own in an order, and a colour."""
SPLITS = ("train", "test")
WEIGHT, NORM, ASIDE = "weights", "norm", "aside"
"""The families of layers that profiles keep apart; see `profile`."""
BLOCK = "block"
"""What stands for a family in the table of blocks."""

# --- arms and groups ------------------------------------------------------------------------------

_COMPARED = ("depth", "seed", *SKIP_KEYS)
_NO_MATTER = ("record", "record_every_weights", "record_every_outputs", "record_every_blocks",
              "record_every_details", "record_details", "record_flight",
              "on_divergence")  # fmt: skip
"""Columns of the spec that change nothing about a run's result."""
_SKIP_DEFAULTS = {"branch_scale": 1.0, "branch_layers": 1, "drop_rate": 0.5, "shortcut": "A"}


def arm(columns: Mapping[str, Any]) -> str:
    """What a run's skip is called: `plain`, `residual`, … with the keys that are not as usual."""
    skip = columns.get("skip")
    if isinstance(skip, bool):  # in a user's own meta
        skip = "identity" if skip else "none"
    name = "unnamed" if skip is None else ARM_NAMES.get(str(skip), str(skip).replace("_", " "))
    extra = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key in SKIP_KEYS[1:]
        if (value := columns.get(key)) is not None and value != _SKIP_DEFAULTS.get(key)
        if key not in ("skip_forward", "skip_backward") or skip == "dosed"
    ]
    return ", ".join([name, *extra])


def alike(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's columns those, with their values, in which two arms of a comparison must agree."""
    named = {key: value for key, value in columns.items() if value is not None}
    kept = {k: v for k, v in named.items() if k not in (*_COMPARED, *_NO_MATTER)}
    if kept.get("network_args"):  # a user's network takes depth and skip among its arguments
        args = json.loads(kept["network_args"])
        if isinstance(args, dict):
            args = {key: value for key, value in args.items() if key not in _COMPARED}
        kept["network_args"] = json.dumps(args, sort_keys=True)
    return kept


def _remaining(run: Run) -> dict[str, Any]:
    return {"origin": run.record.get("origin"), **alike(run.columns())}


def group_titles(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """A title for each of some distinct groups: the keys in which it differs from the others.

    Groups of different networks, and of users' loops, have too little in common for that: each is
    told by its network's name and the keys that are not at their default.
    """
    families = [_family(key) for key in keys]
    many = len(set(families)) > 1
    titles = []
    for key, family in zip(keys, families, strict=True):
        others = [k for k, name in zip(keys, families, strict=True) if name == family]
        shown = _differing(key, others) if len(others) > 1 else _unusual(key) if many else ""
        titles.append(", ".join(filter(None, [family if many else "", shown])))
    return titles


def _family(key: Mapping[str, Any]) -> str:
    own = key.get("origin") == "external"
    return "a user's loop" if own else str(key.get("network") or "unknown network")


def _differing(key: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for other in others for name in other))
    differ = [n for n in names if len({_text(other.get(n)) for other in others}) > 1]

    def title(one: Mapping[str, Any], nulls: bool) -> str:
        named = [f"{name}={_text(one[name])}" for name in differ if one.get(name) is not None]
        lacks = ", ".join(name for name in differ if one.get(name) is None)
        return ", ".join([*named, *[f"without {lacks}"] * bool(nulls and lacks)])

    short = title(key, nulls=False)
    clear = short and [title(other, nulls=False) for other in others].count(short) == 1
    return short if clear else title(key, nulls=True)


def _natural(text: str) -> list[str | float]:
    """By what texts are sorted, their numbers as numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


def _unusual(key: Mapping[str, Any]) -> str:
    name = _family(key)
    usual = RunSpec(network=name).columns() if name in NETWORKS and name != "custom" else {}  # type: ignore[arg-type]
    shown = {n: v for n, v in key.items() if v is not None and v != usual.get(n)}
    return ", ".join(f"{n}={_text(v)}" for n, v in shown.items() if n not in ("origin", "network"))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _whole(value: Any) -> int | None:
    """A whole number from a user's meta, where any spelling or type may stand."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


# --- one row a run --------------------------------------------------------------------------------


def overview(runs: Runs) -> pd.DataFrame:
    """One row a run: group, depth, arm, seed, how it ended, its cost, its final metrics.

    `group` numbers the sets of runs that may be compared, that of most results first, equal ones by
    their titles; `title` says in which keys they differ. Errors are 1 − accuracy of a run that is
    `done`, and NaN otherwise; `train_error` comes from an evaluation-mode pass over the whole
    training split. `match` is the certificate of the run's pair (see `match`).
    """
    if not len(runs):
        return pd.DataFrame()
    keys = [_remaining(run) for run in runs]
    labels = [json.dumps(key, sort_keys=True, default=str) for key in keys]
    order = _largest_first(labels, keys, runs)
    titles = group_titles([keys[labels.index(label)] for label in order])
    rows = []
    for run, label in zip(runs, labels, strict=True):
        columns, number = run.columns(), order.index(label)
        row: dict[str, Any] = {
            "run_id": run.run_id,
            "run": run.path.name,
            "path": str(run.path),
            "origin": run.record.get("origin"),
            "group": number,
            "title": titles[number],
            "network": columns.get("network"),
            "depth": _whole(columns.get("depth")),
            "arm": arm(columns),
            "seed": columns.get("seed"),
            "status": run.status,
            "outcome": outcome(run),
            "steps": _whole(run.record.get("steps")),
            "parameters": (run.record.get("certificate") or {}).get("parameter_count"),
            "seconds": run.record.get("seconds"),
            "recorder_share": run.record.get("recorder_share"),
            **{name: run.metrics.get(name) for name in METRICS},
        }
        for split in SPLITS:
            accuracy = row[f"{split}_accuracy"]
            known = run.status == "done" and accuracy is not None
            row[f"{split}_error"] = 1 - accuracy if known else math.nan
        rows.append(row)
    frame = pd.DataFrame({name: _column(name, [row[name] for row in rows]) for name in rows[0]})
    older = _repeated(runs, frame)
    frame.loc[list(older), [f"{split}_error" for split in SPLITS]] = math.nan
    frame["match"] = _matches(frame, _pair_up(runs, frame))
    for index, newer in older.items():
        frame.loc[index, "match"] = f"not compared: repeated by {newer}"
    return frame


def _largest_first(
    labels: Sequence[str], keys: Sequence[Mapping[str, Any]], runs: Runs
) -> list[str]:
    """The groups' labels: of most results, then of most runs, then by what sets them apart."""
    distinct = list(dict.fromkeys(labels))
    titles = group_titles([keys[labels.index(label)] for label in distinct])
    finals = [label for label, run in zip(labels, runs, strict=True) if run.metrics]
    ranks = {
        label: (-finals.count(label), -labels.count(label), _natural(title))
        for label, title in zip(distinct, titles, strict=True)
    }
    return sorted(distinct, key=ranks.__getitem__)


def _column(name: str, values: list[Any]) -> pd.Series:
    """Numbers that may be missing are Arrow-backed: a null there is not a NaN."""
    if name == "depth":
        return pd.Series(values, dtype="Int64")
    if name == "seed":
        return pd.Series(values, dtype=object)
    if name in (*METRICS, "seconds", "recorder_share"):
        return pd.Series(pa.array(values, pa.float64()), dtype=pd.ArrowDtype(pa.float64()))
    if name in ("steps", "parameters"):
        return pd.Series(pa.array(values, pa.int64()), dtype=pd.ArrowDtype(pa.int64()))
    return pd.Series(values)


def _repeated(runs: Runs, frame: pd.DataFrame) -> dict[int, str]:
    """Rows whose every key another run has as well (an older recipe's, a user's, or one recorded
    otherwise): that run's name, the latest that has its result."""
    ranked = frame.assign(
        ended=frame["status"].isin(FINISHED),
        started=[run.record.get("started") or 0.0 for run in runs],
    )
    known = ranked[frame["depth"].notna() & frame["seed"].notna()]
    keys = ["group", "depth", "seed", "arm"]
    known = known[known.duplicated(keys, keep=False)].sort_values(["ended", "started"])
    older: dict[int, str] = {}
    for _, part in known.groupby(keys, sort=False):
        older |= dict.fromkeys(part.index[:-1], str(part["run"].iloc[-1]))
    return older


def outcome(run: Run) -> str:
    """A run's status in words, with what went wrong."""
    record = run.record
    if run.status == "running" and not run.alive:
        return "unfinished: its process is gone"
    if run.status == "diverged" and record.get("divergence"):
        found = record["divergence"]
        where = f" in {found['layer']}" if found.get("layer") else ""
        return f"diverged at step {found['step']}: {found['quantity']} not finite{where}"
    if run.status == "failed" and record.get("error"):
        return f"failed: {str(record['error']).splitlines()[0]}"
    return run.status


# --- pairs ----------------------------------------------------------------------------------------


def match(first: Run, second: Run) -> str:
    """What the certificates of the two runs of a pair say.

    `matched`: all initial parameters, the batches really consumed and the data are the same, by
    digest. `matched on shared parameters (+n …)`: one arm has parameters of its own besides.
    `not matched: …` says why; `no certificate`: one is a user's own loop. `no certificate: …`: one
    is not finished, or diverged, and so has not seen the batches that the other has.
    """
    one, two = (run.record.get("certificate") or {} for run in (first, second))
    if not all(c.get("parameters") for c in (one, two)):
        return "no certificate"
    lacking = [
        arm(run.columns())
        for run, certificate in zip((first, second), (one, two), strict=True)
        if not (certificate.get("batches") and certificate.get("data"))
    ]
    if lacking:
        return f"no certificate: {' and '.join(lacking)} unfinished"
    shared = one["parameters"].keys() & two["parameters"].keys()
    differ = sorted(name for name in shared if one["parameters"][name] != two["parameters"][name])
    if differ or not shared:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        return f"not matched: initial {differ[0] if differ else 'parameter names'}{more} differ"
    if one["data"] != two["data"]:
        return "not matched: data differ"
    if one["batches"] != two["batches"]:
        return _other_batches(first, second)
    if not extras(first, second):
        return "matched"
    own = [
        f"+{len(names)} in {arm(run.columns())}"
        for run, names in zip((first, second), _own(first, second), strict=True)
        if names
    ]
    return f"matched on shared parameters ({', '.join(own)})"


def _other_batches(first: Run, second: Run) -> str:
    """Why the digests of a pair's batches differ, where all else is the same."""
    fewer, more = sorted((first, second), key=lambda run: run.record.get("steps") or 0)
    made = [run.record.get("steps") for run in (fewer, more)]
    if made[0] == made[1]:
        return "not matched: batches differ"
    if fewer.status != "diverged":
        return f"not matched: batches differ ({made[0]} and {made[1]} updates)"
    return (
        "no certificate: initial parameters are equal; batches cannot be compared, as "
        f"{arm(fewer.columns())} diverged"
    )


def extras(first: Run, second: Run) -> list[str]:
    """Names of the parameters that only one run of a pair has."""
    return [name for names in _own(first, second) for name in names]


def lone_layers(first: Run, second: Run) -> set[str]:
    """Layers that only one run of a pair has, by the parameters of their certificates; none where
    the two have no layer in common."""
    one, two = (
        {name.rpartition(".")[0] for name in certificate.get("parameters", {})}
        for certificate in (run.record.get("certificate") or {} for run in (first, second))
    )
    return one ^ two if one & two else set()


def extra_layers(runs: Runs, frame: pd.DataFrame) -> dict[str, set[str]]:
    """Run's name -> layers that it has, and its partner lacks, or the other way round.

    Args:
        frame: the `pairs` of the runs.
    """
    known = {run.path.name: run for run in runs}
    found: dict[str, set[str]] = {}
    for names in zip(frame["plain_run"], frame["run"], strict=True):
        lone = lone_layers(*(known[name] for name in names))
        for name in names:
            found.setdefault(name, set()).update(lone)
    return found


def _own(first: Run, second: Run) -> tuple[list[str], list[str]]:
    one, two = (
        (run.record.get("certificate") or {}).get("parameters", {}) for run in (first, second)
    )
    return sorted(one.keys() - two.keys()), sorted(two.keys() - one.keys())


_PAIR_KEYS = ["group", "depth", "seed"]


def _pair_up(runs: Runs, frame: pd.DataFrame) -> list[tuple[int, int, str]]:
    """Rows (plain, other) of each pair, with their certificate."""
    if frame.empty:
        return []
    passed = _repeated(runs, frame)
    places: dict[tuple[Any, ...], dict[str, int]] = {}
    for index, row in enumerate(frame.to_dict("records")):
        key = tuple(row[name] for name in _PAIR_KEYS)
        if index not in passed and row["arm"] != "unnamed" and not any(map(pd.isna, key)):
            places.setdefault(key, {})[row["arm"]] = index
    return [
        (arms[PLAIN], other, match(runs.members[arms[PLAIN]], runs.members[other]))
        for arms in places.values()
        if PLAIN in arms
        for name, other in arms.items()
        if name != PLAIN
    ]


def _matches(frame: pd.DataFrame, found: list[tuple[int, int, str]]) -> list[str]:
    results: dict[int, list[str]] = {}
    for plain, other, result in found:
        results.setdefault(plain, []).append(result)
        results.setdefault(other, []).append(result)
    return ["; ".join(dict.fromkeys(results.get(i, ["no partner"]))) for i in frame.index]


def pairs(runs: Runs, frame: pd.DataFrame) -> pd.DataFrame:
    """One row a pair of a plain run and another arm's of equal group, depth and seed.

    Args:
        runs: the runs; frame: their `overview`.

    `train_difference` and `test_difference` are plain error − the arm's error: positive where the
    skip helps. They are NaN where one of the two is not done, or where the certificates show that
    the two are not matched.
    """
    rows = []
    records = frame.to_dict("records")
    for plain, other, result in _pair_up(runs, frame):
        one, two = records[plain], records[other]
        row = {key: two[key] for key in ("group", "title", "depth", "seed", "arm")}
        row |= {"plain_run": one["run"], "run": two["run"], "match": result}
        row["extras"] = ", ".join(extras(runs.members[plain], runs.members[other]))
        for split in SPLITS:
            label = f"{split}_error"
            valid = not result.startswith("not matched")
            row |= {f"plain_{label}": one[label], label: two[label]}
            row[f"{split}_difference"] = one[label] - two[label] if valid else math.nan
        rows.append(row)
    columns = [*_PAIR_KEYS, "title", "arm", "plain_run", "run", "match", "extras"]
    for split in SPLITS:
        columns += [f"plain_{split}_error", f"{split}_error", f"{split}_difference"]
    return _with_depth(pd.DataFrame(rows, columns=columns))


# --- intervals ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95 % t interval.

    `half` is NaN for one seed, and where all seeds agree: there is no spread to judge by.
    """

    mean: float
    half: float
    seeds: int

    @property
    def agree(self) -> bool:
        """Whether several seeds gave one and the same value."""
        return self.seeds > 1 and math.isnan(self.half) and math.isfinite(self.mean)

    @property
    def sign(self) -> int:
        """1 or −1 where the interval lies above or below zero, else 0; of one seed always 0."""
        if self.seeds < 2 or not math.isfinite(self.mean):
            return 0
        spread = 0.0 if self.agree else self.half
        return int(self.mean - spread > 0) - int(self.mean + spread < 0)

    def words(self, sign: bool = False) -> str:
        """`0.889 ± 0.012 (3 seeds)`, `0.889 (one seed)`, `0.000 (3 seeds agree)`."""
        if not self.seeds:
            return "–"
        count = "one seed" if self.seeds == 1 else f"{self.seeds} seeds{' agree' * self.agree}"
        return f"{self.cell(sign).replace('±', ' ± ')} ({count})"

    def cell(self, sign: bool = False) -> str:
        """The same for a narrow column, without the seeds: `0.889±0.012`, `0.889`."""
        if not self.seeds:
            return "–"
        spread = f"±{self.half:.3f}" if self.seeds > 1 and not self.agree else ""
        return f"{self.mean:{'+' if sign else ''}.3f}{spread}"


def interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean and t interval of a sample; a NaN among the values makes both NaN."""
    sample = np.asarray(values, dtype=float)
    n = sample.size
    if not n:
        return Interval(math.nan, math.nan, 0)
    mean = float(sample.mean())
    # Errors are ratios of counts: equal to rounding is equal.
    if n == 1 or np.ptp(sample) <= 1e-12:
        return Interval(mean, math.nan, n)
    half = stdtrit(n - 1, (1 + level) / 2) * sample.std(ddof=1) / math.sqrt(n)
    return Interval(mean, float(half), n)


def _intervals(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Interval over seeds of `<split>_<column>` by group, depth and arm, for train and test."""
    rows = []
    for split in SPLITS:
        label = f"{split}_{column}"
        known = frame[frame[label].notna() & frame["depth"].notna() & (frame["arm"] != "unnamed")]
        for key, part in known.groupby(["group", "title", "depth", "arm"], sort=False):
            found = interval(part[label].to_numpy(dtype=float))
            rows.append(
                dict(zip(("group", "title", "depth", "arm"), key, strict=True))
                | {"split": split, "mean": found.mean, "half": found.half, "seeds": found.seeds}
                | {"low": found.mean - found.half, "high": found.mean + found.half}
                | {"text": found.words(sign=column == "difference")}
            )
    columns = ["group", "title", "depth", "arm", "split", "mean", "half", "seeds", "low", "high"]
    data = pd.DataFrame(rows, columns=[*columns, "text"])
    return data.sort_values(["group", "depth", "arm", "split"], ignore_index=True)


def degradation(frame: pd.DataFrame) -> pd.DataFrame:
    """Final error by group, depth, arm and split: mean and t interval over the seeds done.

    Args:
        frame: an `overview`.
    """
    return _intervals(frame, "error")


def benefit(frame: pd.DataFrame) -> pd.DataFrame:
    """The skip's benefit by group, depth, arm and split: mean paired difference of final errors.

    Args:
        frame: the `pairs`.
    """
    return _intervals(frame, "difference")


def diverged(frame: pd.DataFrame) -> pd.DataFrame:
    """Where runs diverged: a row a group, depth and arm, with `text` such as `2 of 3 diverged`.

    Args:
        frame: an `overview`. Counted are runs that diverged and runs that have a final error.
    """
    lost = _lost(frame)
    ended = frame.assign(lost=lost)[(lost | frame["train_error"].notna()) & frame["depth"].notna()]
    rows = [
        dict(zip(("group", "depth", "arm"), key, strict=True))
        | {"text": f"{part['lost'].sum()} of {len(part)} diverged"}
        for key, part in ended.groupby(["group", "depth", "arm"], sort=True)
        if part["lost"].any()
    ]
    return _with_depth(pd.DataFrame(rows, columns=["group", "depth", "arm", "text"]))


def _lost(frame: pd.DataFrame) -> pd.Series:
    return (frame["status"] == "diverged") & ~frame["match"].str.startswith("not compared")


def comparison(frame: pd.DataFrame, paired: pd.DataFrame) -> pd.DataFrame:
    """Plain beside the other arms, in words: a row a group, depth and arm.

    Args:
        frame: an `overview`; paired: its `pairs`.

    Returns:
        group, title, depth, arm, plain (training accuracy, and how many diverged), other (the
        arm's), difference (with interval, over pairs), seeds (`3`, or `1/3` where the plain network
        has other ones than the arm), matched (`3 of 3` of the pairs with two final errors, and why
        not).
    """
    ended = frame[(frame["train_error"].notna() | _lost(frame)) & frame["depth"].notna()]
    gains, losses = benefit(paired), diverged(frame)
    rows = []
    for (group, title, depth), part in ended.groupby(["group", "title", "depth"], sort=True):
        accuracy = {name: interval(1 - sub["train_error"].dropna().astype(float))
                    for name, sub in part.groupby("arm")}  # fmt: skip

        def cell(name: str, found: Interval, place: dict[str, Any]) -> str:
            lost = list(_at(losses, arm=name, **place)["text"])
            return ", ".join([found.cell()] * bool(found.seeds or not lost) + lost)

        here = {"group": group, "depth": depth}
        plain = accuracy.pop(PLAIN, interval([]))
        for name, other in (accuracy or {"–": interval([])}).items():
            gain = _at(gains, arm=name, split="train", **here)
            both = _at(paired, arm=name, **here)
            both = both[both["plain_train_error"].notna() & both["train_error"].notna()]
            difference = [Interval(*row) for row in gain[["mean", "half", "seeds"]].to_numpy()]
            counts = dict.fromkeys([plain.seeds] + [other.seeds] * bool(accuracy))
            rows.append(
                {"group": group, "title": title, "depth": depth, "arm": name}
                | {"plain": cell(PLAIN, plain, here), "other": cell(str(name), other, here)}
                | {"difference": difference[0].cell(sign=True) if difference else "–"}
                | {"seeds": "/".join(map(str, counts)), "matched": _matched_words(both["match"])}
            )
    columns = ["group", "title", "depth", "arm", "plain", "other", "difference", "seeds", "matched"]
    return pd.DataFrame(rows, columns=columns)


def _matched_words(certificates: Iterable[str]) -> str:
    results = list(certificates)
    good = [r for r in results if r.startswith("matched")]
    if not results:
        return "no pair"
    if len(good) == len(results):
        return f"{len(good)} of {len(results)}" + ("" if set(good) == {"matched"} else " (shared)")
    others = dict.fromkeys(r for r in results if not r.startswith("matched"))
    if not good and list(others) == ["no certificate"]:
        return "no certificate"
    return f"{len(good)} of {len(results)}; {'; '.join(others)}"


def _at(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    keep = np.ones(len(frame), dtype=bool)
    for name, value in values.items():
        keep &= (frame[name] == value).fillna(False).to_numpy(dtype=bool)
    return frame[keep]


# --- profiles -------------------------------------------------------------------------------------


def measured(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows in which a quantity was measured, as float64: nulls go, NaN, Inf and zero stay."""
    values, known = floats(frame[quantity])
    return frame[known].assign(**{quantity: values[known]})


def floats(column: pd.Series) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column as float64, NaN for null, and which of its values were measured."""
    arrow = isinstance(column.dtype, pd.ArrowDtype)  # there a NaN is not a null
    known = ~np.asarray(column.array.isna()) if arrow else np.ones(len(column), dtype=bool)
    return column.to_numpy(dtype=float, na_value=np.nan), known


def moments(steps: ArrayLike) -> list[int]:
    """The steps at which profiles are shown: the first, about √last, and the last recorded."""
    known = np.unique(np.asarray(steps, dtype=int))
    if not known.size:
        return []
    return sorted({int(known[0]), nearest(known, math.sqrt(known[-1])), int(known[-1])})


def nearest(steps: ArrayLike, wanted: float) -> int:
    """The step that is nearest to the one wanted, the earlier of two."""
    known = np.unique(np.asarray(steps, dtype=int))
    return int(known[np.abs(known - wanted).argmin()])


_ON_SKIP = re.compile(r"(^|\.)(downsample|shortcut)(\.|$)")
"""Names of modules on a skip's path, as torchvision and others call them."""


def profile(
    frame: pd.DataFrame, quantity: str = "weight_grad_norm", *, extras: Iterable[str] = ()
) -> pd.DataFrame:
    """A quantity of each module against its ordinal, normalisation layers apart from the others.

    Args:
        frame: rows of layers with step, layer, position, kind and the quantity, of one or more
            runs (`run_id`).
        extras: layers that the other runs of a comparison lack.

    Returns:
        The measured rows with `family` (`weights`: convolutions, linear layers, embeddings;
        `norm`: normalisation layers and other parameters; `aside`: the extras, and what is called
        `downsample` or `shortcut`, so that plain and residual networks line up) and `ordinal`:
        1, 2, … from the input among the run's layers of that family.
    """
    data = measured(frame, quantity)
    data = data.assign(
        position=data["position"].to_numpy(dtype=float, na_value=np.nan),
        kind=data["kind"].astype(object),
        layer=data["layer"].astype(object),
        step=data["step"].to_numpy(dtype=int),
        run_id=data["run_id"].astype(object) if "run_id" in data else "",
    )
    data = data[data["kind"] != "block"]
    aside = {*extras, *filter(_ON_SKIP.search, data["layer"].unique())}
    data = data.assign(family=np.where(data["layer"].isin(aside), ASIDE, _families(data)))
    run, family = (pd.factorize(data[name], sort=True)[0] for name in ("run_id", "family"))
    ordinal = _ordinals(run * (family.max(initial=0) + 1) + family, data["layer"], data["position"])
    order = np.lexsort((ordinal, family, data["step"], run))
    return data.assign(ordinal=ordinal).iloc[order].reset_index(drop=True)


def _families(data: pd.DataFrame) -> NDArray[Any]:
    """Parameters of other modules (gates, a user's own) stand beside the norms, if a run has
    convolutions or linear layers; where it has none, they are its weights."""
    plain = data["kind"].isin(("conv", "linear", "embedding"))
    usual = data["run_id"].isin(data.loc[plain, "run_id"].unique())
    return np.where(plain | (~usual & (data["kind"] != "norm")), WEIGHT, NORM)


def _ordinals(part: NDArray[np.int64], layers: pd.Series, positions: pd.Series) -> NDArray[Any]:
    """Of each row its layer's: 1, 2, … by position within a part of the rows."""
    names, known = pd.factorize(layers, use_na_sentinel=False)
    _, first, number = np.unique(part * len(known) + names, return_index=True, return_inverse=True)
    order = np.lexsort((first, positions.to_numpy()[first], part[first]))
    parts = part[first][order]
    ordinal = np.empty(len(order), dtype=np.int64)
    ordinal[order] = np.arange(1, len(order) + 1) - np.searchsorted(parts, parts)
    return ordinal[number]


def at_step(frame: pd.DataFrame, quantity: str, step: int) -> np.ma.MaskedArray:
    """One run's quantity by layer, from the input on; masked where it was not measured.

    Args:
        frame: step, ordinal and the quantity, over all steps: the greatest ordinal is the number of
            layers.
    """
    count = int(frame["ordinal"].max())
    rows = measured(frame[frame["step"] == step], quantity)
    values = np.ma.masked_all(count, dtype=np.float64)
    values[rows["ordinal"].to_numpy(dtype=int) - 1] = rows[quantity].to_numpy()
    return values


def relative_depth(count: int) -> NDArray[np.float64]:
    """Where each of so many layers lies: 0 the first, 1 the last, evenly spaced in between."""
    return np.linspace(0, 1, count)


def compare_layers(a: ArrayLike, b: ArrayLike, *, log: bool = True) -> np.ma.MaskedArray:
    """B over A at the relative depth of each of A's layers, or B − A where not `log`.

    Layer i of n, from the input on, lies at (i − 1)/(n − 1), so that networks of equal depth are
    compared layer by layer. Between two of B's layers their logarithms (not `log`: their values)
    are interpolated linearly.

    Args:
        a, b: a value of each layer, such as a norm; masked where it was not measured.

    Returns:
        As many values as A has. A ratio is 0 where B alone is exactly zero, Inf where A alone is.
        NaN where both are, or where a value is NaN or Inf; masked where one was not measured.
    """
    own, other = (np.ma.asarray(values, dtype=np.float64) for values in (a, b))
    place = relative_depth(own.size) * (other.size - 1)
    low, high = np.floor(place + 1e-9).astype(int), np.ceil(place - 1e-9).astype(int)
    share = np.where(low == high, 0.0, place - low)
    mine, theirs = (np.where(np.isfinite(v.data), v.data, np.nan) for v in (own, other))
    one, two = theirs[low], theirs[high]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if log:
            found = one ** (1 - share) * two**share / mine
        else:
            found = one * (1 - share) + two * share - mine
    masks = np.ma.getmaskarray(own), np.ma.getmaskarray(other)
    return np.ma.masked_array(found, masks[0] | masks[1][low] | masks[1][high])


def spread(steps: ArrayLike, count: int = 60) -> NDArray[np.int64]:
    """Some `count` of the steps: all up to the tenth, then evenly spaced in their logarithm."""
    known = np.unique(np.asarray(steps, dtype=int))
    if known.size <= count:
        return known
    wanted = np.geomspace(10, max(known[-1], 11), count - 10)
    nearest = np.searchsorted(known, wanted).clip(0, known.size - 1)
    return np.unique(np.concatenate([known[known <= 10], known[nearest], known[-1:]]))


def binned(frame: pd.DataFrame, quantity: str, count: int = 100) -> pd.DataFrame:
    """One run's quantity by step as means over at most `count` equal runs of steps.

    A NaN or Inf in a bin makes its mean non-finite, too; `step` is the bin's last.
    """
    data = measured(frame, quantity).sort_values("step")
    width = max(1, math.ceil(len(data) / count))
    place = np.arange(len(data)) // width
    values = [part.mean() for part in _chunks(data[quantity].to_numpy(), width)]
    last = data["step"].to_numpy(dtype=int)[np.r_[np.flatnonzero(np.diff(place)), len(data) - 1]]
    return pd.DataFrame({"step": last, quantity: values}) if len(data) else data[["step", quantity]]


def _chunks(values: NDArray[np.float64], width: int) -> list[NDArray[np.float64]]:
    return [values[i : i + width] for i in range(0, len(values), width)]


# --- growth per layer -----------------------------------------------------------------------------

MIN_LAYERS = 5
FLAT_RATE = math.log(1.1)
"""A rate is given of what changes by less than this (natural log) a layer, whatever its law, …"""
FLAT_RANGE = math.log(3)
"""… and by less than this in all, …"""
FLAT_NOISE = 0.2
"""… and strays from the fitted line by no more than this (root mean square, natural log)."""
NOISE_FLOOR, NOISE_SHARE = 0.1, 0.05
"""An exponential's residuals: at most this share of the change over all layers, or, where the
rate is not one that chance alone gives a network that keeps its gradient, the floor."""
CURVE_FLOOR, CURVE_SHARE = 0.1, 0.2
"""An exponential's bend, c in y = a + bx + cx² on x ∈ [−1, 1]: at most the floor or share × |b|."""
MIN_RANGE = math.log(2.5)
"""An exponential's change over all layers, at least: over less, any law looks like any other."""
GROWS, SHRINKS, FLAT = "grows", "shrinks", "flat"
ROUNDING = 1e-10
"""Residuals (root mean square, natural log) and slopes below this are the arithmetic's."""


@dataclass(frozen=True)
class Rate:
    """How a gradient norm changes a layer toward the input, over a chain of like layers.

    Whether that is trouble depends on the depth and on all other layers: `gradflow.diagnosis`
    judges, a rate does not.

    `factor` is a ratio of norms (not squared) and None where no exponential fits; `reason` says
    why there is none. `low` and `high` bound the factor: 95 %, over the chain's layers (see
    `fit_rate`). `first_last` is the norm of the network's first layer of this kind over that of its
    last.
    """

    factor: float | None = None
    reason: str = ""
    layers: int = 0
    stage: int | None = None
    kind: str = ""
    first_last: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @property
    def trend(self) -> str:
        """`grows`, `shrinks` or `flat` toward the input: the interval is above, below or around 1.

        Empty where there is no interval.
        """
        if self.low > 1:
            return GROWS
        if self.high < 1:
            return SHRINKS
        return FLAT if self.low <= 1 <= self.high else ""


def fit_rate(norms: ArrayLike) -> Rate:
    """Growth factor a layer toward the input of the norms of like layers, input side first.

    The factor is exp(−slope) of ln(norm) against the layer's ordinal, by least squares. It is
    given only where the norms keep their size, or where an exponential describes them: little
    residual, no bend, and enough of a change to tell. A power law, as in residual networks, and
    tanh's slow decay are refused; so are zeros and non-finite norms.

    Its interval is the slope's t interval, the layers counted for as many as are independent:
    n(1 − r)/(1 + r), r the residuals' correlation from one layer to the next (Santer et al. 2000,
    doi 10.1029/1999JD901105, eq. 6). NaN where fewer than three are left.
    """
    values = np.asarray(norms, dtype=float)
    n = values.size
    broken = _broken(values)
    if broken or n < MIN_LAYERS:
        return Rate(reason=broken or f"fewer than {MIN_LAYERS} like layers in a row", layers=n)
    y, x = np.log(values), np.linspace(-1, 1, n)
    line = np.polyfit(x, y, 1)
    noise = float(np.sqrt(((y - np.polyval(line, x)) ** 2).sum() / (n - 2)))
    bend = abs(np.polyfit(x, y, 2)[0])
    slope = -line[0] * 2 / (n - 1)
    span = abs(slope) * (n - 1)
    factor = float(np.exp(slope))
    half = _slope_half(y - np.polyval(line, x)) * 2 / (n - 1)
    low, high = float(np.exp(slope - half)), float(np.exp(slope + half))
    level = abs(slope) <= FLAT_RATE and span <= FLAT_RANGE and noise <= FLAT_NOISE
    floor = NOISE_FLOOR if abs(slope) > FLAT_RATE else 0.0
    straight = noise <= max(floor, NOISE_SHARE * span)
    straight &= bend <= max(CURVE_FLOOR, CURVE_SHARE * abs(line[0]))
    if level or (straight and span >= MIN_RANGE):
        return Rate(factor, layers=n, low=low, high=high)
    return Rate(reason="no exponential fits", layers=n)


def _slope_half(residuals: NDArray[np.float64]) -> float:
    """Half the 95 % interval of a slope over x ∈ [−1, 1], from the residuals of the fit."""
    n, squares = residuals.size, float((residuals**2).sum())
    if squares <= ROUNDING**2 * n:
        return ROUNDING
    next_to = max(0.0, float(residuals[1:] @ residuals[:-1]) / squares)
    independent = n * (1 - next_to) / (1 + next_to)
    if independent < 3:
        return math.nan
    spread = math.sqrt(squares / (independent - 2) / (np.linspace(-1, 1, n) ** 2).sum())
    return float(stdtrit(independent - 2, (1 + LEVEL) / 2)) * spread


def _broken(values: NDArray[np.float64]) -> str:
    infinite, zero = int((~np.isfinite(values)).sum()), int((values == 0).sum())
    if infinite:
        return f"not finite in {infinite} of {values.size} layers"
    return f"exactly zero in {zero} of {values.size} layers" if zero else ""


Rows = NDArray[np.void]
"""Layers as a structured array, an element each, with the fields of `_ROW`: a frame of a few rows
takes longer to cut than to fit."""
_TEXTS, _NUMBERS = ("layer", "kind", "shape"), ("position", "stage")
_ROW = np.dtype(
    [(name, object) for name in _TEXTS] + [(n, float) for n in (*_NUMBERS, "chain", "value")]
)


def layer_rows(frame: pd.DataFrame) -> Rows:
    """The rows of a frame of layers, their `value` still to come: see `with_values`.

    What is unknown, or of a column that the frame lacks, is NaN. Layers of one stage and shape have
    one `chain`: chains are in the order of stages, and in a stage in that of shapes.
    """
    lacking = [name for name in (*_TEXTS, *_NUMBERS) if name not in frame]
    frame = frame.assign(**dict.fromkeys(lacking, np.nan)) if lacking else frame
    rows = np.empty(len(frame), _ROW)
    for name in _TEXTS:
        rows[name] = frame[name].to_numpy(dtype=object, na_value=np.nan)
    for name in _NUMBERS:
        rows[name] = floats(frame[name])[0]
    shape = frame["shape"].factorize(sort=True)[0]
    chain = rows["stage"] * (shape.max(initial=0) + 1) + shape
    rows["chain"] = np.where(shape < 0, np.nan, chain)
    return rows


def with_values(rows: Rows, column: pd.Series) -> Rows:
    """Those of the rows of a frame in which one of its columns was measured, with its values."""
    values, known = floats(column)
    rows = rows[known]
    rows["value"] = values[known]
    return rows


def layer_rate(frame: pd.DataFrame, quantity: str = "weight_grad_norm") -> Rate:
    """`rate_of` one run's `profile` at one step."""
    return rate_of(with_values(layer_rows(frame), frame[quantity]))


def rate_of(layers: Rows) -> Rate:
    """`fit_rate` of the first chain of like layers in one run at one step.

    The chain is that of same-shaped convolutions of the first stage that has five of them; of
    linear layers where there are no convolutions.
    """
    for kind in ("conv", "linear"):
        rows = layers[layers["kind"] == kind]
        rows = rows[np.argsort(rows["position"], kind="stable")]
        if len(rows) < 2:
            continue
        values, chains = rows["value"], rows["chain"]
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = float(np.divide(values[0], values[-1]))
        known, counts = np.unique(chains[chains == chains], return_counts=True)
        long = known[counts >= MIN_LAYERS]
        if not long.size:
            reason = _broken(values) or f"fewer than {MIN_LAYERS} like layers in a stage"
            return Rate(reason=reason, kind=kind, first_last=ends, layers=len(rows))
        chain = chains == long[0]  # of the lowest stage
        stage = int(rows["stage"][chain][0])
        return replace(fit_rate(values[chain]), stage=stage, kind=kind, first_last=ends)
    return Rate(reason="fewer than two convolutions or linear layers")


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    """`layer_rate` of each run and step of a `profile`, beside the zeros and non-finite values."""
    keys, quantity = ["run_id", "step"], "weight_grad_norm"
    carried = [c for c in ("group", "title", "depth", "arm", "seed", "moment") if c in frame]
    columns = [*keys, *carried, "kind", "position", "stage", "shape", quantity]
    weights = frame.loc[frame["family"] == WEIGHT, columns]
    if weights.empty:
        return _with_depth(pd.DataFrame())
    layers = layer_rows(weights)
    layers["value"] = floats(weights[quantity])[0]
    number = weights.groupby(keys, sort=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(number[order])) + 1)
    about = weights[[*keys, *carried]].iloc[[part[0] for part in parts]].to_dict("records")
    rows = []
    for named, part in zip(about, parts, strict=True):
        rate, values = rate_of(layers[part]), layers["value"][part]
        rows.append(
            named
            | {"factor": rate.factor, "low": rate.low, "high": rate.high}
            | {"trend": rate.trend, "reason": rate.reason}
            | {"kind": rate.kind, "stage": rate.stage, "layers": rate.layers}
            | {"first_last": rate.first_last, "zeros": int((values == 0).sum())}
            | {"non_finite": int((~np.isfinite(values)).sum()), "text": sentence(rate)}
        )
    return _with_depth(pd.DataFrame(rows))


def _with_depth(frame: pd.DataFrame) -> pd.DataFrame:
    """Depths are whole numbers also where a run has none."""
    return frame.astype({"depth": "Int64"}) if "depth" in frame else frame


def short(value: float) -> str:
    """Three significant digits: `18.7`, `4.23e3`, `1.2e-7`."""
    if not math.isfinite(value) or value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def sentence(rate: Rate) -> str:
    """What a gradient does toward the input, in words."""
    stage = "the first stage's" if rate.stage == 1 else f"stage {rate.stage}'s"
    owner = "the hidden layers'" if rate.kind == "linear" else stage
    who = f"the gradient of {owner} weights"
    if rate.factor is not None:
        return f"{who} {_trend_words(rate.trend, _factor_words(rate.factor))}"
    if rate.reason == "no exponential fits":
        return f"no exponential fits: first/last = {short(rate.first_last)}"
    if rate.reason.startswith(("not finite", "exactly zero")):
        return f"the gradient of the weights is {rate.reason}: no rate"
    ends = f"; first/last = {short(rate.first_last)}" if rate.first_last == rate.first_last else ""
    return f"no rate ({rate.reason}){ends}"


def _trend_words(trend: str, factor: str) -> str:
    return {
        GROWS: f"grows {factor} a layer toward the input",
        SHRINKS: f"shrinks to {factor} a layer toward the input",
        FLAT: f"keeps its size ({factor} a layer)",
    }.get(trend, f"changes {factor} a layer toward the input, with too few layers for an interval")


def _factor_words(factor: float) -> str:
    """`1.21×`, `0.0012×`, and of what hardly changes as many digits as tell it from 1."""
    shown = f"{factor:.2f}" if factor >= 0.01 else short(factor)
    return f"{factor:.5g}×" if shown == "1.00" else f"{shown}×"


def other_circumstances(run: Run) -> list[str]:
    """A line for each time that the run was gone on with where results may differ in rounding."""
    lines, before = [], run.record.get("environment") or {}
    for attempt in run.record.get("resumed") or ():
        here = attempt.get("environment") or {}
        kinds = ("python", "device", "threads", "devices", "nodes")
        changed = {kind: (before.get(kind), here.get(kind)) for kind in kinds}
        versions = [place.get("versions") or {} for place in (before, here)]
        for name in versions[0].keys() | versions[1].keys():
            changed[name] = (versions[0].get(name), versions[1].get(name))
        words = [f"{name} {old} → {new}" for name, (old, new) in changed.items() if old != new]
        if words:
            made = counted(attempt.get("updates"), "update")
            lines.append(f"gone on after {made} with {', '.join(sorted(words))}")
        before = here
    return lines


def ordered(arms: Iterable[str]) -> list[str]:
    """The distinct arms, plain and residual first."""
    known = list(dict.fromkeys(arms))
    rank = {name: place for place, name in enumerate(ARMS)}
    return sorted(known, key=lambda name: (rank.get(name, len(rank)), name))


def counted(count: int, noun: str) -> str:
    """`1 run`, `18 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def when(steps: ArrayLike) -> str:
    """A moment in words: `initialisation`, `after 263 updates`."""
    known = np.unique(np.asarray(steps, dtype=int))
    if known[-1] == 0:
        return "initialisation"
    first = f"{known[0]} to " if len(known) > 1 else ""
    return f"after {first}{counted(known[-1], 'update')}"


def rate_words(frame: pd.DataFrame) -> pd.DataFrame:
    """The `rates` of several seeds in words: a row a group, depth, arm and step.

    `rate` is the geometric mean of the factors with its range over the seeds that have one.
    """
    rows = []
    keys = [c for c in ("group", "title", "depth", "arm", "step") if c in frame]
    for key, part in frame.groupby(keys, sort=True, dropna=False):
        fits = part[part["factor"].notna()]
        factors, count = fits["factor"].to_numpy(dtype=float), f"{len(fits)} of {len(part)}"
        ends = part["first_last"].to_numpy(dtype=float)
        trends = dict.fromkeys([*filter(None, fits["trend"]), *filter(None, part["reason"])])
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"rate": _range(factors, 3) + "×" if len(fits) else "–"}
            | {"trend": ", ".join(trends) or "–"}
            | {"fits": count, "first_last": _range(ends), "kind": part["kind"].iloc[0]}
            | {"zeros": int(part["zeros"].sum()), "non_finite": int(part["non_finite"].sum())}
        )
    return _with_depth(pd.DataFrame(rows))


def _range(values: NDArray[np.float64], digits: int | None = None) -> str:
    """Geometric mean and range of positive numbers; the plain values where there are others."""

    def show(value: float) -> str:
        return short(value) if digits is None or value < 0.01 else f"{value:.{digits}f}"

    if not (np.isfinite(values).all() and (values > 0).all()):
        return ", ".join(dict.fromkeys("–" if np.isnan(v) else short(v) for v in values))
    low, mean, high = values.min(), float(np.exp(np.log(values).mean())), values.max()
    return show(mean) if show(low) == show(high) else f"{show(mean)} ({show(low)}–{show(high)})"
