"""Tables: types of their keys, null beside NaN, files written whole or not at all."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradflow import schema

LAYERS = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), ["b", "a"])


def weights(first_step: int = 0, **columns: object) -> pa.Table:
    keys = {"step": np.array([0, 0, 1]) + first_step, "layer": LAYERS}
    values = np.ma.masked_array(np.float32([1, math.nan, 5]), [False, False, True])
    return schema.table("weights", keys | {"weight_norm": values} | columns)


def test_keys_have_their_types_and_values_keep_theirs() -> None:
    data = weights(other=np.array([1.0, 2.0, 3.0]))
    assert data.schema.field("step").type == pa.int32()
    assert data.schema.field("layer").type == pa.dictionary(pa.int32(), pa.string())
    assert data.schema.field("weight_norm").type == pa.float32()
    assert data.schema.field("other").type == pa.float64()
    steps = schema.table("evaluations", {"step": [1, 2], "split": ["test", "train"]})
    assert steps.schema.field("split").type == pa.dictionary(pa.int8(), pa.string())
    columns = {name: [None] for name in schema.MODULE_COLUMNS} | {"layer": ["a"]}
    modules = schema.table("modules", columns)
    assert dict(zip(modules.schema.names, modules.schema.types, strict=True)) == (
        schema.MODULE_COLUMNS
    )


def test_masked_is_null_and_nan_is_nan(tmp_path: Path) -> None:
    """In the table, in the file, in parts put together, and in pandas."""
    path = tmp_path / "weights.parquet"
    schema.write(weights(), path)
    both = schema.concatenate([schema.read(path), weights(2)])
    for data in (weights(), schema.read(path), both.slice(0, 3), both.slice(3)):
        one, nan, null = data["weight_norm"].to_pylist()
        assert one == 1
        assert math.isnan(nan)
        assert null is None
        frame = schema.to_pandas(data)["weight_norm"]
        assert frame.isna().tolist() == [False, False, True]
        assert math.isnan(frame.tolist()[1])
        assert math.isnan(frame.mean())
        assert frame.dtype == pd.ArrowDtype(pa.float32())


def test_lists_may_hold_both() -> None:
    data = schema.table("steps", {"step": [0, 1, 2], "loss": [1.5, math.nan, None]})
    assert data["loss"].null_count == 1
    assert math.isnan(data["loss"][1].as_py())


def test_meanings_are_stamped_and_survive(tmp_path: Path) -> None:
    meanings = {"weight_norm": {"unit": "parameter", "meaning": "L2 norm"}, "unused": {"unit": ""}}
    data = schema.table("weights", {"step": [0], "weight_norm": [1.0]}, meanings)
    path = tmp_path / "weights.parquet"
    schema.write(data, path)
    expected = {b"unit": b"parameter", b"meaning": b"L2 norm"}
    assert pq.read_schema(path).field("weight_norm").metadata.items() >= expected.items()
    both = schema.concatenate([schema.read(path), schema.read(path)])
    assert both.schema.field("weight_norm").metadata.items() >= expected.items()


def test_a_column_that_a_part_lacks_is_null_there() -> None:
    both = schema.concatenate([weights(), weights(2, extra=np.array([1.0, 2.0, 3.0]))])
    assert both["extra"].to_pylist() == [None, None, None, 1, 2, 3]
    assert both["layer"].to_pylist() == ["b", "a", "b"] * 2


def test_parts_of_other_layers_share_one_dictionary() -> None:
    other = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1], pa.int32()), ["c", "a"])
    both = schema.concatenate([weights(), weights(2, layer=other)])
    assert both["layer"].to_pylist() == ["b", "a", "b", "c", "a", "a"]
    assert both["layer"].chunk(0).dictionary.to_pylist() == ["b", "a", "c"]


def test_frames_sort_group_and_search_by_layer() -> None:
    """Layers are categories in the order of the network, here b before a."""
    frame = schema.to_pandas(weights())
    assert frame.sort_values(["layer", "step"])["layer"].tolist() == ["b", "b", "a"]
    assert frame.groupby("layer")["step"].max().to_dict() == {"b": 1, "a": 0}
    assert frame["layer"].str.startswith("a").tolist() == [False, True, False]
    assert frame[frame["layer"] == "b"]["step"].tolist() == [0, 1]


@pytest.mark.parametrize("order", [[0, 0, 1, 1, 4, 4], [4, 4, 0, 0, 1, 1], [0, 1, 4, 0, 1, 4], []])
def test_steps_are_found_in_any_order_of_rows(order: list[int]) -> None:
    data = schema.table("steps", {"step": order, "loss": np.arange(len(order), dtype=float)})
    assert schema.steps_of(data).tolist() == sorted(set(order))
    chosen = schema.narrowed(data, steps=[4, 0, 7])
    assert chosen.to_pylist() == [row for row in data.to_pylist() if row["step"] in (0, 4)]
    assert schema.narrowed(data, steps=[]).num_rows == 0


def test_layers_get_the_columns_of_their_modules() -> None:
    modules = schema.table(
        "modules", {"layer": ["a", "b"], "position": [7, 8], "kind": ["x", None]}
    )
    data = schema.with_modules(weights(), modules)
    assert data["position"].to_pylist() == [8, 7, 8]
    assert data["kind"].to_pylist() == [None, "x", None]
    unknown = schema.table("modules", {"layer": ["b"], "position": [8]})
    assert schema.with_modules(weights(), unknown)["position"].to_pylist() == [8, None, 8]
    steps = schema.table("steps", {"step": [0]})
    assert schema.with_modules(steps, modules).column_names == ["step"]


def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.parquet"
    schema.write(weights(), path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        schema.write(weights(2), path)
        assert reader.read() == before  # who reads the old file still has all of it
    schema.write(weights(), path)
    assert [p.name for p in path.parent.iterdir()] == ["weights.parquet"]

    def break_off(data: pa.Table, where: Path, **options: object) -> None:
        Path(where).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", break_off)
    with pytest.raises(KeyboardInterrupt):
        schema.write(weights(5), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*.parquet")] == ["weights.parquet"]


def test_rows_are_counted_by_the_footer(tmp_path: Path) -> None:
    path = tmp_path / "weights.parquet"
    schema.write(weights(), path)
    assert schema.count(path) == 3
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(pa.ArrowInvalid):
        schema.count(path)
    with pytest.raises(FileNotFoundError):
        schema.count(tmp_path / "none.parquet")


def test_norms_are_stored_small(tmp_path: Path) -> None:
    """152 layers × 200 steps of two norms: fewer bytes than the norms have, keys included."""
    layers, steps = 152, 200
    names = [f"layer{i}.conv" for i in range(layers)]
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, steps, layers))
    growing = 0.02 * np.arange(layers) - np.arange(steps)[:, None] / 50
    values = np.exp(growing + noise).reshape(2, -1).astype(np.float32)
    data = schema.table(
        "weights",
        {
            "step": np.repeat(np.arange(steps), layers),
            "layer": pa.DictionaryArray.from_arrays(
                pa.array(np.tile(np.arange(layers, dtype=np.int32), steps)), names
            ),
            "weight_grad_norm": values[0],
            "weight_norm": values[1],
        },
    )
    path = tmp_path / "weights.parquet"
    schema.write(data, path)
    assert path.stat().st_size < 3.5 * values.size
    assert schema.read(path).equals(data)
