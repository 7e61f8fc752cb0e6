"""Mirrors of a run: a CSV file, and an offline Weights & Biases run that is read back."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradflow
from gradflow import tracking
from gradflow.errors import GradflowError
from gradflow.spec import RunSpec

SPEC = RunSpec(depth=8, width=4, batch_size=400, epochs=2)


def test_csv_has_a_row_an_epoch(tmp_path):
    run = gradflow.run(SPEC, runs_dir=str(tmp_path), threads=1, logger="csv")
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert float(rows[-1]["test_accuracy"]) == run.metrics["test_accuracy"]


def test_a_missing_wandb_names_the_extra(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradflowError, match=r"pip install 'gradflow-harness\[wandb\]'"):
        tracking.check_logger("wandb")


def test_an_offline_wandb_run_read_back(tmp_path, monkeypatch):
    """Group, tags, config, per-epoch metrics and the profile figure, without asking anything."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    run = gradflow.run(SPEC, runs_dir=str(tmp_path / "runs"), threads=1, logger="wandb")
    [file] = run.path.glob("wandb/offline-run-*/run-*.wandb")
    records = _read_back(file)
    [started] = [record["run"] for record in records if record["type"] == "run"]
    assert started["run_group"] == "cifar-8-digits"
    assert sorted(started["tags"]) == ["cifar", "depth-8", "digits", "skip-identity"]
    config = started["config"]["update"]
    columns = {name: value for name, value in SPEC.columns().items() if value is not None}
    assert columns | {"run_id": run.run_id} == {name: config[name] for name in [*columns, "run_id"]}
    epochs = [record["history"] for record in records if record["type"] == "history"]
    assert [epoch["step"]["num"] for epoch in epochs] == [3, 6]
    evaluations = run.frame("evaluations")
    for epoch in epochs:
        for split in ("test", "train_batches"):
            at = evaluations["step"] == epoch["step"]["num"]
            [row] = evaluations[at & (evaluations["split"] == split)].to_dict("records")
            assert epoch["item"][f"{split}_loss"] == pytest.approx(row["loss"])
            assert epoch["item"][f"{split}_accuracy"] == pytest.approx(row["accuracy"])
    summary: dict[str, Any] = {}
    for record in records:
        summary |= record["summary"]["update"] if record["type"] == "summary" else {}
    assert summary["status"] == "done"
    assert summary["train_accuracy"] == pytest.approx(run.metrics["train_accuracy"])
    [figure] = file.parent.glob("files/media/images/gradient_profile*.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


def _read_back(file: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_that_fails_closes_its_mirror(tmp_path, monkeypatch):
    """Or the next run of the same process would be merged into it."""
    told = []

    class Mirror(tracking.NoTracker):
        def finish(self, status, metrics, figures):
            told.append(status)

    room = importlib.import_module("gradflow.run")
    monkeypatch.setattr(room, "make_tracker", lambda *_: Mirror())
    monkeypatch.setattr(room, "_measure_initialisation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradflow.run(SPEC.but(max_steps=0), runs_dir=str(tmp_path), threads=1)
    assert told == ["failed"]
