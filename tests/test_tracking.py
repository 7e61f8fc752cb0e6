"""Mirrors of a run: what CSV, TensorBoard and offline W&B hold is read back and is the record's."""

import csv
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradflow
from gradflow import cli, load_runs, tables, tracking
from gradflow.errors import GradflowError
from gradflow.spec import RunSpec
from gradflow.store import Run
from gradflow.training import checkpoint

SPEC = RunSpec(depth=8, width=4, batch_size=400, epochs=2)
CODES = {"done": 0, "diverged": 0, "failed": 1, "interrupted": 255}


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path, monkeypatch):
    """W&B as it is with nothing set, but for the directories that it has in the home directory."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of-wandb" / name))


@pytest.fixture
def said_nothing(capsys):
    """No mirror has failed: each failure is a line."""
    yield
    assert "logger=" not in capsys.readouterr().err


def run(tmp_path: Path, logger: str, spec: RunSpec = SPEC, **options: Any) -> Run:
    return gradflow.run(spec, runs_dir=str(tmp_path / "runs"), threads=1, logger=logger, **options)


def epochs_of(finished: Run) -> dict[int, dict[str, float]]:
    """The epochs of a record, by step, the naive way."""
    found: dict[int, dict[str, float]] = {}
    for row in finished.frame("evaluations").to_dict("records"):
        if row["split"] in ("train_batches", "test"):
            values = {f"{row['split']}_{name}": row[name] for name in ("loss", "accuracy")}
            found.setdefault(int(row["step"]), {"epoch": len(found) + 1}).update(values)
    return found


# --- CSV and TensorBoard --------------------------------------------------------------------------


def csv_of(finished: Run) -> dict[int, dict[str, float]]:
    with (finished.path / "metrics.csv").open(newline="") as file:
        rows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
    return {int(row.pop("step")): row for row in rows}


def scalars_of(finished: Run) -> dict[str, list[tuple[int, float]]]:
    events = events_of(finished)
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def events_of(finished: Run) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(finished.path / "tensorboard"), size_guidance=everything)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return events.Reload()


@pytest.mark.usefixtures("said_nothing")
def test_csv_has_a_row_an_epoch(tmp_path):
    finished = run(tmp_path, "csv")
    assert csv_of(finished) == epochs_of(finished)
    assert list(csv_of(finished)) == [3, 6]


@pytest.mark.usefixtures("said_nothing")
def test_tensorboard_events_are_the_records_to_float32(tmp_path):
    finished = run(tmp_path, "tensorboard")
    found = scalars_of(finished)
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in epochs_of(finished).items():
        for name, value in metrics.items():
            split, _, quantity = name.rpartition("_")
            tag = f"{quantity}/{split}" if split else name
            expected.setdefault(tag, []).append((step, float(np.float32(value))))
    for quantity in ("loss", "accuracy"):  # of the whole split, at the end; the test's is there
        value = finished.metrics[f"train_{quantity}"]
        expected[f"{quantity}/train"] = [(6, float(np.float32(value)))]
    assert found == expected
    events = events_of(finished)
    for name in ("gradient_profile", "gradient_heatmap"):
        [image] = events.Images(name)
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert image.step == 6
    [words] = events.Tensors("summary/text_summary")
    assert b"done: 6 updates" in words.tensor_proto.string_val[0]
    hyperparameters = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"identity" in hyperparameters


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(GradflowError, match=rf"pip install 'gradflow-harness\[{name}\]'"):
            tracking.check_logger(name)


# --- Weights & Biases, offline --------------------------------------------------------------------


class Offline:
    """An offline W&B run, read back by W&B's own reader of its files."""

    def __init__(self, finished: Run):
        [self.file] = finished.path.glob("wandb/offline-run-*/run-*.wandb")  # one, resumed or not
        done = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(self.file)],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        self.records = [json.loads(line) for line in done.stdout.splitlines()]
        [self.run] = self.of("run")
        [self.exit] = self.of("exit")
        self.config = self.run["config"]["update"]
        self.summary: dict[str, Any] = {}
        for update in self.of("summary"):
            self.summary |= update["update"]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record.get(kind, {}) for record in self.records if record["type"] == kind]

    @property
    def epochs(self) -> dict[int, dict[str, float]]:
        rows = {item["step"]["num"]: item["item"] for item in self.of("history")}
        assert len(rows) == len(self.of("history"))  # none twice
        names = (
            "epoch",
            *(f"{s}_{q}" for s in ("train_batches", "test") for q in ("loss", "accuracy")),
        )
        return {step: {name: row[name] for name in names} for step, row in rows.items()}

    def table(self, name: str) -> list[dict[str, Any]]:
        [path] = self.file.parent.glob(f"files/media/table/{name}_*.table.json")
        table = json.loads(path.read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def same(told: Any, recorded: Any) -> bool:
    """Whether JSON from W&B, where a number that is not finite may be a word, is the record's."""
    if isinstance(recorded, float):
        told = float(told)
        return told == pytest.approx(recorded, rel=1e-12, nan_ok=True)
    return bool(told == recorded)


def assert_mirrors(offline: Offline, finished: Run) -> None:
    """All that the W&B run holds is what the record has."""
    spec = RunSpec.from_dict(finished.spec)
    expected = finished.columns() | {"run_id": finished.run_id, "run": finished.path.name}
    for name, value in expected.items():
        assert same(offline.config.get(name), value), name
    assert offline.exit.get("exit_code", 0) == CODES[finished.status]
    for step, metrics in epochs_of(finished).items():
        for name, value in metrics.items():
            assert same(offline.epochs[step][name], value), (step, name)
    record = finished.record
    told = {"status": finished.status, "steps": record["steps"], **finished.metrics}
    told["recorder_share"] = record["recorder_share"]
    told["parameter_count"] = record["certificate"]["parameter_count"]
    for name, value in told.items():
        assert same(offline.summary[name], value), name
    recorded = {
        (row["step"], row["layer"]): row
        for row in finished.with_modules("weights").to_dict("records")
    }
    steps = tables.moments(finished.steps_of("weights"))
    layers = len(finished.frame("weights")["layer"].unique())
    for name, at in (("profile", steps), ("heatmap", tables.spread(finished.steps_of("weights")))):
        rows = offline.table(f"gradient_{name}_table")
        assert sorted({row["step"] for row in rows}) == list(at)
        for row in rows:
            kept = recorded[row["step"], row["layer"]]
            assert same(row["weight_grad_norm"], kept["weight_grad_norm"])
            assert row["finite"] is math.isfinite(kept["weight_grad_norm"])
            assert (row["position"], row["kind"]) == (kept["position"], kept["kind"])
        if name == "profile":
            assert len(rows) == len(steps) * layers
        [image] = offline.file.parent.glob(f"files/media/images/gradient_{name}_*.png")
        assert image.read_bytes().startswith(b"\x89PNG")
    chart = offline.table("gradient_profile_chart_table")
    assert {row["step"] for row in chart} == set(steps)
    assert max(row["ordinal"] for row in chart) == spec.depth


@pytest.mark.usefixtures("said_nothing")
def test_an_offline_wandb_run_read_back(tmp_path):
    finished = run(tmp_path, "wandb")
    offline = Offline(finished)
    assert_mirrors(offline, finished)
    assert list(offline.epochs) == [3, 6]
    assert sorted(offline.run["tags"]) == ["cifar", "depth-8", "digits", "skip-identity"]
    assert offline.run["run_group"].startswith("cifar-8-digits-")
    assert offline.run["job_type"] == "train"
    assert offline.run["project"] == "gradflow"
    assert offline.summary["diagnosis_first"] == offline.summary["diagnosis_last"] == "healthy"
    assert [path.name for path in (tmp_path / "of-wandb").glob("**/*.json")] == []


def test_a_group_is_what_is_compared_and_a_job_type_what_is_done(tmp_path):
    group = tracking.comparison(SPEC)
    for other in ({"seed": 3}, {"skip": False}, {"skip": "rezero"}, {"record": "all"}):
        assert tracking.comparison(SPEC.but(**other)) == group
    for other in ({"lr": 0.1}, {"depth": 14}, {"width": 8}, {"epochs": 3}, {"data": "synthetic"}):
        assert tracking.comparison(SPEC.but(**other)) != group
    finished = run(tmp_path, "wandb", SPEC.but(epochs=None, max_steps=0))
    offline = Offline(finished)
    assert offline.run["job_type"] == "probe"
    assert len(offline.table("gradient_profile_table")) == 8 + 7  # layers, norms
    assert [item["step"].get("num", 0) for item in offline.of("history")] == [0]


def test_a_diverged_run_keeps_what_is_not_finite_visible(tmp_path, capsys):
    spec = RunSpec(depth=8, width=4, max_steps=30, lr=1e9, schedule="constant", norm="none")
    finished = run(tmp_path, "wandb", spec)
    assert finished.status == "diverged"
    assert "logger=" not in capsys.readouterr().err
    offline = Offline(finished)
    assert_mirrors(offline, finished)
    assert offline.summary["divergence_step"] == finished.record["divergence"]["step"]
    assert "not finite" in offline.summary["diagnosis_last"]
    last = [row for row in offline.table("gradient_profile_table") if not row["finite"]]
    assert {row["step"] for row in last} == {finished.record["divergence"]["step"]}


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_a_run_that_stops_closes_its_mirror_after_its_record(tmp_path, monkeypatch, error):
    """Or the next run of the same process would be merged into it."""
    seen = []
    finish = tracking.WandbTracker.finish

    def look(self, run, status):
        seen.append((run.status, status))
        finish(self, run, status)

    def emit(event):
        if event["event"] == "evaluation":
            raise error

    monkeypatch.setattr(tracking.WandbTracker, "finish", look)
    with pytest.raises(error):
        run(tmp_path, "wandb", emit=emit)
    [left] = load_runs(tmp_path / "runs")
    status = {KeyboardInterrupt: "interrupted", Stop: "failed"}[error]
    assert seen == [(status, status)]
    offline = Offline(left)
    assert offline.exit["exit_code"] == CODES[status]
    assert offline.summary["status"] == status


# --- going on -------------------------------------------------------------------------------------


def stop_in_epoch(number: int, tmp_path: Path, logger: str, spec: RunSpec) -> None:
    """Stop it after that epoch has been logged."""
    count = 0

    def emit(event):
        nonlocal count
        count += event["event"] == "evaluation"
        if count == number and event["event"] == "step":
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, logger, spec, emit=emit)


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
@pytest.mark.parametrize("kept", [2, 1, 0])  # epochs that the checkpoint knows of; two were logged
def test_a_run_that_goes_on_has_each_epoch_once(tmp_path, monkeypatch, capsys, logger, kept):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SECONDS", (-1.0, 1e9))
    spec = SPEC.but(epochs=4)
    write = checkpoint.write_checkpoint

    def once(attempt, spec, state):
        if state["updates"] <= 3 * kept:
            write(attempt, spec, state)

    monkeypatch.setattr(checkpoint, "write_checkpoint", once)
    if kept < 2:  # nothing that was recorded after the last checkpoint is kept
        monkeypatch.setattr("gradflow.store.RunWriter.settle", lambda self: None)
    stop_in_epoch(2, tmp_path, logger, spec)
    [left] = load_runs(tmp_path / "runs")
    began = left.record["started"]
    finished = run(tmp_path, logger, spec)
    assert (finished.record["started"] == began) == (kept > 0)
    assert ("resumed" in finished.record) == (kept > 0)
    expected = epochs_of(finished)
    assert list(expected) == [3, 6, 9, 12]
    assert "logger=" not in capsys.readouterr().err
    if logger == "csv":
        assert csv_of(finished) == expected
    elif logger == "tensorboard":
        found = scalars_of(finished)["loss/test"]
        losses = [(s, float(np.float32(row["test_loss"]))) for s, row in expected.items()]
        assert found == losses
    else:
        offline = Offline(finished)
        assert_mirrors(offline, finished)
        assert (
            offline.run["run_id"] == f"{finished.run_id}-{int(1000 * finished.record['started']):x}"
        )
        assert offline.run.get("resume", False) == (kept > 0)


