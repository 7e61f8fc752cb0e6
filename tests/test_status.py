"""How sweeps stand, read from the store of a sweep that is under way, was killed, or has ended."""

import importlib
import json
import os
import time

import fake_worker as fake
import pytest
from crash import die

from gradflow import load_runs, report, schema, status
from gradflow.spec import RunSpec
from gradflow.store import RunWriter, mark_dead

sweeping = importlib.import_module("gradflow.sweep")
SPECS = [RunSpec(depth=8, seed=seed) for seed in range(5)]
DONE, RUNNING, FAILED, GONE, LEFT = SPECS


@pytest.fixture
def store(tmp_path):
    """A sweep of five runs: one done, one at work, one failed, one whose process died, one left."""
    todo = sweeping.plan(tmp_path, SPECS)
    with sweeping._announced(tmp_path, todo, 2):
        with RunWriter(tmp_path / DONE.name, DONE.to_dict()) as writer:
            writer.finish("done", steps=264)
        writer = RunWriter(tmp_path / FAILED.name, FAILED.to_dict())
        writer.finish("failed", failure="raised", error="Traceback\nValueError: deep")
        die(RunWriter(tmp_path / GONE.name, GONE.to_dict()))
        at_work = RunWriter(tmp_path / RUNNING.name, RUNNING.to_dict())
        rows = {"step": [0, 1], "loss": [2.5, 0.125], "accuracy": [0.1, 0.75]}
        at_work.append("steps", schema.table("steps", rows))
        at_work.update(started=time.time() - 66)
        yield tmp_path
        at_work.finish("interrupted")


def lines(*stores):
    return status.text(load_runs(*stores), stores).splitlines()


def test_a_sweep_under_way(store):
    sweep_id = sweeping.plan(store, SPECS).sweep_id
    head, *rest = lines(store)
    totals, left = head.split("; ")
    assert totals == f"sweep {sweep_id}: 5 runs: 1 done, 1 running, 1 failed, 0 diverged, 2 left"
    assert left.endswith(" left")
    assert rest == [
        f"  {RUNNING.name}: step 2 of 264, loss 0.125, accuracy 75.0%, for 1 min 06 s",
        f"  {FAILED.name}: failed: ValueError: deep",
    ]


def test_time_left_is_told_from_this_sweep_and_this_attempt(store):
    """Not from runs that were there before, nor from what a run had computed before it stopped."""
    with RunWriter(store / LEFT.name, LEFT.to_dict()) as writer:
        writer.record["seconds"] = 1e6
        writer.spent = 1e6
        writer.finish("done")
    (path,) = (store / ".sweeps").iterdir()
    about = json.loads(path.read_text())
    for member in about["runs"]:
        member["missing"] = member["run"] == RUNNING.name
        member["steps"] = 4
    path.write_text(json.dumps(about))
    (record,) = store.glob(f"{RUNNING.name}/run.json")
    run = json.loads(record.read_text()) | {"started": time.time() - 1e6}
    run["resumed"] = [{"updates": 1, "started": time.time() - 30}]
    record.write_text(json.dumps(run))
    assert lines(store)[0].endswith("; 1 min 00 s left")  # 1 of 4 in 30 s, 2 of 4 to go


def test_a_run_that_was_killed_in_the_sweep_has_failed(store):
    mark_dead(store / GONE.name, "failed", "killed by signal 9 (SIGKILL)")
    head, *rest = lines(store)
    assert "1 done, 1 running, 2 failed, 0 diverged, 1 left" in head
    assert f"  {GONE.name}: failed: killed by signal 9 (SIGKILL)" in rest


def test_a_sweep_of_another_machine_is_taken_to_live(store):
    (path,) = (store / ".sweeps").iterdir()
    about = json.loads(path.read_text()) | {"host": "elsewhere"}
    path.with_name("other.json").write_text(json.dumps(about))
    assert not any("not under way" in line for line in lines(store))


def test_a_sweep_that_was_killed(store):
    (path,) = (store / ".sweeps").iterdir()
    copy = path.with_name("killed.json")
    copy.write_text(path.read_text())  # nobody holds its lock
    (head,) = [line for line in lines(store) if line.startswith("sweep killed")]
    assert head.endswith("2 left; not under way: the same command goes on")


def test_a_killed_sweep_whose_runs_others_have_done_is_not_told(store):
    (path,) = (store / ".sweeps").iterdir()
    about = json.loads(path.read_text())
    about["runs"] = [member for member in about["runs"] if member["run"] == DONE.name]
    path.with_name("killed.json").write_text(json.dumps(about))
    assert not any("killed" in line for line in lines(store))


def test_what_failed_before_the_sweep_is_left_where_it_is_tried_again(store):
    (path,) = (store / ".sweeps").iterdir()
    about = json.loads(path.read_text()) | {"started": time.time() + 100}
    path.write_text(json.dumps(about))
    assert "1 done, 1 running, 0 failed, 0 diverged, 3 left" in lines(store)[0]
    for member in about["runs"]:
        member["missing"] = member["run"] != FAILED.name
    path.write_text(json.dumps(about))
    assert "1 done, 1 running, 1 failed, 0 diverged, 2 left" in lines(store)[0]


def test_a_run_outside_of_any_sweep(store):
    (path,) = (store / ".sweeps").iterdir()
    path.write_text("{")
    head, *rest = lines(store)
    assert head == "under way:"
    shown = {line.split(":")[0].strip(): line for line in rest}
    assert shown[GONE.name].endswith("step 0; stopped: the same command goes on")
    assert shown[RUNNING.name].endswith("step 2, loss 0.125, accuracy 75.0%, for 1 min 06 s")


def test_a_sweep_of_which_nothing_is_there_yet_is_told_all_the_same(tmp_path, capsys):
    with sweeping._announced(tmp_path, sweeping.plan(tmp_path, SPECS), 2):
        assert report.main([str(tmp_path), "--text"]) == 0
    assert "5 runs: 0 done, 0 running, 0 failed, 0 diverged, 5 left\n" in capsys.readouterr().out


def test_another_shell_sees_what_the_sweep_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeping, "COMMAND", (os.sys.executable, "-P", fake.__file__))
    seen = []

    def look(event):
        if event["event"] == "start":
            assert report.main([str(tmp_path), "--text"]) == 0
            seen.append(capsys.readouterr().out.splitlines()[0].split(": ", 1)[1])

    sweeping.sweep(SPECS[:2], display=look, runs_dir=str(tmp_path), jobs=1)
    assert seen[0] == "2 runs: 0 done, 0 running, 0 failed, 0 diverged, 2 left"
    assert seen[1].startswith("2 runs: 1 done, 0 running, 0 failed, 0 diverged, 1 left")
    assert report.main([str(tmp_path), "--text"]) == 0
    assert "sweep" not in capsys.readouterr().out


def test_many_runs_are_told_in_short_and_without_what_draws(tmp_path, command):
    for seed in range(report.TOLD_RUNS + 1):
        spec = RunSpec(depth=8, seed=seed)
        with RunWriter(tmp_path / "runs" / spec.name, spec.to_dict()) as writer:
            writer.finish("done", metrics={"train_accuracy": 0.5})
    code = (
        "import sys; from gradflow import report; report.main(['runs', '--text'])\n"
        "print(sorted({'seaborn', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    out = command("-c", code).stdout.splitlines()
    told = "python -m gradflow.report RUNS tells what the gradient did in each"
    assert f"{report.TOLD_RUNS + 1} runs: {told}" in out
    assert out[-1] == "[]"
    assert len(out) < 20
