"""Runs on disk: write parts while running, finish, load, query.

A run is one directory, described in `schema` and here:

    spec.json           what defines the run, defaults written out (a user's `meta` if external)
    run.json            status, times, environment, match certificate, metrics, error, and how many
                        rows each table has once the run has ended
    modules.parquet     one row a module or block
    <table>.parquet     weights, outputs, blocks, steps, evaluations, probes; none if it has no rows
    attempt-<n>/        until finished: claim.json of who is at work (see `claim`), checkpoint.pt to
                        go on from, and <table>-<number>.parquet, merged at the end
    metrics.csv, tensorboard/, wandb/   a logger's mirror, if asked for; see `tracking`

A finished run is eight files or nine. Every file is written under a temporary name and renamed, so
that a kill at any moment leaves a readable run.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import math
import operator
import os
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, reduce
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from gradflow import claim, schema
from gradflow.claim import Claim
from gradflow.errors import Busy, GradflowError, SpecError, StoreError
from gradflow.interrupt import of_interrupt
from gradflow.spec import RunSpec, flatten

if TYPE_CHECKING:
    import pandas as pd
    from pyarrow.compute import Expression
    from pyarrow.dataset import Dataset

STATUSES = ("running", "done", "diverged", "interrupted", "failed")
FINISHED = ("done", "diverged")
"""Statuses of a run that has its result: it is not run again."""
FAILURES = ("raised", "timeout", "killed", "system")
"""What ended a failed run: its own code, its sweep's patience, a signal or its machine, a refusal
of the system such as a full disk."""
LASTING = ("raised", "timeout")
"""Failures that the same run would meet again: a sweep does not try it again unless told to."""
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "train_top5", "test_top5")
CHECKPOINT = "checkpoint.pt"
"""What an unfinished run goes on from; see `training.checkpoint`."""
SWEEPS = ".sweeps"
"""Directory of a store that names the sweeps under way; see `sweep`."""
CORE_FIELDS = ("network", "depth", "skip", "seed", "data", "lr")
"""Fields that every table of `Runs` carries, beside those in which its runs differ."""

_UNDECIDED = ("running", "interrupted")  # statuses that whoever watched the process may correct
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE,
             errno.ENFILE)  # fmt: skip
_LOOKS = 5  # at files that may be merged, and be gone, before they are read
_SETTLE = 64  # parts of a user's own record between two merges
_KEPT = ("started", "environment", "resumed")  # of run.json, where an attempt is gone on with
_TYPES: dict[str, tuple[type, ...]] = {
    "origin": (str,),
    "error": (str, NoneType),
    "failure": (str, NoneType),
    "attempt": (int,),
    "divergence": (dict, NoneType),
    "resumed": (list,),
    **dict.fromkeys(("metrics", "certificate", "environment", "tables"), (dict,)),
    **dict.fromkeys(("steps", "started", "seconds", "recorder_share"), (int, float, NoneType)),
    **dict.fromkeys((f"metrics.{name}" for name in METRICS), (int, float)),
    "certificate.parameter_count": (int,),
    "certificate.parameters": (dict, NoneType),
    "environment.versions": (dict,),
    "environment.git": (dict, NoneType),
}
"""What stands in run.json, where it stands there: all that is used of it."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# --- JSON with non-finite numbers as strings ------------------------------------------------------


