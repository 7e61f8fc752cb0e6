"""Runs on disk: write parts while running, finish, load, query.

A run is one directory, described in `schema` and here:

    spec.json           what defines the run, defaults written out (a user's `meta` if external)
    run.json            status, times, environment, match certificate, metrics, error, and how many
                        rows each table has once the run has ended
    modules.parquet     one row a module or block
    <table>.parquet     weights, outputs, blocks, steps, evaluations, probes; none if it has no rows
    parts/              until finished: <table>-<number>.parquet, merged at the end
    checkpoint.pt       until finished: what the run goes on from
    metrics.csv, wandb/ a logger's mirror, if asked for; see `tracking`

Every file is written under a temporary name and renamed, so that a kill at any moment leaves a
readable run. A run's directory is locked while its process lives (`flock`, which dies with it).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Self

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gradflow import schema
from gradflow.errors import StoreError
from gradflow.spec import RunSpec, flatten

STATUSES = ("running", "done", "diverged", "interrupted", "failed")
FINISHED = ("done", "diverged")
"""Statuses of a run that has its result: it is not run again."""
METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
CHECKPOINT = "checkpoint.pt"
"""What an unfinished run goes on from; see `training.checkpoint`."""
CORE_FIELDS = ("network", "depth", "skip", "seed", "data", "lr")
"""Fields that every table of `Runs` carries, beside those in which its runs differ."""

_KEPT = ("started", "environment", "resumed")  # of run.json, where an attempt is gone on with
_TYPES: dict[str, tuple[type, ...]] = {
    "origin": (str,),
    "error": (str, NoneType),
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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(encode(value), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
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
        path: the run's directory; made, and locked until the writer is closed. What an earlier
            attempt left in it is removed.
        spec: the content of spec.json.
        origin: `gradflow`, or `external` for a record of somebody's own loop.
        keep: asked, under the lock, how many of the parts that an earlier attempt wrote belong to
            what is gone on with; 0 is a new beginning.

    Attributes:
        part: the number of the last part written.
        record: the content of run.json.
        spent: seconds that the attempt gone on with had taken.

    Raises:
        StoreError: the directory cannot be written, holds something else than a run, a run of the
            other origin or a finished external one, or another process is at work in it.
    """

    def __init__(
        self,
        path: str | Path,
        spec: Mapping[str, Any],
        *,
        origin: str = "gradflow",
        keep: Callable[[Path], int] = lambda path: 0,
    ):
        self.path = Path(path)
        self._parts = self.path / "parts"
        self._opened, self.spent = time.time(), 0.0
        self.record: dict[str, Any] = {"origin": origin, "status": "running"}
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path, patience=0.5)
            try:
                earlier = self._earlier(origin)
                self.part = keep(self.path)
                self._clear()
                if self.part:
                    self.record |= {name: earlier[name] for name in _KEPT if name in earlier}
                _write_json(self.path / "spec.json", spec)
                self.update(started=self.record.get("started", self._opened))
            except BaseException:
                os.close(self._lock)
                raise

    def _earlier(self, origin: str) -> dict[str, Any]:
        """The run.json of what is replaced, or gone on with; StoreError if that must not be."""
        if not (self.path / "run.json").exists():
            foreign = any(not path.name.startswith(".") for path in self.path.iterdir())
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
            (self.path / CHECKPOINT).unlink(missing_ok=True)
        # From the last on, so that a kill in the middle leaves a whole beginning.
        for path in sorted(self._parts.glob("*.parquet"), key=_part_number, reverse=True):
            if _part_number(path) > self.part:
                path.unlink()
        for path in [*self.path.glob("*.parquet"), *self.path.glob("**/.*.tmp")]:
            path.unlink()

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
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            self.finish("interrupted")
        else:
            self.finish("failed", error=f"{kind.__name__}: {error}")

    def append(self, name: str, data: pa.Table) -> None:
        """Add rows to a table, in a file of their own that is readable at once."""
        if data.num_rows:
            self.part += 1
            schema.write(data, self._parts / f"{name}-{self.part:06d}.parquet")

    def write(self, name: str, data: pa.Table) -> None:
        """Write a whole table that gets no more rows, as `modules`."""
        schema.write(data, self.path / f"{name}.parquet")

    def update(self, **fields: Any) -> None:
        """Change fields of run.json."""
        self.record |= fields
        _write_json(self.path / "run.json", self.record)

    def finish(self, status: str, **fields: Any) -> None:
        """Set the status and unlock; nothing may be written afterwards.

        The parts are merged and the checkpoint removed, but for a run that can go on from there.
        """
        goes_on = status not in FINISHED and (self.path / CHECKPOINT).exists()
        if not goes_on:
            fields["tables"] = self._merge()
        ended = time.time()
        self.update(status=status, ended=ended, seconds=self.seconds, **fields)
        if not goes_on:
            shutil.rmtree(self._parts, ignore_errors=True)
            (self.path / CHECKPOINT).unlink(missing_ok=True)
        os.close(self._lock)

    def _merge(self) -> dict[str, int]:
        """Each table becomes one file; the rows of each."""
        rows = {}
        for name in schema.KEYS:
            path, data = self.path / f"{name}.parquet", _read_parts(self._parts, name)
            if data is not None:
                schema.write(data, path)
            if path.exists():
                rows[name] = schema.count(path)
        return rows

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, without what was lost or paused between attempts."""
        return self.spent + time.time() - self._opened


@contextlib.contextmanager
def _writing(label: object) -> Iterator[None]:
    """What the system refuses becomes a StoreError of one line."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{label}: cannot be written ({error.strerror})") from None


