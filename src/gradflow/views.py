"""What the page's interactive views show of a run: as much of its record as a page can carry.

A view is one block of bytes, raw deflate (RFC 1951) of

    4 bytes     length of the header, little-endian
    header      JSON: the recorded layers, steps and quantities, and where their values begin
    3 planes    the first, second and third byte of every value

A value is the upper 24 bits of its double, rounded: sign, 11 bits of exponent, 12 of mantissa, so
a relative error of at most 2^-13, whatever its size. A value that was not measured is `NULL`, a NaN
with a payload of its own. `page_assets/data.js` reads it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from gradflow import schema, tables
from gradflow.errors import GradflowError
from gradflow.store import Run

PAGE_BYTES = 8_500_000
"""What the views of all runs may take of a page, before base64 makes it a third more."""
RUN_BYTES = 160_000
"""What one run's view takes at most."""
MAIN = "weight_grad_norm"
"""The quantity that is shown first, with half of a run's share for itself."""
NULL = 0x7FF801
_TABLES = ("weights", "outputs", "blocks")
_VALUE_BYTES = 2.0  # of three, deflated: exponents of neighbours are alike
_FEWEST, _MOST = 6, 500  # steps
_POINTS = 200  # of a curve


def share(runs: int) -> int:
    """Bytes for each of some runs: halved and halved again, so that one more seldom changes it."""
    size = RUN_BYTES
    while size * runs > PAGE_BYTES and size > 1000:
        size //= 2
    return size


def pack(run: Run, extras: Iterable[str] = (), *, size: int = RUN_BYTES) -> bytes:
    """The view of one run, of about `size` bytes at most where its layers are not too many; empty
    where no table of layers has a value.

    Args:
        extras: layers that the run's partners lack: they are set aside, as in `tables.profile`.

    Raises:
        StoreError: a table is damaged, or modules.parquet missing.
    """
    values: list[NDArray[np.float64]] = []
    counts = {name: _quantities(run.table(name)) for name in _TABLES}
    every = [quantity for found in counts.values() for quantity in found]
    header: dict[str, Any] = {"tables": {}, "curves": {}}
    placed: dict[tuple[str, ...], pd.DataFrame] = {}
    for name, quantities in counts.items():
        if not quantities:
            continue
        layers = _layers(run, name, set(extras), placed)
        found: dict[str, Any] = {
            label: layers[label].tolist() for label in ("layer", "kind", "family", "ordinal")
        } | {"quantities": {}}
        header["tables"][name] = found
        for quantity in quantities:
            part = 1.0 if len(every) == 1 else 0.5 if quantity == MAIN else 0.5 / (len(every) - 1)
            most = int(size * part / _VALUE_BYTES / max(len(layers), 1))
            count = int(np.clip(most, _FEWEST, _MOST))
            steps, matrix, note = _matrix(run, name, quantity, found["layer"], count)
            found["quantities"][quantity] = note | {"steps": steps, "at": _place(values)}
            values.append(matrix.ravel())
    loss = _loss(run)
    if len(loss):
        header["curves"]["loss"] = {"steps": loss["step"].tolist(), "at": _place(values)}
        values.append(loss["loss"].to_numpy(dtype=float))
    return _packed(header, values) if header["tables"] else b""


def _quantities(data: pa.Table | None) -> list[str]:
    """The columns of values of which there is any, the main one first."""
    if data is None:
        return []
    names = [
        field.name
        for field in data.schema
        if pa.types.is_floating(field.type) and data[field.name].null_count < len(data)
    ]
    return sorted(names, key=lambda name: name != MAIN)


def _layers(
    run: Run, name: str, extras: set[str], placed: dict[tuple[str, ...], pd.DataFrame]
) -> pd.DataFrame:
    """layer, kind, family and ordinal of a table's layers, by family and place.

    `placed` has those of another table of the same layers: to place them is half of a view's time.
    """
    data = run.table(name)
    assert data is not None
    present = pa.table({"layer": pc.unique(data["layer"]).cast(pa.string())})
    modules = run.modules_of(name)
    assert modules is not None  # a table of layers
    known = schema.with_modules(present, modules).to_pandas()
    if name == "blocks":
        known = known.sort_values("position").assign(family=tables.BLOCK)
        return known.assign(ordinal=range(1, len(known) + 1))
    names = tuple(map(str, known["layer"]))
    if names not in placed:
        placed[names] = tables.profile(known.assign(step=0, there=1.0), "there", extras=extras)
    return placed[names]


