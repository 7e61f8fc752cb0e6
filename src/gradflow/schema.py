"""The recorded tables: their key columns, and how a table becomes a Parquet file and comes back.

A value that was not measured is null, a measured NaN is NaN; both stay what they are in Parquet
and in pandas, whose columns are Arrow-backed for that reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

_LAYER = pa.dictionary(pa.int32(), pa.string())
_NAME = pa.dictionary(pa.int8(), pa.string())
_GROUP = 2**15  # rows that are read at least where some steps of a long run are asked for

KEYS: dict[str, dict[str, pa.DataType]] = {
    "modules": {"layer": pa.string()},
    "weights": {"step": pa.int32(), "layer": _LAYER},
    "outputs": {"step": pa.int32(), "layer": _LAYER},
    "blocks": {"step": pa.int32(), "layer": _LAYER},
    "steps": {"step": pa.int32()},
    "evaluations": {"step": pa.int32(), "split": _NAME},
    "flight": {"step": pa.int32(), "layer": _LAYER, "quantity": _NAME},
    "probes": {
        "probe": _NAME,
        "step": pa.int32(),
        "layer": _LAYER,
        "x_name": _NAME,
        "x": pa.float64(),
    },
}
"""Tables and their key columns. All other columns are values."""

MODULE_COLUMNS: dict[str, pa.DataType] = {
    "layer": pa.string(),
    "position": pa.int32(),
    "kind": pa.string(),
    "stage": pa.int32(),
    "shape": pa.string(),
    "parameters": pa.int64(),
    "calls": pa.int32(),
}

QUANTITIES = {
    "modules": tuple(MODULE_COLUMNS),
    "weights": ("weight_grad_norm", "weight_norm", "update_norm", "update_ratio", "grad_max",
                "grad_nonfinite", "grad_zeros", "grad_subnormals", "grad_cosine", "noise_scale",
                "grad_rank"),
    "outputs": ("output_rms", "output_grad_norm", "output_max", "output_nonfinite",
                "output_spread", "output_grad_zeros", "output_grad_subnormals", "dead_units"),
    "blocks": ("branch_rms", "skip_rms", "branch_grad_norm", "skip_grad_norm",
               "branch_x_grad_norm", "x_grad_cosine"),
    "steps": ("loss", "accuracy", "lr", "grad_norm"),
    "evaluations": ("loss", "accuracy", "top5"),
    "flight": ("value",),
    "probes": ("value",),
}  # fmt: skip
"""Value columns that one may ask for where no run has them; a loop's own come beside them. Those
that `recording.quantities` measures are the same there, which a test compares."""

Meanings = Mapping[str, Mapping[str, str]]
"""Quantity -> its `meaning` and `unit`, stamped into the column's metadata."""


def table(name: str, columns: Mapping[str, Any], meanings: Meanings | None = None) -> pa.Table:
    """An Arrow table of the schema `name`. Values may be arrays, masked arrays or lists.

    A masked element becomes null; a NaN stays NaN.
    """
    types = MODULE_COLUMNS if name == "modules" else KEYS[name]
    arrays, items = [], []
    for label, values in columns.items():
        mask = getattr(values, "mask", None)
        plain = getattr(values, "data", values) if mask is not None else values
        array = pa.array(plain, mask=mask) if mask is not None else pa.array(plain)
        if label in types and array.type != types[label]:
            array = array.cast(types[label])
        note = {
            key.encode(): text.encode() for key, text in (meanings or {}).get(label, {}).items()
        }
        arrays.append(array)
        items.append(pa.field(label, array.type, metadata=note or None))
    return pa.Table.from_arrays(arrays, schema=pa.schema(items))


