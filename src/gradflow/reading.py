"""What a report shows of each run, read from its tables: by several processes, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gradflow import cache, diagnosis, flight, tables, views
from gradflow.cache import Cache, Fingerprint
from gradflow.errors import StoreError
from gradflow.helpers import Helpers
from gradflow.store import Run

QUANTITY = "weight_grad_norm"
VIEW, HEAT = "view", "heat"
_DAMAGED = "damaged"
_DRAWN = ("step", "layer", "family", "ordinal")
"""What a heatmap takes of a profile: it has more rows than all else, and is in no table."""
_ABOUT = ("run_id", "run", "group", "title", "depth", "arm", "seed")

# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A run to be read.

    Attributes:
        path: its directory.
        extras: layers that other runs of its comparison lack.
        size: bytes that its view may take.
        names: of the READERS.
    """

    path: Path
    extras: frozenset[str]
    size: int
    names: tuple[str, ...]

    def key(self, files: Fingerprint) -> str:
        return cache.digest(files.files, sorted(self.extras), self.size, self.names)


def profiles(run: Run, task: Task) -> pd.DataFrame:
    steps = tables.moments(run.steps_of("weights"))
    frame = run.with_modules("weights", steps)
    if QUANTITY not in frame:
        return pd.DataFrame()
    names = ["first", "middle", "last"][: len(steps)] if len(steps) != 2 else ["first", "last"]
    return tables.profile(frame, extras=task.extras).assign(
        moment=lambda f: f["step"].map(dict(zip(steps, names, strict=True)))
    )


def heat(run: Run, task: Task) -> pd.DataFrame:
    steps = tables.spread(run.steps_of("weights"))
    frame = run.with_modules("weights", steps) if len(steps) > 1 else pd.DataFrame()
    if QUANTITY not in frame:
        return pd.DataFrame()
    return tables.profile(frame, extras=task.extras)[[*_DRAWN, QUANTITY]]


def blocks(run: Run, _: Task) -> pd.DataFrame:
    steps = run.steps_of("blocks")
    if not steps.size:
        return pd.DataFrame()
    frame = run.with_modules("blocks", steps[[0, -1]])
    moment = np.where(frame["step"].to_numpy(dtype=int) == steps[0], "first", "last")
    return frame.assign(moment=moment)


def curves(run: Run, _: Task) -> pd.DataFrame:
    steps, evaluations = run.frame("steps"), run.frame("evaluations")
    parts = []
    splits = set(evaluations["split"]) if len(evaluations) else set()
    for measure in ("loss", "accuracy"):
        if measure in steps and not (measure == "accuracy" and "train_batches" in splits):
            parts.append(_curve(tables.binned(steps, measure), measure, "train"))
        if measure not in evaluations:
            continue
        for split, shown in (("train_batches", "train"), ("test", "test"), ("train", "train")):
            if measure == "loss" and split != "test":
                continue  # the loss of each step says more, and in the mode of training
            rows = tables.measured(evaluations[evaluations["split"] == split], measure)
            final = split == "train"
            parts.append(_curve(rows.tail(1) if final else rows, measure, shown, final=final))
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _curve(rows: pd.DataFrame, measure: str, split: str, *, final: bool = False) -> pd.DataFrame:
    values = {"step": rows["step"].to_numpy(dtype=int), "value": rows[measure].to_numpy(float)}
    return pd.DataFrame(values | {"measure": measure, "split": split, "final": final})


READERS: dict[str, Callable[[Run, Task], pd.DataFrame | bytes]] = {
    "profiles": profiles,
    "curves": curves,
    "blocks": blocks,
    "diagnoses": lambda run, _: diagnosis.diagnoses(run),
    "stories": lambda run, _: flight.stories(run),
    VIEW: lambda run, task: views.pack(run, task.extras, size=task.size),
    HEAT: heat,
}
"""What is read of a run: a frame, or bytes as they are. A reader sees the files of its run and the
task, and nothing else: what it gives is kept as long as these are the same."""


def read(task: Task) -> dict[str, bytes]:
    """Parts by reader, frames encoded, those that have nothing left out; and what is damaged."""
    parts, damaged = {}, []
    try:
        run = Run(task.path).held()
    except StoreError as error:  # gone, or cut off, since it was listed
        return {_DAMAGED: json.dumps([str(error)]).encode()}
    for name in task.names:
        try:
            part = READERS[name](run, task)
        except StoreError as error:
            damaged.append(str(error))
            continue
        if len(part):
            parts[name] = part if isinstance(part, bytes) else cache.encode(part)
    return parts | {_DAMAGED: json.dumps(damaged).encode()}


