"""Any loop's record as a run of the store: written while it runs, read by `load_runs`."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from recorded import ALWAYS, Block, cells, loop, near
from torch import nn

from gradflow import Recorder, Skip, build_network, load_runs, schema
from gradflow.errors import SpecError, StoreError
from gradflow.recording import buffers
from gradflow.recording.schedules import every
from gradflow.store import Run

TABLES = ("modules", "weights", "outputs", "blocks", "steps", "evaluations")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Block(Skip(), torch.float32), nn.Linear(4, 2))


def train(steps: int = 3, **options: Any) -> Recorder:
    model = network()
    with Recorder(model, **options) as recorder:
        loop(recorder, steps)
        recorder.evaluate("train", loss=0.25, accuracy=0.75)
        recorder.evaluate("test", loss=math.inf, extra=1)
    return recorder


def test_a_saved_record_is_a_run(tmp_path: Path) -> None:
    meta = {"depth": 3, "skip": True, "seed": 7, "note": "mine", "data": {"name": "toy", "size": 4}}
    recorder = train(save=tmp_path / "mine", meta=meta)
    (run,) = load_runs(tmp_path)
    assert run.record["origin"] == "external"
    assert run.status == "done"
    assert run.spec["skip"] == "identity"
    assert run.metrics == {"train_loss": 0.25, "train_accuracy": 0.75, "test_loss": math.inf}
    assert run.record["steps"] == 3
    assert run.record["environment"]["device"] == "cpu"
    assert 0 < run.record["recorder_share"] < 1
    assert run.record["recorder_seconds"] == near(recorder.seconds)
    assert "certificate" not in run.record
    row = load_runs(tmp_path).runs.iloc[0]
    described = row[["run", "origin", "status", "depth", "skip", "seed", "data", "data_size"]]
    assert described.tolist() == ["mine", "external", "done", 3, "identity", 7, "toy", 4]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(
        ["run.json", "spec.json", *(f"{table}.parquet" for table in TABLES)]
    )


def test_load_runs_gives_what_the_recorder_gives(tmp_path: Path) -> None:
    recorder = train(save=tmp_path / "mine", meta={"depth": 3}, schedule=ALWAYS)
    in_memory = train(schedule=ALWAYS)
    runs = load_runs(tmp_path)
    for table in ("modules", "weights", "outputs", "blocks", "steps"):
        stored = runs.table(table, fields=()).drop(columns="run_id")
        pd.testing.assert_frame_equal(stored, recorder.table(table))
        pd.testing.assert_frame_equal(in_memory.table(table), recorder.table(table))
    assert runs.weights()["depth"].tolist() == [3] * len(runs.weights())


def test_columns_carry_their_unit_and_meaning(tmp_path: Path) -> None:
    train(save=tmp_path / "mine")
    note = pq.read_schema(tmp_path / "mine" / "weights.parquet").field("weight_grad_norm").metadata
    assert note[b"unit"] == b"loss / parameter"
    assert note[b"meaning"].startswith(b"L2 norm of the loss's gradient")
    meanings = load_runs(tmp_path).meanings()
    assert set(meanings) == {
        "weight_grad_norm", "weight_norm", "output_rms", "output_grad_norm", "branch_rms",
        "skip_rms", "branch_grad_norm", "skip_grad_norm", "loss", "grad_norm",
    } | {"accuracy"}  # fmt: skip
    types = pq.read_schema(tmp_path / "mine" / "weights.parquet")
    assert str(types.field("step").type) == "int32"
    assert str(types.field("layer").type).startswith("dictionary<values=string, indices=int32")
    assert str(types.field("weight_norm").type) == "float"


def test_a_measured_nan_stays_and_what_was_not_measured_is_null(tmp_path: Path) -> None:
    """In the file, in the frame, and through a selection of one quantity."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quantities = ["weight_grad_norm", "weight_norm", "update_norm"]
    with Recorder(model, quantities, ALWAYS, optimizer, save=tmp_path / "mine") as recorder:
        for step in range(4):
            model.zero_grad()
            model(torch.randn(2, 4)).sum().backward()
            if step == 1:
                model[0].weight.grad.fill_(math.nan)
            if step == 2:
                model[0].zero_grad()
            recorder.step()
            if step in (0, 3):
                optimizer.step()
    assert recorder.divergence is not None

    def kinds(values: list[Any]) -> str:
        """A dot for null, a question mark for NaN, a 1 for any number."""
        return "".join("." if v is None else "?" if math.isnan(v) else "1" for v in values)

    expected = {  # two layers at each of four steps
        "weight_grad_norm": "11?1.111",
        "update_norm": "11....11",
    }
    data = pq.read_table(tmp_path / "mine" / "weights.parquet")
    runs = load_runs(tmp_path)
    frame = runs.weights()
    for quantity, kind in expected.items():
        assert kinds(data[quantity].to_pylist()) == kind
        assert kinds(list(cells(frame, quantity).values())) == kind
        alone = runs.weights(quantity)[quantity]
        assert kinds(alone.tolist()) == kind.replace(".", "")
        assert not alone.isna().any()
        assert str(alone.dtype) == "float[pyarrow]"
    assert math.isnan(frame["weight_grad_norm"].mean())  # no aggregate passes over a measured NaN
    assert frame["update_norm"].mean() > 0


