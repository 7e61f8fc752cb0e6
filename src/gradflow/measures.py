"""What a finding measures: a number from the recorded tables of its arms, and the way back.

A `Measure` pairs two functions that are each other's inverse. `effect` reads the records of one
seed, one for each arm, and returns a number. `imagine` takes the number and returns records of a
world in which it is true, tables in the real schema: so every rule can be shown to say yes and no
before anything is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from gradflow import schema
from gradflow.errors import GradflowError

Array = NDArray[np.float64]


class Record(Protocol):
    """What effects read: a run of a store (`store.Run`), or an `Imagined` one."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Final metrics: `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy`."""
        ...

    def table(self, name: str) -> pa.Table | None:
        """A recorded table, or None where it has no rows."""
        ...


@dataclass(frozen=True)
class Imagined:
    """A record that nobody recorded: made-up tables in the real schema."""

    tables: Mapping[str, pa.Table] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def table(self, name: str) -> pa.Table | None:
        return self.tables.get(name)


@dataclass(frozen=True)
class Measure:
    """A number that the records of some arms have, and records that have a given number.

    Attributes:
        effect: records of one seed, in the order of the comparison's arms -> the number.
        imagine: number -> as many records, with which `effect` gives that number.
    """

    effect: Callable[..., float]
    imagine: Callable[[float], tuple[Imagined, ...]]


# --- reading --------------------------------------------------------------------------------------


def layers(
    record: Record,
    table: str,
    quantity: str,
    *,
    step: int = 0,
    kind: str | None = None,
    stage: int | None = None,
) -> tuple[list[str], Array]:
    """Names and values of a quantity at one step, from the input on; those that were measured.

    Raises:
        GradflowError: nothing of that was recorded.
    """
    data, modules = record.table(table), record.table("modules")
    if data is None or modules is None or quantity not in data.column_names:
        raise GradflowError(f"{table}: no {quantity} was recorded")
    data = schema.with_modules(data.filter(pc.equal(data["step"], step)), modules)
    data = data.filter(pc.is_valid(data[quantity]))
    if kind is not None:
        data = data.filter(pc.equal(data["kind"], kind))
    if stage is not None:
        data = data.filter(pc.equal(data["stage"], stage))
    if not len(data):
        raise GradflowError(f"{table}: no {quantity} of a {kind or 'module'} at step {step}")
    data = data.sort_by("position")
    return data["layer"].cast(pa.string()).to_pylist(), data[quantity].to_numpy()


def hidden(
    record: Record, quantity: str = "output_grad_norm", *, kind: str = "linear", **options: Any
) -> Array:
    """A quantity of the like modules of one kind, from the input on: without stem and readout.

    Like are those of the commonest shape.
    """
    modules = record.table("modules")
    names, values = layers(record, _table(quantity), quantity, kind=kind, **options)
    assert modules is not None
    shapes = dict(zip(modules["layer"].to_pylist(), modules["shape"].to_pylist(), strict=True))
    found = [shapes[name] for name in names]
    common = max(dict.fromkeys(found), key=found.count)
    return values[[shape == common for shape in found]]


def _table(quantity: str) -> str:
    return {"w": "weights", "u": "weights", "o": "outputs"}.get(quantity[0], "blocks")


