"""Trouble with disks, files, clocks and processes, over real runs: each is one clear line, and what
was recorded stays."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradflow
from gradflow import RunSpec, load_runs
from gradflow.errors import Busy, SpecError
from gradflow.store import Run

RUN = {"depth": 8, "width": 4, "batch_size": 100}
SPEC = RunSpec(**RUN, epochs=3)
KEYS = [f"{name}={value}" for name, value in (RUN | {"epochs": 3, "threads": 1}).items()]
COMMAND = [sys.executable, "-m", "gradflow", *KEYS]
ALONE = shutil.which("unshare") is not None and (
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
)
"""Whether file systems can be mounted for a test alone."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run as it is without trouble."""
    return gradflow.run(SPEC, runs_dir=str(tmp_path_factory.mktemp("whole")), threads=1)


def alike(run, other):
    """Equal parameters, and tables to the last bit."""
    assert run.record["final_parameters"] == other.record["final_parameters"]
    for name in ("weights", "outputs", "blocks", "steps", "evaluations", "modules"):
        assert run.table(name).equals(other.table(name))


def begin(store, until="attempt-1/checkpoint.pt"):
    """Start the run in a process and wait until it has written that file."""
    code = (
        "import sys; from gradflow.training import checkpoint; checkpoint.SECONDS = (0.0, 0.0)\n"
        "import gradflow.cli; sys.exit(gradflow.cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *KEYS, f"runs_dir={store}"], stderr=subprocess.DEVNULL
    )
    while not (Path(store) / SPEC.name / until).exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def kill(process):
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def _killed(tmp_path_factory):
    store = tmp_path_factory.mktemp("killed")
    kill(begin(store))
    return store / SPEC.name


@pytest.fixture
def killed(_killed, tmp_path):
    """The run, killed in the midst, in a store of the test's own."""
    return Path(shutil.copytree(_killed, tmp_path / SPEC.name))


def again(path):
    return gradflow.run(SPEC, runs_dir=str(path.parent), threads=1)


@pytest.mark.skipif(not ALONE, reason="this system lets nobody mount a file system of his own")
@pytest.mark.slow
def test_a_full_disk(tmp_path, whole):
    """The disk is full in the midst of training; when there is room, the same command goes on."""
    script = """
    mount -t tmpfs -o size="$2" tmpfs "$1"; shift 2
    "$@" 2> full.txt; echo $? > full.code
    cp -r store full
    mount -o remount,size=50m store
    "$@" 2> room.txt; echo $? > room.code
    cp -r store room
    """
    keys = [*(key for key in COMMAND if "epochs" not in key), "epochs=60", "runs_dir=store"]
    (tmp_path / "store").mkdir()
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", "store", "300k", *keys],
        cwd=tmp_path,
        check=True,
        timeout=240,
    )
    spec = SPEC.but(epochs=60)
    line = (tmp_path / "full.txt").read_text().splitlines()[-1]
    assert line == f"gradflow: store/{spec.name}: cannot be written (No space left on device)"
    assert (tmp_path / "full.code").read_text() == "1\n"
    full = Run(tmp_path / "full" / spec.name)
    steps = full.table("steps")["step"].to_pylist()
    assert steps == list(range(len(steps)))
    assert len(steps) >= 14  # an epoch: a checkpoint was written
    assert (tmp_path / "room.code").read_text() == "0\n", (tmp_path / "room.txt").read_text()
    done = Run(tmp_path / "room" / spec.name)
    assert done.record["resumed"][0]["updates"] >= 14
    before, after = full.table("weights"), done.table("weights")
    assert after.slice(0, len(before)).to_pylist() == before.to_pylist()
    assert done.table("steps")["step"].to_pylist() == list(range(840))