# --- all runs -------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What was read of some runs.

    Attributes:
        frames: by reader, all runs one under another, with what the overview says of each.
        views: run_id -> its view (see `gradflow.views`).
        damaged: what could not be read, a line each.
    """

    frames: dict[str, pd.DataFrame]
    views: dict[str, bytes]
    damaged: list[str]


def read_all(
    members: Sequence[Run],
    overview: pd.DataFrame,
    extras: Mapping[str, set[str]],
    *,
    drawn: int,
    kept: Cache,
    helpers: Helpers,
) -> Reading:
    """What is shown of the runs' tables, each read once.

    Args:
        extras: run's name -> layers that other runs of its comparison lack.
        drawn: groups of which each arm has its heatmap, of its first run that has a profile.
        kept: what was read before.
    """
    order = _by_preference(overview)
    arms = [tuple(row) for row in overview[["group", "depth", "arm"]].to_numpy(dtype=object)]
    mapped = {place: arms[place] for place in order if arms[place][0] < drawn}
    first = _first_of(mapped)
    size = views.share(len(members))

    def task(place: int, names: Sequence[str]) -> Task:
        path = members[place].path
        return Task(path, frozenset(extras.get(path.name, ())), size, tuple(names))

    tasks = [task(p, [n for n in READERS if n != HEAT or p in first]) for p in order]
    found = dict(zip(order, _read_or_kept(tasks, kept, helpers), strict=True))
    # Where that of the lowest seed has none, the next one's that has.
    others = _first_of({p: arm for p, arm in mapped.items() if "profiles" in found[p]}) - first
    again = [task(place, [HEAT]) for place in sorted(others)]
    for place, parts in zip(sorted(others), _read_or_kept(again, kept, helpers), strict=True):
        found[place] |= {HEAT: parts[HEAT]} if HEAT in parts else {}
    damaged = [line for place in sorted(found) for line in json.loads(found[place][_DAMAGED])]
    ids = [run.run_id for run in members]
    packed = {ids[place]: found[place][VIEW] for place in sorted(found) if VIEW in found[place]}
    return Reading(_frames(found, overview), packed, damaged)


def _first_of(arms: Mapping[int, Any]) -> set[int]:
    """The first place of each arm."""
    found: dict[Any, int] = {}
    for place, arm in arms.items():
        found.setdefault(arm, place)
    return set(found.values())


def _frames(
    found: Mapping[int, Mapping[str, bytes]], overview: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """By reader, the runs' frames one under another, with what the overview says of each run."""
    frames = {}
    for name in READERS:
        places = [place for place in sorted(found) if name != VIEW and name in found[place]]
        if places:
            frame, counts = cache.decode([found[place][name] for place in places])
            rows = np.repeat(places, counts)
            frames[name] = frame.assign(**{c: overview[c].array.take(rows) for c in _ABOUT})
    return frames


def _read_or_kept(tasks: Sequence[Task], kept: Cache, helpers: Helpers) -> list[dict[str, bytes]]:
    """`read` of each task, what was kept of it where its run's files are as they were.

    Heatmaps are kept apart: which run has that of its arm changes with the other runs.
    """
    before = [_fingerprint(task) for task in tasks]
    found: list[dict[str, bytes]] = [{_DAMAGED: b"[]"} for _ in tasks]
    missing: dict[int, Task] = {}
    for place, (task, files) in enumerate(zip(tasks, before, strict=True)):
        names: list[str] = []
        for part in _apart(task):
            parts = None if files is None else kept.load(_entry(part), part.key(files))
            if parts is None:
                names += part.names
            else:
                found[place] |= parts
        if names:
            missing[place] = replace(task, names=tuple(names))
    for place, parts in zip(missing, helpers.map(read, missing.values()), strict=True):
        task, files = missing[place], before[place]
        found[place] |= parts
        # Of a damaged run nothing is kept; one that changed while it was read may be half of each.
        whole = parts[_DAMAGED] == b"[]"
        if whole and files is not None and files.settled and files == _fingerprint(task):
            for part in _apart(task):
                own = {name: parts[name] for name in part.names if name in parts}
                kept.save(_entry(part), part.key(files), own)
    return found


def _apart(task: Task) -> list[Task]:
    """The task without its heatmap, and the heatmap, as far as it has both."""
    names = [tuple(name for name in task.names if name != HEAT), (HEAT,)]
    return [replace(task, names=part) for part in names if set(part) & set(task.names)]


def _fingerprint(task: Task) -> Fingerprint | None:
    try:
        return cache.fingerprint(task.path)
    except OSError:
        return None


def _entry(task: Task) -> str:
    """A name for what is kept of a run: that of another store's run of this name differs."""
    place = hashlib.sha256(str(task.path.resolve()).encode()).hexdigest()[:8]
    return f"{task.path.name}-{place}.{HEAT if task.names == (HEAT,) else 'run'}"


def _by_preference(overview: pd.DataFrame) -> list[int]:
    """The rows, those first that stand for their arm where one run is shown: the lowest seed
    done."""
    order = overview.assign(late=overview["status"] != "done").sort_values(
        ["late", "seed"],
        key=lambda column: column.map(lambda v: (v is None, str(v))),
        kind="stable",
    )
    return list(order.index)