def test_what_was_uploaded_is_gone_on_with_and_not_repeated(tmp_path, monkeypatch):
    """`wandb sync` appends a second directory of the same id to the first."""
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SECONDS", (-1.0, 1e9))
    spec = SPEC.but(epochs=3)
    stop_in_epoch(2, tmp_path, "wandb", spec)
    [first] = (tmp_path / "runs").glob("*/wandb/offline-run-*/run-*.wandb")
    first.with_suffix(".wandb.synced").touch()
    kept = first.parent.rename(first.parent.with_name("offline-run-20200101_000000-earlier"))
    finished = run(tmp_path, "wandb", spec)
    assert kept.exists()
    kept.rename(tmp_path / "uploaded")
    offline = Offline(finished)
    assert offline.file.name == first.name  # the same id
    assert offline.run["resume"] is True
    assert [item["step"]["num"] for item in offline.of("history")] == [9]


def test_a_server_that_has_an_epoch_is_not_sent_it_again(tmp_path, monkeypatch):
    sent = []

    class Server:
        starting_step = 4  # it has step 3

        def log(self, values, step=None):
            sent.append(step)

    tracker = object.__new__(tracking.WandbTracker)
    tracker._run, tracker._there = Server(), Server.starting_step - 1  # type: ignore[assignment]
    for step in (3, 6):
        tracker.log(step, {"epoch": step / 3})
    assert sent == [6]


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["__init__", "log", "finish"])
def test_a_mirror_that_fails_costs_one_line_and_the_run_nothing(
    tmp_path, monkeypatch, capsys, moment
):
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.CsvTracker, moment, fail)
    finished = run(tmp_path, "csv")
    assert finished.status == "done"
    assert len(finished.frame("steps")) == 6
    said = capsys.readouterr().err
    line = "logger=csv: [Errno 28] No space left on device; the run goes on without\n"
    assert said == line