@pytest.mark.skipif(not ALONE, reason="this system lets nobody mount a file system of his own")
def test_a_store_that_is_read_only(tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "store" / SPEC.name)
    script = """
    mount -t tmpfs tmpfs empty; mount -o remount,ro empty
    mount --bind store store; mount -o remount,bind,ro store
    for command in "$@"; do
        $command > out.txt 2> err.txt || echo failed
        tail -n 1 err.txt; tail -n 1 out.txt
    done
    """
    (tmp_path / "empty").mkdir()
    commands = [
        " ".join([*COMMAND, "runs_dir=empty"]),
        " ".join([*COMMAND[:3], "-m", *COMMAND[3:], "seed=0,1", "runs_dir=empty/runs"]),
        f"{sys.executable} -m gradflow.report store --text",
    ]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *commands],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    first, line, second, other, *report = done.stdout.splitlines()
    assert (first, second) == ("failed", "failed")
    assert line == "gradflow: runs_dir=empty: cannot be written (Read-only file system)"
    assert other == "gradflow: runs_dir=empty/runs: cannot be written (Read-only file system)"
    assert "failed" not in report
    assert "1.000" in report[-1] or "done" in report[-1]


@pytest.mark.parametrize("size", [0, 300, -8])
def test_a_truncated_part(killed, whole, size, capsys):
    """It is named, the other tables and runs are read, and the run is made anew as it was."""
    shutil.copytree(whole.path, killed.parent / "other")
    part = min(killed.glob("attempt-1/weights-*.parquet"))
    part.write_bytes(part.read_bytes()[:size])
    runs = load_runs(killed.parent)
    assert len(runs.weights()) == whole.table("weights").num_rows
    assert runs.steps()["run_id"].nunique() == 2
    assert [str(part) in problem for problem in runs.problems] == [True]
    alike(again(killed), whole)
    assert f"{part.name}: damaged; the run begins again\n" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", '{\n "origin": "gradflow",\n "sta'])
def test_a_half_written_record(killed, whole, text):
    """The run is named and passed over by readers; the same command goes on from its checkpoint."""
    (killed / "run.json").write_text(text)
    runs = load_runs(killed.parent)
    assert len(runs) == 0
    assert [p.startswith(f"{killed}/run.json: unreadable") for p in runs.problems] == [True]
    done = again(killed)
    assert done.record["resumed"][0]["updates"] >= 1
    alike(done, whole)


def test_a_stale_lock_of_a_dead_process(killed, whole):
    """The lock died with its process; the claim that it left does not keep anybody waiting."""
    claim = killed / "attempt-1" / "claim.json"
    owner = json.loads(claim.read_text())
    owner["pid"] = os.getpid()  # another process has the dead one's number by now
    claim.write_text(json.dumps(owner))
    began = time.monotonic()
    alike(again(killed), whole)
    assert time.monotonic() - began < 60  # a lease is 120 s


def test_a_run_that_another_process_computes(tmp_path):
    process = begin(tmp_path, "attempt-1/claim.json")
    try:
        process.send_signal(signal.SIGSTOP)  # it lives, and holds its lock
        with pytest.raises(Busy) as caught:
            again(tmp_path / SPEC.name)
    finally:
        kill(process)
    path = tmp_path / SPEC.name
    assert str(caught.value) == f"{path}: another process is computing this run"


def test_a_clock_that_goes_backwards(tmp_path, whole, monkeypatch):
    """Each look at the clock is an hour before the last: nothing measured depends on it."""
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    done = again(tmp_path / "runs" / SPEC.name)
    assert done.record["ended"] < done.record["started"]
    assert 0 < done.record["seconds"] < 100
    alike(done, whole)
    assert gradflow.sweep([SPEC], runs_dir=str(tmp_path / "runs")).reused == 1


def test_a_run_of_a_newer_version(tmp_path, whole):
    """Its id says that what is unknown here is as if it were not there."""
    shutil.copytree(whole.path, tmp_path / SPEC.name)
    path = tmp_path / SPEC.name / "spec.json"
    newer = json.loads(path.read_text()) | {"sharpness": None}
    path.write_text(json.dumps(newer))
    events = []
    gradflow.run(SPEC, runs_dir=str(tmp_path), emit=events.append)
    assert [event["reused"] for event in events] == [True]
    with pytest.raises(SpecError, match=r"^sharpness: no such key"):
        RunSpec.from_dict(newer)