def encode(value: Any) -> Any:
    """Plain JSON data; NaN, Infinity and -Infinity become these words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(name): encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(encode(value), indent=1, allow_nan=False) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        value = json.loads(text)
        if "\\ud" in text:  # half a character, which neither Arrow nor a page can take
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise StoreError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: unreadable ({error})") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: unreadable (not a JSON object)")
    return decode(value)


def _read_record(directory: Path) -> dict[str, Any]:
    """The content of run.json. Raises StoreError where it is missing or not what it should be."""
    path = directory / "run.json"
    record = _read_json(path)
    if record.get("status") not in STATUSES:
        raise StoreError(f"{path}: unreadable (no status)")
    for label, types in _TYPES.items():
        part, _, name = label.rpartition(".")
        values = record.get(part, {}) if part else record
        if name in values and type(values[name]) not in types:
            raise StoreError(f"{path}: unreadable ({label} has a wrong type)")
    return record


# --- writing --------------------------------------------------------------------------------------


class RunWriter:
    """Writes one run; a context manager that leaves the run with the status of how it ended.

    Args:
        path: the run's directory; made, and claimed until the writer is closed. What an earlier
            attempt left in it is removed.
        spec: the content of spec.json.
        origin: `gradflow`, or `external` for a record of somebody's own loop.
        keep: asked, once the run is claimed, how many of the parts that an earlier attempt wrote
            belong to what is gone on with; 0 is a new beginning. It is given the directory of the
            attempt.

    Attributes:
        attempt: the directory of what is not finished: parts and checkpoint.
        part: the number of the last part written.
        record: the content of run.json.
        spent: seconds that the attempt gone on with had taken.

    Raises:
        Busy: another process is at work on the run; from any method, if it has taken it over.
        StoreError: the directory cannot be written, holds something else than a run, a run of the
            other origin or a finished external one; or its name would break a table's line.
    """

    def __init__(
        self,
        path: str | Path,
        spec: Mapping[str, Any],
        *,
        origin: str = "gradflow",
        keep: Callable[[Path], int] = lambda attempt: 0,
    ):
        self.path = Path(path)
        if not _is_one_line(self.path.name):
            raise StoreError(
                f"{str(path)!r}: a run's name has no line breaks or control characters"
            )
        self._opened, self.spent = time.monotonic(), 0.0
        self.record: dict[str, Any] = {"origin": origin, "status": "running"}
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = Claim(self.path, after=_attempts(self.path))
            try:
                self.record["attempt"] = self._claim.number
                earlier = self._earlier(origin)
                self.part = keep(self.attempt)
                self._clear()
                if self.part:
                    self.record |= {name: earlier[name] for name in _KEPT if name in earlier}
                self._write_json("spec.json", spec)
                self.update(started=self.record.get("started", time.time()))
            except BaseException:
                self._claim.release(keep=True)
                raise

    @property
    def attempt(self) -> Path:
        return self._claim.attempt

    def _earlier(self, origin: str) -> dict[str, Any]:
        """The run.json of what is replaced, or gone on with; StoreError if that must not be."""
        if not (self.path / "run.json").exists():
            known = (".", "attempt-")
            foreign = any(not path.name.startswith(known) for path in self.path.iterdir())
            if foreign and not (self.path / "spec.json").exists():
                raise StoreError(f"{self.path}: holds other files, and no run")
            return {}
        try:
            earlier = _read_record(self.path)
        except StoreError:
            if origin == "external":  # of unknown status: not ours to remove
                raise
            return {}
        if earlier.get("origin") != origin:
            held = "a run of another origin"
        elif origin == "external" and earlier["status"] in FINISHED:
            held = "a finished run"
        else:
            return earlier
        raise StoreError(f"{self.path}: holds {held}; save elsewhere or remove it")

    def _clear(self) -> None:
        if not self.part:
            (self.attempt / CHECKPOINT).unlink(missing_ok=True)
        # From the last on, so that a kill in the middle leaves a whole beginning.
        standing = _parts(self.attempt)
        for path in {*self.attempt.glob("*.parquet")} - {*standing}:
            path.unlink()
        for path in reversed(standing):
            if _numbers(path)[1] > self.part:
                path.unlink()
        for path in [*self.path.glob("*.parquet"), *self.path.glob("**/.*.tmp")]:
            path.unlink(missing_ok=True)
        for path in self.path.glob("attempt-*"):
            if path != self.attempt:
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.record["status"] != "running":
            return
        if kind is None:
            self.finish("done")
        elif issubclass(kind, Busy):
            self._claim.release(keep=True)
        elif issubclass(kind, SystemExit) or of_interrupt(error):
            self.finish("interrupted")
        else:
            self.finish("failed", failure=_failure(error), error=f"{kind.__name__}: {error}")

    def append(self, name: str, data: pa.Table) -> None:
        """Add rows to a table, in a file of their own that is readable at once."""
        if data.num_rows:
            with self.writes():
                schema.write(data, self.attempt / f"{name}-{self.part + 1:06d}.parquet")
            self.part += 1
            if self.record["origin"] == "external" and self.part % _SETTLE == 0:
                self.settle()

    def settle(self) -> None:
        """Merge parts into few files: none that was written so far will be taken back.

        The last ones, as long as the one before them is not much larger than all of them together:
        so a table of n parts is about log n files, and each row is rewritten as often.
        """
        for name in schema.KEYS:
            chosen: list[Path] = []
            size = 0
            for path in reversed(_parts(self.attempt, name)):
                bytes_ = path.stat().st_size
                if chosen and bytes_ > 2 * size:
                    break
                chosen.insert(0, path)
                size += bytes_
            if len(chosen) > 1:
                self._join(name, chosen)

    def _join(self, name: str, paths: list[Path]) -> None:
        first, last = _numbers(paths[0])[0], _numbers(paths[-1])[1]
        with self.writes():
            whole = schema.concatenate([_read_part(path) for path in paths])
            schema.write(whole, self.attempt / f"{name}-{first:06d}-{last:06d}.parquet")
        for path in paths:
            path.unlink()

    def write(self, name: str, data: pa.Table) -> None:
        """Write a whole table that gets no more rows, as `modules`."""
        with self.writes():
            schema.write(data, self.attempt / f"{name}.new")
            self._claim.place(f"{name}.new", f"{name}.parquet")

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        self.record |= fields
        self._write_json("run.json", self.record)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with self.writes():
            (self.attempt / f".{name}.tmp").write_text(_json(value))
            self._claim.place(f".{name}.tmp", name)

    @contextlib.contextmanager
    def writes(self) -> Iterator[None]:
        """What cannot be written in the attempt is a StoreError; Busy if that was taken over."""
        with _writing(self.path):
            try:
                yield
            except OSError:
                self._claim.check()
                raise

    def finish(self, status: str, **fields: Any) -> None:
        """Set the status and give the run free; nothing may be written afterwards.

        The parts are merged and the checkpoint removed, but for a run that can go on from there.
        """
        goes_on = status not in FINISHED and (self.attempt / CHECKPOINT).exists()
        try:
            if not goes_on:
                fields["tables"] = self._merge()
            self.update(status=status, ended=time.time(), seconds=self.seconds, **fields)
        except BaseException:
            self.record["status"] = "running"
            if status not in FINISHED:  # parts, and what run.json said before, stand
                self._claim.release(keep=True)
            raise
        self._claim.release(keep=goes_on)

    def _merge(self) -> dict[str, dict[str, int]]:
        """Each table becomes one file; the rows and bytes of each."""
        found = {}
        for name in schema.KEYS:
            path, data = self.path / f"{name}.parquet", _read_parts(self.attempt, name)
            if data is not None:
                self.write(name, data)
            if path.exists():
                found[name] = {"rows": schema.count(path), "bytes": path.stat().st_size}
        return found

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, without what was lost or paused between attempts."""
        return self.spent + time.monotonic() - self._opened


