"""Sweeps with real processes and a real store, most of them over the runs of `fake_worker`."""

import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import fake_worker as fake
import pytest

from gradflow.claim import Claim, alive
from gradflow.errors import SpecError, StoreError
from gradflow.spec import DataSpec, NetworkSpec, RunSpec
from gradflow.store import Run, RunWriter, mark_dead
from gradflow.sweep import cost, sweep

module = importlib.import_module("gradflow.sweep")
FAKE = (sys.executable, "-P", fake.__file__)


def spec(seed, depth=8):
    return RunSpec(depth=depth, seed=seed)


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(module, "COMMAND", FAKE)


def names(events, kind):
    return [event["run"] for event in events if event["event"] == kind]


def gone(pid):
    """Whether a process has ended; one that only waits to be buried by its parent has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- what is computed -----------------------------------------------------------------------------


def test_runs_come_in_the_order_of_the_specs_and_twice_the_same_is_computed_once(cheap, tmp_path):
    events = []
    specs = [spec(2), spec(0, depth=56), spec(2), spec(1)]
    result = sweep(specs, display=events.append, runs_dir=str(tmp_path), jobs=2)
    assert [run.path.name for run in result.runs] == [s.name for s in specs]
    assert sorted(names(events, "start")) == sorted({s.name for s in specs})
    assert sorted(names(events, "end")) == sorted({s.name for s in specs})
    assert result.counts == {"done": 3}
    assert (result.failures, result.reused) == ([], 0)


def test_what_the_store_has_is_not_computed_again(cheap, tmp_path):
    first, unfinished = spec(fake.DIVERGES), spec(fake.KILLED)
    before = sweep([first, unfinished], runs_dir=str(tmp_path), jobs=1)
    assert [run.status for run in before.runs] == ["diverged", "failed"]
    events = []
    specs = [first, unfinished, spec(0)]
    after = sweep(specs, display=events.append, runs_dir=str(tmp_path), jobs=1)
    assert names(events, "start") == [unfinished.name, spec(0).name]
    assert events[0]["reused"] == after.reused == 1
    assert after.runs[0].record == before.runs[0].record
    assert after.counts == {"done": 1, "diverged": 1, "failed": 1}
    assert after.summary().splitlines()[0] == (
        "3 runs: 1 done, 1 diverged, 1 failed; 1 of them from before."
    )
    events.clear()
    again = sweep([first], display=events.append, runs_dir=str(tmp_path))
    assert [event["event"] for event in events] == ["sweep"]
    assert again.counts == {"diverged": 1}


def test_the_longest_run_is_first(cheap, tmp_path):
    events = []
    specs = [spec(0, depth) for depth in (8, 56, 20, 110)]
    sweep(specs, display=events.append, runs_dir=str(tmp_path), jobs=1)
    assert names(events, "start") == [spec(0, depth).name for depth in (110, 56, 20, 8)]


def test_no_specs_are_no_runs(tmp_path):
    assert sweep([], runs_dir=str(tmp_path)).summary() == "0 runs: none."


def test_cost_grows_with_images_depth_and_the_square_of_width():
    at = RunSpec(depth=8, max_steps=100, batch_size=20)  # 100 × 20 images, and 2000 for the rest
    assert cost(at.but(depth=20)) / cost(at) == 20 / 8
    assert cost(at.but(width=32)) / cost(at) == 4
    assert cost(at.but(max_steps=300)) / cost(at) == 8000 / 4000
    assert cost(RunSpec(network=NetworkSpec(target="a.b"), max_steps=0)) == 2000 * 20 * 64**2


# --- side by side ---------------------------------------------------------------------------------


def test_two_workers_work_at_the_same_time(cheap, tmp_path):
    events = []
    specs = [spec(seed) for seed in fake.PAIR]  # each waits until the other is there
    result = sweep(specs, display=events.append, runs_dir=str(tmp_path), jobs=2)
    assert result.counts == {"done": 2}
    kinds = [event["event"] for event in events]
    assert kinds[:5] == ["sweep", "start", "start", "begin", "begin"]


def test_a_worker_takes_one_run_after_another_in_one_thread(cheap, tmp_path):
    result = sweep([spec(seed) for seed in range(4)], runs_dir=str(tmp_path), jobs=2)
    assert len({run.record["pid"] for run in result.runs}) <= 2
    settings = [run.record["settings"] for run in result.runs]
    assert {(each["device"], each["threads"]) for each in settings} == {("auto", 1)}


@pytest.mark.parametrize(
    ("settings", "workers"),
    [({}, 5), ({"threads": 2}, 2), ({"threads": 9}, 1), ({"jobs": 3}, 3), ({"jobs": 50}, 7)],
)
def test_as_many_workers_as_cores_have_room_for(monkeypatch, tmp_path, settings, workers):
    monkeypatch.setattr(module, "cores", lambda: 5)
    monkeypatch.setattr(module, "_gpus", lambda: 0)
    assert devices_of(monkeypatch, tmp_path, settings) == ["auto"] * workers


def devices_of(monkeypatch, tmp_path, settings):
    """The devices of the workers that a sweep of seven runs would have."""
    monkeypatch.setattr(module.Pool, "compute", lambda pool, specs: places.extend(pool._free) or {})
    places, events = [], []
    sweep([spec(s) for s in range(7)], display=events.append, runs_dir=str(tmp_path), **settings)
    assert events[0]["workers"] == len(places)
    return places


@pytest.mark.parametrize(
    ("settings", "devices"),
    [
        ({}, ["cuda:0", "cuda:1", "cuda:2"]),
        ({"device": "cuda", "jobs_per_device": 2}, ["cuda:0", "cuda:1", "cuda:2"] * 2),
        ({"device": "cuda:1"}, ["cuda:1"]),
        ({"device": "cuda:1", "jobs_per_device": 3}, ["cuda:1"] * 3),
        ({"jobs": 5}, ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]),
        ({"devices": 2}, ["auto"]),
        ({"device": "cpu"}, ["cpu"] * 5),
        ({"device": "cpu", "devices": 2}, ["cpu"] * 2),
    ],
)
def test_a_worker_a_gpu_or_several(monkeypatch, tmp_path, settings, devices):
    monkeypatch.setattr(module, "_gpus", lambda: 3)
    monkeypatch.setattr(module, "cores", lambda: 5)
    assert devices_of(monkeypatch, tmp_path, settings) == devices


def test_gpus_are_those_that_are_visible(monkeypatch):
    for visible, count in (("0,1", 2), ("", 0), ("GPU-8f3, GPU-1a2", 2), ("-1", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert module._gpus() == count


def test_each_worker_computes_on_its_own_device(cheap, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_gpus", lambda: 2)
    specs = [spec(seed) for seed in (*fake.PAIR, fake.KILLED, 0, 1)]
    result = sweep(specs, runs_dir=str(tmp_path))
    devices = [run.record["settings"]["device"] for run in result.runs]
    assert sorted(devices[:2]) == ["cuda:0", "cuda:1"]
    assert set(devices) == {"cuda:0", "cuda:1"}


# --- trouble --------------------------------------------------------------------------------------


def test_what_fails_or_is_killed_does_not_stop_the_others(cheap, tmp_path):
    seeds = (0, fake.RAISES, 1, fake.KILLED, fake.EXITS, fake.REFUSED, 2)
    events = []
    result = sweep(
        [spec(seed) for seed in seeds], display=events.append, runs_dir=str(tmp_path), jobs=2
    )
    statuses = [None if run is None else run.status for run in result.runs]
    assert statuses == ["done", "failed", "done", "failed", "failed", None, "done"]
    assert result.counts == {"done": 3, "failed": 4}
    assert sorted(names(events, "end")) == sorted(spec(seed).name for seed in seeds)

    errors = {failed.seed: error for failed, error in result.failures}
    assert set(errors) == {fake.RAISES, fake.KILLED, fake.EXITS, fake.REFUSED}
    assert errors[fake.RAISES].splitlines()[-1] == "ValueError: of the user's making"
    assert errors[fake.KILLED].splitlines()[-2:] == [
        "the last words", "killed by signal 9 (SIGKILL)",
    ]  # fmt: skip
    assert errors[fake.EXITS] == "its process exited with code 3"
    assert errors[fake.REFUSED] == "device=nowhere: this machine has no such device"

    killed = result.runs[3]
    assert killed.record["error"] == "killed by signal 9 (SIGKILL)"
    assert not killed.alive
    assert "    killed by signal 9 (SIGKILL)" in result.summary().splitlines()


def test_what_would_fail_again_is_tried_again_when_asked_for(cheap, tmp_path):
    specs = [spec(fake.RAISES), spec(fake.KILLED), spec(0)]
    sweep(specs, runs_dir=str(tmp_path), jobs=1)
    again, asked = [], []
    result = sweep(specs, display=again.append, runs_dir=str(tmp_path), jobs=1)
    assert names(again, "start") == [spec(fake.KILLED).name]
    assert result.counts == {"done": 1, "failed": 2}
    errors = {failed.seed: error.splitlines() for failed, error in result.failures}
    assert errors[fake.RAISES] == [
        "ValueError: of the user's making", "failed before; retry_failed=true tries it again",
    ]  # fmt: skip
    sweep(specs, display=asked.append, runs_dir=str(tmp_path), jobs=1, retry_failed=True)
    assert sorted(names(asked, "start")) == sorted(s.name for s in specs[:2])


@pytest.mark.parametrize("seed", [fake.WAITS, fake.STUBBORN])
def test_a_run_that_hangs_fails_at_its_timeout_and_does_not_stop_the_others(
    cheap, monkeypatch, tmp_path, seed
):
    monkeypatch.setattr(module, "GRACE", 1.0)
    specs = [spec(seed, depth=56), spec(0), spec(1)]
    result = sweep(specs, runs_dir=str(tmp_path), jobs=1, timeout=1.5)
    assert [run.status for run in result.runs] == ["failed", "done", "done"]
    ((failed, error),) = result.failures
    assert failed == specs[0]
    assert error.splitlines()[-1] == "timeout: it took longer than 1.5 s"
    record = result.runs[0].record
    assert (record["failure"], record["error"]) == ("timeout", "timeout: it took longer than 1.5 s")
    assert gone(record["pid"])


def test_fail_fast_ends_the_sweep_at_the_first_failure(cheap, tmp_path):
    specs = [spec(fake.WAITS, depth=110), spec(fake.RAISES, depth=56), spec(0), spec(1)]
    result = sweep(specs, runs_dir=str(tmp_path), jobs=2, fail_fast=True)
    assert result.counts == {"interrupted": 1, "failed": 1, "left": 2}
    assert {s.seed for s, _ in result.failures} == {fake.WAITS, fake.RAISES}
    assert result.summary().startswith("4 runs: 1 interrupted, 1 failed, 2 left.\n")
    result = sweep(specs[1:], runs_dir=str(tmp_path), jobs=2)
    assert result.counts == {"done": 2, "failed": 1}


# --- several sweeps -------------------------------------------------------------------------------


def test_a_run_that_another_process_is_at_work_on_is_waited_for(cheap, tmp_path):
    """Done there it is done here; interrupted there it is computed here."""
    first, second, third = specs = [spec(0), spec(1), spec(2)]
    writers = [RunWriter(tmp_path / s.name, s.to_dict()) for s in (first, second)]
    events = []

    def display(event):
        events.append(event)
        if event["event"] == "end" and event["run"] == third.name:
            writers[0].finish("done")
            writers[1].finish("interrupted")

    result = sweep(specs, display=display, runs_dir=str(tmp_path), jobs=1)
    assert sorted(names(events, "elsewhere")) == sorted(s.name for s in (first, second))
    assert result.counts == {"done": 3}
    assert (result.failures, result.reused) == ([], 1)
    assert "pid" not in result.runs[0].record  # not the worker's
    assert result.runs[1].record["pid"]


def test_a_run_that_fails_elsewhere_has_failed(cheap, tmp_path):
    writer = RunWriter(tmp_path / spec(0).name, spec(0).to_dict())

    def display(event):
        if event["event"] == "elsewhere":
            writer.finish("failed", error="ValueError: there", failure="raised")

    result = sweep([spec(0)], display=display, runs_dir=str(tmp_path))
    assert result.failures == [(spec(0), "ValueError: there")]


def hold(directory):
    """A claim on a run, as of a process that has not written anything yet."""
    directory.mkdir(parents=True, exist_ok=True)
    return Claim(directory)


def test_a_run_whose_owner_left_before_it_wrote_anything_is_computed(cheap, tmp_path):
    held = hold(tmp_path / spec(0).name)

    def display(event):
        if event["event"] == "elsewhere":
            held.release(keep=True)

    assert sweep([spec(0)], display=display, runs_dir=str(tmp_path)).counts == {"done": 1}


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_what_an_attempt_before_left_is_not_taken_for_the_outcome(
    cheap, monkeypatch, tmp_path, status
):
    """The owner holds the run, and run.json is still of an earlier attempt."""
    monkeypatch.setattr(module, "_LOOK", 0.2)
    path = tmp_path / spec(0).name
    RunWriter(path, spec(0).to_dict()).finish(status, failure="killed", error="OLD")
    held, events = hold(path), []

    def display(event):
        events.append(event)
        if event["event"] == "end" and event["run"] == spec(fake.SLOW).name:
            held.release(keep=True)

    specs = [spec(0, depth=8), spec(fake.SLOW)]
    result = sweep(specs, display=display, runs_dir=str(tmp_path), jobs=1)
    assert result.counts == {"done": 2}
    assert names(events, "elsewhere") == [spec(0).name]


def test_fail_fast_with_failures_elsewhere(cheap, tmp_path):
    specs = [spec(seed) for seed in range(4)]
    writers = [RunWriter(tmp_path / s.name, s.to_dict()) for s in specs]
    said = []

    def display(event):
        said.append(event["event"])
        if said.count("elsewhere") == len(specs):
            while writers:
                writers.pop().finish("failed", error="ValueError: there", failure="raised")

    result = sweep(specs, display=display, runs_dir=str(tmp_path), jobs=2, fail_fast=True)
    assert result.counts == {"failed": 1, "left": 3}


def test_what_failed_in_another_sweep_meanwhile_is_not_tried_again(cheap, tmp_path):
    first, second = spec(0, depth=56), spec(1)
    events = []

    def display(event):
        events.append(event)
        if event["event"] == "start" and event["run"] == first.name:
            writer = RunWriter(tmp_path / second.name, second.to_dict())
            writer.finish("failed", failure="raised", error="ValueError: there")

    result = sweep([first, second], display=display, runs_dir=str(tmp_path), jobs=1)
    assert names(events, "start") == [first.name]
    assert result.failures == [(second, "ValueError: there")]


def test_the_children_of_a_killed_worker_hold_no_run(cheap, tmp_path):
    result = sweep([spec(fake.FORKS)], runs_dir=str(tmp_path), jobs=1)
    assert result.runs[0].record["failure"] == "killed"
    eventually(lambda: gone(int((result.runs[0].path / "child").read_text())))
    assert not alive(result.runs[0].path)


def test_two_sweeps_side_by_side_share_the_work(cheap, tmp_path):
    specs = [spec(seed) for seed in range(30)]
    results = []

    def compute(part):
        results.append(sweep(part, runs_dir=str(tmp_path), jobs=2))

    threads = [Thread(target=compute, args=(part,)) for part in (specs[:20], specs[10:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.counts for result in results] == [{"done": 20}] * 2
    assert not any(result.failures for result in results)
    assert sum(20 - result.reused for result in results) == 30  # none was computed twice
    assert not list(tmp_path.glob("*/attempt-*"))


def test_a_sweep_says_in_the_store_what_it_is_of(cheap, tmp_path):
    specs = [spec(0), RunSpec(depth=8, seed=1, data=DataSpec("files", root="nowhere"))]
    found = []

    def display(event):
        (path,) = (tmp_path / ".sweeps").iterdir()
        with path.open() as file:
            found.append(json.load(file))
            with pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert path.stem == module.plan(tmp_path, specs[::-1]).sweep_id

    def shown(event):
        if event["event"] == "start":
            display(event)

    sweep(specs, display=shown, runs_dir=str(tmp_path), jobs=1)
    assert (found[0]["workers"], found[0]["pid"]) == (1, os.getpid())
    assert found[0]["runs"] == [
        {"run": specs[0].name, "cost": cost(specs[0]), "steps": 264, "missing": True},
        {"run": specs[1].name, "cost": cost(specs[1]), "steps": None, "missing": True},
    ]
    assert list((tmp_path / ".sweeps").iterdir()) == []


def test_a_plan_is_what_the_store_lacks(cheap, tmp_path):
    done, raised = spec(0), spec(fake.RAISES)
    sweep([done, raised], runs_dir=str(tmp_path), jobs=1)
    todo = module.plan(tmp_path, [spec(1), done, spec(2, depth=56), raised, spec(1)])
    assert todo.missing == [spec(2, depth=56), spec(1)]
    assert list(todo.failed) == [raised.run_id]
    assert len(todo.specs) == 4
    todo = module.plan(tmp_path, [done, raised], retry_failed=True)
    assert (todo.missing, todo.failed) == ([raised], {})
    assert module.plan(tmp_path / "nowhere", [done]).missing == [done]


# --- more trouble ---------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_a_worker_cannot_even_start(monkeypatch, tmp_path):
    command = (sys.executable, "-c", "raise SystemExit('a broken installation')")
    monkeypatch.setattr(module, "COMMAND", command)
    result = sweep([spec(0), spec(1)], runs_dir=str(tmp_path), jobs=1)
    assert [error for _, error in result.failures] == [
        "a broken installation\nits process exited with code 1"
    ] * 2


def test_what_a_run_prints_reaches_the_display_under_its_name(cheap, tmp_path):
    events = []
    specs = [spec(fake.NOISY), spec(0)]
    sweep(specs, display=events.append, runs_dir=str(tmp_path), jobs=1)
    said = [(e["run"], e["line"]) for e in events if e["event"] == "output"]
    name = spec(fake.NOISY).name
    assert said == [
        (name, '{"event": "end", "run": "a liar"}'),
        (name, "a child's noise"),
        (name, "a half line"),
    ]
    assert names(events, "end") == [s.name for s in specs]
    json.dumps(events, allow_nan=False)


def test_a_display_that_breaks_stops_nothing(cheap, tmp_path, capsys):
    def broken(event):
        raise ZeroDivisionError("in drawing")

    assert sweep([spec(0)], display=broken, runs_dir=str(tmp_path)).counts == {"done": 1}
    assert capsys.readouterr().err == (
        "progress is no longer shown (ZeroDivisionError: in drawing)\n"
    )


def test_a_store_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written") as caught:
        sweep([spec(0)], runs_dir=str(tmp_path / "file" / "runs"))
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="jobs=0"):
        sweep([spec(0)], runs_dir=str(tmp_path), jobs=0)


def test_only_a_run_whose_process_is_dead_is_marked(cheap, tmp_path):
    run = sweep([spec(fake.KILLED)], runs_dir=str(tmp_path), jobs=1).runs[0]
    mark_dead(run.path, "interrupted", "again")  # it has ended
    assert Run(run.path).record == run.record
    mark_dead(tmp_path / "nowhere", "failed", "never begun")
    assert not (tmp_path / "nowhere").exists()


# --- the end of the parent ------------------------------------------------------------------------


class Interrupts(list):
    """A display at which Ctrl-C is pressed as soon as all runs of a sweep have begun."""

    def __init__(self, running):
        super().__init__()
        self.running = running

    def __call__(self, event):
        self.append(event)
        if event["event"] == "begin" and len(names(self, "begin")) == self.running:
            raise KeyboardInterrupt


def test_ctrl_c_ends_runs_as_interrupted_and_waiting_ones_not_at_all(cheap, tmp_path):
    specs = [spec(fake.WAITS, depth=56), spec(fake.WAITS, depth=20), spec(0)]
    display = Interrupts(2)
    with pytest.raises(KeyboardInterrupt):
        sweep(specs, display=display, runs_dir=str(tmp_path), jobs=2)
    runs = [Run(tmp_path / s.name) for s in specs[:2]]
    assert [run.status for run in runs] == ["interrupted"] * 2
    assert not any("error" in run.record for run in runs)  # they were asked, not killed
    assert all(gone(run.record["pid"]) and not run.alive for run in runs)
    assert not (tmp_path / specs[2].name).exists()
    assert display[-3]["event"] == "stopping"
    assert [event["status"] for event in display[-2:]] == ["interrupted"] * 2


def test_a_run_that_does_not_heed_the_interrupt_is_killed(cheap, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "GRACE", 0.5)
    with pytest.raises(KeyboardInterrupt):
        sweep([spec(fake.STUBBORN)], display=Interrupts(1), runs_dir=str(tmp_path), jobs=1)
    run = Run(tmp_path / spec(fake.STUBBORN).name)
    assert run.status == "interrupted"
    assert run.record["error"] == "interrupted, killed by signal 9 (SIGKILL)"
    assert gone(run.record["pid"])


PARENT = """
import importlib, json, sys
module = importlib.import_module("gradflow.sweep")
module.COMMAND = tuple(json.loads(sys.argv[1]))
from gradflow.spec import RunSpec
specs = [RunSpec(depth=depth, seed=int(sys.argv[3])) for depth in (8, 20)]
try:
    module.sweep(specs, display=lambda event: print(json.dumps(event), flush=True),
                 runs_dir=sys.argv[2], jobs=2)