def write(data: pa.Table, path: Path) -> None:
    """Write atomically: a reader sees the old file or the new one, never a half.

    Raises FileNotFoundError where the directory is not there (any more).
    """
    values = [f.name for f in data.schema if pa.types.is_floating(f.type)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(
        data,
        temporary,
        compression="zstd",
        use_dictionary=[f.name for f in data.schema if f.name not in values],
        use_byte_stream_split=values,
        row_group_size=_GROUP,
    )
    temporary.replace(path)


def read(
    path: Path, columns: Sequence[str] | None = None, steps: Iterable[int] | None = None
) -> pa.Table:
    """The table in one file, or what `narrowed` leaves of it: nothing else is decoded.

    Raises pyarrow's or the system's errors where it is damaged.
    """
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        chosen = None if columns is None else [name for name in columns if name in names]
        wanted = None if steps is None or "step" not in names else list(steps)
        if wanted is None:
            return narrowed(file.read(chosen), chosen)
        read = None if chosen is None else [*{*chosen, "step"}]
        groups = _groups(file.metadata, names.index("step"), wanted)
        return narrowed(file.read_row_groups(groups, read), chosen, wanted)


def _groups(metadata: pq.FileMetaData, place: int, steps: Sequence[int]) -> list[int]:
    """The row groups that may have one of these steps, the column at that place."""

    def holds(group: int) -> bool:
        known = metadata.row_group(group).column(place).statistics
        return known is None or any(known.min <= step <= known.max for step in steps)

    return [group for group in range(metadata.num_row_groups) if holds(group)]


def narrowed(
    data: pa.Table, columns: Sequence[str] | None = None, steps: Iterable[int] | None = None
) -> pa.Table:
    """Some columns, those of them that are there, and the rows of some steps."""
    if steps is not None and "step" in data.column_names:
        found, rows = _stretches(data)
        data = data.filter(pa.array(np.repeat(np.isin(found, list(steps)), rows)))
    if columns is None:
        return data
    return data.select([name for name in columns if name in data.column_names])


def steps_of(data: pa.Table) -> NDArray[np.int64]:
    """The steps of a table's rows, in ascending order."""
    return np.unique(_stretches(data)[0]).astype(np.int64)


def _stretches(data: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Each stretch of rows of one step: the step, and how many rows. A long run has hundreds of
    rows to a step, one after another: to look at each of them takes most of a look at few steps."""
    steps = data["step"].to_numpy()
    begins = np.flatnonzero(np.r_[True, steps[1:] != steps[:-1]])[: len(steps)]
    return steps[begins], np.diff(np.r_[begins, len(steps)])


def columns_of(path: Path) -> pa.Schema:
    """The columns of the table in one file, by its footer alone. Raises as `read` does."""
    return pq.read_schema(path, memory_map=False)


def count(path: Path) -> int:
    """Rows of the table in one file, by its footer alone. Raises as `read` does."""
    return pq.read_metadata(path).num_rows


def concatenate(parts: list[pa.Table]) -> pa.Table:
    """Parts of one table as one; a column that a part lacks is null there."""
    return pa.concat_tables(parts, promote_options="permissive").unify_dictionaries()


def with_modules(data: pa.Table, modules: pa.Table) -> pa.Table:
    """A table of layers, each row with the columns of its module; any other table as it is."""
    if "layer" not in data.column_names:
        return data
    layers = data["layer"].cast(_LAYER).unify_dictionaries().combine_chunks()
    order = pc.index_in(layers.dictionary, value_set=modules["layer"]).take(layers.indices)
    for label in modules.column_names[1:]:
        data = data.append_column(label, modules[label].take(order))
    return data


def encoded(modules: pa.Table) -> pa.Table:
    """The same with text as dictionaries, but for the key: so rows of layers take little room."""
    for place, label in enumerate(modules.column_names):
        if place and pa.types.is_string(modules[label].type):
            modules = modules.set_column(place, label, modules[label].dictionary_encode())
    return modules


def to_pandas(data: pa.Table) -> pd.DataFrame:
    """A frame of Arrow-backed columns, in which null (not measured) and NaN (measured) differ.

    Dictionaries become categories, in the order of the network; pandas cannot sort Arrow's own.
    """
    import pandas as pd

    def dtype(kind: pa.DataType) -> pd.ArrowDtype | None:
        return None if pa.types.is_dictionary(kind) else pd.ArrowDtype(kind)

    return data.to_pandas(types_mapper=dtype)