def test_float64_models_are_recorded_in_float64(tmp_path: Path) -> None:
    model = nn.Linear(4, 4, dtype=torch.float64)
    with Recorder(model, save=tmp_path / "mine") as recorder:
        loss = (model(torch.randn(3, 4, dtype=torch.float64)) * 1e-100).sum()
        loss.backward()
        recorder.step(loss)
    (value,) = load_runs(tmp_path).outputs("output_grad_norm")["output_grad_norm"]
    assert value == near(math.sqrt(12) * 1e-100, rel=1e-12)


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("out of cheese"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "interrupted"),
    ],
)
def test_the_status_is_how_the_block_was_left(
    error: BaseException, status: str, tmp_path: Path
) -> None:
    def run() -> None:
        with Recorder(network(), save=tmp_path / "mine") as recorder:
            loop(recorder, 2)
            raise error

    with pytest.raises(type(error)):
        run()
    (found,) = load_runs(tmp_path)
    assert found.status == status
    assert found.record.get("error") == (
        "ValueError: out of cheese" if status == "failed" else None
    )
    assert found.frame("steps")["step"].tolist() == [0, 1]
    assert len(found.frame("weights")) == 6
    assert not found.alive


def test_a_diverged_loop_is_a_diverged_run(tmp_path: Path) -> None:
    model = network()
    with Recorder(model, save=tmp_path / "mine") as recorder:
        loop(recorder, 1)
        nn.init.constant_(model[1].inner.weight, math.nan)
        loop(recorder, 1)
    (run,) = load_runs(tmp_path)
    assert run.status == "diverged"
    assert run.record["divergence"] == {
        "step": 1, "layer": "1.inner", "quantity": "output_rms"
    }  # fmt: skip
    assert run.record["steps"] == 1  # the update of step 1 was not made


def test_a_loop_that_goes_on_counts_its_steps(tmp_path: Path) -> None:
    with Recorder(network(), save=tmp_path / "mine") as recorder:
        loop(recorder, 1)
        recorder.step(math.nan)
        loop(recorder, 2)
    (run,) = load_runs(tmp_path)
    assert (run.status, run.record["steps"]) == ("diverged", 4)