def _matrix(
    run: Run, name: str, quantity: str, layers: list[str], count: int
) -> tuple[list[int], NDArray[np.float64], dict[str, str]]:
    """Some of the steps at which it was measured, values [step, layer], its meaning and unit."""
    data = run.table(name, [quantity])
    assert data is not None
    data = _where_measured(data, quantity)
    steps = spread(schema.steps_of(data), count)
    data = schema.narrowed(data, steps=steps)
    column = pc.index_in(data["layer"].cast(pa.string()), pa.array(layers, pa.string()))
    there = pc.is_valid(column).to_numpy()
    row = np.searchsorted(steps, data["step"].to_numpy())
    matrix = np.full((len(steps), len(layers)), missing())
    matrix[row[there], column.drop_null().to_numpy()] = data[quantity].to_numpy()[there]
    metadata = data.schema.field(quantity).metadata or {}
    note = {key.decode(): text.decode() for key, text in metadata.items()}
    return [int(step) for step in steps], matrix, {k: note.get(k, "") for k in ("meaning", "unit")}


def _where_measured(data: pa.Table, quantity: str) -> pa.Table:
    values = data[quantity]
    return data.filter(pc.is_valid(values)) if values.null_count else data


def layered(run: Run, quantity: str, *, step: int = 0, extras: Iterable[str] = ()) -> pd.DataFrame:
    """The same layers' values for a static figure: as recorded, and more of the early steps.

    Args:
        step: the recorded step that is nearest to it is among those of `tables.spread`.
        extras: as for `pack`.

    Returns:
        step, layer, family, ordinal and the quantity, null where it was not measured.

    Raises:
        GradflowError: the quantity was not recorded; StoreError as for `pack`.
    """
    recorded = {name: _quantities(run.table(name)) for name in _TABLES}
    name = next((name for name, found in recorded.items() if quantity in found), None)
    if name is None:
        there = ", ".join(found for names in recorded.values() for found in names)
        raise GradflowError(
            f"{run.path.name}: {quantity} was not recorded (recorded: {there or 'nothing'})"
        )
    data = run.table(name, [quantity])
    assert data is not None
    known = schema.steps_of(_where_measured(data, quantity))
    steps = np.union1d(tables.spread(known), tables.nearest(known, step))
    rows = schema.to_pandas(schema.narrowed(data, steps=steps)).astype({"step": int, "layer": str})
    layers = _layers(run, name, set(extras), {})[["layer", "family", "ordinal"]]
    return rows.merge(layers.astype({"layer": str}), on="layer")


def spread(steps: ArrayLike, count: int) -> NDArray[np.int64]:
    """At most `count` of the steps, first and last among them: half of them evenly spaced in their
    logarithm, for what happens early, half evenly in themselves."""
    known = np.unique(np.asarray(steps, dtype=int))
    if known.size <= count:
        return known
    last = known.size - 1
    early = np.geomspace(1, last + 1, count // 2).round() - 1
    even = np.linspace(0, last, count - count // 2).round()
    return known[np.unique(np.concatenate([early, even])).astype(int)]


def _loss(run: Run) -> pd.DataFrame:
    steps = run.frame("steps")
    return tables.binned(steps, "loss", _POINTS) if "loss" in steps else pd.DataFrame()


def _place(values: list[NDArray[np.float64]]) -> int:
    return sum(part.size for part in values)


# --- numbers --------------------------------------------------------------------------------------


def missing() -> float:
    """The NaN that stands for what was not measured."""
    return float(np.array(NULL << 40, np.uint64).view(np.float64))


def codes(values: ArrayLike) -> NDArray[np.uint32]:
    """The upper 24 bits of each double, rounded to nearest; NaN and NULL as they are."""
    doubles = np.ascontiguousarray(values, dtype=np.float64)
    bits = doubles.view(np.uint64)
    rounded = (bits + np.uint64(1 << 39)) >> np.uint64(40)
    plain = np.where(bits >> np.uint64(40) == NULL, NULL, 0x7FF800)
    return np.where(np.isnan(doubles), plain, rounded).astype(np.uint32)


def doubles(found: NDArray[np.uint32]) -> NDArray[np.float64]:
    """What `codes` stand for; NULL is a NaN."""
    return (found.astype(np.uint64) << np.uint64(40)).view(np.float64)


def _packed(header: dict[str, Any], values: list[NDArray[np.float64]]) -> bytes:
    found = codes(np.concatenate(values) if values else np.zeros(0))
    text = json.dumps(header | {"count": int(found.size)}, separators=(",", ":")).encode()
    planes = [((found >> shift) & 0xFF).astype(np.uint8).tobytes() for shift in (16, 8, 0)]
    squeezed = zlib.compressobj(level=6, wbits=-15)
    whole = b"".join([len(text).to_bytes(4, "little"), text, *planes])
    return squeezed.compress(whole) + squeezed.flush()


def unpack(view: bytes) -> tuple[dict[str, Any], NDArray[np.uint32]]:
    """The header and the codes of a view."""
    whole = zlib.decompress(view, wbits=-15)
    length = int.from_bytes(whole[:4], "little")
    header = json.loads(whole[4 : 4 + length])
    planes = np.frombuffer(whole, np.uint8, offset=4 + length).reshape(3, -1).astype(np.uint32)
    return header, (planes[0] << 16) | (planes[1] << 8) | planes[2]