def _is_one_line(name: str) -> bool:
    return not any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name)


def _failure(error: BaseException | None) -> str:
    """Which of FAILURES an exception is: the run's own doing, unless the system refused it room."""
    ours = isinstance(error, GradflowError) and isinstance(error, OSError)
    refused = isinstance(error, OSError) and error.errno in _REFUSALS
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    memory = memory or "can't allocate memory" in str(error)  # torch's own on a CPU
    return "system" if ours or refused or memory else "raised"


def _attempts(path: Path) -> int:
    """The number of the last attempt at a run, as far as run.json tells."""
    try:
        number = _read_json(path / "run.json").get("attempt", 0)
    except StoreError:
        return 0
    return number if isinstance(number, int) else 0


@contextlib.contextmanager
def _writing(label: object) -> Iterator[None]:
    """What the system refuses becomes a StoreError of one line."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise StoreError(f"{label}: cannot be written ({reason})") from None


def _numbers(part: Path) -> tuple[int, int]:
    """The first and the last part that a file holds: more than one if it was merged."""
    first, _, last = part.stem.partition("-")[2].partition("-")
    return int(first), int(last or first)


def _parts(attempt: Path, name: str = "*") -> list[Path]:
    """Files of parts, in order, without those that lie in a merged one and are about to go."""
    paths = {path: _numbers(path) for path in attempt.glob(f"{name}-*.parquet")}
    merged: dict[str, list[tuple[int, int]]] = {}
    for path, (first, last) in paths.items():
        if first < last:
            merged.setdefault(path.stem.partition("-")[0], []).append((first, last))

    def stands(path: Path) -> bool:
        (first, last), others = paths[path], merged.get(path.stem.partition("-")[0], [])
        return not any(a <= first and last <= b and (a, b) != (first, last) for a, b in others)

    return sorted(filter(stands, paths), key=lambda path: paths[path])


def _read_parts(
    attempt: Path,
    name: str,
    columns: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
) -> pa.Table | None:
    parts = [_read_part(path, columns, steps) for path in _parts(attempt, name)]
    return schema.concatenate(parts) if parts else None


def _read_part(
    path: Path, columns: Sequence[str] | None = None, steps: Sequence[int] | None = None
) -> pa.Table:
    try:
        return schema.read(path, columns, steps)
    except pa.ArrowException as error:
        raise StoreError(f"{path}: unreadable ({str(error).splitlines()[0]})") from None


def damaged(attempt: Path, upto: int) -> Path | None:
    """The first of an attempt's parts, up to that number, that cannot be read; by footers alone."""
    for path in _parts(attempt):
        try:
            if _numbers(path)[1] <= upto:
                schema.count(path)
        except (OSError, pa.ArrowException):
            return path
    return None


def prepare(runs_dir: str | Path) -> Path:
    """The store's directory, made if missing. Raises StoreError where it cannot be written."""
    path = Path(runs_dir)
    with _writing(f"runs_dir={path}"):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path, prefix=".writable.").close()
    return path


# --- reading one run ------------------------------------------------------------------------------


