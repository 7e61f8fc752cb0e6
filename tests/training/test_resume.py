"""A run that is stopped anywhere and gone on with ends as one that was not, to the last bit."""

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gradflow
from gradflow.captions import environment, summary
from gradflow.spec import RunSpec
from gradflow.store import CHECKPOINT, Run
from gradflow.tables import other_circumstances
from gradflow.training import checkpoint

TABLES = ("modules", "weights", "outputs", "blocks", "steps", "evaluations")
TINY = {"depth": 8, "width": 4, "batch_size": 100}
KINDS = [
    {"skip": "stochastic_depth", "epochs": 3},
    {"optimizer": "adam", "lr": 1e-3, "schedule": "cosine", "warmup": 5, "epochs": 3},
    {"batch_size": 50, "accumulate": 3, "record": "all", "epochs": 4, "clip": 0.5},
    {"max_steps": 33, "precision": "bf16"},
    {"epochs": 3, "precision": "fp64"},
]


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    """Checkpoints after every epoch and at every update."""
    monkeypatch.setattr(checkpoint, "SECONDS", (-1.0, -1.0))


def stopped(spec: RunSpec, store: str, update: int) -> None:
    """Run, and raise when `update` updates have been told of or passed."""

    def emit(event):
        if event.get("step", -1) >= update:
            raise Stop

    with pytest.raises(Stop):
        gradflow.run(spec, runs_dir=store, threads=1, emit=emit)


def assert_same(one: Run, other: Run) -> None:
    assert one.status == other.status
    assert one.metrics == other.metrics
    for name in ("certificate", "final_parameters", "steps", "divergence"):
        assert one.record[name] == other.record[name], name
    for name in TABLES:
        mine, theirs = one.table(name), other.table(name)
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.equals(theirs), name
    assert sorted(p.name for p in one.path.iterdir()) == sorted(
        p.name for p in other.path.iterdir()
    )


@pytest.mark.parametrize("keys", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, keys):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    spec = RunSpec(**TINY | keys)
    whole = gradflow.run(spec, runs_dir=str(tmp_path / "whole"), threads=1)
    store = str(tmp_path / "parts")
    for update in (4, 17, 30):
        stopped(spec, store, update)
        part = Run(tmp_path / "parts" / spec.name)
        assert part.status == "failed"
        assert list(part.path.glob(f"attempt-*/{CHECKPOINT}"))
        steps = part.frame("steps")["step"]
        assert list(steps) == list(range(len(steps)))
    done = gradflow.run(spec, runs_dir=store, threads=1)
    assert_same(done, whole)
    assert len(done.record["resumed"]) == 3
    assert done.record["resumed"][-1]["updates"] >= 29
    assert done.record["resumed"][-1]["environment"]["threads"] == 1


def test_a_run_stopped_after_its_last_update_goes_on(tmp_path):
    spec = RunSpec(**TINY, epochs=2)

    def emit(event):
        if event["event"] == "evaluation" and event["split"] == "train":
            raise Stop

    with pytest.raises(Stop):
        gradflow.run(spec, runs_dir=str(tmp_path / "parts"), threads=1, emit=emit)
    done = gradflow.run(spec, runs_dir=str(tmp_path / "parts"), threads=1)
    assert done.record["resumed"][0]["updates"] == 27
    assert_same(done, gradflow.run(spec, runs_dir=str(tmp_path / "whole"), threads=1))


def test_other_circumstances_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    spec = RunSpec(**TINY, epochs=2)
    stopped(spec, str(tmp_path), 16)
    monkeypatch.setattr("gradflow.environment.metadata.version", lambda package: "2.99")
    done = gradflow.run(spec, runs_dir=str(tmp_path), threads=2)
    torch.set_num_threads(1)
    updates = done.record["resumed"][0]["updates"]
    (line,) = other_circumstances(done)
    assert line.startswith(f"gone on after {updates} updates with ")
    assert f"torch {torch.__version__} → 2.99" in line
    assert "threads 1 → 2" in line
    assert line in summary(done)
    assert line in environment(done)


def test_a_checkpoint_loads_as_plain_data_and_belongs_to_its_run(tmp_path, monkeypatch):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    spec = RunSpec(**TINY, epochs=2)
    stopped(spec, str(tmp_path), 16)
    path = tmp_path / spec.name / "attempt-1"
    state = torch.load(path / CHECKPOINT, weights_only=True)
    assert state["updates"] == state["recorder"]["next_step"] >= 14
    assert checkpoint.read_checkpoint(path, spec) is not None
    assert checkpoint.read_checkpoint(path, spec.but(seed=1)) is None
    monkeypatch.setattr(checkpoint, "RECIPE", 0)
    assert checkpoint.read_checkpoint(path, spec) is None


def test_a_damaged_checkpoint_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    spec = RunSpec(**TINY, epochs=2)
    stopped(spec, str(tmp_path / "a"), 16)
    file = tmp_path / "a" / spec.name / "attempt-1" / CHECKPOINT
    file.write_bytes(file.read_bytes()[:1000])
    done = gradflow.run(spec, runs_dir=str(tmp_path / "a"), threads=1)
    assert "resumed" not in done.record
    assert_same(done, gradflow.run(spec, runs_dir=str(tmp_path / "b"), threads=1))


def test_divergence_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr("gradflow.training.fit._PROGRESS_SECONDS", 0.0)
    hot = {"lr": 1e9, "schedule": "constant", "norm": "none", "on_divergence": "continue"}
    spec = RunSpec(**TINY | hot, max_steps=20)
    stopped(spec, str(tmp_path), 12)
    assert gradflow.run(spec, runs_dir=str(tmp_path), threads=1).status == "diverged"


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """SIGKILL at random moments, writing included, over runs of several kinds."""
    code = (
        "import sys, json, gradflow\n"
        "from gradflow.spec import RunSpec\n"
        "from gradflow.training import checkpoint\n"
        "checkpoint.SECONDS = (0.0, 0.05)\n"
        "gradflow.run(RunSpec(**json.loads(sys.argv[1])), runs_dir=sys.argv[2], threads=1)\n"
    )

    def start(keys: dict, store: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code, json.dumps(keys), str(store)])

    def written_since(moment: float, store: Path) -> bool:
        return any(p.stat().st_mtime > moment for p in store.glob("*/attempt-*/steps-*.parquet"))

    chance, kills, gone_on = random.Random(0), 0, 0
    for number, kind in zip(itertools.count(), itertools.cycle(KINDS)):
        if kills >= 30:
            break
        keys = {**TINY, "depth": 14, **kind, "seed": number}
        keys |= {"max_steps": 150} if "max_steps" in keys else {"epochs": 11}
        spec = RunSpec(**keys)
        whole, parts = tmp_path / f"whole{number}", tmp_path / f"parts{number}"
        assert start(keys, whole).wait() == 0
        for _ in range(8):
            began, process = time.time(), start(keys, parts)
            while process.poll() is None and not written_since(began, parts):
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
            if process.poll() is None:
                process.kill()
                kills += 1
            process.wait()
            part = Run(parts / spec.name)
            steps = part.frame("steps")["step"]
            assert list(steps) == list(range(len(steps)))
        assert start(keys, parts).wait() == 0
        done = Run(parts / spec.name)
        assert_same(done, Run(whole / spec.name))
        gone_on += len(done.record.get("resumed", []))
    print(f"{kills} kills, {gone_on} times gone on")
    assert gone_on >= 20
