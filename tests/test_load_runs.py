"""Many runs at once: chosen before anything is read, narrowed while it is, and lazily."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import report_store
from crash import die

from gradflow import load_runs, schema
from gradflow.errors import SpecError
from gradflow.recording.quantities import QUANTITIES, STEPS
from gradflow.spec import RunSpec
from gradflow.store import Run, Runs, RunWriter

LAYERS = ("conv1", "bn1", "fc")
KINDS = ("conv", "norm", "linear")


def write(store: Path, spec: RunSpec, steps: int = 3, *, killed: bool = False) -> Path:
    """A run whose gradient norm is depth × (step + 1) × (place + 1); the norm of fc is null."""
    writer = RunWriter(store / spec.name, spec.to_dict())
    modules = {"layer": LAYERS, "position": range(3), "kind": KINDS, "stage": [1] * 3}
    writer.write("modules", schema.table("modules", {k: list(v) for k, v in modules.items()}))
    assert spec.depth is not None
    for step in range(steps):
        norms = [float(spec.depth * (step + 1) * place) for place in (1, 2, 3)]
        columns: dict[str, Any] = {"step": [step] * 3, "layer": list(LAYERS)}
        columns["weight_grad_norm"] = norms
        columns["weight_norm"] = np.ma.masked_array([1, math.nan, 0], [False, False, True])
        writer.append("weights", schema.table("weights", columns))
    if killed:
        die(writer)
    else:
        accuracy = 1 / (1 + spec.seed)
        writer.finish("done", metrics={"train_accuracy": accuracy}, steps=steps)
    return writer.path


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    for depth in (8, 14):
        for skip in (False, True):
            for seed in (0, 1):
                write(tmp_path, RunSpec(depth=depth, skip=skip, seed=seed))
    return load_runs(tmp_path)


# --- choosing -------------------------------------------------------------------------------------


def test_runs_are_chosen_by_the_values_of_their_columns(runs: Runs) -> None:
    def found(chosen: Runs) -> list[tuple[Any, ...]]:
        return sorted((run.spec["depth"], run.spec["skip"], run.spec["seed"]) for run in chosen)

    assert found(runs.where(depth=8, skip=False)) == [(8, "none", 0), (8, "none", 1)]
    assert found(runs.where(depth=8, skip="none")) == found(runs.where(depth=8, skip=False))
    assert len(runs.where(depth=[8, 14], seed=range(1))) == 4
    assert len(runs.where(skip=("none", True))) == 8
    assert len(runs.where(status="done").where(depth=20)) == 0
    assert found(runs.where(runs.runs["train_accuracy"] > 0.75, depth=14)) == [
        (14, "identity", 0), (14, "none", 0)
    ]  # fmt: skip
    assert runs.where(depth=20).weights("weight_grad_norm").empty
    assert len(runs.where()) == 8


def test_choosing_reads_no_table(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "_read", lambda *_: pytest.fail("a table was read"))
    assert len(runs.where(depth=8)) == 4


def test_a_mask_with_nulls_in_it_leaves_these_out(tmp_path: Path) -> None:
    report_store.write_external(tmp_path, "with", {"depth": 20})
    report_store.write_external(tmp_path, "without", {})
    runs = load_runs(tmp_path)
    assert [run.path.name for run in runs.where(runs.runs["depth"] > 8)] == ["with"]
    assert [run.path.name for run in runs.where(runs.runs["depth"].isna())] == ["without"]
    assert [run.path.name for run in runs.where(depth=None)] == ["without"]
    assert len(runs.where([True, False])) == len(runs.where(np.array([False, True]))) == 1


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (lambda runs: runs.where(dept=8), "dept: no such column of runs; near it are depth"),
        (lambda runs: runs.where([True]), "where: 1 booleans for 8 runs"),
        (lambda runs: runs.table("weigths"), "weigths: no such table; there are modules, weights"),
        (lambda runs: runs.weights(fields=["dept"]), "fields=dept: no run has it; near it are d"),
        (lambda runs: runs.dataset("weigths"), "weigths: no such table"),
        (
            lambda runs: runs.weights("weight_grad_nrom"),
            "weight_grad_nrom: no run has it in its table weights; near it are weight_grad_norm",
        ),
        (lambda runs: runs.weights(["weight_norm", "f1"]), "f1: no run has it in its table weigh"),
        (lambda runs: runs.weights("output_rms"), "output_rms: no run has it in its table weights"),
        (
            lambda runs: runs.weights(modules=("knid",)),
            "modules=knid: no run has it in its table modules; near it are kind",
        ),
    ],
)
def test_what_is_misspelt_is_one_line(runs: Runs, choose: Any, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        choose(runs)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


def test_what_is_known_or_recorded_by_any_run_may_be_asked_for(tmp_path: Path) -> None:
    for name, quantity in (("one", "my_norm"), ("other", "weight_norm")):
        writer = RunWriter(tmp_path / name, {}, origin="external")
        writer.write("modules", schema.table("modules", {"layer": ["fc"], "position": [0]}))
        rows = {"step": [0], "layer": ["fc"], quantity: [2.0]}
        writer.append("weights", schema.table("weights", rows))
        writer.finish("done")
    runs = load_runs(tmp_path)
    assert runs.weights("my_norm")["my_norm"].tolist() == [2.0]
    assert list(runs.weights("update_norm")) == ["run_id", "step", "layer", "update_norm"]
    assert runs.where(run="none").weights("nothing").empty  # of no runs anything may be asked
    measured: dict[str, list[str]] = {}
    for one in QUANTITIES.values():
        measured.setdefault(one.table, []).append(one.name)
    assert {name: list(schema.QUANTITIES[name]) for name in measured} == measured
    assert list(schema.QUANTITIES["steps"]) == list(STEPS)
    assert set(schema.QUANTITIES) == set(schema.KEYS)


def test_an_empty_store_has_the_columns_of_a_run(tmp_path: Path) -> None:
    nothing = load_runs(tmp_path)
    assert nothing.runs.empty
    assert nothing.runs["depth"].tolist() == []
    assert len(nothing.where(nothing.runs["depth"] > 8)) == 0
    write(tmp_path, RunSpec())
    assert list(nothing.runs) == list(load_runs(tmp_path).runs)


# --- narrowing ------------------------------------------------------------------------------------


def test_steps_quantities_and_module_columns_alone(runs: Runs) -> None:
    frame = runs.weights("weight_grad_norm", steps=2, fields=("depth",), modules=("kind",))
    assert list(frame) == ["run_id", "depth", "step", "layer", "weight_grad_norm", "kind"]
    assert len(frame) == 8 * 3
    assert set(frame["step"]) == {2}
    expected = frame["depth"] * 3 * frame["layer"].map(dict(zip(LAYERS, (1, 2, 3), strict=True)))
    assert frame["weight_grad_norm"].tolist() == expected.tolist()
    whole = runs.weights("weight_grad_norm")
    some = runs.weights("weight_grad_norm", steps=np.array([0, 2]))
    pd.testing.assert_frame_equal(some, whole[whole["step"] != 1].reset_index(drop=True))
    both = runs.weights(["weight_norm", "weight_grad_norm", "update_norm"], steps=[7, 0])
    assert len(both) == 8 * 3
    assert {"weight_norm", "weight_grad_norm"} < set(both)
    assert "update_norm" not in both
    assert len(runs.weights(["weight_norm"], steps=0)) == 8 * 2  # not measured, of fc
    without = runs.weights().drop(columns=["position", "kind", "stage"])
    assert list(runs.weights(modules=())) == list(without)


def test_a_null_stays_a_null_and_a_nan_a_nan(runs: Runs) -> None:
    values = runs.weights(steps=0).set_index("layer")["weight_norm"]
    assert values.isna()["fc"].all()
    assert not values.isna()["bn1"].any()
    assert np.isnan(values["bn1"].to_numpy(float)).all()
    lazy = runs.dataset("weights").to_table(columns=["layer", "weight_norm"])
    assert lazy["weight_norm"].null_count == 8 * 3
    assert pc.sum(pc.is_nan(lazy["weight_norm"])).as_py() == 8 * 3


def test_text_is_categorical_and_behaves_like_text(runs: Runs) -> None:
    frame = runs.weights("weight_grad_norm")
    types = {name: str(frame[name].dtype) for name in frame}
    assert {n for n, kind in types.items() if kind == "category"} == {
        "run_id", "network", "skip", "shortcut", "data", "layer", "kind"
    }  # fmt: skip
    assert types["depth"] == types["seed"] == "int64[pyarrow]"
    assert (frame["skip"] == "none").sum() == 4 * 9
    grouped = frame.groupby(["depth", "skip", "kind"])["weight_grad_norm"].max()
    assert grouped.loc[14, "none", "linear"] == 14 * 3 * 3
    wide = grouped.reset_index().pivot_table("weight_grad_norm", index="depth", columns="skip")
    wide["difference"] = wide["none"] - wide["identity"]
    assert wide["difference"].tolist() == [0, 0]
    joined = frame.merge(runs.runs[["run_id", "train_accuracy"]], on="run_id")
    assert len(joined) == len(frame)
    assert frame["run_id"].cat.categories.is_monotonic_increasing


def test_of_a_long_run_the_row_groups_of_the_steps_alone_are_read(tmp_path: Path) -> None:
    steps, layers = 500, [f"layer{i}" for i in range(200)]
    columns = {"step": np.repeat(np.arange(steps), 200), "layer": layers * steps}
    data = schema.table("weights", columns | {"weight_norm": np.arange(steps * 200.0)})
    schema.write(data, tmp_path / "weights.parquet")
    file = pq.ParquetFile(tmp_path / "weights.parquet")
    assert file.metadata.num_row_groups == math.ceil(steps * 200 / 2**15)
    for wanted in ([0], [499, 3], [163, 164], [], [500], [-1]):
        read = schema.read(tmp_path / "weights.parquet", ["weight_norm"], wanted)
        assert read.column_names == ["weight_norm"]
        expected = [s * 200.0 + i for s in sorted({*wanted} & {*range(steps)}) for i in range(200)]
        assert read["weight_norm"].to_pylist() == expected
    assert schema._groups(file.metadata, 0, [0]) == [0]
    assert schema._groups(file.metadata, 0, [163]) == [0, 1]
    assert schema.read(tmp_path / "weights.parquet").equals(data)


def test_what_is_not_asked_for_is_not_read(runs: Runs) -> None:
    """A column that cannot be decoded costs nothing where it is not wanted."""
    path = runs.members[0].path / "weights.parquet"
    (group,) = (pq.read_metadata(path).row_group(i) for i in range(1))
    column = group.column(3)
    assert column.path_in_schema == "weight_norm"
    raw = bytearray(path.read_bytes())
    start = column.data_page_offset
    raw[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    assert len(runs.weights("weight_grad_norm")) == 8 * 9
    assert runs.problems == []
    assert len(runs.weights("weight_norm", fields=())) == 7 * 6
    assert len(runs.problems) == 1
    assert str(path.parent) in runs.problems[0]


# --- lazily ---------------------------------------------------------------------------------------


def test_a_dataset_has_the_rows_of_the_frame(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = runs.dataset("weights")
    monkeypatch.chdir("/")
    frame = runs.weights(modules=())
    lazy = schema.to_pandas(dataset.to_table().unify_dictionaries())
    assert list(lazy) == list(frame)
    assert lazy["shortcut"].isna().sum() == 4 * 9  # of plain networks: no dictionary then
    texts = ["run_id", "layer", "skip", "network", "data", "shortcut"]
    pd.testing.assert_frame_equal(
        *(f.assign(**{n: f[n].astype(object).fillna("") for n in texts}) for f in (lazy, frame)),
        check_dtype=False,
    )
    assert len(dataset.to_table().to_pandas()) == len(frame)


def test_a_query_opens_the_files_of_the_runs_that_it_wants(runs: Runs) -> None:
    dataset = runs.dataset("weights", fields=("depth", "skip", "drop_rate"))
    shallow = (pc.field("depth") == 8) & (pc.field("skip") == "none")
    assert len(list(dataset.get_fragments(filter=shallow))) == 2
    assert len(list(dataset.get_fragments(filter=pc.field("drop_rate") == 0.5))) == 0
    values = dataset.to_table(["weight_grad_norm"], filter=shallow & (pc.field("step") == 1))
    assert sorted(values["weight_grad_norm"].to_pylist()) == [16, 16, 32, 32, 48, 48]
    counted = dataset.to_table().group_by("depth").aggregate([("weight_grad_norm", "max")])
    assert dict(zip(*counted.to_pydict().values(), strict=True)) == {8: 72, 14: 126}


def test_unfinished_runs_are_in_it_and_damaged_ones_are_named(tmp_path: Path) -> None:
    write(tmp_path, RunSpec(depth=8))
    write(tmp_path, RunSpec(depth=14), steps=5, killed=True)
    bad = write(tmp_path, RunSpec(depth=20)) / "weights.parquet"
    bad.write_bytes(bad.read_bytes()[:100])
    runs = load_runs(tmp_path)
    table = runs.dataset("weights").to_table()
    assert sorted(table["depth"].to_pylist()) == [8] * 9 + [14] * 15
    assert len(runs.problems) == 1
    assert runs.problems[0].startswith(f"{bad.parent}: weights unreadable (")
    assert len(runs.weights("weight_grad_norm")) == 24
    assert len(runs.problems) == 1 or all(str(bad.parent) in line for line in runs.problems)


def test_columns_that_some_runs_lack_and_fields_of_users(tmp_path: Path) -> None:
    write(tmp_path, RunSpec(depth=8))
    report_store.write_external(tmp_path, "mine", {"depth": "deep", "step": 3})
    runs = load_runs(tmp_path)
    table = runs.dataset("steps").to_table()
    assert table["depth"].to_pylist() == ["deep"] * 3
    assert table["step"].to_pylist() == [0, 1, 2]  # what was recorded, not what meta calls so
    weights = runs.dataset("weights", fields=("network",)).to_table(filter=pc.field("step") == 0)
    assert set(weights["network"].to_pylist()) == {"cifar", None}


def test_a_dataset_of_nothing(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", {}).finish("done")
    dataset = load_runs(tmp_path).dataset("weights")
    assert dataset.count_rows() == 0
    assert dataset.schema.names == ["run_id", "step", "layer"]


def test_meanings_come_from_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RunWriter(tmp_path / "run", {})
    note = {"loss": {"meaning": "what is minimised", "unit": "loss"}}
    writer.append("steps", schema.table("steps", {"step": [0], "loss": [1.0]}, note))
    writer.finish("done")
    monkeypatch.setattr(Run, "_read", lambda *_: pytest.fail("a table was read"))
    assert load_runs(tmp_path).meanings() == note


@pytest.mark.slow
def test_types_that_an_editor_knows(tmp_path: Path) -> None:
    """The annotations say what comes back: mypy, over a user's own file."""
    (tmp_path / "mine.py").write_text(
        "import gradflow\n"
        "import pandas as pd\n"
        "runs = gradflow.load_runs('runs').where(depth=8)\n"
        "frame: pd.DataFrame = runs.runs\n"
        "frame = runs.weights('weight_grad_norm', steps=0, fields=('depth',))\n"
        "wrong: int = runs.weights()\n"
        "runs.weights(step=0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--follow-imports=silent", "mine.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[1] for line in lines] == ["6", "7"], done.stdout