class Run:
    """One run of a store, finished or not. Reads run.json and spec.json at once, tables on demand.

    Raises:
        StoreError: one of the two is missing, unreadable, or has a field of a wrong type.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.record = _read_record(self.path)
        self.spec = _read_json(self.path / "spec.json")
        self._held: dict[str, pa.Table | None] | None = None

    def held(self) -> Run:
        """The same run, each of whose tables is read once and kept: for several looks at it."""
        if self._held is not None:
            return self
        held = copy(self)
        held._held = {}
        return held

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status})"

    @property
    def run_id(self) -> str:
        """The hash at the end of the directory's name; for an external run a hash of its path."""
        if self.record.get("origin") == "gradflow":
            return self.path.name.rsplit("-", 1)[-1]
        return hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()[:10]

    @property
    def status(self) -> str:
        return self.record["status"]

    @property
    def alive(self) -> bool:
        """Whether a process is at work on the run, on this machine or another."""
        return self.status == "running" and claim.alive(self.path)

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics: `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy`."""
        return self.record.get("metrics", {})

    def columns(self) -> dict[str, Any]:
        """The spec as one flat row of columns."""
        return flatten(self.spec)

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        steps: Iterable[int] | None = None,
    ) -> pa.Table | None:
        """A recorded table, or None where it has no rows (yet).

        Args:
            columns: of its values these alone, those of them that were recorded; the keys (`step`,
                `layer`, …) always come. Others are not read.
            steps: the rows of these steps alone; in long runs, little more is read.

        Raises:
            StoreError: it is damaged.
        """
        wanted = None if columns is None else list(dict.fromkeys([*schema.KEYS[name], *columns]))
        try:
            data = self._looked_up(name, wanted, None if steps is None else list(steps))
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(name, str(error).splitlines()[0]) from None
        if data is not None:
            self._check_keys(name, data.column_names)
        return data

    def _check_keys(self, name: str, columns: Iterable[str]) -> None:
        lacking = sorted(set(schema.KEYS[name]) - set(columns))
        if lacking:
            raise self._unreadable(name, f"has no {', '.join(lacking)}")

    def _unreadable(self, name: str, reason: str) -> StoreError:
        return StoreError(f"{self.path}: {name} unreadable ({reason})")

    def _looked_up(
        self, name: str, columns: Sequence[str] | None, steps: Sequence[int] | None
    ) -> pa.Table | None:
        if self._held is None:
            return self._read(name, columns, steps)
        if name not in self._held:
            self._held[name] = self._read(name)
        data = self._held[name]
        return None if data is None else schema.narrowed(data, columns, steps)

    def _read(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        steps: Sequence[int] | None = None,
    ) -> pa.Table | None:
        """From the parts, unless they have been merged: that may happen while they are read."""
        parts, whole = None, self.path / f"{name}.parquet"
        for _ in range(_LOOKS):
            with contextlib.suppress(FileNotFoundError):
                attempt = claim.latest(self.path)
                parts = None if attempt is None else _read_parts(attempt, name, columns, steps)
                break
        return schema.read(whole, columns, steps) if whole.exists() else parts

    def files(self, name: str) -> dict[Path, pa.Schema]:
        """The Parquet files that make up a table now, and their columns, by their footers alone.

        One of a finished run; of another its parts, which go when they are merged; none where
        nothing was recorded.

        Raises:
            StoreError: one is damaged.
        """
        whole, attempt = self.path / f"{name}.parquet", claim.latest(self.path)
        parts = [] if attempt is None else _parts(attempt, name)
        try:
            found = {p: schema.columns_of(p) for p in ([whole] if whole.exists() else parts)}
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(name, str(error).splitlines()[0]) from None
        for columns in found.values():
            self._check_keys(name, columns.names)
        return found

    def frame(self, name: str) -> pd.DataFrame:
        """A recorded table as a frame; without rows or columns where nothing was recorded."""
        import pandas as pd

        data = self.table(name)
        return pd.DataFrame() if data is None else schema.to_pandas(data)

    def steps_of(self, name: str) -> NDArray[np.int64]:
        """The steps at which a table has rows, in ascending order."""
        data = self.table(name, ())
        return np.array([], int) if data is None else schema.steps_of(data)

    def with_modules(self, name: str, steps: Iterable[int] | None = None) -> pd.DataFrame:
        """A table of layers, each row with its module's position, kind, stage, shape, …

        Args:
            steps: the rows of these alone; by default all.

        Raises:
            StoreError: the table, or modules.parquet, is damaged or missing.
        """
        import pandas as pd

        data = self.table(name, steps=steps)
        if data is None:
            return pd.DataFrame()
        modules = self.modules_of(name)
        return schema.to_pandas(data if modules is None else schema.with_modules(data, modules))

    def modules_of(self, name: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """What says more of the rows of the table `name`, if it is one of layers."""
        if name == "modules" or "layer" not in schema.KEYS[name] or columns == ():
            return None
        modules = self.table("modules", columns)
        if modules is None:
            raise StoreError(f"{self.path / 'modules.parquet'}: missing")
        return modules


def find(runs_dir: str | Path, spec: RunSpec) -> Run | None:
    """The finished run of this spec, if the store has it whole and it is what its name says.

    Whole: each table has as many bytes as were written. What its name says: all keys that it and
    `spec` both have are equal; those of another version follow from the id.
    """
    try:
        run = Run(Path(runs_dir) / spec.name)
        if run.status not in FINISHED or not _agree(run.spec, encode(spec.to_dict())):
            return None
        for name, left in run.record.get("tables", {}).items():
            if (run.path / f"{name}.parquet").stat().st_size != left["bytes"]:
                return None
    except (OSError, TypeError, KeyError):  # a StoreError is an OSError
        return None
    return run


def _agree(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[name], other[name]) for name in one.keys() & other.keys())
    return bool(one == other)


def mark_dead(
    path: str | Path, status: str, error: str, *, failure: str = "killed", certain: bool = False
) -> None:
    """Write down the end of a run whose process died without doing so; parts stay as they are.

    Does nothing where the run has ended otherwise, was never begun, or has a process at work on it.

    Args:
        failure: what ended it; see FAILURES.
        certain: the process was on another machine, and is known to be dead.

    Raises:
        StoreError: it cannot be read or written.
    """
    path = Path(path)
    if not (path / "run.json").exists() or _read_record(path)["status"] not in _UNDECIDED:
        return
    with _writing(path):
        try:
            held = Claim(path, after=_attempts(path), force=certain, watch=False)
        except Busy:
            return
        try:
            record = _read_record(path)
            if record["status"] in _UNDECIDED:
                record |= {"status": status, "error": error, "attempt": held.number}
                record["ended"] = time.time()
                record["failure"] = failure if status == "failed" else None
                (held.attempt / ".run.json.tmp").write_text(_json(record))
                held.place(".run.json.tmp", "run.json")
        finally:
            held.release(keep=True)


# --- reading many ---------------------------------------------------------------------------------


class Selection(TypedDict, total=False):
    """What a table of `Runs` may be narrowed to, beside its quantity; see `Runs.table`."""

    steps: int | Iterable[int]
    fields: Sequence[str]
    modules: Sequence[str]


class Runs:
    """The runs of one or more stores as frames; a sequence of `Run` objects. See `load_runs`.

        runs = gradflow.load_runs("runs").where(depth=56)
        runs.runs                                    one row a run
        runs.weights("weight_grad_norm", steps=0)    one row a run and layer
        runs.dataset("weights")                      the same, unread, for pyarrow, DuckDB, polars

    Attributes:
        members: the runs, each a `Run`.
        problems: what was passed over or could not be read, a line each.
    """

    def __init__(self, members: Iterable[Run], problems: Iterable[str] = ()):
        self.members = list(members)
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.members)

    def __repr__(self) -> str:
        return f"Runs({len(self)} runs, {len(self.problems)} problems)"

    @cached_property
    def _columns(self) -> list[dict[str, Any]]:
        return [run.columns() for run in self.members]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return [_row(run, own) for run, own in zip(self.members, self._columns, strict=True)]

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run, in the order of `members`.

        `run_id`, `run` (directory's name), `path`, `origin`, `status`, the spec's fields, the final
        metrics, `parameter_count`, `steps`, `seconds`, `recorder_share`, `error`.
        """
        import pandas as pd

        return pd.DataFrame({n: _column([r.get(n) for r in self._rows]) for n in self._labels()})

    def _labels(self) -> list[str]:
        if not self.members:
            return [*_IDENTITY, *RunSpec().columns(), *METRICS, *_OUTCOME]
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def where(self, mask: ArrayLike | None = None, /, **fields: Any) -> Runs:
        """The runs of which all of this holds; no table is read for it.

            runs.where(depth=56, skip=("none", "identity"))
            runs.where(runs.runs["train_accuracy"] > 0.9)

        Args:
            mask: a boolean for each run, in the order of `runs`; a null is False.
            fields: columns of `runs`, each with its value, or a list, tuple, set or range of them.
                `skip` takes True and False as well.

        Raises:
            SpecError: no run has such a column, or there is not one boolean a run.
        """
        kept = np.ones(len(self), bool) if mask is None else _booleans(mask, len(self))
        for name, wanted in fields.items():
            if self.members and name not in self._labels():
                raise SpecError(f"{name}: no such column of runs{_nearest(name, self._labels())}")
            several = isinstance(wanted, list | tuple | set | frozenset | range)
            allowed = [_spelling(name, value) for value in (wanted if several else [wanted])]
            kept &= np.array([_spelling(name, r.get(name)) in allowed for r in self._rows], bool)
        chosen = [run for run, keep in zip(self.members, kept, strict=True) if keep]
        return Runs(chosen, self.problems)

    def table(
        self,
        name: str,
        quantity: str | Sequence[str] | None = None,
        *,
        steps: int | Iterable[int] | None = None,
        fields: Sequence[str] | None = None,
        modules: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """A recorded table over all runs, with `run_id`, the spec's fields and module columns.

        What is not asked for is not read. Text that recurs (run, skip, layer, kind, shape, …) is
        categorical; numbers are Arrow-backed, so that a null (not measured) is no NaN (measured).

        Args:
            name: weights, outputs, blocks, steps, evaluations, probes, flight, modules.
            quantity: one value column or several, without the rows that have none of them.
            steps: the rows of one step or of several; by default of all.
            fields: which of the spec's fields; by default `network, depth, skip, seed, data, lr`
                and all in which the runs differ.
            modules: which columns of modules.parquet (`position, kind, stage, shape, parameters,
                calls`), in the tables of layers; by default all.

        Returns:
            One row a recorded row; where there is none, no row and only `run_id`, the table's keys
            and the quantity as columns. Runs whose files are damaged are named in `problems`.

        Raises:
            SpecError: no such table; or no run has one of the fields, or has recorded a quantity or
                a column of modules whose name is not gradflow's either.
        """
        quantities = None if quantity is None else _listed(quantity)
        located = None if modules is None else _listed(modules)
        at = None if steps is None else [int(step) for step in _listed(steps)]
        described = self._described(name, fields)
        self._check_recorded(name, quantities or (), "")
        self._check_recorded("modules", located or (), "modules=")
        parts = []
        for place, run in enumerate(self.members):
            with self._noting():
                data = _recorded(run, name, quantities, at, located)
                if data is not None:
                    row = {label: _repeated(a, place, len(data)) for label, a in described.items()}
                    parts.append(_preceded(data, row))
        return schema.to_pandas(
            schema.concatenate(parts) if parts else _no_rows(name, quantities or ())
        )

    def dataset(self, name: str, *, fields: Sequence[str] | None = None) -> Dataset:
        """A recorded table over all runs, as it lies on disk now, unread.

        Whatever reads a `pyarrow.dataset.Dataset` (pyarrow itself, DuckDB, polars) reads of it only
        the columns, runs and row groups that a query needs. `modules` has the module columns, to be
        joined by `run_id` and `layer`. Runs that are not finished are in it with what they have
        written so far; these files go when the run ends, and the dataset must then be asked for
        again. Damaged files are named in `problems`, and their runs left out.

        Args:
            fields: as for `table`; whatever a query selects runs by. Each is a column.

        Raises:
            SpecError: no such table, or no run has one of the fields.
        """
        from pyarrow import dataset as ds
        from pyarrow.fs import LocalFileSystem

        described = self._described(name, fields)
        files: list[tuple[int, Path, pa.Schema]] = []
        for place, run in enumerate(self.members):
            with self._noting():
                files += [(place, path, held) for path, held in run.files(name).items()]
        if not files:
            return ds.dataset(_no_rows(name, ()))
        recorded = pa.unify_schemas([held for *_, held in files], promote_options="permissive")
        own = {n: _without_null(a) for n, a in described.items() if n not in recorded.names}
        return ds.FileSystemDataset.from_paths(
            [str(path.resolve()) for _, path, _ in files],
            schema=pa.schema([*((label, a.type) for label, a in own.items()), *recorded]),
            format=ds.ParquetFileFormat(),
            filesystem=LocalFileSystem(),
            partitions=[_condition(own, place) for place, *_ in files],
        )

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))

    def _described(self, name: str, fields: Sequence[str] | None) -> dict[str, pa.Array]:
        """The columns that say of which run a row is: an element a run; text as a dictionary."""
        if name not in schema.KEYS:
            raise SpecError(f"{name}: no such table; there are {', '.join(schema.KEYS)}")
        known = {label for columns in self._columns for label in columns} | {*CORE_FIELDS}
        chosen = self._varying() if fields is None else list(fields)
        for field in chosen:
            if self.members and field not in known:
                raise SpecError(f"fields={field}: no run has it{_nearest(field, known)}")
        values: dict[str, list[Any]] = {"run_id": [run.run_id for run in self.members]}
        values |= {field: [own.get(field) for own in self._columns] for field in chosen}
        return {label: _sorted_texts(_array(listed)) for label, listed in values.items()}

    def _check_recorded(self, table: str, columns: Iterable[str], prefix: str) -> None:
        """Refuse columns of a table that nobody knows: neither gradflow nor, by footers, a run."""
        unknown = [name for name in columns if name not in schema.QUANTITIES[table]]
        if not unknown or not self.members:
            return
        known = {*schema.QUANTITIES[table]}
        for run in self.members:
            with contextlib.suppress(StoreError):  # named where it is read
                known.update(*(held.names for held in run.files(table).values()))
        for name in unknown:
            if name not in known:
                near = _nearest(name, known)
                raise SpecError(f"{prefix}{name}: no run has it in its table {table}{near}")

    def _varying(self) -> list[str]:
        seen: dict[str, set[Any]] = {}
        for columns in self._columns:
            for name, value in columns.items():
                seen.setdefault(name, set()).add(value)
        return [name for name, values in seen.items() if name in CORE_FIELDS or len(values) > 1]

    def weights(
        self, quantity: str | Sequence[str] | None = None, **selection: Unpack[Selection]
    ) -> pd.DataFrame:
        """`weight_grad_norm`, `weight_norm`, `update_norm` by step and layer. See `table`."""
        return self.table("weights", quantity, **selection)

    def outputs(
        self, quantity: str | Sequence[str] | None = None, **selection: Unpack[Selection]
    ) -> pd.DataFrame:
        """`output_rms`, `output_grad_norm` by step and layer. See `table`."""
        return self.table("outputs", quantity, **selection)

    def blocks(
        self, quantity: str | Sequence[str] | None = None, **selection: Unpack[Selection]
    ) -> pd.DataFrame:
        """`branch_rms`, `skip_rms`, `branch_grad_norm`, `skip_grad_norm` by step and block. See
        `table`."""
        return self.table("blocks", quantity, **selection)

    def steps(
        self, quantity: str | Sequence[str] | None = None, **selection: Unpack[Selection]
    ) -> pd.DataFrame:
        """`loss`, `lr`, `grad_norm` (L2, of all parameters together), … by step. See `table`."""
        return self.table("steps", quantity, **selection)

    def evaluations(
        self, quantity: str | Sequence[str] | None = None, **selection: Unpack[Selection]
    ) -> pd.DataFrame:
        """`loss` and `accuracy` by step and split. See `table`."""
        return self.table("evaluations", quantity, **selection)

    def probes(
        self, quantity: str | Sequence[str] | None = None, **selection: Unpack[Selection]
    ) -> pd.DataFrame:
        """Values of probes by probe, step, layer and x. See `table`."""
        return self.table("probes", quantity, **selection)

    def modules(self, *, fields: Sequence[str] | None = None) -> pd.DataFrame:
        """Every module of every run: layer, position, kind, stage, shape, parameters, calls."""
        return self.table("modules", fields=fields)

    def meanings(self) -> dict[str, dict[str, str]]:
        """Quantity -> its `meaning` and `unit`, as stamped into the recorded files.

        The conditions in a meaning (unscaled, over how many passes and ranks, before clipping,
        eager or compiled) are those of the first run that has the quantity.
        """
        found: dict[str, dict[str, str]] = {}
        for run in self.members:
            for name in schema.KEYS:
                with contextlib.suppress(StoreError):
                    for item in (item for columns in run.files(name).values() for item in columns):
                        if item.metadata and item.name not in found:
                            found[item.name] = {
                                label.decode(): text.decode()
                                for label, text in item.metadata.items()
                                if label in (b"meaning", b"unit")
                            }
        return found