def test_wandb_that_cannot_log_in_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")  # without a key it fails at once, and asks nobody
    monkeypatch.setenv("HOME", str(tmp_path))
    finished = run(tmp_path, "wandb")
    assert finished.status == "done"
    said = capsys.readouterr().err
    assert said.startswith("logger=wandb: ")
    assert said.endswith("; the run goes on without\n")


def test_one_call_an_epoch_and_one_at_the_end(tmp_path, monkeypatch):
    import wandb

    calls = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, *a, **k: calls.append(1) or log(self, *a, **k)
    )
    run(tmp_path, "wandb", SPEC.but(epochs=5))
    assert len(calls) == 6


# --- a sweep --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_offline_sweep_read_back_is_what_the_store_has(tmp_path, monkeypatch, capsys):
    """Each run its own W&B run, and each comparison a group."""
    monkeypatch.chdir(tmp_path)
    keys = ["depth=8,14", "skip=true,false", "width=4", "batch_size=400", "epochs=2"]
    assert cli.main(["-m", *keys, "logger=wandb", "jobs=2", "threads=1"]) == 0
    assert "logger=" not in capsys.readouterr().err
    runs = load_runs("runs")
    assert len(runs) == 4
    found = {run.path.name: Offline(run) for run in runs}
    for finished in runs:
        assert_mirrors(found[finished.path.name], finished)
    assert len({offline.run["run_id"] for offline in found.values()}) == 4
    grouped = {(run.spec["depth"], found[run.path.name].run["run_group"]) for run in runs}
    assert len(grouped) == 2
