"""Sweeps on a real Slurm, with real jobs, preemption and accounting."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from slurm import Cluster, missing

from gradflow.spec import NetworkSpec, RunSpec
from gradflow.store import Run

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing())]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def start(cluster, tmp_path):
    """Starts `python ARGUMENTS` in an empty directory; what is still there at the end is killed."""
    started = []

    def begin(*arguments):
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**cluster.environment, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    cluster.call("scancel", "--user", str(os.geteuid()))
    eventually(lambda: not cluster.call("squeue", "--noheader"))


def spec(seed, **does):
    network = NetworkSpec(target="nets.build", args=does)
    return RunSpec(network=network, max_steps=20, batch_size=100, seed=seed)


def drive(specs, **settings):
    settings = {"launcher": "slurm", "runs_dir": "runs", "device": "cpu", **settings}
    asked = {"specs": [spec.to_dict() for spec in specs], "settings": settings}
    return HERE / "drive.py", json.dumps(asked)


def finish(process, code):
    """The events of a sweep, and its result, once it has ended as it should."""
    output, errors = process.communicate(timeout=180)
    assert process.returncode == code, errors
    *events, result = map(json.loads, output.splitlines())
    return events, result


def eventually(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def place(tmp_path, spec):
    """Job and node of a run, once it is being built there."""
    path = tmp_path / "runs" / spec.name

    def look():
        if not (path / "run.json").exists():
            return None
        run = Run(path)
        return run.record.get("environment", {}).get("slurm") if run.status == "running" else None

    return eventually(look)


def record(tmp_path, spec):
    return Run(tmp_path / "runs" / spec.name).record


def is_done(tmp_path, spec):
    begun = (tmp_path / "runs" / spec.name / "run.json").exists()
    return begun and record(tmp_path, spec)["status"] == "done"


def test_a_sweep_of_twelve_with_one_failing_one_killed_and_one_preempted(cluster, start, tmp_path):
    go = tmp_path / "go"
    failing, killed = spec(20, do="raise"), spec(21, do="die")
    preempted = spec(22, until=str(go))
    fine = [spec(seed) for seed in range(9)]
    sweep = start(*drive([*fine, failing, killed, preempted], runs_per_job=4))
    job = place(tmp_path, preempted)["job"]
    urgent = cluster.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive",
                          "--output=/dev/null", "--wrap=true")  # fmt: skip
    state = ("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={urgent}")
    eventually(lambda: cluster.call(*state) == "COMPLETED")
    go.touch()
    events, result = finish(sweep, 1)
    assert result["counts"] == {"done": 10, "failed": 2}
    assert set(result["failures"]) == {failing.name, killed.name}
    assert "ValueError: of the user's making" in result["failures"][failing.name]
    assert "killed by signal 9 (SIGKILL)" in result["failures"][killed.name]
    assert record(tmp_path, failing)["failure"] == "raised"
    begun = [event for event in events if event["event"] == "begin"]
    assert len([event for event in begun if event["run"] == preempted.name]) <= 1
    said = record(tmp_path, preempted)
    assert said["status"] == "done"
    assert said["attempt"] == 2  # interrupted in good order, and then computed
    assert said["environment"]["slurm"]["job"] == job
    for run in [*fine, preempted]:
        assert (tmp_path / record(tmp_path, run)["environment"]["slurm"]["log"]).exists()
    left = {path.suffix for path in (tmp_path / "runs/.slurm").iterdir()}
    assert left == {"", ".out"}  # the lock and the logs


def test_two_sweeps_that_overlap_compute_each_run_once(start, tmp_path):
    specs = [spec(seed, count=str(tmp_path / f"{seed}.count")) for seed in range(6)]
    one = start(*drive(specs[:4], runs_per_job=2))
    other = start(*drive(specs[2:], runs_per_job=2))
    assert finish(one, 0)[1]["counts"] == {"done": 4}
    assert finish(other, 0)[1]["counts"] == {"done": 4}
    assert [(tmp_path / f"{seed}.count").read_text() for seed in range(6)] == ["built\n"] * 6


def test_what_became_of_a_job_is_told_and_does_not_stop_the_rest(cluster, start, tmp_path):
    fine, hoard = spec(0), spec(1, do="hoard")
    cancelled, failed = spec(2, until="/never"), spec(3, until="/never")
    asked = {"memory": 1.2, "args": {"no-requeue": True}}
    sweep = start(*drive([fine, hoard, cancelled, failed], slurm=asked))
    place(tmp_path, hoard)
    cluster.call("scancel", place(tmp_path, cancelled)["job"])
    at = place(tmp_path, failed)
    eventually(lambda: is_done(tmp_path, fine))
    eventually(lambda: len(cluster.call("squeue", "--noheader").splitlines()) == 1)
    cluster.call("scontrol", "update", f"NodeName={at['node']}", "State=DOWN", "Reason=test")
    _, result = finish(sweep, 1)
    cluster.resume()
    assert result["counts"] == {"done": 1, "failed": 3}
    for run, said in {hoard: "exceeded its memory", cancelled: "cancelled by root",
                      failed: "its node failed"}.items():  # fmt: skip
        assert said in result["failures"][run.name]
        assert "; log: runs/.slurm/" in result["failures"][run.name]
        assert record(tmp_path, run)["status"] == "failed"
        assert said in record(tmp_path, run)["error"]


def test_at_the_end_of_its_time_a_job_is_requeued_and_goes_on(cluster, start, tmp_path):
    go = tmp_path / "go"
    late = spec(0, until=str(go))
    sweep = start(*drive([late, spec(1)], runs_per_job=2))
    job = place(tmp_path, late)["job"]
    cluster.call("scancel", "--signal=USR2", job)
    eventually(lambda: record(tmp_path, late)["status"] == "interrupted")
    go.touch()
    events, result = finish(sweep, 0)
    assert result["counts"] == {"done": 2}
    assert {"event": "output", "run": None, "line": f"Slurm job {job}: requeued"} in events
    assert record(tmp_path, late)["attempt"] == 2


def test_ctrl_c_ends_the_jobs_and_the_same_command_goes_on(cluster, start, tmp_path):
    go = tmp_path / "go"
    command = ["-m", "gradflow", "-m", "network.target=nets.build",
               f"network.args={{until:'{go}'}}", "seed=0,1,2", "max_steps=20", "batch_size=100",
               "launcher=slurm", "jobs=1", "device=cpu"]  # fmt: skip
    at_work = RunSpec(
        network=NetworkSpec(target="nets.build", args={"until": str(go)}),
        max_steps=20, batch_size=100,
    )  # fmt: skip
    sweep = start(*command)
    place(tmp_path, at_work)
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "the same command goes on from the last checkpoint" in errors
    assert not cluster.call("squeue", "--noheader")
    assert record(tmp_path, at_work)["status"] == "interrupted"
    go.touch()
    again = start(*command)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert output.startswith("3 runs: 3 done")


def test_jobs_go_on_without_the_parent_and_are_not_submitted_again(cluster, start, tmp_path):
    go, count = tmp_path / "go", tmp_path / "count"
    waits = spec(0, until=str(go), count=str(count))
    first = start(*drive([waits]))
    job = place(tmp_path, waits)["job"]
    first.kill()
    first.wait()
    second = start(*drive([waits]))
    assert json.loads(second.stdout.readline())["event"] == "sweep"
    assert json.loads(second.stdout.readline()) == {"event": "start", "run": waits.name}
    assert cluster.call("squeue", "--noheader", "--format=%i") == job
    go.touch()
    assert finish(second, 0)[1]["counts"] == {"done": 1}
    assert count.read_text() == "built\n"
    assert not list((tmp_path / "runs/.slurm").glob("*.json*"))


def test_a_run_on_two_nodes_equals_one_in_one_process(start, tmp_path):
    run = RunSpec(depth=8, width=4, norm="layer", precision="fp64", max_steps=5, batch_size=64)
    two = start(*drive([run], nodes=2))
    assert finish(two, 0)[1]["counts"] == {"done": 1}
    one = start(*drive([run], launcher="local", runs_dir="alone", jobs=1))
    assert finish(one, 0)[1]["counts"] == {"done": 1}
    shared, alone = Run(tmp_path / "runs" / run.name), Run(tmp_path / "alone" / run.name)
    assert shared.record["environment"]["nodes"] == 2
    assert shared.record["certificate"]["batches"] == alone.record["certificate"]["batches"]
    for name in ("weights", "outputs", "blocks", "steps"):
        pd.testing.assert_frame_equal(shared.frame(name), alone.frame(name), rtol=1e-9, atol=1e-12)


def test_a_run_on_two_nodes_is_requeued_too(cluster, start, tmp_path):
    go = tmp_path / "go"
    shared = spec(0, until=str(go))
    sweep = start(*drive([shared], nodes=2))
    job = place(tmp_path, shared)["job"]
    cluster.call("scancel", "--signal=USR2", job)
    eventually(lambda: record(tmp_path, shared)["status"] == "interrupted")
    go.touch()
    assert finish(sweep, 0)[1]["counts"] == {"done": 1}
    assert record(tmp_path, shared)["attempt"] == 2


def test_a_job_whose_node_fails_is_begun_again(cluster, start, tmp_path):
    go = tmp_path / "go"
    begun = spec(0, until=str(go))
    sweep = start(*drive([begun]))
    node = place(tmp_path, begun)["node"]
    cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    go.touch()
    _, result = finish(sweep, 0)
    cluster.resume()
    assert result["counts"] == {"done": 1}
    assert record(tmp_path, begun)["attempt"] == 2


def test_the_first_failure_ends_the_sweep_if_told_to(cluster, start, tmp_path):
    failing, waiting = spec(0, do="raise"), [spec(seed, until="/never") for seed in (1, 2, 3)]
    sweep = start(*drive([failing, *waiting], fail_fast=True, jobs=2))
    _, result = finish(sweep, 1)
    assert result["counts"]["failed"] == 1
    assert "ValueError: of the user's making" in result["failures"][failing.name]
    assert not cluster.call("squeue", "--noheader")
    statuses = [path.parent.name for path in (tmp_path / "runs").glob("*/run.json")]
    assert len(statuses) < 4  # not all were begun


def test_what_slurm_refuses_is_one_line(start, tmp_path):
    sweep = start("-m", "gradflow", "-m", "depth=8", "max_steps=0", "launcher=slurm",
                  "slurm.partition=nowhere")  # fmt: skip
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 1
    *_, last = errors.splitlines()
    assert last.startswith("gradflow: launcher=slurm: sbatch: error: ")
    assert "nvalid partition" in last
    assert not list((tmp_path / "runs/.slurm").glob("*.pkl"))
    assert "Traceback" not in errors