_IDENTITY = ("run_id", "run", "path", "origin", "status")
_OUTCOME = ("parameter_count", "steps", "seconds", "recorder_share", "error")


def _row(run: Run, columns: dict[str, Any]) -> dict[str, Any]:
    record = run.record
    origin = record.get("origin")
    own = (run.run_id, run.path.name, str(run.path), origin, run.status)
    identity = dict(zip(_IDENTITY, own, strict=True))
    certified = {"parameter_count": record.get("certificate", {}).get("parameter_count")}
    return (
        identity
        | columns
        | identity  # whatever a user's `meta` is called
        | {name: run.metrics.get(name) for name in METRICS}
        | {name: (record | certified).get(name) for name in _OUTCOME}
    )


def _booleans(mask: ArrayLike, count: int) -> NDArray[np.bool_]:
    values = np.array([value is True or value is np.True_ for value in np.asarray(mask, object)])
    if len(values) != count:
        raise SpecError(f"where: {len(values)} booleans for {count} runs")
    return values.astype(bool)


def _spelling(name: str, value: Any) -> Any:
    """A skip by its name, as in spec.json: a user's own meta may have a boolean."""
    if name == "skip" and isinstance(value, bool):
        return "identity" if value else "none"
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; near it are {', '.join(near)}" if near else ""