CHILD = """
import sys, torch
from gradflow import Recorder
from gradflow.recording import buffers
buffers.FLUSH_SECONDS = 0.0
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
with Recorder(model, save=sys.argv[1], meta={"depth": 2}) as recorder:
    for step in range(4):
        model(torch.randn(3, 4)).sum().backward()
        recorder.step()
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_killed_run_is_readable_up_to_its_last_flush(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        run = Run(path)
        assert (run.status, run.alive) == ("running", True)
        with pytest.raises(StoreError, match="another process"):
            Recorder(network(), save=path).__enter__()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    (run,) = load_runs(tmp_path)
    assert (run.status, run.alive) == ("running", False)
    assert run.frame("steps")["step"].tolist() == [0, 1, 2]  # the fourth was still in the buffer
    assert run.frame("weights")["step"].tolist() == [0, 0, 1, 1, 2, 2]
    assert load_runs(tmp_path).weights()["position"].tolist() == [0, 1] * 3
    assert load_runs(tmp_path).runs["status"].tolist() == ["running"]
    train(1, save=path)  # the lock died with its process
    assert load_runs(tmp_path).runs["status"].tolist() == ["done"]


# --- refusals -------------------------------------------------------------------------------------


def test_a_directory_of_other_things_is_not_touched(tmp_path: Path) -> None:
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / "train.parquet").write_text("precious")
    with pytest.raises(StoreError, match="holds other files"):
        Recorder(network(), save=mine).__enter__()
    assert [path.name for path in mine.iterdir()] == ["train.parquet"]


def test_refused_before_anything_is_attached(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = network()
    with pytest.raises(StoreError, match="cannot be written"):
        Recorder(model, save=tmp_path / "file").__enter__()
    assert not any(each._forward_hooks for each in model.modules())


def test_meta_is_plain(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^meta: wants names with plain values"):
        Recorder(network(), save=tmp_path / "mine", meta={"lr": torch.tensor(1.0)}).__enter__()
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("meta", [{1: 2}, {"": 2}, "depth=56", {"file": "datens\udce4tze.csv"}])
def test_meta_has_names_and_text_that_can_be_written(tmp_path: Path, meta: Any) -> None:
    with pytest.raises(SpecError, match=r"^meta: wants names with plain values"):
        Recorder(network(), save=tmp_path / "mine", meta=meta).__enter__()
    assert not (tmp_path / "mine").exists()


def test_half_a_character_costs_its_own_run_alone(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        train(1, save=tmp_path / name, meta={"note": "Größe 🙂", "depth": 1})
    spec = tmp_path / "mine" / "spec.json"
    spec.write_text(spec.read_text().replace("\\u00f6", "\\udcf6"))
    runs = load_runs(tmp_path)
    assert [run.spec["note"] for run in runs] == ["Größe 🙂"]
    assert len(runs.problems) == 1
    assert f"{spec}: unreadable" in runs.problems[0]


def test_numpy_s_numbers_are_plain(tmp_path: Path) -> None:
    meta = {"seed": np.int64(3), "lr": np.float32(0.5), "skip": np.True_, "data": {"n": np.int8(4)}}
    train(1, save=tmp_path / "mine", meta=meta)
    (run,) = load_runs(tmp_path)
    assert run.spec == {"seed": 3, "lr": 0.5, "skip": "identity", "data": {"n": 4}}
    with pytest.raises(SpecError, match=r"^meta: wants names with plain values \(not ndarray\)"):
        Recorder(network(), save=tmp_path / "other", meta={"lr": np.ones(2)}).__enter__()


def test_a_saved_run_ends_with_its_block(tmp_path: Path) -> None:
    recorder = train(save=tmp_path / "mine")
    before = json.loads((tmp_path / "mine" / "run.json").read_text())
    with pytest.raises(RuntimeError, match="evaluate after its `with` block"):
        recorder.evaluate("test", loss=1.0)
    with pytest.raises(RuntimeError, match="has saved its run"):
        recorder.__enter__()
    assert json.loads((tmp_path / "mine" / "run.json").read_text()) == before
    assert len(recorder.table("steps")) == 3


# --- buffers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "limit", "value"),
    [
        (False, "FLUSH_STEPS", 3),
        (True, "FLUSH_STEPS", 3),
        (False, "BUFFER_BYTES", 1),
        (True, "FLUSH_SECONDS", 0.0),
    ],
)
def test_many_flushes_give_the_table_of_one(
    saved: bool, limit: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = {"weights": every(1), "outputs": every(3, first=2), "blocks": every(2)}
    options: dict[str, Any] = {"schedule": mapping, "quantities": "all"}

    def call(name: str) -> Recorder:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        place = tmp_path / name if saved else None
        with Recorder(model, optimizer=optimizer, save=place, **options) as recorder:
            for _ in range(11):
                loop(recorder, 1)
                optimizer.step()
        return recorder

    one = call("one")
    written: list[str] = []
    made = schema.table
    monkeypatch.setattr(
        schema, "table", lambda name, *rest: written.append(name) or made(name, *rest)
    )
    monkeypatch.setattr(buffers, limit, value)
    many = call("many")
    assert written.count("weights") == (4 if limit == "FLUSH_STEPS" else 11)
    for table in ("modules", "weights", "outputs", "blocks", "steps"):
        pd.testing.assert_frame_equal(one.table(table), many.table(table))
    assert one.table("weights")["update_norm"].notna().all()


def test_buffers_stay_small_however_long_the_run() -> None:
    """152 layers, everything measured at every step: under 16 MB, and nothing left in a row."""
    model = build_network("cifar", depth=152, width=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = Recorder(model, "all", ALWAYS, optimizer)
    held = [
        array.nbytes
        for buffer in recorder._buffers.values()
        for array in (buffer._values, buffer._measured, buffer._elements)
    ]
    assert len(held) == 9
    assert 2**20 < sum(held) < 16 * 2**20