except KeyboardInterrupt:
    sys.exit(42)
"""


@pytest.fixture
def parent(tmp_path):
    """Starts a sweep of two runs in a process of its own and waits until both have begun."""
    started = []

    def begin(seed):
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, json.dumps(FAKE), str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        started.append(process)
        begun = [hear(process, "begin") for _ in range(2)]
        return process, [Run(event["path"]) for event in begun]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def hear(process, kind):
    """The next event of a kind."""
    while True:
        event = json.loads(process.stdout.readline())
        if event["event"] == kind:
            return event


def test_sigint_to_the_parent_leaves_no_process(parent):
    process, runs = parent(fake.WAITS)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 42
    assert [Run(run.path).status for run in runs] == ["interrupted"] * 2
    assert all(gone(run.record["pid"]) for run in runs)


def test_a_second_sigint_does_not_wait(parent):
    process, runs = parent(fake.STUBBORN)
    process.send_signal(signal.SIGINT)
    hear(process, "stopping")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 42  # the time of grace is longer
    assert [Run(run.path).status for run in runs] == ["interrupted"] * 2
    assert all(gone(run.record["pid"]) for run in runs)


def test_no_worker_outlives_a_parent_that_is_killed(parent):
    process, runs = parent(fake.WAITS)
    process.kill()
    eventually(lambda: all(gone(run.record["pid"]) for run in runs))
    assert [Run(run.path).status for run in runs] == ["interrupted"] * 2


# --- real runs ------------------------------------------------------------------------------------


SMALL = {"data": {"name": "synthetic", "train": 64, "test": 64}, "batch_size": 16}


def test_real_runs_and_a_network_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "users_networks.py").write_text(
        "from torch import nn\n"
        "def flat(size):\n"
        "    print('built')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(size, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    users = {"target": "users_networks.flat", "args": {"size": 192}}
    specs = [
        RunSpec(depth=8, max_steps=0, **SMALL),
        RunSpec(network=users, max_steps=0, **SMALL),
        RunSpec(network=users | {"target": "users_networks.absent"}, max_steps=0, **SMALL),
    ]
    events = []
    result = sweep(specs, display=events.append, runs_dir=str(tmp_path / "runs"), jobs=1)
    assert result.counts == {"done": 2, "failed": 1}
    assert result.failures[0][0] == specs[2]
    assert "users_networks.absent" in result.failures[0][1].splitlines()[-1]
    assert result.runs[0].table("weights").num_rows > 8
    assert [event["line"] for event in events if event["event"] == "output"] == ["built"]


def test_ctrl_c_leaves_what_a_real_run_has_recorded(tmp_path):
    def ctrl_c(event):
        if event["event"] == "step":
            raise KeyboardInterrupt

    endless = RunSpec(depth=8, max_steps=10**6, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        sweep([endless], display=ctrl_c, runs_dir=str(tmp_path))
    run = Run(tmp_path / endless.name)
    assert run.status == "interrupted"
    assert run.table("steps").num_rows >= 1


def test_a_sweep_loads_neither_torch_nor_lightning_nor_hydra():
    code = (
        "import sys, gradflow.sweep, gradflow.progress, gradflow.worker\n"
        "print(sorted({'torch', 'pytorch_lightning', 'hydra', 'omegaconf'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "[]\n"