def _listed(value: Any) -> list[Any]:
    """One or several as a list."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def _recorded(
    run: Run,
    name: str,
    quantities: Sequence[str] | None,
    steps: Sequence[int] | None,
    modules: Sequence[str] | None,
) -> pa.Table | None:
    """What is asked for of one run's table, with its module columns; None where it has none."""
    data = run.table(name, quantities, steps)
    if data is None:
        return None
    if quantities is not None:
        present = [quantity for quantity in quantities if quantity in data.column_names]
        if not present:
            return None
        if all(data[quantity].null_count for quantity in present):
            data = data.filter(reduce(pc.or_, [pc.is_valid(data[q]) for q in present]))
    located = run.modules_of(name, modules)
    return data if located is None else schema.with_modules(data, schema.encoded(located))


def _preceded(data: pa.Table, row: dict[str, pa.Array]) -> pa.Table:
    for label, values in reversed(row.items()):
        if label not in data.column_names:
            data = data.add_column(0, label, values)
    return data


def _sorted_texts(array: pa.Array) -> pa.Array:
    """Text as a dictionary, in the order of the alphabet; anything else as it is."""
    if not pa.types.is_string(array.type):
        return array
    names = array.unique().drop_null().sort()
    codes = pc.index_in(array, value_set=names).cast(np.min_scalar_type(-len(names) - 1).name)
    return pa.DictionaryArray.from_arrays(codes, names)