def _lock(path: Path, patience: float = 0.0) -> int:
    """Lock a run's directory. A look whether it is alive holds it for a moment: have patience."""
    handle, until = os.open(path, os.O_RDONLY), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            os.close(handle)
            raise StoreError(f"{path}: another process is computing this run") from None


def _part_number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _read_parts(directory: Path, name: str) -> pa.Table | None:
    paths = sorted(directory.glob(f"{name}-*.parquet"))
    return schema.concatenate([schema.read(path) for path in paths]) if paths else None


def prepare(runs_dir: str | Path) -> Path:
    """The store's directory, made if missing. Raises StoreError where it cannot be written."""
    path = Path(runs_dir)
    with _writing(f"runs_dir={path}"):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
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
        """Whether a process of this machine is at work on the run."""
        try:
            os.close(_lock(self.path))
        except OSError:
            return self.status == "running"
        return False

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics: `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy`."""
        return self.record.get("metrics", {})

    def columns(self) -> dict[str, Any]:
        """The spec as one flat row of columns."""
        return flatten(self.spec)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table | None:
        """A recorded table, or None where it has no rows (yet). Raises StoreError if damaged."""
        try:
            data = self._read(name)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise StoreError(f"{self.path}: {name} unreadable ({reason})") from None
        lacking = () if data is None else sorted(set(schema.KEYS[name]) - set(data.column_names))
        if lacking:
            raise StoreError(f"{self.path}: {name} unreadable (has no {', '.join(lacking)})")
        return data if data is None or columns is None else data.select(columns)

    def _read(self, name: str) -> pa.Table | None:
        """From the parts, unless they have been merged: that may happen while they are read."""
        parts, whole = None, self.path / f"{name}.parquet"
        with contextlib.suppress(FileNotFoundError):
            parts = _read_parts(self.path / "parts", name)
        return schema.read(whole) if whole.exists() else parts

    def frame(self, name: str) -> pd.DataFrame:
        """A recorded table as a frame; without rows or columns where nothing was recorded."""
        data = self.table(name)
        return pd.DataFrame() if data is None else schema.to_pandas(data)

    def with_modules(self, name: str) -> pd.DataFrame:
        """A table of layers, each row with its module's position, kind, stage, shape, …

        Raises:
            StoreError: the table, or modules.parquet, is damaged or missing.
        """
        data = self.table(name)
        return pd.DataFrame() if data is None else schema.to_pandas(self._located(name, data))

    def _located(self, name: str, data: pa.Table) -> pa.Table:
        """Rows of the table `name` with the columns of their modules, if it is one of layers."""
        if name == "modules" or "layer" not in schema.KEYS[name]:
            return data
        modules = self.table("modules")
        if modules is None:
            raise StoreError(f"{self.path / 'modules.parquet'}: missing")
        return schema.with_modules(data, modules)


def find(runs_dir: str | Path, spec: RunSpec) -> Run | None:
    """The finished run of this spec, if the store has it whole and it is what its name says."""
    try:
        run = Run(Path(runs_dir) / spec.name)
        left = run.record.get("tables", {})
        found = {name: schema.count(run.path / f"{name}.parquet") for name in left}
    except (OSError, pa.ArrowException):  # a StoreError is an OSError
        return None
    same = run.spec == decode(encode(spec.to_dict()))
    return run if run.status in FINISHED and same and found == left else None


def mark_dead(path: str | Path, status: str, error: str) -> None:
    """Write down the end of a run whose process died without doing so; parts stay as they are.

    Does nothing where the run has ended, was never begun, or has a process at work on it. Raises
    StoreError where it cannot be read or written.
    """
    path = Path(path)
    if not (path / "run.json").exists():
        return
    with _writing(path):
        try:
            handle = _lock(path)
        except StoreError:
            return
        try:
            record = _read_record(path)
            if record["status"] == "running":
                _write_json(path / "run.json", record | {"status": status, "error": error})
        finally:
            os.close(handle)


# --- reading many ---------------------------------------------------------------------------------


class Runs:
    """The runs of one or more stores as frames.

    `runs` has one row a run: `run_id`, `run` (directory's name), `path`, `origin`, `status`, the
    spec's fields, the final metrics, `parameter_count`, `seconds`, `recorder_share`, `error`.
    `problems` lists what was passed over, a line each.
    """

    def __init__(self, members: Iterable[Run], problems: Iterable[str] = ()):
        self.members = list(members)
        self.problems = list(problems)
        self._columns = {run.path: run.columns() for run in self.members}

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.members)

    @property
    def runs(self) -> pd.DataFrame:
        rows = []
        for run in self.members:
            record = run.record
            identity = {
                "run_id": run.run_id,
                "run": run.path.name,
                "path": str(run.path),
                "origin": record.get("origin"),
                "status": run.status,
            }
            rows.append(
                identity
                | self._columns[run.path]
                | identity  # whatever a user's `meta` is called
                | {name: run.metrics.get(name) for name in METRICS}
                | {
                    "parameter_count": record.get("certificate", {}).get("parameter_count"),
                    "steps": record.get("steps"),
                    "seconds": record.get("seconds"),
                    "recorder_share": record.get("recorder_share"),
                    "error": record.get("error"),
                }
            )
        labels = list(dict.fromkeys(name for row in rows for name in row))
        return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in labels})

    def table(
        self, name: str, quantity: str | None = None, *, fields: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """A recorded table over all runs, with `run_id`, module columns and the spec's fields.

        Args:
            name: weights, outputs, blocks, steps, evaluations, probes, modules.
            quantity: one column alone, without the rows in which it was not measured.
            fields: which of the spec's fields; by default `network, depth, skip, seed, data, lr`
                and all in which the runs differ.

        Returns:
            One row a recorded row; where there is none, no row and only `run_id`, the table's keys
            and the quantity as columns. Runs whose files are damaged are named in `problems`.
        """
        chosen = self._varying() if fields is None else list(fields)
        values = {f: _array([self._columns[run.path].get(f) for run in self]) for f in chosen}
        parts = []
        for place, run in enumerate(self.members):
            described = {label: array[place] for label, array in values.items()}
            try:
                parts.append(self._part(run, name, quantity, described))
            except StoreError as error:
                if str(error) not in self.problems:
                    self.problems.append(str(error))
        present = [part for part in parts if part is not None]
        return schema.to_pandas(
            schema.concatenate(present) if present else _no_rows(name, quantity)
        )

    def _part(
        self, run: Run, name: str, quantity: str | None, described: Mapping[str, pa.Scalar]
    ) -> pa.Table | None:
        data = run.table(name)
        if data is None or (quantity is not None and quantity not in data.column_names):
            return None
        if quantity is not None:
            data = data.select([*schema.KEYS[name], quantity])
            data = data.filter(pc.is_valid(data[quantity]))
        data = run._located(name, data)
        row = {"run_id": pa.scalar(run.run_id), **described}
        for label, value in reversed(row.items()):
            if label not in data.column_names:
                data = data.add_column(0, label, pa.repeat(value, len(data)))
        return data

    def _varying(self) -> list[str]:
        seen: dict[str, set[Any]] = {}
        for columns in self._columns.values():
            for name, value in columns.items():
                seen.setdefault(name, set()).add(value)
        return [name for name, values in seen.items() if name in CORE_FIELDS or len(values) > 1]

    def weights(self, quantity: str | None = None, **options: Any) -> pd.DataFrame:
        """`weight_grad_norm`, `weight_norm`, `update_norm` by step and layer."""
        return self.table("weights", quantity, **options)

    def outputs(self, quantity: str | None = None, **options: Any) -> pd.DataFrame:
        """`output_rms`, `output_grad_norm` by step and layer."""
        return self.table("outputs", quantity, **options)

    def blocks(self, quantity: str | None = None, **options: Any) -> pd.DataFrame:
        """`branch_rms`, `skip_rms`, `branch_grad_norm`, `skip_grad_norm` by step and block."""
        return self.table("blocks", quantity, **options)

    def steps(self, quantity: str | None = None, **options: Any) -> pd.DataFrame:
        """`loss`, `lr`, `grad_norm`, … by step."""
        return self.table("steps", quantity, **options)

    def evaluations(self, quantity: str | None = None, **options: Any) -> pd.DataFrame:
        """`loss` and `accuracy` by step and split."""
        return self.table("evaluations", quantity, **options)

    def probes(self, quantity: str | None = None, **options: Any) -> pd.DataFrame:
        """Values of probes by probe, step, layer and x."""
        return self.table("probes", quantity, **options)

    def modules(self, **options: Any) -> pd.DataFrame:
        """Every module of every run: layer, position, kind, stage, shape, parameters, calls."""
        return self.table("modules", **options)

    def meanings(self) -> dict[str, dict[str, str]]:
        """Quantity -> its `meaning` and `unit`, as stamped into the recorded files."""
        found: dict[str, dict[str, str]] = {}
        for run in self.members:
            for name in schema.KEYS:
                with contextlib.suppress(StoreError):
                    data = run.table(name)
                    for item in data.schema if data is not None else ():
                        if item.metadata and item.name not in found:
                            found[item.name] = {
                                label.decode(): text.decode()
                                for label, text in item.metadata.items()
                                if label in (b"meaning", b"unit")
                            }
        return found


def _no_rows(name: str, quantity: str | None) -> pa.Table:
    types = {"run_id": pa.string(), **schema.KEYS[name]}
    if quantity is not None:
        types[quantity] = pa.float64()
    return pa.schema(list(types.items())).empty_table()


def _array(values: list[Any]) -> pa.Array:
    """One type for all: text where a user's `meta` mixes numbers and words, or has huge numbers."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])


def _column(values: list[Any]) -> Any:
    array = _array(values)
    return pd.Series(array.to_pandas(types_mapper=pd.ArrowDtype), dtype=pd.ArrowDtype(array.type))


def load_runs(*runs_dirs: str | Path) -> Runs:
    """All runs below the given stores (default `runs`), finished or not, ours or a user's.

    A directory that is given twice counts once. One without run.json and spec.json that can be
    read is passed over and named in `problems`. Raises StoreError where a given directory does not
    exist.
    """
    paths: dict[Path, Path] = {}
    for directory in map(Path, runs_dirs or ("runs",)):
        if not directory.is_dir():
            raise StoreError(f"{directory}: no such directory of runs")
        candidates = (
            [directory] if (directory / "run.json").exists() else _subdirectories(directory)
        )
        for path in candidates:
            paths.setdefault(path.resolve(), path)
    members, problems = [], []
    for path in paths.values():
        try:
            members.append(Run(path))
        except StoreError as error:
            problems.append(str(error))
    return Runs(members, problems)


def _subdirectories(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