def readings(record: Record, probe: str) -> tuple[list[str | None], Array, Array]:
    """Layer, x and value of each reading of a probe, in the order in which they were made.

    Raises:
        GradflowError: there is none.
    """
    data = record.table("probes")
    data = None if data is None else data.filter(pc.equal(data["probe"].cast(pa.string()), probe))
    if data is None or not len(data):
        raise GradflowError(f"probes: no {probe} was recorded")
    layer = data["layer"].cast(pa.string()).to_pylist()
    x = data["x"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return layer, x, data["value"].cast(pa.float64()).to_numpy(zero_copy_only=False)


def reading(record: Record, probe: str, x: float | None = None) -> float:
    """One reading: that at `x`, or the only one.

    Raises:
        GradflowError: there is none, or more than one.
    """
    _, places, values = readings(record, probe)
    chosen = values if x is None else values[places == x]
    if len(chosen) != 1:
        raise GradflowError(f"probes: {len(chosen)} readings of {probe} at {x}")
    return float(chosen[0])


def at_blocks(record: Record, probe: str) -> Array:
    """A probe's readings at what comes out of each block, from the input on.

    Raises:
        GradflowError: there is none.
    """
    names, _, values = readings(record, probe)
    modules = record.table("modules")
    if modules is None:
        raise GradflowError(f"modules: none were recorded beside {probe}")
    kinds = dict(zip(modules["layer"].to_pylist(), modules["kind"].to_pylist(), strict=True))
    return values[[kinds.get(name) == "block" for name in names]]


def along_blocks(probe: str) -> Callable[[Record], tuple[Array, Array]]:
    """Reader of a curve: places 1, 2, … of the blocks, and a probe's readings there."""

    def read(record: Record) -> tuple[Array, Array]:
        values = at_blocks(record, probe)
        return np.arange(1.0, len(values) + 1), values

    return read


def along(
    quantity: str = "output_grad_norm", *, kind: str = "linear", power: int = 2, **options: Any
) -> Callable[[Record], tuple[Array, Array]]:
    """Reader of a curve: places 1, 2, … of the like modules, and a quantity to some power there."""

    def read(record: Record) -> tuple[Array, Array]:
        values = hidden(record, quantity, kind=kind, **options)
        return np.arange(1.0, len(values) + 1), values**power

    return read


def at_places(values: ArrayLike) -> Callable[[Array], Array]:
    """Theory of a curve over places 1, 2, …: these values there."""
    numbers = np.asarray(values, dtype=float)
    return lambda places: numbers[places.astype(int) - 1]


def over_arms(
    places: Sequence[float], name: str = "train_accuracy"
) -> Callable[..., tuple[Array, Array]]:
    """Reader of a curve over several arms: a final metric of each, at its place."""

    def read(*records: Record) -> tuple[Array, Array]:
        values = [float(record.metrics[name]) for record in records]
        return np.asarray(places, dtype=float), np.array(values)

    return read


def running_accuracy(record: Record, batches: int = 10) -> tuple[Array, Array]:
    """Reader of a curve: updates, and the mean training-mode accuracy of so many last batches.

    Raises:
        GradflowError: no steps were recorded.
    """
    steps = record.table("steps")
    if steps is None:
        raise GradflowError("steps: none were recorded")
    means = np.convolve(steps["accuracy"].to_numpy(), np.full(batches, 1 / batches), "valid")
    return np.arange(batches, batches + float(len(means))), means


def updates_to(record: Record, accuracy: float) -> float:
    """Updates until `running_accuracy` reaches this; infinite where it never does."""
    updates, means = running_accuracy(record)
    reached = updates[means >= accuracy - 1e-9]
    return float(reached[0]) if len(reached) else math.inf


def growth_of(norms: ArrayLike, *, trim: int = 4) -> float:
    """ρ, the *squared* growth of a norm per layer toward the input, by least squares of ln norm².

    Args:
        norms: from the input on, not squared.
        trim: layers left out at each end.
    """
    values = np.asarray(norms, dtype=float)
    values = values[trim : len(values) - trim]
    if len(values) < 3:
        raise GradflowError(f"{len(values)} layers are too few for a rate")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = 2 * np.log(values)
    if not np.isfinite(logs).all():
        return math.nan
    return float(np.exp(-np.polyfit(np.arange(len(logs)), logs, 1)[0]))


# --- imagining ------------------------------------------------------------------------------------


def imagined_layers(
    quantity: str,
    values: ArrayLike,
    *,
    kind: str = "linear",
    stage: int = 1,
    step: int = 0,
    shape: str = "64x64",
    metrics: Mapping[str, float] | None = None,
) -> Imagined:
    """A record of like modules with these values of a quantity, from the input on."""
    numbers = np.asarray(values, dtype=float)
    count = len(numbers)
    names = [f"layers.{i}" for i in range(count)]
    modules = {
        "layer": names, "position": range(count), "kind": [kind] * count,
        "stage": [stage] * count, "shape": [shape] * count, "parameters": [4096] * count,
        "calls": [1] * count,
    }  # fmt: skip
    rows = {"step": [step] * count, "layer": names, quantity: numbers}
    table = _table(quantity)
    return Imagined(
        {"modules": schema.table("modules", modules), table: schema.table(table, rows)},
        metrics or {},
    )


def imagined_readings(
    probe: str,
    values: Sequence[float],
    *,
    x: Sequence[float] | None = None,
    layers: Sequence[str] | None = None,
    step: int = 0,
) -> Imagined:
    """A record of one probe's readings."""
    count = len(values)
    rows = {
        "probe": [probe] * count,
        "step": [step] * count,
        "layer": pa.array(layers if layers is not None else [None] * count, pa.string()),
        "x_name": pa.array(["x" if x is not None else None] * count, pa.string()),
        "x": pa.array(x if x is not None else [None] * count, pa.float64()),
        "value": pa.array(values, pa.float64()),
    }
    return Imagined({"probes": schema.table("probes", rows)})


def imagined_blocks(probe: str, values: Sequence[float]) -> Imagined:
    """A record of one probe's readings at what comes out of each block, from the input on."""
    record = imagined_layers("skip_rms", values, kind="block", shape="")
    names = record.tables["modules"]["layer"].to_pylist()
    return Imagined({**record.tables, **imagined_readings(probe, values, layers=names).tables})


# --- measures that many findings share ------------------------------------------------------------


def growth(
    quantity: str = "output_grad_norm",
    *,
    kind: str = "linear",
    trim: int = 4,
    squared: bool = True,
    stage: int | None = None,
) -> Measure:
    """Growth per layer toward the input over like modules: of the squared norm (ρ), or the norm."""
    power = 1.0 if squared else 0.5

    def effect(record: Record) -> float:
        values = hidden(record, quantity, kind=kind, **({} if stage is None else {"stage": stage}))
        return growth_of(values, trim=trim) ** power

    def imagine(rate: float) -> tuple[Imagined, ...]:
        norms = np.exp(-np.arange(2.0 * trim + 12) * math.log(rate) / (2 * power))
        return (imagined_layers(quantity, norms, kind=kind, stage=stage or 1),)

    return Measure(effect, imagine)


def end_ratio(
    quantity: str = "output_grad_norm", *, kind: str = "linear", step: int = 0
) -> Measure:
    """A quantity of the first of the like modules over that of the last; not squared."""

    def effect(record: Record) -> float:
        values = hidden(record, quantity, kind=kind, step=step)
        return float(values[0] / values[-1])

    def imagine(ratio: float) -> tuple[Imagined, ...]:
        values = np.geomspace(ratio, 1.0, 12)
        return (imagined_layers(quantity, values, kind=kind, step=step),)

    return Measure(effect, imagine)


def metric(name: str = "train_accuracy") -> Measure:
    """A final metric."""
    return Measure(
        lambda record: float(record.metrics[name]),
        lambda value: (Imagined(metrics={name: value}),),
    )


def metric_difference(name: str = "train_accuracy") -> Measure:
    """A final metric of the first arm minus that of the second."""
    return Measure(
        lambda one, other: float(one.metrics[name] - other.metrics[name]),
        lambda value: (Imagined(metrics={name: value}), Imagined(metrics={name: 0.0})),
    )


def best_difference(one: int, other: int, name: str = "train_accuracy") -> Measure:
    """The highest final metric among the first `one` arms minus that of the `other` arms after.

    Of an accuracy, the error of the latter minus that of the former, each at its best.
    """

    def effect(*records: Record) -> float:
        values = [float(record.metrics[name]) for record in records]
        return max(values[:one]) - max(values[one:])

    def imagine(value: float) -> tuple[Imagined, ...]:
        first, second = Imagined(metrics={name: value}), Imagined(metrics={name: 0.0})
        return (*[first] * one, *[second] * other)

    return Measure(effect, imagine)


def single_reading(probe: str, x: float | None = None) -> Measure:
    """The one reading of a probe (at x)."""
    return Measure(
        lambda record: reading(record, probe, x),
        lambda value: (imagined_readings(probe, [value], x=None if x is None else [x]),),
    )


def block_reading(probe: str, block: int) -> Measure:
    """A probe's reading at what comes out of a block, counted from 1."""

    def effect(record: Record) -> float:
        values = at_blocks(record, probe)
        if len(values) < block:
            raise GradflowError(f"probes: {len(values)} readings of {probe} at blocks, not {block}")
        return float(values[block - 1])

    return Measure(effect, lambda value: (imagined_blocks(probe, [value] * block),))