def _without_null(array: pa.Array) -> pa.Array:
    """No dictionary that has a null in it, in some run's rows: Arrow cannot unite such ones."""
    return array if array.null_count == 0 else array.cast(_plain(array.type))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _repeated(array: pa.Array, place: int, rows: int) -> pa.Array:
    """One element of a column, so many times."""
    if not pa.types.is_dictionary(array.type):
        return pa.repeat(array[place], rows)
    codes = pa.repeat(array.indices[place], rows)
    return pa.DictionaryArray.from_arrays(codes, array.dictionary)


def _condition(described: Mapping[str, pa.Array], place: int) -> Expression:
    """What holds of every row of that run: so its files are read only where a query wants them."""
    return reduce(
        operator.and_,
        (
            pc.field(label) == array[place] if array[place].is_valid else pc.field(label).is_null()
            for label, array in described.items()
        ),
    )


def _no_rows(name: str, quantities: Iterable[str]) -> pa.Table:
    types = {"run_id": pa.dictionary(pa.int32(), pa.string()), **schema.KEYS[name]}
    types |= dict.fromkeys(quantities, pa.float64())
    return pa.schema(list(types.items())).empty_table()


def _array(values: list[Any]) -> pa.Array:
    """One type for all: text where a user's `meta` mixes numbers and words, or has huge numbers."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])


def _column(values: list[Any]) -> Any:
    import pandas as pd

    array = _array(values)
    return pd.Series(array.to_pandas(types_mapper=pd.ArrowDtype), dtype=pd.ArrowDtype(array.type))


def load_runs(*runs_dirs: str | Path) -> Runs:
    """All runs below the given stores (default `runs`), finished or not, ours or a user's.

    A directory that is given twice counts once. What has no trace of a run, such as the figures of
    a report, is passed over; a run without run.json and spec.json that can be read is named in
    `problems`, and so is a store that lies in the store: give its own path as well. Raises
    StoreError where a given directory does not exist.
    """
    paths: dict[Path, Path] = {}
    inner: dict[Path, Path] = {}
    directories = [Path(directory) for directory in runs_dirs or ("runs",)]
    for directory in directories:
        if not directory.is_dir():
            raise StoreError(f"{directory}: no such directory of runs")
        for path in run_directories(directory):
            paths.setdefault(path.resolve(), path)
        inner |= {path.resolve(): path for path in _stores(directory)}
    for directory in directories:
        inner.pop(directory.resolve(), None)
    problems = [f"{path}: a store in the store; load it by its path" for path in inner.values()]
    members = []
    for path in paths.values():
        try:
            members.append(Run(path))
        except StoreError as error:
            problems.append(str(error))
    return Runs(members, problems)


def run_directories(directory: Path) -> list[Path]:
    """Where runs may lie: the directory itself, if it is one, else those directly below it."""
    if (directory / "run.json").exists():
        return [directory]
    return [path for path in _below(directory) if _has_trace(path)]


def _stores(directory: Path) -> list[Path]:
    """Directories directly below that are no runs, but hold some."""
    return [p for p in _below(directory) if not _has_trace(p) and any(p.glob("*/run.json"))]


def _below(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))


def _has_trace(path: Path) -> bool:
    """Whether a run has been begun there, or cannot be looked for."""
    try:
        names = [entry.name for entry in os.scandir(path)]
    except OSError:
        return True
    return any(n in ("run.json", "spec.json") or n.startswith("attempt-") for n in names)
