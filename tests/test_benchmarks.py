"""The benchmarks run and say something of every arm; what they measure is no test's business."""

import contextlib
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import limits, queries, recording, reports, stores
from benchmarks.recording import ARMS, Task
from gradflow import load_runs, report
from gradflow.networks import chain

OWN = [name for name, arm in ARMS.items() if not arm.install]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """A task of milliseconds, and a process left as it is."""
    small = Task("small", lambda: chain(2, 4, branch="linear act", seed=0), (3, 4), 3, 4)
    monkeypatch.setattr(recording, "TASKS", {"small": small})
    monkeypatch.setattr(recording, "set_up_process", lambda threads: None)
    monkeypatch.setattr(limits, "TASKS", recording.TASKS)


def test_the_table_has_every_arm_and_positive_ratios(tmp_path, capsys):
    frame = recording.main(["small", "--steps", "2", "--arms", *OWN, "--out", str(tmp_path)])
    assert list(frame["arm"]) == OWN
    ratios = frame[["ratio", "low", "high", "mean_ratio", "milliseconds"]].to_numpy()
    assert (ratios > 0).all()
    assert (frame["low"] <= frame["ratio"]).all()
    assert (frame["ratio"] <= frame["high"]).all()
    rows = re.findall(r"^\| ([^|]+) \|", (tmp_path / "recording.md").read_text(), re.MULTILINE)
    assert rows == ["arm", "---", *OWN]
    assert {path.name for path in tmp_path.iterdir()} == {
        "recording.csv", "recording.md", "recording.png"
    }  # fmt: skip
    assert f"{torch.get_num_threads()} thread" in capsys.readouterr().out


def test_an_arm_whose_package_is_missing_is_left_out_with_the_command_that_gets_it(
    monkeypatch, capsys
):
    def missing(network, optimizer):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(ARMS, "peer", recording.Arm(missing, "", "pip install peer"))
    assert recording.available(["none", "peer"]) == ["none"]
    assert "peer: left out (No module named 'peer'): pip install peer" in capsys.readouterr().out


def test_every_arm_trains_the_same_network_alike():
    """No arm changes what is computed: nothing of what is compared is spared by one of them."""
    trained = {}
    for name in OWN:
        with contextlib.ExitStack() as stack:
            arm = recording._Trainee(recording.TASKS["small"], ARMS[name].watch, stack)
            for _ in range(3):
                arm.step()
            trained[name] = nn.utils.parameters_to_vector(arm.network.parameters())
    assert all(torch.equal(trained["none"], values) for values in trained.values())


def test_the_interval_of_the_median_is_that_of_the_order_statistics():
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    # Ranks 40 and 61 of 100: the tables' nonparametric 95 % interval of the median.
    assert recording.median_interval(values) == (50.5, 40.0, 61.0)


def test_what_a_recorder_holds_is_counted_in_all_its_tensors_and_arrays():
    held = {"a": torch.zeros(3), "b": [np.zeros(2), (torch.zeros(1, dtype=torch.float64), "x")]}
    assert limits.held_bytes(held) == 3 * 4 + 2 * 8 + 8


def test_the_limits_are_stated_for_a_task():
    assert re.match(r"small: 0\.00 MB in \d+ tensors; step", limits.least("small", 2))
    assert re.search(r"buffers [\d.]+ MB \(weights ", limits.buffers("default", "small"))
    assert re.search(r"median \d+\.\d+ \[", limits.whole_run(2, depth=8))


@pytest.mark.parametrize("what", ["bare", "run"])
def test_steps_of_a_process_of_their_own_are_as_many_as_asked_for(what, monkeypatch):
    seen = []
    monkeypatch.setattr(limits.statistics, "median", lambda taken: seen.append(taken) or 1.0)
    assert limits.median_step(what, 2, "default", 8) == 1.0
    ((first, second),) = seen
    assert min(first, second) > 0


def test_one_s_own_questions_have_the_same_answer_either_way(tmp_path, capsys):
    frame = queries.main(tmp_path, runs=10, layers=3, steps=5, rounds=1)
    assert list(frame["question"]) == list(queries.QUESTIONS)
    assert (frame[["pandas, s", "gradflow, s", "ratio"]].to_numpy() > 0).all()
    assert capsys.readouterr().out.startswith("10 runs, 0.0 M rows of weights; load_runs 0.")


def test_a_made_up_store_is_one_that_gradflow_reports_on(tmp_path):
    wanted = stores.specs(40, 20, 30)
    assert len({spec.name for spec in wanted}) == 40
    stores.fill(tmp_path, wanted[:4])
    for spec in wanted[:4]:
        (tmp_path / spec.name / "run.json").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    stores.fill(tmp_path, wanted[:4])  # what is there stays
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    runs = load_runs(tmp_path)
    assert [run.status for run in runs] == ["done"] * 4
    for name in ("weights", "outputs"):
        frame = runs.table(name)
        values = frame[[column for column in frame if column.endswith(("norm", "rms"))]]
        assert values.shape == (4 * 39 * 30, 2)  # 20 weight layers, 19 normalisation layers
        assert values.notna().all(axis=None)
        assert (values > 0).all(axis=None)
    found = report.gather(runs)
    assert set(found.pairs["match"]) == {"matched"}
    assert len(found.pairs) == 2
    assert found.pairs["train_difference"].notna().all()
    assert not found.problems


def test_a_reports_cost_is_that_of_all_its_processes():
    inner = "import time; held = b'x' * 50_000_000; time.sleep(.5)"
    code = "import subprocess, sys; held = b'x' * 50_000_000; "
    code += f"subprocess.run([sys.executable, '-c', {inner!r}])"
    cost = reports.measured([sys.executable, "-c", code])
    assert cost.seconds > 0.5
    assert 100 < cost.memory < 250


def test_the_table_of_reports_has_all_four(tmp_path, capsys):
    reports.main(tmp_path, [reports.Shape(2, 8, 12)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 runs × 8 layers × 12 steps"
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| pandas, run by run", "| first report", "| second, one new run", "| third, nothing new"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["2-8-12"]
